"""Rules of the nft variant of iptables as nf_tables expressions, byte for byte as ``iptables-nft`` writes them.

Only what a gateway writes is spoken here; for anything else ``expressions`` has no answer, and the tool is asked.
What is sent is also what is read back, by ``nft_reading``.
"""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from ipaddress import IPv4Network

from gateway.kernel.extensions import PROTOCOLS, Extension, action, in_order, printable, printable_match, tracked
from gateway.kernel.netlink import attribute
from gateway.kernel.nft_expressions import (
    DESTINATION_AT,
    META_IIFNAME,
    META_L4PROTO,
    META_MARK,
    META_OIFNAME,
    NETWORK_HEADER,
    SOURCE_AT,
    TRANSPORT_HEADER,
    equals,
    expression,
    masked,
    meta,
    payload,
)
from gateway.kernel.nft_messages import named, nested, number
from rules.iptables import ALL_BITS, PORT_MAX
from rules.ruleset import (
    AnyRule,
    Conntrack,
    Destination,
    DestinationPort,
    Drop,
    Goto,
    InInterface,
    Jump,
    Mark,
    Match,
    OutInterface,
    Protocol,
    Return,
    Rule,
    Source,
    States,
    Target,
)

PORT_AT = 2  # the destination port, in the header of either
DROP, JUMP, GOTO, RETURN = 0, -3, -4, -5  # verdicts
MANY = 1 << 13
"""Parts of rules that are remembered: many rules are made of few of them."""


def expressions(rule: AnyRule) -> bytes | None:
    """The body of NFTA_RULE_EXPRESSIONS for an IPv4 rule; None for one that is not spoken here.

    What iptables could not print, so that it would not be read back as the same rule, is not spoken either.
    """
    if not isinstance(rule, Rule):
        return None
    head, target = matched(rule.matches), acting(rule.target)
    return None if head is None or target is None else b"".join((head, _COUNTER, target))


def matched(matches: tuple[Match, ...]) -> bytes | None:
    """The expressions of what must hold; None where they are not spoken here."""
    if not in_order(tuple(map(type, matches))):
        return None
    parts: list[_Part] = []
    for match in matches:
        found = _match(match)
        if found is None:
            return None
        parts += found
    # iptables-nft writes interfaces and the protocol ahead of the addresses, in whatever order it prints them.
    parts.sort(key=_place)
    return b"".join([part for _, part in parts])


_Part = tuple[int, bytes]  # where it stands, and its expressions


def _place(part: _Part) -> int:
    return part[0]


@lru_cache(MANY)
def _match(match: Match) -> tuple[_Part, ...] | None:  # noqa: PLR0911 -- one a match
    match match:
        case InInterface(name) if printable_match(match):
            return ((0, meta(META_IIFNAME) + equals(name.encode() + b"\0")),)
        case OutInterface(name) if printable_match(match):
            return ((1, meta(META_OIFNAME) + equals(name.encode() + b"\0")),)
        case Source(prefix):
            return _address(3, SOURCE_AT, prefix)
        case Destination(prefix):
            return _address(4, DESTINATION_AT, prefix)
        case DestinationPort(protocol, port) if protocol in PROTOCOLS and 0 <= port <= PORT_MAX:
            return ((2, protocol_is(bytes([PROTOCOLS[protocol]]))), (5, port_is(struct.pack(">H", port))))
        case Protocol("icmp"):
            return ((2, protocol_is(bytes([socket.IPPROTO_ICMP]))),)
        case Mark(value, mask) if printable_match(match):
            under = b"" if mask == ALL_BITS else masked(struct.pack("=I", mask))
            return ((5, meta(META_MARK) + under + equals(struct.pack("=I", value))),)
        case Conntrack() | States() if tracks := tracked(match):
            return ((5, _extension("match", tracks)),)
    return None


def _address(place: int, offset: int, prefix: str) -> tuple[_Part, ...] | None:
    try:
        network = IPv4Network(prefix)
    except ValueError:
        return None
    address, octets = network.network_address.packed, network.prefixlen // 8
    if network.prefixlen == 0 or str(network) != prefix:
        return None
    if network.prefixlen % 8 == 0:
        return ((place, payload(NETWORK_HEADER, offset, octets) + equals(address[:octets])),)
    return ((place, payload(NETWORK_HEADER, offset, 4) + masked(network.netmask.packed) + equals(address)),)


def host(offset: int, address: bytes) -> bytes:
    """The expressions for one address at that place in an IPv4 header."""
    return payload(NETWORK_HEADER, offset, 4) + equals(address)


def protocol_is(value: bytes) -> bytes:
    """The expressions for a protocol by its number."""
    return meta(META_L4PROTO) + equals(value)


def port_is(value: bytes) -> bytes:
    """The expressions for a destination port."""
    return payload(TRANSPORT_HEADER, PORT_AT, 2) + equals(value)


@lru_cache(MANY)
def acting(target: Target) -> bytes | None:
    """The expression of what a rule does; None where it is not spoken here."""
    match target:
        case Jump(chain) | Goto(chain):
            code = JUMP if isinstance(target, Jump) else GOTO
            return _verdict(code, chain) if printable(Rule((), target)) else None
        case Return():
            return _verdict(RETURN)
        case Drop():
            return _verdict(DROP)
    done = action(target)
    return _extension("target", done) if done else None


def _extension(kind: str, what: Extension) -> bytes:
    name, revision, data = what
    return expression(kind, named(1, name) + number(2, revision) + attribute(3, data))


def _verdict(code: int, chain: str = "") -> bytes:
    where = named(2, chain) if chain else b""
    return expression("immediate", number(1, 0) + nested(2, nested(2, number(1, code), where)))


def counted(packets: bytes, octets: bytes) -> bytes:
    """A rule's counter."""
    return expression("counter", attribute(1, octets) + attribute(2, packets))


_COUNTER = counted(bytes(8), bytes(8))
