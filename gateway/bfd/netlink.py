"""The few questions that the probes ask the kernel, over netlink (rtnetlink(7), linux/netfilter/nf_tables.h).

Only netfilter's answer needs a capability (CAP_NET_ADMIN). The kernel answers inside ``send``, so nothing waits here.
Errors of the kernel come as OSError.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.bfd.udp import family_of

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTMGRP_LINK = 1

_GETLINK = 18
_GETROUTE, _GETNEIGH, _GETRULE = 26, 30, 34
_GET_NFT_RULE = 10 << 8 | 7  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETRULE
_REQUEST, _DUMP = 0x001, 0x300
_ERROR, _DONE = 2, 3

_IFLA_IFNAME = 3
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_NDA_DST, _NDA_PROBES = 1, 4
_FRA_PRIORITY = 6
_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN = 1, 2

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_ROUTE = struct.Struct("=BBBBBBBBI")

IFF_UP, IFF_RUNNING, IFF_NOARP = 0x1, 0x40, 0x80

INCOMPLETE, REACHABLE, STALE, DELAY, PROBE, FAILED, NOARP, PERMANENT = (1 << bit for bit in range(8))
"""States of a neighbour (linux/neighbour.h)."""


@dataclass(frozen=True, slots=True)
class Egress:
    """The way that packets to the outside take: an interface and, unless it is a point-to-point link, a gateway."""

    interface: int
    gateway: str | None


@dataclass(frozen=True, slots=True)
class Link:
    """An interface."""

    name: str
    flags: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour's state, and how many questions to it are not answered yet."""

    state: int
    probes: int


class Netlink:
    """A netlink socket for questions. Raises OSError."""

    def __init__(self, protocol: int = NETLINK_ROUTE, groups: int = 0) -> None:
        self.socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
        )
        self.socket.bind((0, groups))
        self._sequence = 0

    def close(self) -> None:
        self.socket.close()

    def drain(self) -> None:
        """Throw away what the kernel told of its own accord."""
        try:
            while self.socket.recv(65536):
                pass
        except OSError:
            # Nothing more is waiting; or more came than the socket holds, and that we were told is all we wanted.
            return

    def egress(self, destination: str) -> Egress | None:
        """The first hop towards an address; None when there is no route."""
        family = family_of(destination)
        raw = socket.inet_pton(family, destination)
        body = _ROUTE.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_DST, raw)
        try:
            for reply in self._ask(_GETROUTE, body):
                found = _attributes(reply[_ROUTE.size :])
                interface, gateway = found.get(_RTA_OIF), found.get(_RTA_GATEWAY)
                if interface is not None:
                    address = None if gateway is None else socket.inet_ntop(family, gateway)
                    return Egress(int.from_bytes(interface, sys.byteorder), address)
        except OSError as error:
            if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                raise
        return None

    def link(self, interface: int) -> Link | None:
        """An interface by its index; None when it is gone."""
        try:
            for reply in self._ask(_GETLINK, _LINK.pack(0, 0, interface, 0, 0)):
                flags = _LINK.unpack_from(reply)[3]
                name = _attributes(reply[_LINK.size :])[_IFLA_IFNAME].rstrip(b"\0").decode()
                return Link(name, flags)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        return None

    def neighbour(self, interface: int, address: str) -> Neighbour | None:
        """What the kernel knows of a neighbour; None when nothing."""
        family = family_of(address)
        body = _NEIGHBOUR.pack(family, interface, 0, 0, 0) + _attribute(_NDA_DST, socket.inet_pton(family, address))
        try:
            for reply in self._ask(_GETNEIGH, body):
                state = _NEIGHBOUR.unpack_from(reply)[2]
                probes = _attributes(reply[_NEIGHBOUR.size :]).get(_NDA_PROBES, b"")
                return Neighbour(state, int.from_bytes(probes, sys.byteorder))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        return None

    def rule_priorities(self, family: int) -> set[int]:
        """The priorities of the policy routing rules."""
        body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        return {
            int.from_bytes(_attributes(reply[_ROUTE.size :]).get(_FRA_PRIORITY, b"\0"), sys.byteorder)
            for reply in self._ask(_GETRULE, body, _DUMP)
        }

    def chain_length(self, family: int, table: str, chain: str) -> int:
        """How many rules an nf_tables chain holds, 0 also when there is no such chain. On a netfilter socket."""
        names = _attribute(_NFTA_RULE_TABLE, table.encode() + b"\0") + _attribute(
            _NFTA_RULE_CHAIN, chain.encode() + b"\0"
        )
        # struct nfgenmsg; the families of IPv4 and IPv6 are those of sockets.
        body = struct.pack("=BBH", family, 0, 0) + names
        try:
            return sum(1 for _ in self._ask(_GET_NFT_RULE, body, _DUMP))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return 0
            raise

    def _ask(self, kind: int, body: bytes, flags: int = 0) -> Iterator[bytes]:
        """The bodies of all replies to one request."""
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, self._sequence, 0)
        self.socket.send(header + body)
        while True:
            data = self.socket.recv(65536)
            while data:
                length, what, _, sequence, _ = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue
                if what == _DONE:
                    return
                if what == _ERROR:
                    code = -int(struct.unpack_from("=i", message)[0])
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield message
            if not flags & _DUMP:
                return


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        # The two highest bits say how the value is encoded.
        found[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found
