"""The opt-in TCP listener's settings, checked before anything listens; cheap to import."""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address
from pathlib import Path

METRICS_LISTEN = "NATGW_METRICS_LISTEN"


class CannotListen(OSError):
    """The daemon was asked to listen where or how it must not; the message is one sentence."""


class TokenFile:
    """A file that holds a bearer token; read again whenever it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = b""

    def read(self) -> bytes:
        """The token; raises CannotListen where the file is unreadable or empty."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                self._token = self._path.read_bytes().strip()
                self._seen = seen
        except OSError as error:
            raise CannotListen(f"the token file {self._path} cannot be read: {error.strerror}") from error
        if not self._token:
            raise CannotListen(f"the token file {self._path} is empty")
        return self._token


def parse_listen(listen: str, name: str = "NATGW_LISTEN") -> tuple[str, int]:
    """``192.0.2.1:8080`` or ``[2001:db8::1]:8080`` as address and port; raises CannotListen."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", listen)
    if found is None:
        raise CannotListen(f"{name}={listen} is not an address and a port (192.0.2.1:8080 or [2001:db8::1]:8080)")
    host, port = found[1] or found[2], int(found[3])
    try:
        version = ip_address(host).version
    except ValueError as error:
        raise CannotListen(f"{name}={listen}: {error}") from error
    if version != (6 if found[1] else 4) or port > 65535:
        raise CannotListen(f"{name}={listen} is not an address and a port")
    return host, port


def check_listen(listen: str, token_file: Path | None) -> TokenFile:
    """The token to ask for on ``listen``; raises CannotListen without a usable one."""
    parse_listen(listen)
    if token_file is None:
        raise CannotListen("NATGW_LISTEN needs NATGW_TOKEN_FILE: the gateway does not listen on TCP without a token")
    tokens = TokenFile(token_file)
    tokens.read()
    return tokens


def tcp_socket(listen: str, name: str = "NATGW_LISTEN") -> socket.socket:
    """A bound TCP socket; raises CannotListen when the address is not ours or taken."""
    host, port = parse_listen(listen, name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY: without it every answer waits 40 ms for a delayed ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # [::] is all IPv6 addresses, not IPv4 as well: never wider than asked.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {listen}: {error.strerror}") from error
    return sock
