"""The private data of xtables' extensions: the kernel takes them as they are, from either iptables variant.

Layouts: linux/netfilter/xt_conntrack.h, xt_mark.h, nf_nat.h. Sizes are filled up to eight bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from rules.iptables import PORT_MAX, render_rule
from rules.ruleset import (
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    InInterface,
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

_MAP_IPS, _PROTO_SPECIFIED, _PROTO_RANDOM_FULLY = 1, 2, 16  # NF_NAT_RANGE_*
_CT_STATE, _CT_ORIGDST, _STATE_DNAT, _ESTABLISHED_OR_RELATED = 0x1, 0x8, 0x80, 0x6  # XT_CONNTRACK_*
_CT_ADDRESS_AT, _CT_FLAGS_AT, _CT_SIZE = 32, 146, 168
"""``struct xt_conntrack_mtinfo3``: four addresses with masks, times, ports, flags, state, more ports."""
_NAT_PORT_AT = 36

PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
"""Those whose ports are spoken of. Of SCTP's iptables-nft has no expressions but its own extension; it does not read
others back."""
PROTOCOL_NAMES: Mapping[int, str] = {number: name for name, number in PROTOCOLS.items()}


class Extension(NamedTuple):
    """A match or target as it is written: its name, its revision, its data."""

    name: str
    revision: int
    data: bytes


def tracked(match: Match) -> Extension | None:
    """A match on the connection; None for any other."""
    match match:
        case Conntrack("DNAT", orig_dst) if address := packed(orig_dst):
            data = bytes(_CT_ADDRESS_AT) + address + bytes(12) + b"\xff" * 16
            flags = struct.pack("=HHHH", _CT_STATE | _CT_ORIGDST, 0, _STATE_DNAT, 0)
        case States("RELATED,ESTABLISHED"):
            data, flags = b"", struct.pack("=HHH", _CT_STATE, 0, _ESTABLISHED_OR_RELATED)
        case _:
            return None
    return Extension("conntrack", 3, (data.ljust(_CT_FLAGS_AT, b"\0") + flags).ljust(_CT_SIZE, b"\0"))


def tracking(data: bytes) -> Match:
    """What a match on the connection may say; ``tracked`` tells whether it says that and nothing else."""
    if data[_CT_FLAGS_AT : _CT_FLAGS_AT + 2] == struct.pack("=H", _CT_STATE):
        return States("RELATED,ESTABLISHED")
    return Conntrack("DNAT", _address(data, _CT_ADDRESS_AT))


def action(target: Target) -> Extension | None:
    """A target that is no verdict; None for the others."""
    match target:
        case Dnat(address, port) if (to := packed(address)) and 0 <= (port or 0) <= PORT_MAX:
            flags = _MAP_IPS if port is None else _MAP_IPS | _PROTO_SPECIFIED
            # struct nf_nat_range2: from, to, both inclusive
            data = struct.pack("=I", flags) + 2 * (to + bytes(12)) + 2 * struct.pack(">H", port or 0)
            return Extension("DNAT", 2, data.ljust(48, b"\0"))
        case Snat(address, random_fully) if to := packed(address):
            flags = _MAP_IPS | (_PROTO_RANDOM_FULLY if random_fully else 0)
            # struct nf_nat_ipv4_multi_range_compat, of one range
            return Extension("SNAT", 0, (struct.pack("=II", 1, flags) + 2 * to).ljust(24, b"\0"))
        case Masquerade(random_fully):
            flags = _PROTO_RANDOM_FULLY if random_fully else 0
            return Extension("MASQUERADE", 0, struct.pack("=II", 1, flags).ljust(24, b"\0"))
        case SetMark(value, mask) if printable(Rule((), target)):
            return Extension("MARK", 2, struct.pack("=II", value, mask))
    return None


def acted(name: str, data: bytes) -> Target | None:
    """What a target may do; ``action`` tells whether it does that and nothing else."""
    info = data.ljust(48, b"\0")
    first, second = struct.unpack_from("=II", info)
    match name:
        case "DNAT":
            ported = first & _PROTO_SPECIFIED
            port = int.from_bytes(info[_NAT_PORT_AT : _NAT_PORT_AT + 2], "big") if ported else None
            return Dnat(_address(info, 4), port)
        case "SNAT":
            return Snat(_address(info, 8), bool(second & _PROTO_RANDOM_FULLY))
        case "MASQUERADE":
            return Masquerade(bool(second & _PROTO_RANDOM_FULLY))
        case "MARK":
            return SetMark(first, second)
    return None


def packed(address: str) -> bytes:
    """The four bytes of an address as people write it; none where it is something else."""
    try:
        four = socket.inet_aton(address)
    except OSError:
        return b""
    return four if socket.inet_ntoa(four) == address else b""


def _address(data: bytes, at: int) -> str:
    return socket.inet_ntoa(data[at : at + 4].ljust(4, b"\0"))


def printable(rule: Rule) -> bool:
    """Whether iptables prints the rule so that it is read back as the same one."""
    try:
        render_rule(rule)
    except ValueError:
        return False
    return True


def printable_match(match: Match) -> bool:
    """The same of one match."""
    return printable(Rule((match,), Return()))


ORDER = (Source, Destination, InInterface, OutInterface, DestinationPort, Protocol, Mark, Conntrack, States)
"""As iptables-save prints matches, and ``rules.iptables`` reads them."""


@lru_cache
def in_order(kinds: tuple[type[Match], ...]) -> bool:
    """Whether matches of these kinds stand as iptables prints them, each once."""
    return list(kinds) == [kind for kind in ORDER if kind in kinds]
