"""The opt-in TCP listener's settings, checked before anything listens; cheap to import."""

from __future__ import annotations

import array
import contextlib
import fcntl
import re
import socket
import struct
from collections.abc import Collection, Iterator
from ipaddress import ip_address
from pathlib import Path

METRICS_LISTEN = "NATGW_METRICS_LISTEN"
GONE_MILLISECONDS = 60_000
"""A caller that acknowledges nothing for so long, or takes nothing, is gone, whatever the connection waits for."""
_SIOCGIFCONF = 0x8912
_IFREQ = 40  # bytes of a struct ifreq on 64-bit machines: a name of 16, a sockaddr_in, padding


class CannotListen(OSError):
    """The daemon was asked to listen where or how it must not; the message is one sentence."""


class TokenFile:
    """A file that holds a bearer token; read for every request, for a file's times do not tell every change."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes:
        """The token; raises CannotListen where the file is unreadable or empty."""
        try:
            token = self._path.read_bytes().strip()
        except OSError as error:
            raise CannotListen(f"the token file {self._path} cannot be read: {error.strerror}") from error
        if not token:
            raise CannotListen(f"the token file {self._path} is empty")
        return token


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


def check_listen(listen: str, token_file: Path | None, *, mutual_tls: bool = False) -> TokenFile | None:
    """The token to ask for on ``listen``, None where callers show certificates alone; raises CannotListen."""
    parse_listen(listen)
    if token_file is None and mutual_tls:
        return None
    if token_file is None:
        raise CannotListen(
            "NATGW_LISTEN needs NATGW_TOKEN_FILE or NATGW_TLS_CLIENT_CA: on TCP the gateway answers nobody unknown"
        )
    tokens = TokenFile(token_file)
    tokens.read()
    return tokens


ANYWHERE = "yes-I-know"
"""What NATGW_LISTEN_ANYWHERE must say."""


def check_place(listen: str, reached: Collection[str], name: str = "NATGW_LISTEN") -> None:
    """Refuse (CannotListen) all addresses at once, and those of the interfaces that tenants and outsiders reach."""
    host, _ = parse_listen(listen, name)
    unless = f"unless NATGW_LISTEN_ANYWHERE={ANYWHERE}"
    if ip_address(host).is_unspecified:
        raise CannotListen(f"{name}={listen} is every address, those that tenants reach as well: refused {unless}")
    if (interface := interface_of(host)) in reached:
        raise CannotListen(f"{name}={listen} is on {interface}, where tenants or outsiders call: refused {unless}")


def interface_of(host: str) -> str | None:
    """The interface that has this address; None for none, or all."""
    wanted = ip_address(host)
    return next((interface for interface, address in own_addresses() if ip_address(address) == wanted), None)


def own_addresses() -> Iterator[tuple[str, str]]:
    """The addresses of this network namespace with their interfaces (netdevice(7), SIOCGIFCONF; proc_net(5))."""
    buffer = array.array("B", bytes(_IFREQ * 4096))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
        (length, _) = struct.unpack("iP", fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, asked))
    data = buffer.tobytes()[:length]
    for start in range(0, length, _IFREQ):
        label = data[start : start + 16].partition(b"\0")[0].decode()
        yield label.partition(":")[0], socket.inet_ntoa(data[start + 20 : start + 24])
    with contextlib.suppress(FileNotFoundError):  # IPv6 is not compiled in, or off
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, _, _, interface = line.split()
            yield interface, str(ip_address(bytes.fromhex(digits)))


def tcp_socket(listen: str, name: str = "NATGW_LISTEN") -> socket.socket:
    """A listening TCP socket; raises CannotListen when the address is not ours or taken.

    It hears only what comes in by the interface that has the address. To Linux an address is the whole host's: a tenant
    whose packets the gateway forwards could send them to an address of its third interface as well.
    """
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
        if interface := interface_of(host):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_MILLISECONDS)  # of each connection, too
        sock.listen()  # callers can connect from now on, however long the server takes to start
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {listen}: {error.strerror}") from error
    return sock
