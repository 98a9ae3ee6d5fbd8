"""Addresses of one Subnet, given out as Kube-OVN's IPAM does: the first free one, never an excluded one. Pure.

The pool is the CIDR without its network and broadcast address; the gateway and ``excludeIps`` (addresses and
``first..last`` ranges) are reserved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from lab.kinds import Subnet


@dataclass
class Pool:
    """Who holds which address of a subnet."""

    name: str
    cidr: IPv4Network
    gateway: IPv4Address
    excluded: tuple[tuple[IPv4Address, IPv4Address], ...] = ()
    holders: dict[IPv4Address, str] = field(default_factory=dict)

    @classmethod
    def of(cls, subnet: Subnet) -> Pool:
        return cls(subnet.name, subnet.cidr, subnet.gateway_address, subnet.exclude_ips)

    def refusal(self, address: IPv4Address) -> str | None:
        """Why the address can be nobody's here (end of a sentence that begins with the address), or None."""
        if address not in self.cidr:
            return f"lies outside subnet {self.name} ({self.cidr})"
        if address == self.gateway:
            return f"is the gateway of subnet {self.name}"
        if self.cidr.prefixlen < 31 and address in (self.cidr.network_address, self.cidr.broadcast_address):
            return f"is the network or broadcast address of subnet {self.name} ({self.cidr})"
        for first, last in self.excluded:
            if first <= address <= last:
                span = str(first) if first == last else f"{first}..{last}"
                return f"is excluded by excludeIps {span} of subnet {self.name}"
        return None

    def take(self, address: IPv4Address, holder: str) -> str | None:
        """Give the address to the holder; or say why not (end of a sentence, as `refusal`)."""
        why = self.refusal(address)
        if why is None and self.holders.get(address, holder) != holder:
            why = f"belongs to {self.holders[address]} already"
        if why is None:
            self.holders[address] = holder
        return why

    def first_free(self, holder: str, within: IPv4Network | None = None) -> IPv4Address | None:
        """Give the first free address, of ``within`` if named, to the holder; None when there is none."""
        first, last = int(self.cidr.network_address), int(self.cidr.broadcast_address)
        if self.cidr.prefixlen < 31:
            first, last = first + 1, last - 1
        if within is not None:
            first, last = max(first, int(within.network_address)), min(last, int(within.broadcast_address))
        reserved = sorted((int(a), int(b)) for a, b in (*self.excluded, (self.gateway, self.gateway)))
        candidate = first
        while candidate <= last:
            jump = next((end + 1 for start, end in reserved if start <= candidate <= end), None)
            if jump is not None:
                candidate = jump
            elif IPv4Address(candidate) in self.holders:
                candidate += 1
            else:
                self.holders[IPv4Address(candidate)] = holder
                return IPv4Address(candidate)
        return None
