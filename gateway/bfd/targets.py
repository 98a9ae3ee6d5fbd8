"""The probe of configured targets beyond the gateway: ICMP echo, or a TCP connection.

One answer is enough: a single target that is gone is that target's trouble, all of them gone is ours. A TCP connection
that is refused counts as an answer, because somebody refused it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from gateway.bfd.health import Result
from gateway.bfd.probes import failed, not_applicable, passed
from gateway.bfd.udp import canonical, family_of

_ECHO_REQUEST, _ECHO_REQUEST_6 = 8, 128
_ECHO_REPLY, _ECHO_REPLY_6 = 0, 129
_ICMP = struct.Struct("!BBHHH")


@dataclass(frozen=True, slots=True)
class Target:
    """An address to be reached; ``port`` is None for ICMP echo."""

    address: str
    port: int | None

    def __str__(self) -> str:
        if self.port is None:
            return f"icmp:{self.address}"
        return f"tcp:[{self.address}]:{self.port}" if ":" in self.address else f"tcp:{self.address}:{self.port}"

    @staticmethod
    def parse(text: str) -> Target:
        """``icmp:ADDRESS`` or ``tcp:ADDRESS:PORT``, an IPv6 address there in brackets. Raises ValueError."""
        kind, _, rest = text.strip().partition(":")
        host, _, port = rest.rpartition(":") if kind == "tcp" else (rest, "", "")
        address = canonical(host.removeprefix("[").removesuffix("]"))
        good = port.isdecimal() and 1 <= int(port) <= 65535 if kind == "tcp" else kind == "icmp"
        if address is None or not good:
            raise ValueError(f"not icmp:ADDRESS or tcp:ADDRESS:PORT: {text.strip()!r}")
        return Target(address, int(port) if kind == "tcp" else None)


class _Attempt(Protocol):
    """One question to one target."""

    def answered(self) -> bool: ...

    def close(self) -> None: ...


class _Connection:
    """A TCP connection, ended as soon as it is there."""

    def __init__(self, target: Target) -> None:
        self._socket = socket.socket(
            family_of(target.address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self._code = self._socket.connect_ex((target.address, target.port or 0))

    def answered(self) -> bool:
        if self._code == errno.EINPROGRESS:
            error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._code = error
            else:
                with suppress(OSError):
                    self._socket.getpeername()
                    self._code = 0
        return self._code in (0, errno.ECONNREFUSED)

    def close(self) -> None:
        self._socket.close()


class _Echo:
    """An ICMP echo request. The kernel's ping socket numbers it; a raw socket (root) is the second choice.

    Raises PermissionError when we may have neither: net.ipv4.ping_group_range does not hold our group.
    """

    def __init__(self, target: Target) -> None:
        six = family_of(target.address) == socket.AF_INET6
        protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
        flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        family = family_of(target.address)
        self._raw = False
        try:
            self._socket = socket.socket(family, socket.SOCK_DGRAM | flags, protocol)
        except PermissionError:
            self._socket = socket.socket(family, socket.SOCK_RAW | flags, protocol)
            self._raw = not six
        self._cookie = os.urandom(8)
        self._reply = _ECHO_REPLY_6 if six else _ECHO_REPLY
        request = _ICMP.pack(_ECHO_REQUEST_6 if six else _ECHO_REQUEST, 0, 0, os.getpid() & 0xFFFF, 1) + self._cookie
        if self._raw:
            request = request[:2] + _checksum(request).to_bytes(2, "big") + request[4:]
        with suppress(OSError):
            # Not to be reached is what we are here to find out.
            self._socket.connect((target.address, 0))
            self._socket.send(request)

    def answered(self) -> bool:
        while True:
            try:
                data = self._socket.recv(256)
            except OSError:
                return False
            if self._raw:
                data = data[(data[0] & 15) * 4 :]
            if data[:1] == bytes([self._reply]) and data[_ICMP.size :] == self._cookie:
                return True

    def close(self) -> None:
        self._socket.close()


class TargetsProbe:
    """Passes when any of the targets answers within the time between ``start`` and ``finish``."""

    name = "targets"

    def __init__(self, targets: Sequence[Target], log: Callable[[str], None]) -> None:
        self._targets = list(targets)
        self._log = log
        self._attempts: dict[Target, _Attempt] = {}

    def start(self, now: int) -> None:
        for attempt in self._attempts.values():
            attempt.close()
        self._attempts = {}
        for target in list(self._targets):
            try:
                self._attempts[target] = _Echo(target) if target.port is None else _Connection(target)
            except PermissionError:
                self._targets.remove(target)
                self._log(f"{target} is not probed: net.ipv4.ping_group_range does not hold group {os.getegid()}")
            except OSError:
                # No descriptor or no such family: no answer from this one.
                continue

    def finish(self, now: int) -> Result | None:
        if not self._targets:
            return not_applicable("none can be probed")
        answered = [str(target) for target, attempt in self._attempts.items() if attempt.answered()]
        if answered:
            return passed(f"{len(answered)} of {len(self._targets)} answer")
        return failed("none answers: " + ", ".join(map(str, self._targets)))


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
