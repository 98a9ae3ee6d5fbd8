"""Connection tracking entries put into a namespace over ctnetlink, as many as its table takes, within seconds.

Each is an exchange of datagrams that a tenant had by a source translation, answered and assured: the kernel throws
none of these out to make room.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator

from netns import Namespace

_NETLINK_NETFILTER, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 12, 32, 33
_NEW = 1 << 8  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW
_REQUEST, _CREATE, _EXCL = 0x1, 0x400, 0x200  # NLM_F_…; refusals alone are answered
_NLMSG_ERROR = 2
_NLA_F_NESTED = 0x8000
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_NAT_SRC, _CTA_TIMEOUT = 1, 2, 3, 6, 7
_ANSWERED = 0x2 | 0x4 | 0x8  # IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
_AT_ONCE = 500  # messages in a datagram
_PORTS = 60_000  # connections of one tenant to one destination
_PORT = b"\xfe\xfd"  # stands for the port in a message; nothing else in it looks like this


def fill(namespace: Namespace, source: str, eip: str, destination: str, *, timeout: int = 3600) -> int:
    """Fill the namespace's table to its last entry; how many it took.

    ``source`` is the first of the tenants, ``destination`` the first of those whom they talk to, port 53; a source
    port is kept. ``timeout`` in seconds.
    """
    made = 0
    with namespace.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as talk:
        talk.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 20)
        talk.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
        talk.bind((0, 0))
        for batch in _batches(source, eip, destination, timeout):
            talk.send(batch)
            refused = _refused(talk)
            made += _AT_ONCE - refused.total()
            if refused:
                assert set(refused) == {errno.ENOMEM}, [os.strerror(code) for code in refused]
                break
    return made


def _refused(talk: socket.socket) -> Counter[int]:
    """Error numbers of the messages sent last; the kernel has answered when ``send`` returns."""
    found: Counter[int] = Counter()
    while True:
        try:
            data = talk.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        while data:
            length, kind, _, _, _, code = struct.unpack_from("=IHHIIi", data)
            assert kind == _NLMSG_ERROR
            found[-code] += 1
            data = data[(length + 3) & ~3 :]


def _batches(source: str, eip: str, destination: str, timeout: int) -> Iterator[bytes]:
    """Datagrams of messages, each about another connection, without end."""
    tenant, server = _number(source), _number(destination)
    while True:
        message = _message(_address(tenant), _address(server), socket.inet_aton(eip), timeout)
        for first in range(1024, 1024 + _PORTS, _AT_ONCE):
            ports = range(first, first + _AT_ONCE)
            yield b"".join(message.replace(_PORT, port.to_bytes(2, "big")) for port in ports)
        tenant, server = tenant + 1, server + 1


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address), "big")


def _address(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _message(tenant: bytes, server: bytes, eip: bytes, timeout: int) -> bytes:
    """A connection from any port of the tenant's (``_PORT``), as linux/netfilter/nfnetlink_conntrack.h has it."""
    dns = (53).to_bytes(2, "big")
    payload = struct.pack("=BBH", socket.AF_INET, 0, 0) + b"".join(
        (
            _tuple(_CTA_TUPLE_ORIG, tenant, server, _PORT, dns),
            _tuple(_CTA_TUPLE_REPLY, server, tenant, dns, _PORT),
            _nla(_CTA_STATUS, struct.pack("!I", _ANSWERED)),
            # CTA_NAT_V4_MINIP, …_MAXIP; CTA_NAT_PROTO with CTA_PROTONAT_PORT_MIN, …_MAX
            _nest(_CTA_NAT_SRC, _nla(1, eip), _nla(2, eip), _nest(3, _nla(1, _PORT), _nla(2, _PORT))),
            _nla(_CTA_TIMEOUT, struct.pack("!I", timeout)),
        )
    )
    return struct.pack("=IHHII", 16 + len(payload), _NEW, _REQUEST | _CREATE | _EXCL, 0, 0) + payload


def _tuple(kind: int, source: bytes, destination: bytes, source_port: bytes, destination_port: bytes) -> bytes:
    """CTA_TUPLE_IP and CTA_TUPLE_PROTO with their three attributes."""
    proto = (_nla(1, bytes([socket.IPPROTO_UDP])), _nla(2, source_port), _nla(3, destination_port))
    return _nest(kind, _nest(1, _nla(1, source), _nla(2, destination)), _nest(2, *proto))


def _nest(kind: int, *parts: bytes) -> bytes:
    return _nla(kind | _NLA_F_NESTED, b"".join(parts))


def _nla(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)
