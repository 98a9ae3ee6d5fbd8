"""Sockets in namespaces: who reaches whom, and as whom the far end sees it.

A socket belongs to the namespace it was opened in, whoever uses it afterwards. So clients and servers are
plain sockets of the test itself: a listening one is ready when its call returns, and nobody has to be waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from netns import Namespace, run

PATIENCE = 30.0  # seconds to wait for what must come, on a busy machine
SILENCE = 0.2  # seconds without anything, after what came later has already arrived
Address = tuple[str, int]

_ECHO_REPLY, _ECHO_REQUEST = 0, 8


class Host(Namespace):
    """A namespace with the sockets that were opened in it."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        self._sockets: list[socket.socket] = []

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands here, all in one process."""
        run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(commands) + "\n")

    def ip_text(self, *words: str) -> str:
        return run("ip", "-n", self.name, *words)

    def ip_json(self, *words: str) -> list[Any]:
        found: list[Any] = json.loads(run("ip", "-n", self.name, "-j", *words) or "[]")
        return found

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace; it is closed with ``close_sockets`` at the latest."""
        with self.entered():
            opened = socket.socket(family, kind, protocol)
        return self.keep(opened)

    def keep(self, opened: socket.socket) -> socket.socket:
        """Have ``close_sockets`` close this one, too; nothing on it waits longer than PATIENCE."""
        self._sockets.append(opened)
        opened.settimeout(PATIENCE)
        return opened

    def close_sockets(self) -> None:
        """Close them at once: no connection may go on saying goodbye into somebody else's test."""
        while self._sockets:
            opened = self._sockets.pop()
            if opened.type == socket.SOCK_STREAM and opened.fileno() != -1:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            opened.close()

    def remove(self) -> None:
        self.close_sockets()
        super().remove()

    def tcp_server(self, port: int) -> socket.socket:
        """A listening socket; callers can connect when this returns."""
        server = self.open_socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()
        return server

    def udp(self, port: int = 0) -> socket.socket:
        """A datagram socket bound to that port of every address, or (0) to one that the kernel chooses."""
        opened = self.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("", port))
        return opened

    def raw_icmp(self) -> socket.socket:
        """A socket that hears all ICMP messages that reach this namespace."""
        return self.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


@dataclass
class Flow:
    """A connection (or a pair of datagram sockets) that stands: both ends, and the address each end sees."""

    near: socket.socket
    far: socket.socket
    source: Address
    """The near end as the far end sees it."""

    def forth(self, token: bytes) -> None:
        self.near.send(token)

    def back(self, token: bytes) -> None:
        if self.far.type == socket.SOCK_STREAM:
            self.far.send(token)
        else:
            self.far.sendto(token, self.source)

    def talk(self) -> None:
        """Something new goes both ways, and nothing is on its way afterwards; fails if it does not arrive in time."""
        for send, end in ((self.forth, self.far), (self.back, self.near)):
            token = secrets.token_bytes(8)
            send(token)
            assert end.recv(64) == token
        for end in (self.near, self.far):
            if end.type == socket.SOCK_STREAM:  # an acknowledgement may be held back for 40 ms or more
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def is_cut(self, control: Flow) -> bool:
        """Whether nothing passes any more in either direction, while the control flow works."""
        return not self.forth_arrives(control) and not self.back_arrives(control)

    def forth_arrives(self, control: Flow) -> bool:
        """Whether the far end still gets what the near end sends."""
        return _arrives(self.forth, self.far, control)

    def back_arrives(self, control: Flow) -> bool:
        """Whether the near end still gets what the far end sends."""
        return _arrives(self.back, self.near, control)


def _arrives(send: Callable[[bytes], None], end: socket.socket, control: Flow) -> bool:
    with contextlib.suppress(ConnectionError):
        send(secrets.token_bytes(8))
    control.talk()  # sent later; when that is there, the other would be, too
    return anything(end)


def anything(end: socket.socket) -> bool:
    """Whether something is to be read, after a moment's grace; a connection reset or ended is nothing."""
    end.settimeout(SILENCE)
    try:
        return bool(end.recv(64))
    except (TimeoutError, ConnectionError):
        return False
    finally:
        end.settimeout(PATIENCE)


