"""Which flows are logged: the include and exclude rules of a VpcEgressGateway."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.observer.flow import Endpoints, Flow, labels, nat_types


@dataclass(frozen=True, slots=True)
class Prefix:
    """A range of addresses of one family: those that are ``network`` once ``host_bits`` are shifted out."""

    width: int
    host_bits: int
    network: int

    def contains(self, address: bytes) -> bool:
        """Whether an address, as on the wire, is in the range."""
        return len(address) == self.width and int.from_bytes(address, "big") >> self.host_bits == self.network


@dataclass(frozen=True, slots=True)
class EndpointsRule:
    """What a rule asks of the endpoints; where it names nothing, everything will do. Port ranges include both ends."""

    sources: tuple[Prefix, ...] = ()
    destinations: tuple[Prefix, ...] = ()
    source_ports: tuple[tuple[int, int], ...] = ()
    destination_ports: tuple[tuple[int, int], ...] = ()

    def matches(self, ends: Endpoints) -> bool:
        """Whether everything that is named fits."""
        return (
            _within(self.sources, ends.source)
            and _within(self.destinations, ends.destination)
            and _between(self.source_ports, ends.source_port)
            and _between(self.destination_ports, ends.destination_port)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """A filter rule; where it names nothing, everything will do.

    A NAT type is any of ``snat`` and ``dnat``, which a flow with both has too, and ``snat_dnat``, which only that has.
    """

    address_families: frozenset[str] = frozenset()
    protocols: frozenset[str] = frozenset()
    nat_types: frozenset[str] = frozenset()
    original: EndpointsRule = EndpointsRule()
    translated: EndpointsRule = EndpointsRule()

    def matches(self, flow: Flow) -> bool:
        """Whether everything that is named fits."""
        named = labels(flow)
        return (
            (not self.address_families or named.address_family in self.address_families)
            and (not self.protocols or named.protocol in self.protocols)
            and (not self.nat_types or not self.nat_types.isdisjoint((named.nat_type, *nat_types(flow.nat))))
            and self.original.matches(flow.original)
            and self.translated.matches(flow.translated)
        )


@dataclass(frozen=True, slots=True)
class Filters:
    """Exclude rules come first; without include rules everything else is logged."""

    include: tuple[Rule, ...] = ()
    exclude: tuple[Rule, ...] = ()

    def let_through(self, flow: Flow) -> bool:
        """Whether a flow is logged."""
        if any(rule.matches(flow) for rule in self.exclude):
            return False
        return not self.include or any(rule.matches(flow) for rule in self.include)


def _within(prefixes: tuple[Prefix, ...], address: bytes) -> bool:
    return not prefixes or any(prefix.contains(address) for prefix in prefixes)


def _between(ranges: tuple[tuple[int, int], ...], port: int) -> bool:
    return not ranges or any(first <= port <= last for first, last in ranges)
