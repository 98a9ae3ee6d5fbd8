"""Rules of the nft variant of iptables as nf_tables expressions, byte for byte as ``iptables-nft`` writes them.

Only what our long chains hold is spoken here, and the guard that comes and goes with the EIPs; for anything else
``expressions`` has no answer, and the tool is asked.
Messages: linux/netfilter/nf_tables.h; the private data of xtables extensions: xt_conntrack.h, nf_nat.h.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Network

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
    nested,
    number,
    payload,
)
from rules.ruleset import (
    AnyRule,
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    InInterface,
    Mark,
    Match,
    OutInterface,
    Rule,
    Snat,
    Source,
    Target,
)

_VERDICT, _NF_DROP = 0, 0  # the register NFT_REG_VERDICT; linux/netfilter.h
_PORT_AT = 2  # the destination port, in the header of either
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
"""Of SCTP's ports iptables-nft has no expressions but its own extension; it does not read others back."""

_MAP_IPS, _PROTO_SPECIFIED, _PROTO_RANDOM_FULLY = 1, 2, 16  # NF_NAT_RANGE_*
_CT_STATE, _CT_ORIGDST, _STATE_DNAT = 0x1, 0x8, 0x80  # XT_CONNTRACK_*


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
            return [(0, meta(META_IIFNAME) + equals(name.encode() + b"\0"))]
        case OutInterface(name):
            return [(1, meta(META_OIFNAME) + equals(name.encode() + b"\0"))]
        case Source(prefix):
            return [(3, _address(SOURCE_AT, prefix))]
        case Destination(prefix):
            return [(4, _address(DESTINATION_AT, prefix))]
        case DestinationPort(protocol, port) if protocol in _PROTOCOLS:
            known = meta(META_L4PROTO) + equals(bytes([_PROTOCOLS[protocol]]))
            return [(2, known), (5, payload(TRANSPORT_HEADER, _PORT_AT, 2) + equals(struct.pack(">H", port)))]
        case Mark(value, mask):
            return [(5, meta(META_MARK) + masked(struct.pack("=I", mask)) + equals(struct.pack("=I", value)))]
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
        return payload(NETWORK_HEADER, offset, octets) + equals(address[:octets])
    return payload(NETWORK_HEADER, offset, 4) + masked(network.netmask.packed) + equals(address)


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
        case Drop():
            return expression("immediate", number(1, _VERDICT) + nested(2, nested(2, number(1, _NF_DROP))))
    return None


def _extension(kind: str, name: str, revision: int, data: bytes, size: int) -> bytes:
    """A match or target of xtables, whose private data the kernel takes as they are."""
    what = attribute(1, name.encode() + b"\0") + number(2, revision) + attribute(3, data.ljust(size, b"\0"))
    return expression(kind, what)


_COUNTER = expression("counter", attribute(1, bytes(8)) + attribute(2, bytes(8)))
