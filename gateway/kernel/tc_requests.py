"""The requests that make and delete traffic control objects."""

from __future__ import annotations

import socket
import struct

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Message, body
from gateway.kernel.tc_police import police_options
from gateway.kernel.tc_wire import INGRESS_HANDLE, ROOT_HANDLE, TC_H_INGRESS, TC_H_ROOT, Header
from gateway.ports import Refused
from rules.tc import (
    BUCKETS,
    ROOT_TABLE,
    Classify,
    ClassKey,
    DeleteTc,
    FilterKey,
    Htb,
    IfbKey,
    IngressKey,
    Link,
    Policer,
    PolicerKey,
    Rate,
    Redirect,
    RedirectKey,
    RootKey,
    SetTc,
    TableKey,
    TcStep,
)
from rules.tc_text import tc_text

REDIRECT_PRIORITY = 0xFFFF
LEAVES = ("fq_codel", "sfq", "bfifo")
"""Queues for a class, the best first."""

_RTM_NEWLINK, _RTM_DELLINK = 16, 17
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFF_UP = 0x1
_IFB_QUEUE = 1000
_LEAST_QUEUE = 256 * 1024  # bytes; four segments as large as offloading makes them, or TCP starves at 1 Mbit/s
_MOST_QUEUE = 32 * 1024 * 1024  # fq_codel bounds its memory likewise
_NEW = NLM_F_CREATE | NLM_F_EXCL


def made(step: SetTc, index: int) -> Message:
    """What makes the object on the interface of that index. Raises Refused for what cannot be."""
    match step.key, step.value:
        case IfbKey(device), _:
            return _ifb(device)
        case RootKey(), Htb() as root:
            header = Header(index, ROOT_HANDLE, TC_H_ROOT)
            return Message(wire.RTM_NEWQDISC, _NEW, wire.encoded(header, "htb", wire.htb_root(root)))
        case IngressKey(), _:
            header = Header(index, INGRESS_HANDLE, TC_H_INGRESS)
            return Message(wire.RTM_NEWQDISC, _NEW, wire.encoded(header, "ingress", b""))
        case ClassKey(_, minor), Rate() as rate:
            header = Header(index, ROOT_HANDLE | minor, ROOT_HANDLE)
            return Message(wire.RTM_NEWTCLASS, NLM_F_CREATE, wire.encoded(header, "htb", wire.htb_class(rate)))
    return Message(wire.RTM_NEWTFILTER, _NEW, _filter(step, index))


def _filter(step: SetTc, index: int) -> bytes:
    match step.key, step.value:
        case TableKey(_, priority, table), _:
            header = Header(index, table << 20, ROOT_HANDLE, _info(priority))
            return wire.encoded(header, "u32", wire.u32_table(BUCKETS))
        case FilterKey() as key, (Classify() | Link()) as value:
            # The number of the table that a priority begins with is not ours to know before it is there.
            hangs_on = wire.U32_ROOT if key.table == ROOT_TABLE else key.table << 20 | key.bucket << 12
            handle = key.node if key.table == ROOT_TABLE else hangs_on | key.node
            header = Header(index, handle, ROOT_HANDLE, _info(key.priority))
            return wire.encoded(header, "u32", wire.u32_filter(value, hangs_on))
        case PolicerKey(_, ingress, priority, handle), Policer() as policer:
            header = Header(index, handle, INGRESS_HANDLE if ingress else ROOT_HANDLE, _info(priority))
            return wire.encoded(header, *police_options(policer))
        case RedirectKey(), Redirect(ifb):
            to = index_of(ifb)
            if to is None:
                raise Refused(tc_text(step), f"no such interface {ifb}", retryable=True)
            header = Header(index, 0, INGRESS_HANDLE, _info(REDIRECT_PRIORITY))
            return wire.encoded(header, "u32", wire.u32_redirect(to))
    raise Refused(tc_text(step), "only Kube-OVN's script makes such", retryable=False)


def deleted(step: DeleteTc, index: int) -> Message:
    """What deletes the object; a filter is deleted by what the kernel says of it."""
    match step.key:
        case IfbKey():
            return Message(_RTM_DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))
        case RootKey():
            return Message(wire.RTM_DELQDISC, 0, wire.encoded(Header(index, ROOT_HANDLE, TC_H_ROOT)))
        case IngressKey():
            return Message(wire.RTM_DELQDISC, 0, wire.encoded(Header(index, INGRESS_HANDLE, TC_H_INGRESS)))
        case ClassKey(_, minor):
            return Message(wire.RTM_DELTCLASS, 0, wire.encoded(Header(index, ROOT_HANDLE | minor, ROOT_HANDLE)))
    raise Refused(tc_text(step), "it goes with what it belongs to", retryable=False)


def queue(step: TcStep, index: int, kind: str) -> Message:
    """What gives the class of the step a queue; where it has one of that kind, the queue is adjusted."""
    assert isinstance(step.key, ClassKey)
    assert isinstance(step.value, Rate)
    options = wire.fifo_limit(min(max(_LEAST_QUEUE, step.value.rate // 10), _MOST_QUEUE)) if kind == "bfifo" else None
    header = Header(index, 0, ROOT_HANDLE | step.key.minor)
    return Message(wire.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, wire.encoded(header, kind, options))


def index_of(name: str) -> int | None:
    """The interface's index, None where there is no such interface."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _info(priority: int) -> int:
    return wire.filter_info(priority, wire.ETH_P_IP)


def _ifb(device: str) -> Message:
    message = ifinfmsg()
    message["flags"] = message["change"] = _IFF_UP
    message["attrs"] = [
        ("IFLA_IFNAME", device),
        ("IFLA_TXQLEN", _IFB_QUEUE),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "ifb")]}),
    ]
    return Message(_RTM_NEWLINK, NLM_F_CREATE, body(message))
