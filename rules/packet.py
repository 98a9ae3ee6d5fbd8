"""A packet as the rules see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packet:
    """An IPv4 packet on its way. ``protocol`` is tcp, udp, icmp …; ports are 0 where it has none."""

    protocol: str
    src: str
    sport: int
    dst: str
    dport: int
    in_interface: str
    mark: int = 0

    def __str__(self) -> str:
        return f"{self.protocol} {endpoint(self.src, self.sport)} -> {endpoint(self.dst, self.dport)}"


def endpoint(address: str, port: int) -> str:
    """An address with its port, where there is one."""
    return f"{address}:{port}" if port else address
