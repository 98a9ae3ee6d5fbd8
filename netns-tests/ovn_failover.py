"""What becomes of traffic through two gateways behind an OVN router when something is done to one of them."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from ovn import CLIENTS, ROOTFS, SERVER, SERVER_PORT, Gateway, Ovn, wait_until

_SO_RCVBUFFORCE = 33
_LAST = -1


@dataclass
class Stream:
    """A datagram every 10 ms from one address of the client, and what came back; times are monotonic seconds."""

    address: str
    sent: list[float] = field(default_factory=list)
    answered: dict[int, tuple[float, str]] = field(default_factory=dict)
    """When the answer to each came, and the gateway's outer address that the server saw."""

    def lost(self) -> list[int]:
        return [number for number in range(len(self.sent)) if number not in self.answered]

    def hole(self) -> float:
        """Seconds of the longest time without an answer."""
        times = sorted(at for at, _ in self.answered.values())
        return max(after - before for before, after in itertools.pairwise(times))

    def via(self) -> str:
        """The gateway that the newest answered datagram took; one was answered."""
        return self.answered[max(self.answered)][1]

    def left(self, address: str) -> float | None:
        """When the first datagram that took another gateway was sent; None when all took this one."""
        return next((self.sent[n] for n, (_, via) in sorted(self.answered.items()) if via != address), None)


class Streams:
    """A stream through each gateway."""

    INTERVAL = 0.010
    PATIENCE = 5.0
    """Seconds to wait for an answer when the stream ends."""

    def __init__(self, ovn: Ovn) -> None:
        self._ovn = ovn
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        with ovn.server.entered():
            self._server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._server.bind((SERVER, SERVER_PORT))
        self._server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)  # nothing is lost at the ends
        self._server.settimeout(0.1)
        self._start(self._echo)
        self.streams: dict[str, Stream] = {}

    def begin(self) -> None:
        """Find an address of the client for each gateway, and stream."""
        sockets: dict[str, socket.socket] = {}
        wanted = {gateway.outer for gateway in self._ovn.gateways}
        for address in CLIENTS:
            if set(sockets) == wanted:
                break
            with self._ovn.client.entered():
                client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.bind((address, 0))
            client.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
            client.settimeout(0.5)
            client.connect((SERVER, SERVER_PORT))
            client.send(b"0")
            try:
                via = client.recv(100).split()[1].decode()
            except TimeoutError:
                via = ""
            if not via or via in sockets:
                client.close()
            else:
                sockets[via] = client
        if set(sockets) != wanted:
            pytest.fail(f"only {sorted(sockets)} carry traffic")
        for via, client in sockets.items():
            stream = self.streams[via] = Stream(client.getsockname()[0])
            self._start(lambda stream=stream, client=client: self._stream(stream, client))  # type: ignore[misc]

    def through(self, gateway: Gateway) -> Stream:
        """The stream that began through this gateway."""
        return self.streams[gateway.outer]

    def end(self) -> None:
        """Stop sending, wait for what is under way, and close everything."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._server.close()

    def _start(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()

    def _echo(self) -> None:
        while not self._stop.is_set() or any(thread.is_alive() for thread in self._threads[1:]):
            with contextlib.suppress(TimeoutError):
                data, source = self._server.recvfrom(100)
                self._server.sendto(data + b" " + source[0].encode(), source)

    def _stream(self, stream: Stream, client: socket.socket) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= due:
                stream.sent.append(now)
                self._send(client, len(stream.sent) - 1)
                # After a standstill of this machine no burst, which the switch might have no room for.
                due = max(due + self.INTERVAL, now)
            else:
                self._receive(stream, client, due - now)
        # What is sent last is answered last: when that is there, nothing is under way any more.
        end = time.monotonic() + self.PATIENCE
        while stream.lost() and time.monotonic() < end:
            self._send(client, _LAST)
            self._receive(stream, client, 0.1)
            if _LAST in stream.answered:
                self._receive(stream, client, 0.1)
                break
        while self._receive(stream, client, 0):
            pass
        stream.answered.pop(_LAST, None)
        client.close()

    def _send(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            client.send(str(number).encode())

    def _receive(self, stream: Stream, client: socket.socket, patience: float) -> bool:
        """Take one answer; whether there was one within so many seconds."""
        client.settimeout(max(patience, 0.0001))
        with contextlib.suppress(OSError):
            number, via = client.recv(100).split()
            stream.answered[int(number)] = (time.monotonic(), via.decode())
            return True
        return False


@contextlib.contextmanager
def streaming(ovn: Ovn) -> Iterator[Streams]:
    """Streams through both gateways, which have settled for a moment when this begins."""
    streams = Streams(ovn)
    try:
        streams.begin()
        wait_until(lambda: all(len(one.answered) > 50 for one in streams.streams.values()), "the streams run")
        yield streams
    finally:
        streams.end()


def down_reasons(gateway: Gateway) -> list[str]:
    """The diagnostics with which the gateway's session left Up, oldest first."""
    return re.findall(r"Up -> \w+ <([^>]*)>", "\n".join(gateway.told()))


