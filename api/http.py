"""The HTTP face: FastAPI on uvicorn, on a Unix socket of root's and, only if asked, on TCP behind a token.

Each listener has a thread and an event loop of its own: reading a body of some megabytes, or writing a plan as
large, must not delay the verbs that the daemon's main loop answers. The routes are in ``api.http_gateway``
(the whole state, views, probes) and ``api.http_items`` (one object); errors are problem documents (RFC 9457).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from api.http_gateway import Committer, add_gateway, add_probes, add_views
from api.http_guards import BearerToken, SizeLimit
from api.http_items import add_items
from api.http_models import PROBLEM_JSON
from api.http_problems import install
from api.listen import CannotListen, check_listen, tcp_socket
from gateway.service import Service

SOCKET_NAME = "api.sock"
MAX_BODY_BYTES = 32 * 2**20  # some 250,000 objects
MAX_CONNECTIONS = 512
GRACE_SECONDS = 2

ABOUT = """The desired state of one NAT gateway.

Every write is one transaction: a whole state (PUT /v1/gateway), a list of commands (PATCH /v1/gateway) or one
object. PUT on an object means "make it so": it creates, replaces or changes nothing. Exporting the state
(GET /v1/gateway) and putting it back changes nothing. Errors are problem documents (RFC 9457)."""


def build_app(service: Service, *, max_body: int = MAX_BODY_BYTES) -> FastAPI:
    """The application over a started service. It asks nobody who they are: see ``serve_http``."""
    app = FastAPI(
        title="vpc-nat-gateway",
        version=service.status().version or "0",
        description=ABOUT,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    install(app)
    app.add_middleware(SizeLimit, limit=max_body)
    commit = Committer(service)
    add_gateway(app, service, commit)
    add_items(app, service, commit)
    add_views(app, service)
    add_probes(app, service)
    _say_problem_json(app)
    return app


def _say_problem_json(app: FastAPI) -> None:
    """FastAPI declares every model as application/json; problems have a media type of their own."""
    declare = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            operations = (operation for path in declare()["paths"].values() for operation in path.values())
            for response in (r for operation in operations for r in operation["responses"].values()):
                content = response.get("content", {})
                for media, said in list(content.items()):
                    if said.get("schema", {}).get("$ref", "").endswith("/Problem"):
                        del content[media]
                        content[PROBLEM_JSON] = said
        return declare()

    app.openapi = openapi  # type: ignore[method-assign]


async def serve_http(
    service: Service, run_dir: Path, listen: str | None, token_file: Path | None, stop: asyncio.Event
) -> None:
    """Answer on ``run_dir/api.sock`` and, if given, on ``listen`` (addr:port) until ``stop`` is set.

    Running requests get some seconds to end. Raises CannotListen before anything listens when ``listen`` has no
    usable ``token_file`` or an address cannot be bound.
    """
    tokens = check_listen(listen, token_file) if listen else None
    async with contextlib.AsyncExitStack() as stack:
        listeners: list[tuple[ASGIApp, socket.socket]] = []
        if listen and tokens:
            tcp = stack.enter_context(contextlib.closing(tcp_socket(listen)))
            listeners.append((BearerToken(build_app(service), tokens), tcp))
        unix = stack.enter_context(unix_listener(run_dir / SOCKET_NAME))
        listeners.append((build_app(service), unix))
        running = [await stack.enter_async_context(_serving(app, sock)) for app, sock in listeners]
        stopping = asyncio.create_task(_wait(stop))
        stack.callback(stopping.cancel)
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        for server in running:
            if server.done():
                server.result()


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


class _Server(uvicorn.Server):
    """A uvicorn that leaves the process's signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _serving(app: ASGIApp, sock: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """A server at work in its thread; it ends with the block."""
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    running = asyncio.create_task(asyncio.to_thread(server.run, [sock]))
    try:
        yield running
    finally:
        server.should_exit = True
        await asyncio.wait([running])


@contextlib.contextmanager
def unix_listener(path: Path) -> Iterator[socket.socket]:
    """A bound Unix socket that only its owner can use, at ``path`` from the moment it answers; gone at the end.

    What an earlier daemon left at ``path`` is replaced. Raises CannotListen.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fresh.unlink(missing_ok=True)
        sock.bind(str(fresh))
        fresh.chmod(0o600)
        sock.listen(MAX_CONNECTIONS)
        fresh.rename(path)
        mine = path.stat().st_ino
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {path}: {error.strerror or error}") from error
    try:
        yield sock
    finally:
        sock.close()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == mine:
                path.unlink()
