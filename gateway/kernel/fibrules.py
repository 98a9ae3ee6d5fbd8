"""Rules of the routing policy (``ip rule``), as netlink messages: linux/fib_rules.h.

What a rule may say besides "from this prefix, in by that interface, at this priority, to that table" is not taken
apart: such a rule keeps its whole message.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_network

from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attribute, attributes, text, u32
from rules.ruleset import Family
from rules.state import ROUTE_PROTOCOL, USUAL_PRIORITY, PolicyRule

_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34
_FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_SUPPRESS_PREFIXLEN = 2, 3, 6, 14
_FRA_TABLE, _FRA_PAD, _FRA_PROTOCOL = 15, 18, 21
_PLAIN = {_FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_PAD, _FRA_PROTOCOL}
_FR_ACT_TO_TBL = 1
_FIB_RULE_INVERT = 2
_NOTHING_SUPPRESSED = 0xFFFFFFFF

_HEADER = struct.Struct("=BBBBBxxBI")  # family, dst_len, src_len, tos, table, action, flags

_FAMILY: dict[Family, socket.AddressFamily] = {4: socket.AF_INET, 6: socket.AF_INET6}


def everything(family: Family) -> Message:
    """The request for all rules of a family."""
    return Message(_RTM_GETRULE, 0, _HEADER.pack(_FAMILY[family], 0, 0, 0, 0, 0, 0))


def parse(message: memoryview) -> PolicyRule:
    """A rule as the kernel tells it."""
    number, dst_len, src_len, tos, table, action, flags = _HEADER.unpack_from(message)
    said = attributes(message, _HEADER.size)
    suppresses = _FRA_SUPPRESS_PREFIXLEN in said and u32(said[_FRA_SUPPRESS_PREFIXLEN]) != _NOTHING_SUPPRESSED
    selects = dst_len or tos or flags & _FIB_RULE_INVERT or not said.keys() <= _PLAIN
    foreign = selects or suppresses or action != _FR_ACT_TO_TBL
    return PolicyRule(
        interface=text(said[_FRA_IIFNAME]) if _FRA_IIFNAME in said else None,
        table=u32(said[_FRA_TABLE]) if _FRA_TABLE in said else table,
        priority=u32(said[_FRA_PRIORITY]) if _FRA_PRIORITY in said else 0,
        source=f"{socket.inet_ntop(number, said[_FRA_SRC])}/{src_len}" if _FRA_SRC in said else None,
        family=6 if number == socket.AF_INET6 else 4,
        foreign=_resendable(message).hex() if foreign else "",
    )


def _resendable(message: memoryview) -> bytes:
    """The message as a request: of the header's flags all but the inversion describe, and do not ask."""
    *fields, flags = _HEADER.unpack_from(message)
    return _HEADER.pack(*fields, flags & _FIB_RULE_INVERT) + bytes(message[_HEADER.size :])


def addition(rule: PolicyRule) -> Message:
    """The request to add it, refused with EEXIST where it is."""
    return Message(_RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _body(rule, mark=True))


def deletion(rule: PolicyRule) -> Message:
    """The request to delete it, whoever made it; refused with ENOENT where there is none."""
    return Message(_RTM_DELRULE, 0, _body(rule, mark=False))


def _body(rule: PolicyRule, mark: bool) -> bytes:
    if rule.foreign:
        return bytes.fromhex(rule.foreign)
    source = ip_network(rule.source) if rule.source else None
    small_table = rule.table if rule.table < 256 else 0  # the header has one byte for it (0: RT_TABLE_UNSPEC)
    src_len = source.prefixlen if source else 0
    parts = [_HEADER.pack(_FAMILY[rule.family], 0, src_len, 0, small_table, _FR_ACT_TO_TBL, 0)]
    parts.append(attribute(_FRA_TABLE, struct.pack("=I", rule.table)))
    if source:
        parts.append(attribute(_FRA_SRC, source.network_address.packed))
    if rule.interface:
        parts.append(attribute(_FRA_IIFNAME, rule.interface.encode() + b"\0"))
    # Without a priority the kernel would take a rule that is there for another one, and add it again.
    priority = USUAL_PRIORITY if mark and rule.priority is None else rule.priority
    if priority is not None:
        parts.append(attribute(_FRA_PRIORITY, struct.pack("=I", priority)))
    if mark:
        parts.append(attribute(_FRA_PROTOCOL, bytes([ROUTE_PROTOCOL])))
    return b"".join(parts)
