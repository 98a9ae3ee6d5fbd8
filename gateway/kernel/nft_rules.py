"""Rules of the nft variant of iptables as nf_tables expressions, byte for byte as ``iptables-nft`` writes them.

Only what our long chains hold is spoken here; for anything else ``expressions`` has no answer, and the tool is asked.
Messages: linux/netfilter/nf_tables.h; the private data of xtables extensions: xt_conntrack.h, nf_nat.h.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Network

from gateway.kernel.netlink import attribute
from rules.ruleset import (
    AnyRule,
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    InInterface,
    Mark,
    Match,
    OutInterface,
    Rule,
    Snat,
    Source,
    Target,
)

_REGISTER = 1  # NFT_REG_1, of 16 bytes
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_L4PROTO = 3, 6, 7, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_SOURCE_AT, _DESTINATION_AT = 12, 16  # in an IPv4 header
_PORT_AT = 2  # the destination port, in the header of either
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
"""Of SCTP's ports iptables-nft has no expressions but its own extension; it does not read others back."""

_MAP_IPS, _PROTO_SPECIFIED, _PROTO_RANDOM_FULLY = 1, 2, 16  # NF_NAT_RANGE_*
_CT_STATE, _CT_ORIGDST, _STATE_DNAT = 0x1, 0x8, 0x80  # XT_CONNTRACK_*

NFTA_LIST_ELEM = 1


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | 0x8000, b"".join(inner))


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network byte order, as nf_tables wants its numbers."""
    return attribute(kind, struct.pack(">I", value))


def expressions(rule: AnyRule) -> bytes | None:
    """The body of NFTA_RULE_EXPRESSIONS for an IPv4 rule; None for one that is not spoken here."""
    if not isinstance(rule, Rule):
        return None
    parts = [part for match in rule.matches for part in _match(match)]
    target = _target(rule.target)
    if target is None or any(part is None for _, part in parts):
        return None
    # iptables-nft writes interfaces and the protocol ahead of the addresses, in whatever order it prints them.
    ordered = [part for _, part in sorted(parts, key=lambda placed: placed[0]) if part is not None]
    return b"".join([*ordered, _COUNTER, target])


_Part = tuple[int, bytes | None]  # where it stands, and its expressions


def _match(match: Match) -> list[_Part]:  # noqa: PLR0911 -- one a match
    match match:
        case InInterface(name):
            return [(0, _meta(_META_IIFNAME) + _equals(name.encode() + b"\0"))]
        case OutInterface(name):
            return [(1, _meta(_META_OIFNAME) + _equals(name.encode() + b"\0"))]
        case Source(prefix):
            return [(3, _address(_SOURCE_AT, prefix))]
        case Destination(prefix):
            return [(4, _address(_DESTINATION_AT, prefix))]
        case DestinationPort(protocol, port) if protocol in _PROTOCOLS:
            known = _meta(_META_L4PROTO) + _equals(bytes([_PROTOCOLS[protocol]]))
            return [(2, known), (5, _payload(_TRANSPORT_HEADER, _PORT_AT, 2) + _equals(struct.pack(">H", port)))]
        case Mark(value, mask):
            return [(5, _meta(_META_MARK) + _masked(struct.pack("=I", mask)) + _equals(struct.pack("=I", value)))]
        case Conntrack("DNAT", orig_dst):
            return [(5, _conntrack(orig_dst))]
    return [(0, None)]


def _address(offset: int, prefix: str) -> bytes | None:
    try:
        network = IPv4Network(prefix)
    except ValueError:
        return None
    address, octets = network.network_address.packed, network.prefixlen // 8
    if network.prefixlen == 0:
        return None
    if network.prefixlen % 8 == 0:
        return _payload(_NETWORK_HEADER, offset, octets) + _equals(address[:octets])
    return _payload(_NETWORK_HEADER, offset, 4) + _masked(network.netmask.packed) + _equals(address)


def _conntrack(orig_dst: str) -> bytes:
    """``struct xt_conntrack_mtinfo3``: four addresses with masks, times, ports, flags, state, more ports."""
    address = socket.inet_aton(orig_dst) + bytes(12)
    flags = struct.pack("=HHHH", _CT_STATE | _CT_ORIGDST, 0, _STATE_DNAT, 0)
    return _extension("match", "conntrack", 3, bytes(32) + address + b"\xff" * 16 + bytes(82) + flags, 168)


def _target(target: Target) -> bytes | None:
    match target:
        case Dnat(address, port):
            to = socket.inet_aton(address) + bytes(12)
            flags = _MAP_IPS if port is None else _MAP_IPS | _PROTO_SPECIFIED
            # struct nf_nat_range2: from, to, both inclusive
            data = struct.pack("=I", flags) + to + to + struct.pack(">HH", port or 0, port or 0)
            return _extension("target", "DNAT", 2, data, 48)
        case Snat(address, random_fully):
            to = socket.inet_aton(address)
            flags = _MAP_IPS | (_PROTO_RANDOM_FULLY if random_fully else 0)
            # struct nf_nat_ipv4_multi_range_compat, of one range
            return _extension("target", "SNAT", 0, struct.pack("=II", 1, flags) + to + to, 24)
    return None


def _extension(kind: str, name: str, revision: int, data: bytes, size: int) -> bytes:
    """A match or target of xtables, whose private data the kernel takes as they are."""
    what = attribute(1, name.encode() + b"\0") + number(2, revision) + attribute(3, data.ljust(size, b"\0"))
    return _expression(kind, what)


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


def _expression(name: str, data: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, attribute(1, name.encode() + b"\0"), nested(2, data))


_COUNTER = _expression("counter", attribute(1, bytes(8)) + attribute(2, bytes(8)))
