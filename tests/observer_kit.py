"""Flows and the kernel's messages about them, for the observer's tests; and hypothesis' idea of both."""

from __future__ import annotations

import socket
import struct

from hypothesis import strategies as st

from gateway.observer.flow import DNAT, SNAT, Counters, Endpoints, Flow

NEW, UPDATE, DESTROY = (0x100, 0x600), (0x100, 0), (0x102, 0)
"""Message types and flags of the events."""
TCP, UDP, ICMP = 6, 17, 1


def attribute(kind: int, value: bytes, nested: bool = False) -> bytes:
    header = struct.pack("=HH", 4 + len(value), kind | (0x8000 if nested else 0))
    return header + value + bytes(-len(value) % 4)


def tuple_attribute(kind: int, protocol: int, ends: Endpoints, flagged: bool = True) -> bytes:
    first = 1 if len(ends.source) == 4 else 3
    ip = attribute(first, ends.source) + attribute(first + 1, ends.destination)
    proto = attribute(1, bytes([protocol]))
    if ends.source_port or ends.destination_port:
        proto += attribute(2, struct.pack(">H", ends.source_port)) + attribute(
            3, struct.pack(">H", ends.destination_port)
        )
    else:
        proto += attribute(4, b"\1\2") + attribute(5, b"\x08") + attribute(6, b"\0")
    return attribute(kind, attribute(1, ip, flagged) + attribute(2, proto, flagged), flagged)


def turned(ends: Endpoints) -> Endpoints:
    return Endpoints(ends.destination, ends.source, ends.destination_port, ends.source_port)


def body(flow: Flow, flagged: bool = True) -> bytes:
    """The body of a message, in the order of the kernel."""
    family = socket.AF_INET6 if flow.ipv6 else socket.AF_INET
    said = struct.pack("=BBH", family, 0, 0)
    said += tuple_attribute(1, flow.protocol, flow.original, flagged)
    said += tuple_attribute(2, flow.protocol, turned(flow.translated), flagged)
    if flow.zone:
        said += attribute(18, struct.pack(">H", flow.zone))
    said += attribute(12, struct.pack(">I", flow.identifier))
    said += attribute(3, struct.pack(">I", 0x188 | (flow.nat << 4)))
    if flow.counters is None:
        return said + attribute(7, struct.pack(">I", 30)) + attribute(8, bytes(4))
    for kind, packets, octets in ((9, *flow.counters[:2]), (10, *flow.counters[2:])):
        said += attribute(
            kind, attribute(1, struct.pack(">Q", packets)) + attribute(2, struct.pack(">Q", octets)), True
        )
    return said + attribute(8, bytes(4))


def message(event: tuple[int, int], said: bytes, sequence: int = 0) -> bytes:
    kind, flags = event
    return struct.pack("=IHHII", 16 + len(said), kind, flags, sequence, 0) + said + bytes(-len(said) % 4)


def address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def flow(
    identifier: int = 7,
    *,
    source: str = "10.0.0.2",
    destination: str = "192.0.2.10",
    ports: tuple[int, int] = (12345, 443),
    snat: str | None = "198.51.100.5",
    dnat: tuple[str, int] | None = None,
    protocol: int = TCP,
    counters: Counters | None = None,
    zone: int = 0,
) -> Flow:
    original = Endpoints(address(source), address(destination), *ports)
    translated = original
    nat = 0
    if snat is not None:
        nat |= SNAT
        translated = translated._replace(source=address(snat))
    if dnat is not None:
        nat |= DNAT
        translated = translated._replace(destination=address(dnat[0]), destination_port=dnat[1])
    return Flow(identifier, zone, protocol, nat, original, translated, counters)


_u64 = st.integers(0, 2**64 - 1)
counters = st.builds(Counters, _u64, _u64, _u64, _u64)


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Any translated flow."""
    addresses = st.binary(min_size=4, max_size=4) if draw(st.booleans()) else st.binary(min_size=16, max_size=16)
    with_ports = draw(st.booleans())
    # The ports of a message are both there or both missing.
    ports = st.integers(1, 0xFFFF) if with_ports else st.just(0)
    original, translated = (Endpoints(draw(addresses), draw(addresses), draw(ports), draw(ports)) for _ in range(2))
    nat = 0
    if (original.source, original.source_port) != (translated.source, translated.source_port):
        nat |= SNAT
    if (original.destination, original.destination_port) != (translated.destination, translated.destination_port):
        nat |= DNAT
    protocol = draw(st.sampled_from([6, 17, 132, 33, 47] if with_ports else [1, 58, 50, 0, 255]))
    identifier, zone = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 0xFFFF))
    return Flow(
        identifier, zone, protocol, nat or draw(st.integers(1, 3)), original, translated, draw(st.none() | counters)
    )
