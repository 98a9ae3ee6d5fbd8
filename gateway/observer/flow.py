"""A translated connection, what it is called in labels and log, and its line in the log."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import NamedTuple

SNAT, DNAT = 1, 2
START, END = "start", "end"
OTHER = "other"

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_NAT_LISTS = {SNAT: ("snat",), DNAT: ("dnat",), SNAT | DNAT: ("dnat", "snat")}
_NAT_LABELS = {SNAT: "snat", DNAT: "dnat", SNAT | DNAT: "snat_dnat"}
_PORTS = struct.Struct("=HH")


class Endpoints(NamedTuple):
    """Who speaks to whom. Addresses as on the wire; ports are 0 where the protocol has none."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int


class Counters(NamedTuple):
    """What the kernel counted of a connection, both directions."""

    original_packets: int
    original_bytes: int
    reply_packets: int
    reply_bytes: int


class Flow(NamedTuple):
    """A connection that the kernel translates, as one message tells of it.

    ``translated`` is the connection as it leaves: the reply's tuple, turned round. ``counters`` is None where the
    message carried none. ``nat`` is SNAT, DNAT or both.
    """

    identifier: int
    zone: int
    protocol: int
    nat: int
    original: Endpoints
    translated: Endpoints
    counters: Counters | None

    @property
    def ipv6(self) -> bool:
        """Whether it is a connection of IPv6."""
        return len(self.original.source) == 16


class Labels(NamedTuple):
    """How metrics tell flows apart."""

    address_family: str
    protocol: str
    nat_type: str


def labels(flow: Flow) -> Labels:
    """The labels of a flow."""
    return Labels("ipv6" if flow.ipv6 else "ipv4", protocol_name(flow.protocol), _NAT_LABELS[flow.nat])


def protocol_name(number: int) -> str:
    """The word for an IP protocol."""
    return _PROTOCOLS.get(number, OTHER)


def nat_types(nat: int) -> tuple[str, ...]:
    """The translations, in the order of the log."""
    return _NAT_LISTS[nat]


def pack(flow: Flow) -> bytes:
    """The endpoints of a flow in little memory; its other parts are kept elsewhere."""
    packed = bytes((flow.protocol, flow.nat))
    for ends in (flow.original, flow.translated):
        packed += ends.source + ends.destination + _PORTS.pack(ends.source_port, ends.destination_port)
    return packed


def is_of(packed: bytes, flow: Flow) -> bool:
    """Whether ``packed`` is this flow: the kernel's identifiers are 32 bits of a hash, which two of 100,000 share."""
    ends = flow.original
    return packed[0] == flow.protocol and packed.startswith(
        ends.source + ends.destination + _PORTS.pack(ends.source_port, ends.destination_port), 2
    )


def unpack(packed: bytes, identifier: int, zone: int, counters: Counters | None) -> Flow:
    """The flow of ``pack``."""
    half = (len(packed) - 2) // 2
    original, translated = (_endpoints(packed[start : start + half]) for start in (2, 2 + half))
    return Flow(identifier, zone, packed[0], packed[1], original, translated, counters)


def _endpoints(packed: bytes) -> Endpoints:
    width = (len(packed) - _PORTS.size) // 2
    return Endpoints(packed[:width], packed[width : 2 * width], *_PORTS.unpack_from(packed, 2 * width))


class Identity(NamedTuple):
    """Whose flows these are."""

    namespace: str
    name: str
    pod: str
    node: str


class Recorder:
    """Writes the lines of the log: JSON, schema ``v1`` of Kube-OVN's observer, keys in its order."""

    def __init__(self, identity: Identity) -> None:
        self._identity = json.dumps(identity._asdict(), separators=(",", ":"))[1:-1]

    def line(self, event: str, flow: Flow, nanoseconds: int) -> bytes:
        """The line for an event, which happened so many nanoseconds after 1970-01-01 UTC."""
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        types = ",".join(f'"{word}"' for word in _NAT_LISTS[flow.nat])
        return (
            f'{{"schemaVersion":"v1","timestamp":"{stamp}.{rest // 1000:06d}Z","event":"{event}",'
            f'"conntrackID":{flow.identifier},"zone":{flow.zone},{self._identity},'
            f'"addressFamily":"{"ipv6" if flow.ipv6 else "ipv4"}","protocol":"{protocol_name(flow.protocol)}",'
            f'"protocolNumber":{flow.protocol},"natType":[{types}],"original":{_tuple(flow.original)},'
            f'"translated":{_tuple(flow.translated)}{_counters(flow.counters)}}}\n'
        ).encode()


def _tuple(ends: Endpoints) -> str:
    """Kube-OVN's observer leaves out a port of 0, so this does too."""
    family = socket.AF_INET6 if len(ends.source) == 16 else socket.AF_INET
    source_port = f'"sourcePort":{ends.source_port},' if ends.source_port else ""
    destination_port = f',"destinationPort":{ends.destination_port}' if ends.destination_port else ""
    return (
        f'{{"sourceIP":"{socket.inet_ntop(family, ends.source)}",{source_port}'
        f'"destinationIP":"{socket.inet_ntop(family, ends.destination)}"{destination_port}}}'
    )


def _counters(counters: Counters | None) -> str:
    if counters is None:
        return ""
    return (
        f',"counters":{{"originalPackets":{counters.original_packets},"originalBytes":{counters.original_bytes},'
        f'"replyPackets":{counters.reply_packets},"replyBytes":{counters.reply_bytes}}}'
    )
