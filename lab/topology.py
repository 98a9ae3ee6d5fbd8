"""World -> the namespaces, links, addresses and routes it is built of, as text for ``ip -batch``. Pure.

Every bridge stands in the hub namespace, so nothing is ever created in the namespace the lab is started from:

    tenant eth0 ── lanN (bridge, hub) ── lanN  VPC router        one namespace per VPC
                        │
                   gateway eth0 … net1 ── macvlan on eth1 in the node namespace, as Multus makes it
                   (net1 … net2 where eth0 belongs to another primary CNI: mgmt0, a bridge in the hub)
                                            │
    internet eth0 ── inet0  phys  extN ── extN (bridge, hub)     phys is the physical gateway
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network
from itertools import count

from lab.egressplan import EgressPlan
from lab.routing import Frozen, rule_lines, spread
from lab.world import GatewayPlan, Nic, World


class Step(Frozen):
    """``ip`` command lines to run, in order, in one namespace."""

    netns: str
    lines: tuple[str, ...]


def steps(world: World) -> list[Step]:
    """All links first (they need only the namespaces), then addresses, then routes."""
    return [
        *_links(world),
        *_tenants(world),
        *_outside(world),
        *(step for gw in world.gateways for step in _gateway(world, gw)),
        *(step for plan in world.egresses for step in _egress(world, plan)),
    ]


def sysctls(world: World) -> dict[str, tuple[str, ...]]:
    """``name=value`` for each namespace that needs some.

    Reverse path filtering is off everywhere, since a machine's own setting would otherwise leak into new namespaces.
    The gateways get what the controller's postStart hook gives them. OVN's routers send no redirects.
    """
    loose = ("net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
    forward = (*loose, "net.ipv4.ip_forward=1")
    quiet = (*forward, "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.default.send_redirects=0")
    settings: dict[str, tuple[str, ...]] = dict.fromkeys(world.namespaces(), loose)
    settings |= {vpc.netns: quiet for vpc in world.vpcs}
    settings[world.phys] = quiet
    settings |= {gw.netns: forward for gw in world.gateways}
    if world.egresses:  # connections, not pairs of hosts, are spread over next hops, as OVN does it
        by_port = ("net.ipv4.fib_multipath_hash_policy=1",)
        settings[world.phys] += by_port
        settings |= {vpc.netns: (*quiet, *by_port) for vpc in world.vpcs}
    return settings


def _links(world: World) -> Iterator[Step]:
    """Bridges and veth pairs, made in the hub; the far ends are born in their own namespaces."""
    port = (f"p{number}" for number in count())
    lines: list[str] = []

    def bridge(name: str) -> None:
        lines.extend((f"link add {name} type bridge", f"link set {name} up"))

    def cable(bridge_name: str, far: str, netns: str) -> None:
        name = next(port)
        lines.append(f"link add {name} type veth peer name {far} netns {netns}")
        lines.append(f"link set {name} master {bridge_name} up")

    for vpc in world.vpcs:
        for lan in vpc.lans:
            bridge(lan.bridge)
            cable(lan.bridge, lan.bridge, vpc.netns)
    if world.management is not None:
        bridge(world.management.bridge)
        cable(world.management.bridge, world.management.bridge, world.node)
    for segment in world.segments:
        bridge(segment.bridge)
        cable(segment.bridge, segment.bridge, world.phys)
        cable(segment.bridge, segment.master, world.node)
    for host in world.hosts:
        cable(host.bridge, "eth0", host.netns)
        for nic in host.nics:
            cable(nic.bridge, nic.interface, host.netns)
    for gw in world.gateways:
        cable(gw.bridge, gw.vpc_interface, gw.netns)
        if gw.management is not None:
            cable(gw.management.bridge, gw.management.interface, gw.netns)
    for plan in world.egresses:
        for replica in plan.replicas:
            cable(plan.bridge, "eth0", replica.netns)
    yield Step(netns=world.hub, lines=tuple(lines))
    yield Step(netns=world.phys, lines=(f"link add inet0 type veth peer name eth0 netns {world.internet.netns}",))
    up = [f"link set {segment.master} up" for segment in world.segments]
    macvlans = [
        f"link add link {gw.master} name {gw.external_interface} netns {gw.netns} type macvlan mode {gw.mode}"
        for gw in world.gateways
    ]
    macvlans += [
        f"link add link {plan.master} name net1 netns {replica.netns} type macvlan mode {plan.mode}"
        for plan in world.egresses
        for replica in plan.replicas
    ]
    if world.management is not None:
        lan = world.management
        up += [f"addr add {lan.gateway}/{lan.cidr.prefixlen} dev {lan.bridge}", f"link set {lan.bridge} up"]
    yield Step(netns=world.node, lines=(*up, *macvlans))


def _tenants(world: World) -> Iterator[Step]:
    for vpc in world.vpcs:
        lines = ["link set lo up"]
        if vpc.bfd is not None:
            lines.append(f"addr add {vpc.bfd}/32 dev lo")
        for lan in vpc.lans:
            lines.append(f"addr add {lan.gateway}/{lan.cidr.prefixlen} dev {lan.bridge}")
            lines.append(f"link set {lan.bridge} up")
        yield Step(netns=vpc.netns, lines=(*lines, *rule_lines(vpc.router)))
    for host in (*world.hosts, world.internet):
        yield Step(
            netns=host.netns,
            lines=(
                "link set lo up",
                f"addr add {host.address} dev eth0",
                "link set eth0 up",
                f"route add default via {host.gateway} dev eth0",
                *(line for nic in host.nics for line in _nic(nic)),
            ),
        )


def _nic(nic: Nic) -> Iterator[str]:
    yield f"addr add {nic.address} dev {nic.interface}"
    yield f"link set {nic.interface} up"
    yield from (f"route replace {route.cidr} via {route.via} dev {nic.interface}" for route in nic.routes)


def _outside(world: World) -> Iterator[Step]:
    lines = ["link set lo up", f"addr add {world.transit} dev inet0", "link set inet0 up"]
    for segment in world.segments:
        lines.extend(f"addr add {address} dev {segment.bridge}" for address in segment.gateways)
        lines.append(f"link set {segment.bridge} up")
    yield Step(netns=world.phys, lines=tuple(lines))


def _gateway(world: World, gw: GatewayPlan) -> Iterator[Step]:
    """What the CNI leaves in the pod before the first exec.

    eth0 gets the default route of its subnet (the tenant's, or that of another primary CNI); the external interface's,
    from the pod's annotations, replaces it. With noDefaultEIP the external interface has neither address nor route,
    and eth0's default stays until the first ``eip-add``.
    """
    inside, outside = gw.vpc_interface, gw.external_interface
    lines = ["link set lo up", f"addr add {gw.lan} dev {inside}", f"link set {inside} up"]
    if gw.external is not None:
        lines.append(f"addr add {gw.external} dev {outside}")
    lines.append(f"link set {outside} up")
    lines.extend(f"route replace {route.cidr} via {route.via} dev {inside}" for route in gw.routes)
    if gw.management is not None:
        lines.extend(_nic(gw.management))
    elif gw.external is None:
        lines.append(f"route replace default via {gw.lan_gateway} dev {inside}")
    if gw.external is not None:
        lines.append(f"route replace default via {gw.external_gateway} dev {outside}")
    yield Step(netns=gw.netns, lines=tuple(lines))


def _egress(world: World, plan: EgressPlan) -> Iterator[Step]:
    """What the CNI leaves in an egress gateway's pods, and the ways back outside.

    eth0 has routes to the sources and to the router's BFD address, net1 the default one. Outside somebody must know
    where sources that keep their addresses are: the physical gateway spreads what is for them over the replicas.
    """
    for replica in plan.replicas:
        near = replica.internal.network
        inside = [source.cidr for source in plan.sources if not source.cidr.subnet_of(near)]
        inside += [IPv4Network(plan.bfd.peer)] if plan.bfd else []
        lines = ["link set lo up"]
        for name, address in (("eth0", replica.internal), ("net1", replica.external)):
            lines += [f"addr add {address} dev {name}", f"link set {name} up"]
        lines += [f"route replace {cidr} via {plan.internal_gateway} dev eth0" for cidr in dict.fromkeys(inside)]
        lines.append(f"route replace default via {plan.external_gateway} dev net1")
        yield Step(netns=replica.netns, lines=tuple(lines))
    device = next(segment.bridge for segment in world.segments if segment.master == plan.master)
    back = spread(dict.fromkeys(plan.external_addresses, device))
    kept = [source.cidr for source in plan.sources if not source.snat]
    if kept and plan.replicas:
        yield Step(netns=world.phys, lines=tuple(f"route replace {cidr} {back}" for cidr in kept))
