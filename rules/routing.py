"""Where a packet is routed: own addresses, routes, and the routing policy's rules (ip-rule(8))."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from rules.packet import Packet
from rules.state import DEFAULT_TABLE, MAIN_TABLE, USUAL_PRIORITY, Actual, AddressKey, PolicyRule, RouteEntry, RouteKey


@dataclass(frozen=True)
class Host:
    """What routing needs to know: own addresses, routes, whether interfaces do ARP, and rules of the routing policy.

    The routes to the subnets of the own addresses need not be listed, nor the rule that asks the main table.
    """

    addresses: Iterable[AddressKey] = ()
    routes: Mapping[RouteKey, RouteEntry] = field(default_factory=dict)
    arp: Mapping[str, bool] = field(default_factory=dict)
    rules: Collection[PolicyRule] = ()

    @classmethod
    def of(cls, actual: Actual) -> Host:
        """The facts of one reading of the kernel."""
        arp = {name: link.arp for name, link in actual.links.items()}
        return cls(actual.addresses, actual.routes, arp, actual.policy_rules)


def route(host: Host, destination: str, packet: Packet | None = None) -> tuple[str, RouteEntry] | None:
    """The longest prefix that holds the destination, and where it leads; None without one.

    Rules of the routing policy choose the tables for ``packet``; without one, the main table alone is asked.
    """
    for table in _tables(host, packet):
        candidates = [(prefix, entry) for prefix, entry in _all_routes(host, table) if within(destination, prefix)]
        if candidates:
            return max(candidates, key=lambda found: _network(found[0]).prefixlen)
    return None


def _tables(host: Host, packet: Packet | None) -> Iterator[int]:
    """The routing tables that are asked, in their order; rules that say more than we know are passed over."""
    known = sorted(
        (rule for rule in host.rules if rule.family == 4 and not rule.foreign and rule.table != MAIN_TABLE),
        key=lambda rule: USUAL_PRIORITY if rule.priority is None else rule.priority,
    )
    for rule in known:
        if (
            packet is not None
            and rule.interface in (None, packet.in_interface)
            and (rule.source is None or within(packet.src, rule.source))
            and rule.table != DEFAULT_TABLE
        ):
            yield rule.table
    yield MAIN_TABLE


def _all_routes(host: Host, table: int) -> Iterator[tuple[str, RouteEntry]]:
    for key, entry in host.routes.items():
        if ":" not in key.prefix and key.table == table:
            yield key.prefix, entry
    for address in host.addresses if table == MAIN_TABLE else ():
        if ":" not in address.address:
            yield str(IPv4Interface(address.address).network), RouteEntry(address.interface, None)


@lru_cache(maxsize=4096)
def _network(prefix: str) -> IPv4Network:
    return IPv4Network(prefix)


def within(address: str, prefix: str) -> bool:
    """Whether an IPv4 prefix holds the address."""
    return IPv4Address(address) in _network(prefix)
