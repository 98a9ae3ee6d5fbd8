"""A VPC's logical router: how OVN routes, as a function and as ``ip rule``/``ip route`` lines that do the same. Pure.

OVN looks a packet up in the routes first (longest prefix; at equal length a connected route before a static
destination route before a source route) and drops what no route matches. Only then the policies speak, highest
priority first, and the first match may drop the packet, send it elsewhere or let the route stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

ANY = IPv4Network("0.0.0.0/0")
_POLICY_PREFERENCE = 1000  # + 0..32767, as OVN's priorities are
_ROUTE_PREFERENCE = 40000  # + 0..65: two steps for each prefix length
_ANCHOR = _ROUTE_PREFERENCE - 1  # where an "allow" jumps to
_TABLE = 10000  # routing tables 10000.. are the lab's

T = TypeVar("T")
Action = Literal["allow", "drop", "reroute"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Connected(Frozen):
    """A subnet on a port of the router."""

    cidr: IPv4Network
    device: str
    gateway: IPv4Address


class Static(Frozen):
    cidr: IPv4Network
    next_hop: IPv4Address
    by_source: bool = False


class Policy(Frozen):
    priority: int
    src: IPv4Network
    dst: IPv4Network
    action: Action
    next_hop: IPv4Address | None = None
    next_hops: tuple[IPv4Address, ...] = ()
    """Several, over which packets are spread."""
    table: int | None = None
    """The routing table where something changes them while the lab stands."""

    @property
    def hops(self) -> tuple[IPv4Address, ...]:
        return self.next_hops or ((self.next_hop,) if self.next_hop else ())


class Hop(Frozen):
    """What becomes of a packet: handed out on a connected subnet, sent to next hops, or lost (and why)."""

    kind: Literal["deliver", "via", "drop", "unrouted"]
    next_hops: tuple[IPv4Address, ...] = ()


class Router(Frozen):
    """The routes and policies of one VPC."""

    connected: tuple[Connected, ...]
    statics: tuple[Static, ...] = ()
    policies: tuple[Policy, ...] = ()

    def hop(self, src: IPv4Address, dst: IPv4Address) -> Hop:
        """Where the router sends a packet (not one to itself)."""
        routed = self._route(src, dst)
        if routed.kind == "unrouted":
            return routed
        for policy in sorted(self.policies, key=lambda p: -p.priority):
            if src in policy.src and dst in policy.dst:
                if policy.action == "drop":
                    return Hop(kind="drop")
                if policy.action == "reroute" and policy.hops:
                    return Hop(kind="via", next_hops=policy.hops)
                return routed
        return routed

    def _route(self, src: IPv4Address, dst: IPv4Address) -> Hop:
        for _, by_source, group in self._groups():
            matching = [route for route in group if (src if by_source else dst) in route.cidr]
            if not matching:
                continue
            hops = tuple(route.next_hop for route in matching if isinstance(route, Static))
            return Hop(kind="via", next_hops=hops) if len(hops) == len(matching) else Hop(kind="deliver")
        return Hop(kind="unrouted")

    def _groups(self) -> Iterator[tuple[int, bool, list[Connected | Static]]]:
        """Routes in the order in which OVN prefers them: (prefix length, by source, routes)."""
        by_destination: list[Connected | Static] = [*self.connected, *(s for s in self.statics if not s.by_source)]
        by_source: list[Connected | Static] = [s for s in self.statics if s.by_source]
        for length in range(32, -1, -1):
            for sourced, routes in ((False, by_destination), (True, by_source)):
                group = [route for route in routes if route.cidr.prefixlen == length]
                if group:
                    yield length, sourced, group

    def device(self, next_hop: IPv4Address) -> str:
        """The router port on which a next hop lives."""
        return next(port.device for port in self.connected if next_hop in port.cidr)


def parse_match(text: str) -> tuple[IPv4Network, IPv4Network] | None:
    """(source, destination) of an OVN match of ``ip4.src == X`` and ``ip4.dst == X`` joined by ``&&``.

    None for any other match, and for one that no packet can meet.
    """
    found = {"src": ANY, "dst": ANY}
    for term in text.split("&&"):
        simple = re.fullmatch(r"\s*(?:ip4|ip4\.(src|dst)\s*==\s*([0-9./]+))\s*", term)
        if simple is None:
            return None
        side, value = simple.groups()
        if side is None:
            continue
        try:
            meet = intersection(found[side], IPv4Network(value, strict=False))
        except ValueError:
            return None
        if meet is None:
            return None
        found[side] = meet
    return found["src"], found["dst"]


def intersection(one: IPv4Network, other: IPv4Network) -> IPv4Network | None:
    """What two CIDRs share: the smaller one, or nothing."""
    if one.subnet_of(other):
        return one
    return other if other.subnet_of(one) else None


def rule_lines(router: Router) -> list[str]:
    """``ip -batch`` lines for a namespace that shall route like the router (its links and addresses exist already)."""
    lines: list[str] = []
    table = _TABLE
    for length, by_source, group in router._groups():
        preference = _ROUTE_PREFERENCE + (32 - length) * 2 + by_source
        for cidr in _unique(route.cidr for route in group):
            members = [route for route in group if route.cidr == cidr]
            target = "0.0.0.0/0" if by_source else str(cidr)
            lines.append(f"route add {target} table {table} {_nexthops(router, members)}")
            selector = _selector(cidr, ANY) if by_source else _selector(ANY, cidr)
            lines.append(f"rule add pref {preference} {selector} lookup {table}")
            table += 1
    for policy in router.policies:
        preference = _POLICY_PREFERENCE + 32767 - policy.priority
        if policy.action == "reroute" and policy.hops:
            chosen = policy.table or table
            line = f"route add 0.0.0.0/0 table {chosen} {spread({hop: router.device(hop) for hop in policy.hops})}"
            if line not in lines:
                lines.append(line)
            verdict = f"lookup {chosen}"
            table += policy.table is None
        else:
            verdict = "blackhole" if policy.action == "drop" else f"goto {_ANCHOR}"
        lines.extend(
            f"rule add pref {preference} {_selector(src, dst)} {verdict}" for src, dst in _routed(router, policy)
        )
    if router.policies:
        lines.append(f"rule add pref {_ANCHOR} nop")
    # Last, because the kernel checks next hops against main; the connected routes stand in our own tables as well.
    return [*lines, "rule del pref 32766", "rule del pref 32767"]


def _routed(router: Router, policy: Policy) -> list[tuple[IPv4Network, IPv4Network]]:
    """The (source, destination) pairs of a policy for which a route exists: others are lost before policies speak."""
    pairs: list[tuple[IPv4Network, IPv4Network]] = []
    routes: list[Connected | Static] = [*router.connected, *router.statics]
    for route in routes:
        by_source = isinstance(route, Static) and route.by_source
        meet = intersection(policy.src if by_source else policy.dst, route.cidr)
        if meet is not None:
            pairs.append((meet, policy.dst) if by_source else (policy.src, meet))
    whole = (policy.src, policy.dst)
    return [whole] if whole in pairs else _unique(pairs)


def _nexthops(router: Router, routes: list[Connected | Static]) -> str:
    connected = next((route for route in routes if isinstance(route, Connected)), None)
    if connected is not None:
        return f"dev {connected.device} scope link src {connected.gateway}"
    return spread({route.next_hop: router.device(route.next_hop) for route in routes if isinstance(route, Static)})


def spread(hops: Mapping[IPv4Address, str]) -> str:
    """One route over several next hops, each with its device."""
    ways = [f"via {hop} dev {device}" for hop, device in hops.items()]
    return ways[0] if len(ways) == 1 else " ".join(f"nexthop {way}" for way in ways)


def _selector(src: IPv4Network, dst: IPv4Network) -> str:
    return f"from {src}" + ("" if dst == ANY else f" to {dst}")


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
