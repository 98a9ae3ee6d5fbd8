"""A request and a reply per connection, inside a loop: for control sockets and for HTTP.

Nothing here can block or be made to: a connection has a deadline, a request has a greatest size, and there are only so
many connections at a time.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gateway.small.loop import Loop

DEADLINE = 5_000_000
"""Microseconds that a whole exchange may take."""
LIMIT = 8192
"""Bytes of the longest request."""
CONNECTIONS = 32

_UCRED = struct.Struct("@iII")


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    deadline: int
    received: bytes = b""
    reply: bytes | None = None


class Server:
    """Answers connections on a listening socket, as a participant of ``loop``.

    ``respond`` is given what has arrived so far and returns the reply, or None to wait for more. ``admit`` decides who
    may speak.
    """

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        respond: Callable[[bytes], bytes | None],
        admit: Callable[[socket.socket], bool] = lambda peer: True,
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._respond = respond
        self._admit = admit
        self._connections: dict[int, _Connection] = {}
        listening.setblocking(False)
        loop.watch(listening.fileno(), self._accept)
        loop.add(self)

    def next_timer(self) -> int | None:
        """The earliest deadline of a connection."""
        return min((connection.deadline for connection in self._connections.values()), default=None)

    def tick(self, now: int) -> None:
        """Close connections that took too long."""
        for connection in [slow for slow in self._connections.values() if slow.deadline <= now]:
            self._close(connection)

    def close(self) -> None:
        """Stop listening and drop every connection."""
        for connection in list(self._connections.values()):
            self._close(connection)
        self._loop.forget(self._listening.fileno())
        self._listening.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._listening.accept()
        except OSError:
            # The peer has gone again, or descriptors are short: nothing to answer.
            return
        if not self._admit(peer):
            peer.close()
            return
        if len(self._connections) >= CONNECTIONS:
            # An honest exchange is over in a moment, so the oldest is the one that holds its place for nothing.
            self._close(next(iter(self._connections.values())))
        peer.setblocking(False)
        connection = _Connection(peer, self._loop.clock() + DEADLINE)
        self._connections[peer.fileno()] = connection
        self._loop.watch(peer.fileno(), lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.received += data
        if not data or len(connection.received) > LIMIT:
            self._close(connection)
            return
        reply = self._respond(connection.received)
        if reply is not None:
            connection.reply = reply
            self._write(connection)

    def _write(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.reply or b"")
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return
        connection.reply = (connection.reply or b"")[sent:]
        if connection.reply:
            self._loop.watch(connection.socket.fileno(), lambda: self._write(connection), selectors.EVENT_WRITE)
        else:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        fileno = connection.socket.fileno()
        del self._connections[fileno]
        self._loop.forget(fileno)
        with suppress(OSError):
            # Let the peer read the whole reply before it sees the end.
            connection.socket.shutdown(socket.SHUT_WR)
        connection.socket.close()


def credentials(peer: socket.socket) -> tuple[int, int]:
    """Process and user of a unix socket's peer; a process of another PID namespace has the number 0."""
    pid, uid, _gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def same_user_or_root(peer: socket.socket) -> bool:
    """Whether a unix socket's peer is root or runs as we do."""
    _, uid = credentials(peer)
    return uid in (0, os.geteuid())


def line_protocol(answer: Callable[[str], str]) -> Callable[[bytes], bytes | None]:
    """A ``respond`` for requests of one line."""

    def respond(received: bytes) -> bytes | None:
        line, newline, _ = received.partition(b"\n")
        return answer(line.decode("utf-8", "replace")).encode() if newline else None

    return respond


def listen_unix(path: Path) -> socket.socket:
    """A listening socket for probes, mode 0600. Raises OSError, also when another supervisor answers there."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(17, f"{path} is there and not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise OSError(98, f"another supervisor answers on {path}")
        path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    finally:
        os.umask(before)
    listening.listen()
    return listening


def listen_tcp(address: str) -> socket.socket:
    """A listening socket for ``HOST:PORT``, on every address when the host is empty. Raises OSError, ValueError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    families = [socket.AF_INET6, socket.AF_INET] if not host else [socket.AF_INET6 if ":" in host else socket.AF_INET]
    for family in families:
        try:
            listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError:
            # This kernel has no IPv6.
            if family == families[-1]:
                raise
            continue
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not host:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((host, int(port)))
        listening.listen()
        return listening
    raise OSError(97, f"no socket for {address}")
