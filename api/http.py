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
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from api.http_app import build_app
from api.http_connections import Connections, Patience, Speaker
from api.http_guards import BearerToken, Counted, LocalUsers, SameOrigin
from api.http_traffic import Figures, metrics_app
from api.listen import METRICS_LISTEN, CannotListen, check_listen, check_place, interface_of, parse_listen, tcp_socket
from api.metrics import ShapedReader, no_limits
from api.rate import Buckets, RateLimit
from api.tls import Exposure, reloading
from api.watching import SOCKET_NAME as FLOWS_SOCKET
from gateway.service import Service

SOCKET_NAME = "api.sock"
MAX_CONNECTIONS = 512
GRACE_SECONDS = 2


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
    patience: Patience = Patience(),  # noqa: B008 -- frozen
) -> None:
    """Answer on ``run_dir/api.sock`` and, if given, on ``listen`` (addr:port) until ``stop`` is set.

    On ``metrics_listen`` nothing is answered but ``/metrics`` and ``/healthz``, to anybody. ``shaped`` reads what the
    kernel counts of bandwidth limits.

    Running requests get some seconds to end. Raises CannotListen before anything listens when ``listen`` has neither a
    usable ``token_file`` nor callers' certificates to ask for, or where it must not listen or cannot.
    """
    figures = Figures.of(service, run_dir / FLOWS_SOCKET, shaped)
    async with contextlib.AsyncExitStack() as stack:
        faces: list[_Face] = []
        if listen:
            tls = exposure.tls
            tokens = check_listen(listen, token_file, mutual_tls=exposure.mutual)
            context = reloading(tls) if tls else None
            app: ASGIApp = SameOrigin(build_app(service, figures=figures))
            app = BearerToken(app, tokens) if tokens else app
            faces.append(_over_tcp(stack, service, exposure, app, listen=listen, tls=context))
        if metrics_listen:
            bare = metrics_app(figures)
            faces.append(_over_tcp(stack, service, exposure, bare, listen=metrics_listen, name=METRICS_LISTEN))
        unix = stack.enter_context(unix_listener(run_dir / SOCKET_NAME))
        mine = frozenset({0, os.geteuid()})
        faces.append(_Face(LocalUsers(build_app(service, figures=figures), mine), unix))
        running = [await stack.enter_async_context(_serving(face, patience)) for face in faces]
        stopping = asyncio.create_task(_wait(stop))
        stack.callback(stopping.cancel)
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        service.journal.hang_up()
        for server in running:
            if server.done():
                server.result()


@dataclass(frozen=True)
class _Face:
    """An application, where it listens, and whether it may answer there at the moment."""

    app: ASGIApp
    listener: socket.socket
    tls: ssl.SSLContext | None = None
    admits: Callable[[], bool] = lambda: True


def _over_tcp(
    stack: contextlib.AsyncExitStack,
    service: Service,
    exposure: Exposure,
    app: ASGIApp,
    *,
    listen: str,
    name: str = "NATGW_LISTEN",
    tls: ssl.SSLContext | None = None,
) -> _Face:
    """The application behind the limit of calls, where it was told to listen and may; raises CannotListen."""
    if not exposure.anywhere:
        check_place(listen, _sides(service) or (), name)
    interface = interface_of(parse_listen(listen, name)[0])

    def admits() -> bool:
        # Which interfaces are the two sides may be said later than this: by an ``init`` that names them.
        return exposure.anywhere or interface not in (_sides(service) or _expected_sides(service))

    tcp = stack.enter_context(contextlib.closing(tcp_socket(listen, name)))
    return _Face(RateLimit(app, Buckets(*exposure.rate), time.monotonic), tcp, tls, admits)


def _sides(service: Service) -> tuple[str, str] | None:
    """The interfaces that tenants and outsiders reach; None before ``init``, which may name others."""
    spec = service.spec
    return (spec.interfaces.vpc, spec.interfaces.external) if spec is not None and spec.initialized else None


def _expected_sides(service: Service) -> tuple[str, str]:
    """Those that an ``init`` would take that names none."""
    expected = service.status().interfaces
    return expected.vpc, expected.external


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


class _Server(uvicorn.Server):
    """A uvicorn with connections of its own: it leaves signals to the daemon, and sleeps while nobody calls.

    Its own loop wakes up ten times a second, for the Date header and to see whether it shall end: 0.2 % of a processor.
    """

    _ending: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop

    def __init__(self, config: uvicorn.Config, face: _Face, patience: Patience) -> None:
        super().__init__(config)
        self._face, self._patience = face, patience

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        face = self._face
        connections = Connections(face.listener, self._speaker, face.tls, MAX_CONNECTIONS, self._patience, face.admits)
        connections.start()
        self.servers = [connections]  # type: ignore[list-item]  # closes like one
        self.started = True

    def _speaker(self, ended: Callable[[Speaker], None]) -> Speaker:
        return Speaker(self.config, self.server_state, ended)

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
async def _serving(face: _Face, patience: Patience) -> AsyncIterator[asyncio.Task[None]]:
    """A server at work in its thread; it ends with the block."""
    config = uvicorn.Config(
        Counted(face.app),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are about what strangers send: they could fill the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Connections are bounded elsewhere; this bounds the requests that go on although their callers are gone.
        limit_concurrency=2 * MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config, face, patience)
    running = asyncio.create_task(asyncio.to_thread(server.run, [face.listener]))
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
