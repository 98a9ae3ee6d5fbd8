"""Traffic control on the wire: tc messages of rtnetlink to values and back.

Structures: linux/rtnetlink.h (tcmsg), linux/pkt_sched.h (tc_htb_glob, tc_htb_opt, tc_ratespec), linux/pkt_cls.h
(tc_u32_sel, tc_u32_key), linux/tc_act/tc_mirred.h. pyroute2's encoder for u32 is not used: it can neither hash nor
link, and it marks every filter as terminal, which on a link keeps filters of lower priority from ever matching.
Numbers are in the machine's byte order, but for what u32 compares with a packet.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.kernel.netlink import attribute, attributes, text, u32
from rules.tc import R2Q, Classify, Htb, Link, Rate, Selector

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTCLASS, RTM_DELTCLASS, RTM_GETTCLASS = 40, 41, 42
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

ROOT_HANDLE = 0x00010000  # 1:
INGRESS_HANDLE = 0xFFFF0000  # ffff:
TC_H_ROOT = 0xFFFFFFFF
TC_H_INGRESS = 0xFFFFFFF1
U32_ROOT = 0xFFF00000  # as a hash table's number: the one that the priority begins with
ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800

TCA_KIND, TCA_OPTIONS = 1, 2
_HTB_PARMS, _HTB_INIT, _HTB_DIRECT_QLEN, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 5, 6, 7
_U32_CLASSID, _U32_HASH, U32_LINK, _U32_DIVISOR, _U32_SEL, U32_POLICE, U32_ACT = 1, 2, 3, 4, 5, 6, 7
_MATCHALL_CLASSID = 1
ACT_KIND, ACT_OPTIONS = 1, 2
_MIRRED_PARMS = 2
_EGRESS_REDIR = 1
_TC_ACT_STOLEN = 4
_TERMINAL = 1
_LINKLAYER_ETHERNET = 1
_HTB_VERSION = 3
_DIRECT_PACKETS = 1000  # what may wait unshaped: a device without a queue of its own would have it dropped
_RATE_MAX = 0xFFFFFFFF

TCMSG = struct.Struct("=BxxxiIII")  # family, interface index, handle, parent, info
_GLOB = struct.Struct("=5I")  # version, rate2quantum, default, debug, direct packets
_RATESPEC = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, minimal unit, rate
_HTB_TAIL = struct.Struct("=5I")  # buffer, ceil buffer, quantum, level, priority
_SEL = struct.Struct("=BBBxHHhhI")  # flags, offset shift, keys, offset mask, offset, hash offset..., hash mask
_KEY = struct.Struct("=IIii")  # mask, value (both as they stand in the packet), offset, offset mask
_MIRRED = struct.Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, ifindex


@dataclass(frozen=True, slots=True)
class Header:
    """What says which object is meant; ``index`` is the interface's."""

    index: int
    handle: int
    parent: int
    info: int = 0


@dataclass(frozen=True, slots=True)
class Tc(Header):
    """One object of a dump: the header and the attributes."""

    kind: str = ""
    options: memoryview | None = None


def decoded(message: memoryview) -> Tc:
    """The object in a message; its options are decoded by kind."""
    _, index, handle, parent, info = TCMSG.unpack_from(message)
    said = attributes(message, TCMSG.size)
    kind = text(said[TCA_KIND]) if TCA_KIND in said else ""
    return Tc(index, handle, parent, info, kind, said.get(TCA_OPTIONS))


def encoded(header: Header, kind: str = "", options: bytes | None = None) -> bytes:
    """The body of a message."""
    message = TCMSG.pack(0, header.index, header.handle, header.parent, header.info)
    if kind:
        message += attribute(TCA_KIND, kind.encode() + b"\0")
    if options is not None:
        message += attribute(TCA_OPTIONS, options)
    return message


def _number(kind: int, value: int, size: str = "I") -> bytes:
    return attribute(kind, struct.pack(f"={size}", value))


def filter_info(priority: int, protocol: int) -> int:
    """tcm_info of a filter: its priority, and its protocol in network byte order."""
    return priority << 16 | _swapped16(protocol)


def priority_of(info: int) -> int:
    return info >> 16


def protocol_of(info: int) -> int:
    return _swapped16(info & 0xFFFF)


def _swapped16(value: int) -> int:
    return int.from_bytes(struct.pack("!H", value), _NATIVE)


def _swapped32(value: int) -> int:
    return int.from_bytes(struct.pack("!I", value), _NATIVE)


_NATIVE: Literal["little", "big"] = "little" if struct.pack("=H", 1) == b"\1\0" else "big"


# HTB.


def htb_root(root: Htb) -> bytes:
    return attribute(_HTB_INIT, _GLOB.pack(_HTB_VERSION, R2Q, root.default, 0, 0)) + _number(
        _HTB_DIRECT_QLEN, _DIRECT_PACKETS
    )


def htb_root_of(options: memoryview) -> tuple[Htb, int]:
    """The root qdisc, and its rate2quantum."""
    _, r2q, default, _, _ = _GLOB.unpack_from(attributes(options)[_HTB_INIT])
    return Htb(default, ours=r2q == R2Q), r2q


