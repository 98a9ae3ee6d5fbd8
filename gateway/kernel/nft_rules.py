"""Rules of the nft variant of iptables as nf_tables expressions, byte for byte as ``iptables-nft`` writes them.

Only what a gateway writes is spoken here; for anything else ``expressions`` has no answer, and the tool is asked.
Messages: linux/netfilter/nf_tables.h; the private data of xtables extensions: xt_conntrack.h, xt_mark.h, nf_nat.h.
Nested attributes do not bear NLA_F_NESTED, for the kernel tells of none: so what is sent is what is read back, by
``nft_reading``.
"""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from ipaddress import IPv4Network

from gateway.kernel.netlink import attribute
from rules.iptables import ALL_BITS, PORT_MAX, render_rule
from rules.ruleset import (
    AnyRule,
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Goto,
    InInterface,
    Jump,
    Mark,
    Masquerade,
    Match,
    OutInterface,
    Protocol,
    Return,
    Rule,
    SetMark,
    Snat,
    Source,
    States,
    Target,
)

_REGISTER = 1  # NFT_REG_1, of 16 bytes
META_MARK, META_IIFNAME, META_OIFNAME, META_L4PROTO = 3, 6, 7, 16
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
SOURCE_AT, DESTINATION_AT = 12, 16  # in an IPv4 header
PORT_AT = 2  # the destination port, in the header of either
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
"""Of SCTP's ports iptables-nft has no expressions but its own extension; it does not read others back."""

_MAP_IPS, PROTO_SPECIFIED, PROTO_RANDOM_FULLY = 1, 2, 16  # NF_NAT_RANGE_*
CT_STATE, _CT_ORIGDST, _STATE_DNAT = 0x1, 0x8, 0x80  # XT_CONNTRACK_*
_ESTABLISHED_OR_RELATED = 0x6
DROP, JUMP, GOTO, RETURN = 0, -3, -4, -5  # verdicts
MANY = 1 << 13
"""Parts of rules that are remembered: many rules are made of few of them."""
ORDER = (Source, Destination, InInterface, OutInterface, DestinationPort, Protocol, Mark, Conntrack, States)
"""As iptables-save prints them, and ``rules.iptables`` reads them."""