@dataclass(frozen=True)
class Outcome:
    """What became of the stream through the gateway to which something was done."""

    lost: int
    hole: float
    """Seconds of the longest time without an answer."""
    moved: float | None
    """Seconds after the deed at which the first datagram that took the other gateway was sent."""


def failover(ovn: Ovn, gateway: Gateway, deed: Callable[[], object], patience: float = 20.0) -> Outcome:
    """Do something to a gateway that carries a stream, and tell what became of the stream.

    The other gateway's stream must not notice.
    """
    with streaming(ovn) as streams:
        stream = streams.through(gateway)
        others = [one for one in streams.streams.values() if one is not stream]
        begin = time.monotonic()
        deed()
        wait_until(lambda: stream.via() != gateway.outer, "the stream takes the other gateway", patience)
        moved = len(stream.answered)
        wait_until(lambda: len(stream.answered) > moved + 100, "the stream runs on")
    assert [one.lost() for one in others] == [[]]
    left = stream.left(gateway.outer)
    return Outcome(len(stream.lost()), stream.hole(), None if left is None else left - begin)


def drop_everything_inside(gateway: Gateway) -> None:
    """A black hole: the gateway lives, and nothing reaches or leaves it on the inner side."""
    gateway.netns.run(
        "nft",
        "add table inet hole; add chain inet hole in { type filter hook prerouting priority -400; }; "
        "add chain inet hole out { type filter hook output priority -400; }; "
        "add chain inet hole on { type filter hook forward priority -400; }; "
        "add rule inet hole in iifname eth0 drop; add rule inet hole out oifname eth0 drop; "
        "add rule inet hole on oifname eth0 drop",
    )


def drop_nothing(gateway: Gateway) -> None:
    """End ``drop_everything_inside``."""
    gateway.netns.run("nft", "delete table inet hole")


def cut_outside(ovn: Ovn, gateway: Gateway) -> None:
    """The gateway's outer side leads nowhere any more, though its interface has a carrier: a switch lost its mind."""
    ovn.outside.run("ip", "link", "set", f"x-{gateway.port}", "nomaster")


def mend_outside(ovn: Ovn, gateway: Gateway) -> None:
    """End ``cut_outside``."""
    ovn.outside.run("ip", "link", "set", f"x-{gateway.port}", "master", "external")


def bfdd_control(gateway: Gateway, command: str) -> None:
    """A command for the gateway's speaker."""
    gateway.netns.run(
        *("env", f"NATGW_RUN_DIR={gateway.run_dir}", f"NATGW_PYTHON={sys.executable}"),
        *(str(ROOTFS / "usr/bin/bfdd-control"), *command.split()),
    )
