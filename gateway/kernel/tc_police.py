"""Policers on the wire: filters that drop what exceeds a rate, as Kube-OVN's script made them up to release 1.15.

They are read, deleted, and put back where that is undone; nothing new is made of them. Structures: linux/pkt_cls.h
(tc_police, TCA_POLICE_*, TCA_MATCHALL_*), linux/pkt_sched.h (tc_ratespec).
"""

from __future__ import annotations

import struct

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import attribute, attributes, text
from rules.tc import Policer, Rate, Selector

_POLICE_TBF, _POLICE_RATE, _POLICE_RATE64 = 1, 2, 8
_MATCHALL_ACT = 2
_SHOT = 2  # TC_ACT_SHOT: what happens to what exceeds the rate
_RATE_MAX = 0xFFFFFFFF
_HEAD = struct.Struct("=IiIII")  # index, action, limit, burst, largest packet
_RATESPEC = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, minimal unit, rate
_TAIL = struct.Struct("=iiI")  # references, bindings, capabilities
_ETHERNET, _CELL_LOG = 1, 3
# The kernel wants a table of how long packets take, and computes that itself where it knows the link layer.
_RATE_TABLE = bytes(1024)


def policer_of(found: wire.Tc) -> Policer | None:
    """The policer of a filter, or None for a filter that does anything else, or more."""
    if wire.protocol_of(found.info) != wire.ETH_P_IP or found.options is None:
        return None
    said = attributes(found.options)
    if found.kind == "matchall":
        rate = _rate_of(_action(said.get(_MATCHALL_ACT)))
        return None if rate is None else Policer(Selector(), rate, matchall=True)
    selectors = wire.u32_selectors_of(said) if found.kind == "u32" else None
    old = said.get(wire.U32_POLICE)  # `police` in tc's words; `action police` comes as any other action
    rate = _rate_of(attributes(old) if old is not None else _action(said.get(wire.U32_ACT)))
    if rate is None or selectors is None or len(selectors) != 1 or wire.U32_LINK in said:
        return None
    return Policer(selectors[0], rate)


def _action(actions: memoryview | None) -> dict[int, memoryview]:
    """What is said of the one action, if that is a policer."""
    listed = attributes(actions) if actions is not None else {}
    parts = attributes(listed[1]) if set(listed) == {1} else {}
    kind, options = parts.get(wire.ACT_KIND), parts.get(wire.ACT_OPTIONS)
    return attributes(options) if kind is not None and text(kind) == "police" and options is not None else {}


def _rate_of(said: dict[int, memoryview]) -> Rate | None:
    body = said.get(_POLICE_TBF)
    if body is None:
        return None
    _, exceeding, _, burst, _ = _HEAD.unpack_from(body)
    rate = _RATESPEC.unpack_from(body, _HEAD.size)[5]
    if _POLICE_RATE64 in said:
        (rate,) = struct.unpack_from("=Q", said[_POLICE_RATE64])
    return Rate(rate, burst) if exceeding == _SHOT and rate and burst else None


def police_options(policer: Policer) -> tuple[str, bytes]:
    """Kind and options of the filter that makes a policer, at the root of its priority."""
    police = _police(policer.rate)
    if policer.matchall:
        action = attribute(wire.ACT_KIND, b"police\0") + attribute(wire.ACT_OPTIONS, police)
        return "matchall", attribute(_MATCHALL_ACT, attribute(1, action))
    return "u32", wire.u32_root_filter(policer.selector) + attribute(wire.U32_POLICE, police)


def _police(rate: Rate) -> bytes:
    spec = _RATESPEC.pack(_CELL_LOG, _ETHERNET, 0, -1, 0, min(rate.rate, _RATE_MAX))
    none = _RATESPEC.pack(0, 0, 0, 0, 0, 0)
    body = attribute(_POLICE_TBF, _HEAD.pack(0, _SHOT, 0, rate.burst, 0) + spec + none + _TAIL.pack(0, 0, 0))
    high = attribute(_POLICE_RATE64, struct.pack("=Q", rate.rate)) if rate.rate > _RATE_MAX else b""
    return body + attribute(_POLICE_RATE, _RATE_TABLE) + high
