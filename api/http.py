"""Runs the HTTP face: uvicorn on a Unix socket of root's and, only if asked, on TCP behind a token.

Each listener has a thread and an event loop of its own: reading a body of some megabytes, or writing a plan as
large, must not delay the verbs that the daemon's main loop answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.http_app import build_app
from api.http_guards import PEER, BearerToken, Counted, LocalUsers
from api.http_traffic import Figures, metrics_app
from api.listen import METRICS_LISTEN, CannotListen, check_listen, check_place, tcp_socket
from api.metrics import ShapedReader, no_limits
from api.rate import Buckets, RateLimit
from api.tls import Exposure, reloading
from api.watching import SOCKET_NAME as FLOWS_SOCKET
from gateway.service import Service

SOCKET_NAME = "api.sock"
MAX_CONNECTIONS = 512
GRACE_SECONDS = 2
_UCRED = struct.Struct("3i")


async def serve_http(
    service: Service,
    run_dir: Path,
    listen: str | None,
    token_file: Path | None,
    stop: asyncio.Event,
    *,
    exposure: Exposure = Exposure(),  # noqa: B008 -- frozen
    metrics_listen: str | None = None,
    shaped: ShapedReader = no_limits,
) -> None:
    """Answer on ``run_dir/api.sock`` and, if given, on ``listen`` (addr:port) until ``stop`` is set.

    On ``metrics_listen`` nothing is answered but ``/metrics`` and ``/healthz``, to anybody. ``shaped`` reads what the
    kernel counts of bandwidth limits.

    Running requests get some seconds to end. Raises CannotListen before anything listens when ``listen`` has neither a
    usable ``token_file`` nor callers' certificates to ask for, or where it must not listen or cannot.
    """
    figures = Figures.of(service, run_dir / FLOWS_SOCKET, shaped)
    async with contextlib.AsyncExitStack() as stack:
        listeners: list[_Listener] = []
        if listen:
            listeners.append(
                _over_tcp(stack, service, figures, listen=listen, token_file=token_file, exposure=exposure)
            )
        if metrics_listen:
            bare = stack.enter_context(contextlib.closing(tcp_socket(metrics_listen, METRICS_LISTEN)))
            limited = RateLimit(metrics_app(figures), Buckets(*exposure.rate), time.monotonic)
            listeners.append((limited, (bare, None)))
        unix = stack.enter_context(unix_listener(run_dir / SOCKET_NAME))
        mine = frozenset({0, os.geteuid()})
        listeners.append((LocalUsers(build_app(service, figures=figures), mine), (unix, None)))
        running = [await stack.enter_async_context(_serving(Counted(app), *where)) for app, where in listeners]
        stopping = asyncio.create_task(_wait(stop))
        stack.callback(stopping.cancel)
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        service.journal.hang_up()
        for server in running:
            if server.done():
                server.result()


_Listener = tuple[ASGIApp, tuple[socket.socket, ssl.SSLContext | None]]


def _over_tcp(
    stack: contextlib.AsyncExitStack,
    service: Service,
    figures: Figures,
    *,
    listen: str,
    token_file: Path | None,
    exposure: Exposure,
) -> _Listener:
    """The application behind its guards, the outermost first: rate, token, size; and where it listens."""
    tls = exposure.tls
    tokens = check_listen(listen, token_file, mutual_tls=exposure.mutual)
    context = reloading(tls) if tls else None
    if not exposure.anywhere:
        sides = service.status().interfaces
        check_place(listen, (sides.vpc, sides.external))
    app: ASGIApp = build_app(service, figures=figures)
    if tokens:
        app = BearerToken(app, tokens)
    tcp = stack.enter_context(contextlib.closing(tcp_socket(listen)))
    return RateLimit(app, Buckets(*exposure.rate), time.monotonic), (tcp, context)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


class _Protocol(H11Protocol):
    """HTTP that tells the application which process calls by a Unix socket, where an address would stand.

    It writes the Date header when it is needed.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            self.client = (f"{PEER}{pid},{uid}", 0)

    def data_received(self, data: bytes) -> None:
        self.server_state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        super().data_received(data)


class _Config(uvicorn.Config):
    """A configuration with a TLS context made elsewhere."""

    context: ssl.SSLContext | None = None

    def load(self) -> None:
        super().load()
        self.ssl = self.context


class _Server(uvicorn.Server):
    """A uvicorn that leaves the process's signals to the daemon, and sleeps while nobody calls.

    Its own loop wakes up ten times a second, for the Date header and to see whether it shall end: 0.2 % of a processor.
    """

    _ending: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop

    async def main_loop(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        if not self.should_exit:
            await self._ending.wait()

    def end(self) -> None:
        """Ask it to end; any thread."""
        self.should_exit = True
        if self._ending is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._ending.set)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _serving(app: ASGIApp, sock: socket.socket, tls: ssl.SSLContext | None) -> AsyncIterator[asyncio.Task[None]]:
    """A server at work in its thread; it ends with the block."""
    config = _Config(
        app,
        http=_Protocol,
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
    config.context = tls
    server = _Server(config)
    running = asyncio.create_task(asyncio.to_thread(server.run, [sock]))
    try:
        yield running
    finally:
        server.end()
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
