"""The HTTP face over a service with the fake kernel, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from api.http import serve_http
from api.http_app import build_app
from api.tls import Exposure
from tests.gateway_kit import Gateway, gateway

PATIENCE = 60.0
"""Seconds that an answer may take: the machine may be busy, and no test here is about how long it takes."""


def ask(method: str, url: str, **more: Any) -> httpx.Response:
    """One request to a listener, on a connection of its own."""
    return httpx.request(method, url, **{"timeout": PATIENCE, **more})


def call(app: ASGIApp, method: str, path: str, **more: Any) -> httpx.Response:
    """One request to the application itself."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


@dataclass
class Face:
    """A gateway and its HTTP face."""

    app: ASGIApp
    gateway: Gateway

    def __call__(self, method: str, path: str, json: Any = None, **more: Any) -> httpx.Response:
        return call(self.app, method, path, json=json, **more)


def face(directory: Path, **more: Any) -> Iterator[Face]:
    """The body of a fixture: a face over a gateway of its own."""
    made = gateway(directory, **more)
    yield Face(build_app(made.service), made)
    made.service.close()


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The response is this problem; returns the document."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:natgw:problem:{kind}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document


@contextlib.contextmanager
def serving(
    made: Gateway,
    run_dir: Path,
    listen: str | None = None,
    token_file: Path | None = None,
    exposure: Exposure = Exposure(),  # noqa: B008 -- frozen
    **more: Any,
) -> Iterator[None]:
    """``serve_http`` in a loop of its own, answering; stopped at the end, which it must obey."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            face = serve_http(made.service, run_dir, listen, token_file, stop, exposure=exposure, **more)
            loop.run_until_complete(face)
        except BaseException as error:  # noqa: BLE001 -- raised again where the test ends
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until_answering(run_dir / "api.sock", thread)
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=PATIENCE)
        assert not thread.is_alive()
        loop.close()
    if failed:
        raise failed[0]


def wait_until_answering(path: Path, thread: threading.Thread) -> None:
    while thread.is_alive():
        with contextlib.suppress(OSError, httpx.TransportError), unix(path) as client:
            if client.get("/healthz").status_code == 200:
                return
        thread.join(timeout=0.02)


def unix(path: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://gateway", timeout=PATIENCE)
