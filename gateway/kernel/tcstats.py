"""What the kernel counts of bandwidth limits: two dumps, whatever their number. Structures: linux/gen_stats.h."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from gateway.kernel import tc_wire as wire
from gateway.kernel.netlink import Message, Netlink, attributes
from gateway.kernel.tc_requests import index_of
from gateway.ports import Shaped
from rules.tc import ClassKey

_TCA_STATS2 = 7
_BASIC, _QUEUE, _PACKETS64 = 1, 3, 8
_BASIC_STATS = struct.Struct("=QI")  # bytes, packets
_QUEUE_STATS = struct.Struct("=IIII")  # packets that wait, their bytes, drops, requeues


def shaped(classes: Iterable[ClassKey]) -> dict[ClassKey, Shaped]:
    """The counters of those classes that are there; for any thread. Raises OSError.

    What a class let through is its own figure; what was dropped and what waits is that of its queue.
    """
    wanted = set(classes)
    devices = {index: name for name in {key.device for key in wanted} if (index := index_of(name)) is not None}
    if not devices:
        return {}
    netlink = Netlink(socket.NETLINK_ROUTE)
    try:
        queues = {
            (index, parent): said
            for index, _, parent, said in _dump(netlink, wire.RTM_GETQDISC, 0)
            if index in devices and parent
        }
        found: dict[ClassKey, Shaped] = {}
        for index, name in devices.items():
            for _, handle, _, said in _dump(netlink, wire.RTM_GETTCLASS, index):
                key = ClassKey(name, handle & 0xFFFF)
                if key in wanted:
                    found[key] = _shaped(said, queues.get((index, handle), {}))
        return found
    finally:
        netlink.close()


_Said = dict[int, memoryview]


def _dump(netlink: Netlink, kind: int, index: int) -> Iterable[tuple[int, int, int, _Said]]:
    """Interface, handle, parent and statistics of every qdisc or class."""
    for message in netlink.dump(Message(kind, 0, wire.encoded(wire.Header(index, 0, 0)))):
        _, at, handle, parent, _ = wire.TCMSG.unpack_from(message)
        said = attributes(message, wire.TCMSG.size).get(_TCA_STATS2)
        yield at, handle, parent, attributes(said) if said is not None else {}


def _shaped(of_class: _Said, of_queue: _Said) -> Shaped:
    octets, packets = _BASIC_STATS.unpack_from(of_class[_BASIC]) if _BASIC in of_class else (0, 0)
    if _PACKETS64 in of_class:
        (packets,) = struct.unpack_from("=Q", of_class[_PACKETS64])
    said = of_queue.get(_QUEUE, of_class.get(_QUEUE))
    _, backlog, drops, _ = _QUEUE_STATS.unpack_from(said) if said is not None else (0, 0, 0, 0)
    return Shaped(octets, packets, drops, backlog)
