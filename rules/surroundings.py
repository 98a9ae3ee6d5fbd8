"""What surrounds the gateway in its namespace and is not its own: settings, neighbours, other hands' rules.

One reading, as data. ``natgw status``, ``explain`` and ``doctor`` judge by it; nothing is ever changed because of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from rules.spec import Part

FORWARDING = "net/ipv4/ip_forward"
CONNTRACK_COUNT = "net/netfilter/nf_conntrack_count"
CONNTRACK_MAX = "net/netfilter/nf_conntrack_max"
CONNTRACK_BUCKETS = "net/netfilter/nf_conntrack_buckets"

# How the kernel calls the states of a neighbour entry (linux/neighbour.h).
ANSWERING = frozenset({"reachable", "permanent"})
KNOWN = ANSWERING | {"stale", "delay", "probe"}
"""States in which packets go out to a hardware address."""


def rp_filter(interface: str) -> str:
    """The setting's path; the stricter of this one and that of ``all`` holds."""
    return f"net/ipv4/conf/{interface}/rp_filter"


def promote_secondaries(interface: str) -> str:
    """The setting's path; it holds where this one or that of ``all`` is set."""
    return f"net/ipv4/conf/{interface}/promote_secondaries"


class Neighbour(Part):
    """An entry of the ARP table. ``state`` in ip-neighbour(8)'s words; without an entry nobody was asked yet."""

    interface: str
    address: str
    mac: str | None
    state: str

    @property
    def known(self) -> bool:
        """Whether packets for it leave."""
        return self.mac is not None and self.state in KNOWN


class OtherRule(Part):
    """A rule, a policy or a hook that is not the gateway's. ``where``: legacy, nft, or an nft table by name."""

    where: str
    table: str
    chain: str
    text: str

    def __str__(self) -> str:
        return f"{self.where} {self.table} {self.chain}: {self.text}"


class Surroundings(Part):
    """One reading. ``sysctls`` by their paths below /proc/sys; one that the kernel does not have is not there.

    ``other_rules``: the filter table of both iptables variants, the nat and mangle tables of the one that the gateway
    does not use, and base chains of nft tables that belong to somebody else. ``unread``: what could not be read, and
    why.
    """

    kernel: str = ""
    sysctls: dict[str, int] = Field(default_factory=dict)
    neighbours: tuple[Neighbour, ...] = ()
    other_rules: tuple[OtherRule, ...] = ()
    unread: tuple[str, ...] = ()

    def neighbour(self, interface: str, address: str) -> Neighbour | None:
        """The entry for an address, if there is one."""
        return next((n for n in self.neighbours if (n.interface, n.address) == (interface, address)), None)

    def strictness(self, interface: str) -> int:
        """The reverse-path filter in force: 0 none, 1 strict, 2 loose."""
        return max(self.sysctls.get(rp_filter(name), 0) for name in ("all", interface))

    def others(self, chains: Iterable[str]) -> tuple[OtherRule, ...]:
        """Other hands' rules in chains of these names."""
        return tuple(rule for rule in self.other_rules if rule.chain in chains)