NFTA_LIST_ELEM = 1


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind, b"".join(inner))


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network byte order, as nf_tables wants its numbers."""
    return attribute(kind, struct.pack(">I", value & ALL_BITS))


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
    if not _in_order(tuple(map(type, matches))):
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


@lru_cache
def _in_order(kinds: tuple[type[Match], ...]) -> bool:
    return list(kinds) == [kind for kind in ORDER if kind in kinds]


@lru_cache(MANY)
def _match(match: Match) -> tuple[_Part, ...] | None:  # noqa: PLR0911 -- one a match
    match match:
        case InInterface(name) if _printable(Rule((match,), Return())):
            return ((0, _meta(META_IIFNAME) + _equals(name.encode() + b"\0")),)
        case OutInterface(name) if _printable(Rule((match,), Return())):
            return ((1, _meta(META_OIFNAME) + _equals(name.encode() + b"\0")),)
        case Source(prefix):
            return _address(3, SOURCE_AT, prefix)
        case Destination(prefix):
            return _address(4, DESTINATION_AT, prefix)
        case DestinationPort(protocol, port) if protocol in PROTOCOLS and 0 <= port <= PORT_MAX:
            return ((2, protocol_is(bytes([PROTOCOLS[protocol]]))), (5, port_is(struct.pack(">H", port))))
        case Protocol("icmp"):
            return ((2, protocol_is(bytes([socket.IPPROTO_ICMP]))),)
        case Mark(value, mask) if _printable(Rule((match,), Return())):
            masked = b"" if mask == ALL_BITS else _masked(struct.pack("=I", mask))
            return ((5, _meta(META_MARK) + masked + _equals(struct.pack("=I", value))),)
        case Conntrack("DNAT", orig_dst) if address := _packed(orig_dst):
            flags = struct.pack("=HHHH", CT_STATE | _CT_ORIGDST, 0, _STATE_DNAT, 0)
            data = (bytes(CT_ADDRESS_AT) + address + bytes(12) + b"\xff" * 16).ljust(CT_FLAGS_AT, b"\0") + flags
            return ((5, _extension("match", "conntrack", 3, data, _CT_SIZE)),)
        case States("RELATED,ESTABLISHED"):
            state = struct.pack("=HHH", CT_STATE, 0, _ESTABLISHED_OR_RELATED)
            return ((5, _extension("match", "conntrack", 3, bytes(CT_FLAGS_AT) + state, _CT_SIZE)),)
    return None


def _printable(rule: Rule) -> bool:
    try:
        render_rule(rule)
    except ValueError:
        return False
    return True


def _packed(address: str) -> bytes:
    """The four bytes of an address as people write it; none where it is something else."""
    try:
        packed = socket.inet_aton(address)
    except OSError:
        return b""
    return packed if socket.inet_ntoa(packed) == address else b""


def _address(place: int, offset: int, prefix: str) -> tuple[_Part, ...] | None:
    try:
        network = IPv4Network(prefix)
    except ValueError:
        return None
    address, octets = network.network_address.packed, network.prefixlen // 8
    if network.prefixlen == 0 or str(network) != prefix:
        return None
    if network.prefixlen % 8 == 0:
        return ((place, _payload(NETWORK_HEADER, offset, octets) + _equals(address[:octets])),)
    return ((place, _payload(NETWORK_HEADER, offset, 4) + _masked(network.netmask.packed) + _equals(address)),)


def host(offset: int, address: bytes) -> bytes:
    """The expressions for one address at that place in an IPv4 header."""
    return _payload(NETWORK_HEADER, offset, 4) + _equals(address)


def protocol_is(value: bytes) -> bytes:
    """The expressions for a protocol by its number."""
    return _meta(META_L4PROTO) + _equals(value)


def port_is(value: bytes) -> bytes:
    """The expressions for a destination port."""
    return _payload(TRANSPORT_HEADER, PORT_AT, 2) + _equals(value)


CT_ADDRESS_AT, CT_FLAGS_AT, _CT_SIZE = 32, 146, 168
"""``struct xt_conntrack_mtinfo3``: four addresses with masks, times, ports, flags, state, more ports."""


@lru_cache(MANY)
def acting(target: Target) -> bytes | None:  # noqa: PLR0911 -- one a target
    """The expression of what a rule does; None where it is not spoken here."""
    match target:
        case Dnat(address, port) if (to := _packed(address)) and 0 <= (port or 0) <= PORT_MAX:
            flags = _MAP_IPS if port is None else _MAP_IPS | PROTO_SPECIFIED
            # struct nf_nat_range2: from, to, both inclusive
            data = struct.pack("=I", flags) + 2 * (to + bytes(12)) + 2 * struct.pack(">H", port or 0)
            return _extension("target", "DNAT", 2, data, 48)
        case Snat(address, random_fully) if to := _packed(address):
            flags = _MAP_IPS | (PROTO_RANDOM_FULLY if random_fully else 0)
            # struct nf_nat_ipv4_multi_range_compat, of one range
            return _extension("target", "SNAT", 0, struct.pack("=II", 1, flags) + 2 * to, 24)
        case Masquerade(random_fully):
            data = struct.pack("=II", 1, PROTO_RANDOM_FULLY if random_fully else 0)
            return _extension("target", "MASQUERADE", 0, data, 24)
        case SetMark(value, mask) if _printable(Rule((), target)):
            return _extension("target", "MARK", 2, struct.pack("=II", value, mask), 8)
        case Jump(chain) | Goto(chain) if _printable(Rule((), target)):
            return _verdict(JUMP if isinstance(target, Jump) else GOTO, chain)
        case Return():
            return _verdict(RETURN)
        case Drop():
            return _verdict(DROP)
    return None


def _extension(kind: str, name: str, revision: int, data: bytes, size: int) -> bytes:
    """A match or target of xtables, whose private data the kernel takes as they are."""
    what = attribute(1, name.encode() + b"\0") + number(2, revision) + attribute(3, data.ljust(size, b"\0"))
    return _expression(kind, what)


def _verdict(code: int, chain: str = "") -> bytes:
    where = attribute(2, chain.encode() + b"\0") if chain else b""
    return _expression("immediate", number(1, 0) + nested(2, nested(2, number(1, code), where)))


def _meta(key: int) -> bytes:
    return _expression("meta", number(2, key) + number(1, _REGISTER))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", number(1, _REGISTER) + number(2, base) + number(3, offset) + number(4, length))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", number(1, _REGISTER) + number(2, 0) + nested(3, attribute(1, value)))


def _masked(mask: bytes) -> bytes:
    sides = nested(4, attribute(1, mask)) + nested(5, attribute(1, bytes(len(mask))))
    registers = number(1, _REGISTER) + number(2, _REGISTER)
    return _expression("bitwise", registers + number(3, len(mask)) + number(6, 0) + sides)


def counted(packets: bytes, octets: bytes) -> bytes:
    """A rule's counter."""
    return _expression("counter", attribute(1, octets) + attribute(2, packets))


def _expression(name: str, data: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, attribute(1, name.encode() + b"\0"), nested(2, data))


_COUNTER = counted(bytes(8), bytes(8))
