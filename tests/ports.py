"""Port numbers for listeners of tests that run beside each other."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_IPV6 = Path("/proc/net/if_inet6")  # absent, or without the loopback's address, where a machine has no IPv6
_FAMILIES = [(socket.AF_INET, "0.0.0.0")]
if _IPV6.exists() and f"{1:032x} " in _IPV6.read_text():
    _FAMILIES.append((socket.AF_INET6, "::1"))
_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of the loopback that nobody has, of TCP and UDP and both families, and that stays free for its asker.

    The kernel hands out none of these by itself, to no client and to no listener on port 0, so between this answer and
    the listener that it is for nobody takes it by chance. No other test gets it: for as long as this process lives it
    keeps a socket whose name says so, and names (abstract ones) are for a network namespace, as ports are.
    """
    first, last = map(int, _RANGE.read_text().split())
    ports = range(20_000, first) or range(last + 1, 65_536)
    for port in random.SystemRandom().sample(ports, 100):
        if _reserve(port):
            return port
    raise AssertionError("no port is free")


def _reserve(port: int) -> bool:
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0natgw-tests-port-{port}")
        with ExitStack() as probes:
            for family, anywhere in _FAMILIES:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    probes.enter_context(socket.socket(family, kind)).bind((anywhere, port))
    except OSError:
        name.close()
        return False
    _reserved.append(name)
    return True
