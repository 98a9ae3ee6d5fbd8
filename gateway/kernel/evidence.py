"""What tells that somebody wrote to the kernel: events of rtnetlink, nftables' transaction counter, table sizes.

Cheap enough to be asked twice a second for ever: rtnetlink's events are counted, not read (rtnetlink(7)); the counter
and the sizes take one call each, of 0.05 and 0.08 ms. Legacy tables have no more to offer: a rule replaced by one of
the same size is found by the next full comparison only (linux/netfilter_ipv4/ip_tables.h, IPT_SO_GET_INFO).
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Hashable, Mapping

from gateway.kernel import generation
from gateway.kernel.netlink import Netlink
from gateway.kernel.nft_messages import NETLINK_NETFILTER
from gateway.kernel.xtables import info, open_socket
from gateway.ports import Variant
from gateway.watch import Domain, Evidence

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RECEIVE_BUFFER = 1 << 20
_DATAGRAM = 1 << 16

# linux/rtnetlink.h: enum rtnetlink_groups
_LINK, _TC, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE, _IPV6_ROUTE, _IPV6_RULE = 1, 4, 5, 7, 8, 11, 19
_GROUPS = (_LINK, _TC, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE, _IPV6_ROUTE, _IPV6_RULE)
_TC_MESSAGES = range(36, 55)  # RTM_NEWQDISC to RTM_GETACTION
_AF_BRIDGE = 7

_SPARED = 240  # questions


class Events:
    """Counts what rtnetlink tells of links, addresses, routes and rules, and of traffic control.

    May be drained by any thread. Where more was told than fits (ENOBUFS) both counts move.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links = self._tc = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.bind((0, sum(1 << (group - 1) for group in _GROUPS)))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor that is readable when there is something to drain."""
        return self._socket.fileno()

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            self._socket.close()

    def links(self) -> int:
        """How many messages there were about links, addresses, routes and rules."""
        self.drain()
        return self._links

    def tc(self) -> int:
        """How many messages there were about traffic control."""
        self.drain()
        return self._tc

    def drain(self) -> bool:
        """Count what has come; whether anything has."""
        with self._lock:
            before = self._links, self._tc
            while self._socket.fileno() != -1:
                try:
                    self._count(self._socket.recv(_DATAGRAM))
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self._links += 1
                    self._tc += 1
            return before != (self._links, self._tc)

    def _count(self, datagram: bytes) -> None:
        position = 0
        while position + _HEADER.size < len(datagram):
            length, kind, *_ = _HEADER.unpack_from(datagram, position)
            if length < _HEADER.size:
                return
            if kind in _TC_MESSAGES:
                self._tc += 1
            elif datagram[position + _HEADER.size] != _AF_BRIDGE:  # a bridge about its ports
                self._links += 1
            position += (length + 3) & ~3


class _Generation:
    """The number of the last transaction on nftables; None where the kernel has none.

    There it is asked only now and then: each question has the kernel look for its module again.
    """

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._spared = 0

    def __call__(self) -> int | None:
        if self._spared:
            self._spared -= 1
            return None
        number = generation.last(self._netlink)
        if number is None:
            self._spared = _SPARED
        return number


class _LegacySizes:
    """Number of entries, bytes, and where each hook begins and ends, of both legacy tables."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def __call__(self) -> Hashable:
        if self._socket is None:  # of the namespace of the thread that asks
            self._socket = open_socket()
        return tuple(info(self._socket, table) for table in ("mangle", "nat"))


def evidence(variant: Variant, events: Events) -> Mapping[Domain, Evidence]:
    """What to watch of a namespace whose iptables are of this variant; for the writer's thread."""
    nft = _Generation()
    chains: Evidence = nft if variant == "nft" else _LegacySizes()
    return {"chains": chains, "links": events.links, "maps": nft, "nft": nft, "tc": events.tc}
