"""The HTTP face over a service with the fake kernel, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from api.http import build_app
from tests.gateway_kit import Gateway, gateway


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
