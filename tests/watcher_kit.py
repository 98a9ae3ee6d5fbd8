"""Flows and objects for the tests of the flow watcher."""

from __future__ import annotations

import socket
from itertools import count

from gateway.observer.flow import DNAT, SNAT, Counters, Endpoints, Flow
from gateway.watcher.accounts import Key, Objects
from gateway.watcher.ledger import Ledger

TCP, UDP, ICMP = 6, 17, 1
EIP, EIP2, FLOATING = "192.0.2.1", "192.0.2.2", "192.0.2.3"
INSIDE, SERVER, PEER = "10.0.1.5", "10.0.1.80", "203.0.113.9"

OBJECTS = Objects(
    eips=(EIP, EIP2, FLOATING),
    fips=((FLOATING, "10.0.1.33"),),
    dnats=((EIP, 8888, "tcp", False), (EIP, 53, "udp", True)),
    snats=((EIP2, "10.0.0.0/16"), (EIP2, "10.0.1.0/24"), (EIP, "10.0.9.0/24")),
)

_numbers = count(1)


def ends(source: str, source_port: int, destination: str, destination_port: int) -> Endpoints:
    return Endpoints(socket.inet_aton(source), socket.inet_aton(destination), source_port, destination_port)


def flow(
    original: Endpoints, translated: Endpoints, *, protocol: int = TCP, counters: tuple[int, ...] | None = None
) -> Flow:
    """A flow with an identifier of its own."""
    nat = (SNAT if (original[0], original[2]) != (translated[0], translated[2]) else 0) | (
        DNAT if (original[1], original[3]) != (translated[1], translated[3]) else 0
    )
    return Flow(next(_numbers), 0, protocol, nat, original, translated, Counters(*counters) if counters else None)


def mapped(port: int = 8888, eip: str = EIP, protocol: int = TCP, *, peer: str = PEER, peer_port: int = 4000) -> Flow:
    """From outside through a port mapping (or a floating IP) to the server inside."""
    return flow(ends(peer, peer_port, eip, port), ends(peer, peer_port, SERVER, 80), protocol=protocol)


def left(
    eip: str = EIP2,
    source: str = INSIDE,
    *,
    port: int = 40000,
    peer: str = PEER,
    peer_port: int = 443,
    protocol: int = TCP,
) -> Flow:
    """From inside by a source translation."""
    return flow(ends(source, 1234, peer, peer_port), ends(eip, port, peer, peer_port), protocol=protocol)


def counted(one: Flow, *counters: int) -> Flow:
    """The same flow with what the kernel has counted: packets and bytes forth, packets and bytes back."""
    return one._replace(counters=Counters(*counters))


class Book(Ledger):
    """A ledger that keeps what it tells; ``watching``: it has had its first dump, in which there was nothing."""

    def __init__(self, capacity: int = 1000, objects: Objects = OBJECTS, *, watching: bool = True) -> None:
        self.told: list[tuple[str, Flow]] = []
        super().__init__(lambda event, one: self.told.append((event, one)), capacity)
        self.set(objects)
        if watching:
            self.dump()

    def dump(self, *flows: Flow) -> None:
        """A dump that contains these."""
        self.begin_dump()
        for one in flows:
            self.dumped(one)
        self.end_dump()

    def sums(self, *key: object) -> dict[str, int]:
        """The sums of an object, but for zeros."""
        names = ("bytes in", "packets in", "bytes out", "packets out", "active in", "active out", "new in", "new out")
        wanted: Key = key
        return {name: value for name, value in zip(names, self.accounts.sums()[wanted], strict=True) if value}