def htb_class(rate: Rate) -> bytes:
    """Rate and ceiling are one; the quantum is named, so that the kernel computes (and complains about) none.

    Its last byte is our mark: a tree that was adopted while it had no classes is known by those that we put there.
    """
    low = min(rate.rate, _RATE_MAX)
    spec = _RATESPEC.pack(0, _LINKLAYER_ETHERNET, 0, 0, 0, low)
    quantum = max(1600, min(rate.rate // 10, 200_000)) & ~0xFF | R2Q
    parameters = spec + spec + _HTB_TAIL.pack(rate.burst, rate.burst, quantum, 0, 0)
    high = b""
    if rate.rate > _RATE_MAX:
        high = _number(_HTB_RATE64, rate.rate, "Q") + _number(_HTB_CEIL64, rate.rate, "Q")
    return attribute(_HTB_PARMS, parameters) + high


def htb_class_of(options: memoryview) -> Rate:
    """The class; one whose ceiling lies above its rate comes as what it lets through: the ceiling."""
    said = attributes(options)
    parameters = said[_HTB_PARMS]
    ceil = _RATESPEC.unpack_from(parameters, _RATESPEC.size)[5]
    _, cbuffer, _, _, _ = _HTB_TAIL.unpack_from(parameters, 2 * _RATESPEC.size)
    if _HTB_CEIL64 in said:
        (ceil,) = struct.unpack_from("=Q", said[_HTB_CEIL64])
    return Rate(ceil, cbuffer)


def htb_class_is_ours(options: memoryview) -> bool:
    """Whether the class bears our mark."""
    _, _, quantum, _, _ = _HTB_TAIL.unpack_from(attributes(options)[_HTB_PARMS], 2 * _RATESPEC.size)
    return bool(quantum & 0xFF == R2Q)


def fifo_limit(size: int) -> bytes:
    """Options of a bfifo: how many bytes may wait."""
    return struct.pack("=I", size)


# u32.


def u32_table(divisor: int) -> bytes:
    return _number(_U32_DIVISOR, divisor)


def u32_filter(value: Classify | Link, hangs_on: int) -> bytes:
    """A filter in the table (and bucket) ``hangs_on``."""
    if isinstance(value, Link):
        selector = _selector(0, (Selector(),), value.offset, value.mask)
        target = _number(U32_LINK, value.table << 20)
    else:
        selector = _selector(_TERMINAL, value.selectors, 0, 0)
        target = _number(_U32_CLASSID, ROOT_HANDLE | value.minor)
    return target + _number(_U32_HASH, hangs_on) + attribute(_U32_SEL, selector)


def u32_root_filter(selector: Selector) -> bytes:
    """A filter in the table that its priority begins with; what it does is still to be said."""
    return _number(_U32_HASH, U32_ROOT) + attribute(_U32_SEL, _selector(_TERMINAL, (selector,), 0, 0))


def _selector(flags: int, selectors: Sequence[Selector], hash_offset: int, hash_mask: int) -> bytes:
    keys = (_KEY.pack(_swapped32(one.mask), _swapped32(one.value), one.offset, 0) for one in selectors)
    return _SEL.pack(flags, 0, len(selectors), 0, 0, 0, hash_offset, _swapped32(hash_mask)) + b"".join(keys)


def u32_redirect(to_index: int) -> bytes:
    """A filter that takes everything out of another interface."""
    parameters = attribute(_MIRRED_PARMS, _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _EGRESS_REDIR, to_index))
    action = attribute(ACT_KIND, b"mirred\0") + attribute(ACT_OPTIONS, parameters)
    return attribute(_U32_SEL, _selector(_TERMINAL, (Selector(),), 0, 0)) + attribute(U32_ACT, attribute(1, action))


def u32_divisor_of(options: memoryview) -> int | None:
    """The number of buckets where this is a hash table, None where it is a filter."""
    said = attributes(options)
    return u32(said[_U32_DIVISOR]) if _U32_DIVISOR in said else None


def u32_filter_of(options: memoryview) -> Classify | Link | None:
    """The filter, or None for one that does more than choose a class or a table."""
    said = attributes(options)
    if _U32_SEL not in said or U32_POLICE in said or U32_ACT in said:
        return None
    flags, _, _, _, _, _, hash_offset, hash_mask = _SEL.unpack_from(said[_U32_SEL])
    if U32_LINK in said:
        return Link(u32(said[U32_LINK]) >> 20, hash_offset, _swapped32(hash_mask))
    selectors = u32_selectors_of(said)
    if selectors is None or not flags & _TERMINAL or _U32_CLASSID not in said:
        return None
    return Classify(selectors, u32(said[_U32_CLASSID]) & 0xFFFF)


def u32_selectors_of(said: Mapping[int, memoryview]) -> tuple[Selector, ...] | None:
    """What a filter with these attributes compares; None where that depends on other bytes of the packet."""
    if _U32_SEL not in said:
        return None
    _, _, keys, offset_mask, _, _, _, _ = _SEL.unpack_from(said[_U32_SEL])
    compared = [_KEY.unpack_from(said[_U32_SEL], _SEL.size + at * _KEY.size) for at in range(keys)]
    if offset_mask or any(varies for _, _, _, varies in compared):
        return None
    return tuple(Selector(_swapped32(value), _swapped32(mask), offset) for mask, value, offset, _ in compared)


def u32_redirect_of(options: memoryview) -> int | None:
    """The index of the interface that a redirecting filter leads to; None for any other filter."""
    said = attributes(options)
    action = attributes(said[U32_ACT]).get(1) if U32_ACT in said else None
    parts = attributes(action) if action is not None else {}
    if ACT_KIND not in parts or text(parts[ACT_KIND]) != "mirred" or ACT_OPTIONS not in parts:
        return None
    _, _, _, _, _, what, index = _MIRRED.unpack_from(attributes(parts[ACT_OPTIONS])[_MIRRED_PARMS])
    return int(index) if what == _EGRESS_REDIR else None


def matchall_class_of(options: memoryview | None) -> int | None:
    """The class that a matchall filter leads to."""
    said = attributes(options) if options is not None else {}
    return u32(said[_MATCHALL_CLASSID]) & 0xFFFF if _MATCHALL_CLASSID in said else None