class Stream:
    """Numbered datagrams in both directions of a flow, a thousand a second each, by which every loss is seen.

    Use it with ``with``; ``lost`` and ``longest_gap`` are known afterwards. A gap is the time between two arrivals
    at one end, so it has in it what the machine did instead of running this program.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._ends = (flow.near, flow.far)
        self._stop, self._all_sent = threading.Event(), threading.Event()
        self.sent = 0
        self._seen: tuple[set[bytes], set[bytes]] = (set(), set())
        self._gaps = [0.0, 0.0]
        self._threads = [threading.Thread(target=self._send)]
        for number, end in enumerate(self._ends):
            end.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE: nothing is lost at the ends
            self._threads.append(threading.Thread(target=self._receive, args=(number,)))

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads[0].join()
        self._all_sent.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._stop.wait(0.001):
            number = self.sent.to_bytes(4, "big")
            self._flow.forth(number)
            self._flow.back(number)
            self.sent += 1

    def _receive(self, number: int) -> None:
        end, seen, last = self._ends[number], self._seen[number], time.monotonic()
        deadline = None
        while not (self._all_sent.is_set() and len(seen) >= self.sent):
            # What is on its way when the stream ends gets its time.
            deadline = deadline or (time.monotonic() + PATIENCE if self._all_sent.is_set() else None)
            if deadline and time.monotonic() > deadline:
                return
            end.settimeout(SILENCE)
            try:
                seen.add(end.recv(64))
            except TimeoutError:
                continue
            now = time.monotonic()
            self._gaps[number], last = max(self._gaps[number], now - last), now

    @property
    def lost(self) -> int:
        """How many datagrams did not arrive, of both directions."""
        return sum(self.sent - len(seen) for seen in self._seen)

    @property
    def longest_gap(self) -> float:
        """The longest time, in seconds, in which nothing arrived at one of the ends."""
        return max(self._gaps)


def tcp(client: Host, to: Address, server: socket.socket) -> Flow:
    """Connect, and exchange something; TimeoutError or ConnectionError if that fails."""
    near = client.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    near.connect(to)
    far, source = server.accept()
    flow = Flow(near, client.keep(far), source)
    flow.talk()
    return flow


def udp(client: Host, to: Address, server: socket.socket, port: int = 0) -> Flow:
    """Exchange datagrams, from that source port. Only answers from ``to`` count; TimeoutError if none comes."""
    near = client.udp(port)
    near.connect(to)
    return udp_again(near, server)


def udp_again(near: socket.socket, server: socket.socket) -> Flow:
    """Exchange datagrams between a connected socket and a server, whoever it reached before."""
    flow = Flow(near, server, source_of(near, server))
    flow.back(b"answer")
    assert near.recv(64) == b"answer"
    flow.talk()
    return flow


def source_of(near: socket.socket, server: socket.socket) -> Address:
    """Send one datagram; the address from which the server gets it."""
    token = secrets.token_bytes(8)
    near.send(token)
    while True:
        data, source = server.recvfrom(64)
        if data == token:
            return str(source[0]), int(source[1])


def ping(client: Host, to: str, far: Host, patience: float = PATIENCE) -> str:
    """Send an echo request and get the answer; returns the source address that the far host saw."""
    near, ear = client.raw_icmp(), far.raw_icmp()
    near.settimeout(patience)
    token = secrets.token_bytes(16)
    near.sendto(echo_request(token), (to, 0))
    source, _ = _heard(ear, _ECHO_REQUEST, token)
    answered_by, _ = _heard(near, _ECHO_REPLY, token)
    assert answered_by == to
    return source


def echo_request(token: bytes) -> bytes:
    """An ICMP echo request (RFC 792) with a random identifier."""
    rest = os.urandom(2) + struct.pack("!H", 1) + token
    return struct.pack("!BBH", _ECHO_REQUEST, 0, _checksum(struct.pack("!BBH", _ECHO_REQUEST, 0, 0) + rest)) + rest


def _heard(ear: socket.socket, kind: int, token: bytes) -> tuple[str, bytes]:
    while True:
        packet, (source, _) = ear.recvfrom(2048)
        message = packet[(packet[0] & 15) * 4 :]
        if message[0] == kind and message[8:] == token:
            return str(source), message


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
