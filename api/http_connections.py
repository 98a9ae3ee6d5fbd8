"""The connections of one HTTP listener: how many there may be, and how long a caller may let one wait.

At any moment a connection waits for us (its request is complete, the answer is being made) or for its caller: for the
TLS handshake and a head, for a body, or that an answer is read. Waiting for us has no end here, so a stream of events
lasts for days. Each wait for a caller has one, after which the connection is cut.

Where as many are open as there may be, connections that wait for their callers give way to new ones: first those of
the caller who holds most, of them the ones that have waited longest. An honest request is complete within milliseconds,
so whoever fills the listener with stalling connections displaces his own. While none of them waits for its caller, new
callers wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Literal

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from api.http_guards import PEER
from api.rate import network
from gateway import meters
from gateway.small.server import credentials

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 64
DISPLACED_SHARE = 16
"""The part (one in so many) that gives way at once: a crowd then costs one look at all for so many new ones."""
LOOK_SECONDS = 0.5
LATE_SECONDS = 2.0
"""Looks that are further apart mean that this loop was busy, which no caller answers for."""

Wait = Literal["head", "body", "answer"]


@dataclass(frozen=True)
class Patience:
    """Seconds that a connection waits for its caller.

    ``head``: for a complete head, counted from the connection (with TLS, its handshake is in it) or from the end of the
    answer before. ``body``: for the rest of the request. ``answer``: until the caller has taken what is being
    sent; of a stream that is some 64 KiB at a time, of any other answer all of it.
    """

    head: float = 10.0
    body: float = 30.0
    answer: float = 30.0


class Speaker(H11Protocol):
    """HTTP on one connection: it knows for whom it waits, and which process calls by a Unix socket.

    It writes the Date header when it is needed.
    """

    def __init__(self, config: Config, state: ServerState, ended: Callable[[Speaker], None]) -> None:
        super().__init__(config, state, {})
        self._ended = ended
        self._pauses = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who calls, where an address would stand."""
        super().connection_made(transport)
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            pid, uid = credentials(sock)
            self.client = (f"{PEER}{pid},{uid}", 0)

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        self.server_state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        super().connection_lost(exc)
        self._ended(self)

    def pause_writing(self) -> None:
        """The caller has yet to take what was sent."""
        self._pauses += 1
        super().pause_writing()

    def waits(self) -> tuple[Wait, object] | None:
        """What the caller is to do, and something by which one such wait differs from the next; None: nothing."""
        if self.transport is None:  # not yet
            return "head", None
        if self.flow.write_paused or self.transport.is_closing():
            return "answer", self._pauses
        if self.cycle is None or self.cycle.response_complete:
            return "head", self.cycle
        return ("body", self.cycle) if self.cycle.more_body else None


@dataclass(eq=False)
class _Connection:
    peer: str
    since: float
    wait: tuple[Wait, object] | None = ("head", None)
    opening: asyncio.Task[Any] | None = None


@dataclass(eq=False)
class Connections:
    """Accepts the connections of ``listener`` and has a speaker made for each, at most ``most`` at a time.

    While ``admits`` says no, each is closed at once. For one event loop, which it wakes up twice a second while there
    are any, and not at all while there are none. Stands where uvicorn has an ``asyncio.Server``.
    """

    listener: socket.socket
    speaker: Callable[[Callable[[Speaker], None]], Speaker]
    tls: ssl.SSLContext | None
    most: int
    patience: Patience
    admits: Callable[[], bool] = lambda: True
    _open: dict[Speaker, _Connection] = field(default_factory=dict)
    _accepting: bool = False
    _closed: bool = False
    _looked: float = 0.0
    _looking: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._loop = asyncio.get_running_loop()
        self.listener.setblocking(False)
        self.listener.listen(self.most)
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        self._pause()
        self._closed = True

    def _watch(self) -> None:
        """See to it that there will be a look."""
        if self._looking is None:
            self._looked = self._loop.time()
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    async def wait_closed(self) -> None:
        """End the handshakes that are under way."""
        for connection in self._open.values():
            if connection.opening is not None:
                connection.opening.cancel()

    def _look(self) -> None:
        """Cut connections whose callers were waited for long enough, and accept again if that was not possible."""
        self._looking = None
        now = self._loop.time()
        late = max(0.0, now - self._looked - LATE_SECONDS)
        self._looked = now
        for speaker, connection in list(self._open.items()):
            connection.since += late
            wait = self._wait(speaker, connection, now)
            if wait and now - connection.since >= getattr(self.patience, wait[0]):
                self._cut(speaker, "slow")
        if len(self._open) < self.most or any(connection.wait for connection in self._open.values()):
            self._resume()
        if self._open or not (self._accepting or self._closed):
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def _wait(self, speaker: Speaker, connection: _Connection, now: float) -> tuple[Wait, object] | None:
        wait = speaker.waits()
        if wait != connection.wait:
            connection.wait, connection.since = wait, now
        return wait

    def _accept(self) -> None:
        self._watch()
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, address = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("no connection can be accepted: %s", error)
                self._make_room()
                self._pause()
                return
            if not self.admits():
                meters.REFUSED_CONNECTIONS.add("http", "place")
                sock.close()
                continue
            full = len(self._open) >= self.most and not self._make_room()
            sock.setblocking(False)
            speaker = self.speaker(self._ended)
            connection = _Connection(_caller(sock, address), self._loop.time())
            self._open[speaker] = connection
            connection.opening = self._loop.create_task(self._establish(speaker, sock))
            if full:
                self._pause()  # until one has ended: this one is one too many already
                return

    async def _establish(self, speaker: Speaker, sock: socket.socket) -> None:
        times = {"ssl_handshake_timeout": self.patience.head, "ssl_shutdown_timeout": self.patience.head}
        try:
            await self._loop.connect_accepted_socket(lambda: speaker, sock, ssl=self.tls, **times if self.tls else {})
        except OSError:  # the handshake failed: ssl.SSLError and ConnectionError are such
            self._ended(speaker)
        except asyncio.CancelledError:
            self._ended(speaker)
            raise

    def _make_room(self) -> bool:
        """Cut the connections that have the least claim to their places; whether there were any."""
        now = self._loop.time()
        held = Counter(connection.peer for connection in self._open.values())
        idle = [
            (connection, speaker) for speaker, connection in self._open.items() if self._wait(speaker, connection, now)
        ]
        idle.sort(key=lambda one: (-held[one[0].peer], one[0].since))
        for _, speaker in idle[: max(1, self.most // DISPLACED_SHARE)]:
            self._cut(speaker, "crowd")
        return bool(idle)

    def _cut(self, speaker: Speaker, reason: str) -> None:
        meters.REFUSED_CONNECTIONS.add("http", reason)
        connection = self._open.pop(speaker)
        if speaker.transport is not None:
            speaker.transport.abort()
        elif connection.opening is not None:
            connection.opening.cancel()

    def _ended(self, speaker: Speaker) -> None:
        self._open.pop(speaker, None)
        if len(self._open) < self.most:
            self._resume()

    def _pause(self) -> None:
        if self._accepting:
            self._loop.remove_reader(self.listener)
        self._accepting = False

    def _resume(self) -> None:
        if not self._accepting and not self._closed:
            self._loop.add_reader(self.listener, self._accept)
            self._accepting = True


def _caller(sock: socket.socket, address: Any) -> str:
    """By what callers are told apart: process, or network."""
    return f"{PEER}{credentials(sock)[0]}" if sock.family == socket.AF_UNIX else network(address[0])
