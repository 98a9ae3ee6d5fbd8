"""The sockets of RFC 5881: BFD Control packets in UDP, over IPv4 and IPv6, single hop.

Nothing here needs a capability: all ports lie above 1023.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

CONTROL_PORT = 3784
MULTIHOP_PORT = 4784
FIRST_SOURCE_PORT, LAST_SOURCE_PORT = 49152, 65535
TTL = 255
CLASS_SELECTOR_6 = 0xC0

# Constants of linux/in.h and linux/in6.h that the socket module lacks, at least in Python 3.11.
_IP_PKTINFO, _IP_RECVTTL, _IP_FREEBIND = 8, 12, 15
_IPV6_FREEBIND = 78

_INT = struct.Struct("@i")
_WILDCARDS = {"0.0.0.0", "::"}


@dataclass(frozen=True, slots=True)
class Datagram:
    """A received UDP payload, the two addresses, and the TTL or hop limit with which it came."""

    payload: bytes
    local: str
    remote: str
    ttl: int


class Listener(Protocol):
    """Where packets come in."""

    def fileno(self) -> int:
        """What a selector waits for."""
        ...

    def receive(self) -> Datagram | None:
        """The next datagram, or None when none is waiting."""
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class Sender(Protocol):
    """Where the packets of one session go out."""

    def send(self, payload: bytes) -> None:
        """Send now or not at all. Raises OSError."""
        ...

    def close(self) -> None:
        """Send no more."""
        ...


class Network(Protocol):
    """Makes listeners and senders on one UDP port; the real one is ``UdpNetwork``."""

    port: int

    def listeners(self) -> list[Listener]:
        """Listen on every address. Raises OSError."""
        ...

    def sender(self, local: str, remote: str) -> Sender:
        """A sender for one session. Raises OSError."""
        ...

    def locals_for(self, remote: str) -> list[str]:
        """The local addresses from which ``remote`` is to be spoken to; none when there is no route to it."""
        ...


def canonical(text: str) -> str | None:
    """An IPv4 or IPv6 address in the spelling that the kernel uses, or None. Zones (``%eth0``) are not supported."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_ntop(family, socket.inet_pton(family, text))
        except (OSError, ValueError):
            continue
    return None


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6 of a canonical address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def wildcards() -> list[str]:
    """Every address of the families that this kernel has."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return ["0.0.0.0"]
    return ["0.0.0.0", "::"]


class UdpListener:
    """One bound UDP socket that tells where each datagram was sent to and with which TTL."""

    def __init__(self, address: str, port: int) -> None:
        family = family_of(address)
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # An address may be bound before the interface has it: IPv6 addresses are unusable for a second after they
            # are added (duplicate address detection), and a speaker that starts then must not fail.
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            else:
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            self._socket.bind((address, port))
        except OSError as error:
            self._socket.close()
            raise OSError(
                error.errno, f"cannot listen on {address} port {port}: {os.strerror(error.errno or 0)}"
            ) from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> Datagram | None:
        try:
            payload, ancillary, _, source = self._socket.recvmsg(512, 256)
        except OSError:
            # BlockingIOError: nothing is waiting. Anything else is a pending error of the interface, of which the
            # detection time learns in its own way.
            return None
        local, ttl = "", -1
        for level, kind, data in ancillary:
            match level, kind:
                case (socket.IPPROTO_IP, socket.IP_TTL) | (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT):
                    (ttl,) = _INT.unpack_from(data)
                case (socket.IPPROTO_IP, 8):  # _IP_PKTINFO: interface, local address, address in the header
                    local = socket.inet_ntop(socket.AF_INET, data[8:12])
                case (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                    local = socket.inet_ntop(socket.AF_INET6, data[:16])
        return Datagram(payload, local, source[0], ttl)


class UdpSender:
    """The socket of one session.

    RFC 5881 4: "The source port MUST be in the range 49152 through 65535. The same UDP source port number MUST be used
    for all BFD Control packets associated with a particular session. The source port number SHOULD be unique among all
    BFD sessions on the system."
    """

    def __init__(self, local: str, remote: str, port: int) -> None:
        family = family_of(local)
        self._target = (remote, port)
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # RFC 5881 5: "If BFD authentication is not in use on a session, all BFD Control packets for the session
            # MUST be sent with a Time to Live (TTL) or Hop Limit value of 255."
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, TTL)
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, CLASS_SELECTOR_6)
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            else:
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, CLASS_SELECTOR_6)
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            self._bind(local)
        except OSError:
            self._socket.close()
            raise

    def _bind(self, local: str) -> None:
        ports = range(FIRST_SOURCE_PORT, LAST_SOURCE_PORT + 1)
        begin = int.from_bytes(os.urandom(2), "big") % len(ports)
        for step in range(len(ports)):
            try:
                self._socket.bind((local, ports[(begin + step) % len(ports)]))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, f"no source port is free on {local}")

    def send(self, payload: bytes) -> None:
        self._socket.sendto(payload, self._target)

    def close(self) -> None:
        self._socket.close()


class UdpNetwork:
    """BFD over the kernel's UDP. ``addresses`` are canonical; a wildcard listens on every address of its family."""

    def __init__(self, addresses: Iterable[str], port: int = CONTROL_PORT) -> None:
        self.addresses = list(addresses)
        self.port = port

    def listeners(self) -> list[Listener]:
        opened: list[Listener] = []
        try:
            for address in self.addresses:
                opened.append(UdpListener(address, self.port))
        except OSError:
            for listener in opened:
                listener.close()
            raise
        return opened

    def sender(self, local: str, remote: str) -> Sender:
        return UdpSender(local, remote, self.port)

    def locals_for(self, remote: str) -> list[str]:
        family = family_of(remote)
        same = [address for address in self.addresses if family_of(address) == family]
        if not _WILDCARDS.intersection(same):
            return same
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((remote, self.port))
            except OSError:
                return []
            return [str(probe.getsockname()[0])]
