"""Which link an interface name stands for, and what becomes of it: rtnetlink, link messages only.

Read with the standard library rather than pyroute2, whose synchronous sockets raise inside a running event
loop; two message types with three attributes are all that is needed here. Messages: rtnetlink(7),
linux/rtnetlink.h, linux/if_link.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_NLMSG_ERROR = 2
_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_NLM_F_REQUEST = 1
_RTMGRP_LINK = 1
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_ARPHRD_ETHER = 1
_IFNAMSIZ = 16
_IFF_UP = 0x1
_IFF_NOARP = 0x80
_IFF_LOWER_UP = 0x10000

_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")
_ATTRIBUTE_TYPE_MASK = 0x3FFF  # the upper bits say nested and network byte order
_DATAGRAM = 65536
_RECEIVE_BUFFER = 1 << 18
_QUERY_TIMEOUT = 1.0  # the kernel answers within the call; this only bounds a wait for a reply that was lost


class LinksLost(Exception):
    """The kernel dropped link messages (ENOBUFS): what is known of links must be read anew."""


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface as the kernel last described it."""

    index: int
    name: str
    mac: bytes
    ethernet: bool
    flags: int
    gone: bool = False

    @property
    def can_announce(self) -> bool:
        """Up, with carrier, Ethernet, and ARP not switched off (``ip link set … arp off``)."""
        ready = self.flags & (_IFF_UP | _IFF_LOWER_UP | _IFF_NOARP) == _IFF_UP | _IFF_LOWER_UP
        return ready and self.ethernet and len(self.mac) == 6 and not self.gone


def parse(datagram: bytes) -> Iterator[Link]:
    """The links that the messages of one netlink datagram speak of, in order; ``gone`` for deleted ones.

    Raises OSError with the kernel's errno for an error message; stops at the first truncated message.
    """
    while len(datagram) >= _NLMSG.size:
        length, kind, *_ = _NLMSG.unpack_from(datagram)
        if not _NLMSG.size <= length <= len(datagram):
            return
        body = datagram[_NLMSG.size : length]
        datagram = datagram[_aligned(length) :]
        if kind == _NLMSG_ERROR and len(body) >= _ERROR.size:
            code = -_ERROR.unpack_from(body)[0]
            if code:
                raise OSError(code, os.strerror(code))
        # A bridge reports its ports by the same messages in its own family (the first byte): there RTM_DELLINK
        # means that the link left the bridge.
        elif kind in (_RTM_NEWLINK, _RTM_DELLINK) and len(body) >= _IFINFO.size and body[0] == socket.AF_UNSPEC:
            yield _link(body, gone=kind == _RTM_DELLINK)


def read(name: str) -> Link | None:
    """The link of that name in the thread's network namespace, or None; works in any thread.

    Raises OSError if the kernel refuses the question for another reason than that there is no such link.
    """
    attribute = name.encode() + b"\0"
    if len(attribute) > _IFNAMSIZ:
        return None
    size = _ATTRIBUTE.size + len(attribute)
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _ATTRIBUTE.pack(size, _IFLA_IFNAME) + attribute
    body += bytes(_aligned(size) - size)
    request = _NLMSG.pack(_NLMSG.size + len(body), _RTM_GETLINK, _NLM_F_REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_QUERY_TIMEOUT)
        netlink.send(request)
        try:
            return next(parse(netlink.recv(_DATAGRAM)), None)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise


class Monitor:
    """A non-blocking subscription to link messages of the thread's network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.bind((0, _RTMGRP_LINK))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._socket.fileno()

    def receive(self) -> list[Link]:
        """All that has been reported since the last call, oldest first. Raises LinksLost if some is missing."""
        links: list[Link] = []
        lost = False
        while True:
            try:
                links += parse(self._socket.recv(_DATAGRAM))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Told before the messages that did fit. They are read off, not left for later: by then they
                # would overrule, with an older truth, what has been read anew.
                lost = True
        if lost:
            raise LinksLost
        return links

    def close(self) -> None:
        """Give the descriptor back; twice is once."""
        self._socket.close()


def _link(body: bytes, *, gone: bool) -> Link:
    _, device, index, flags, _ = _IFINFO.unpack_from(body)
    attributes = dict(_attributes(body[_IFINFO.size :]))
    name = attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "surrogateescape")
    return Link(index, name, attributes.get(_IFLA_ADDRESS, b""), device == _ARPHRD_ETHER, flags, gone)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & _ATTRIBUTE_TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
