"""Routing rules that ask for nothing but the interface a packet came in by (``ip rule``: ``iif net1 lookup 100``).

IPv4. Messages: linux/fib_rules.h.
"""

from __future__ import annotations

import socket
import struct

from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attributes, text, u32
from rules.state import ROUTE_PROTOCOL, PolicyRule

_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_PAD, _FRA_PROTOCOL = 3, 6, 14, 15, 18, 21
_PLAIN = {_FRA_IIFNAME, _FRA_PRIORITY, _FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_PAD, _FRA_PROTOCOL}
_FR_ACT_TO_TBL = 1
_PRIORITY = 32764  # ahead of the main table's rule; without one the kernel would take a rule that is there for another
_FIB_RULE_INVERT = 2
_NOTHING_SUPPRESSED = 0xFFFFFFFF

_HEADER = struct.Struct("=BBBBBxxBI")  # family, dst_len, src_len, tos, table, action, flags
_ATTRIBUTE = struct.Struct("=HH")  # length, type

ALL = Message(_RTM_GETRULE, 0, _HEADER.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0))
"""The request for all rules."""


def parse(message: memoryview) -> PolicyRule | None:
    """What a rule says if the interface is all that it asks for, and a table all that it leads to; else None."""
    _, dst_len, src_len, tos, table, action, flags = _HEADER.unpack_from(message)
    said = attributes(message, _HEADER.size)
    selects = dst_len or src_len or tos or flags & _FIB_RULE_INVERT or not said.keys() <= _PLAIN
    suppresses = _FRA_SUPPRESS_PREFIXLEN in said and u32(said[_FRA_SUPPRESS_PREFIXLEN]) != _NOTHING_SUPPRESSED
    if selects or suppresses or action != _FR_ACT_TO_TBL or _FRA_IIFNAME not in said:
        return None
    return PolicyRule(text(said[_FRA_IIFNAME]), u32(said[_FRA_TABLE]) if _FRA_TABLE in said else table)


def addition(rule: PolicyRule) -> Message:
    """The request to add it, refused with EEXIST where it is, by us."""
    priority = _attribute(_FRA_PRIORITY, struct.pack("=I", _PRIORITY))
    return Message(_RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _body(rule) + priority)


def deletion(rule: PolicyRule) -> Message:
    """The request to delete it, refused with ENOENT where there is none."""
    return Message(_RTM_DELRULE, 0, _body(rule))


def _body(rule: PolicyRule) -> bytes:
    header = _HEADER.pack(socket.AF_INET, 0, 0, 0, rule.table, _FR_ACT_TO_TBL, 0)
    marks = ((_FRA_IIFNAME, rule.interface.encode() + b"\0"), (_FRA_PROTOCOL, bytes([ROUTE_PROTOCOL])))
    return header + b"".join(_attribute(kind, value) for kind, value in marks)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
