"""VpcEgressGateways in the lab: what is refused, who gets which address, how it is built, what is tried. Pure.

The lab plays the controller and OVN: it gives the pods their addresses and routes, runs the init container's script,
and lets the VPC's router spread the sources' packets over the replicas, by a policy that comes after routing, as
OVN's do. IPv4 only, as all of the lab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from lab.egressplan import Bfd, EgressPlan, Replica, Source
from lab.ipam import Pool
from lab.kinds import DEFAULT_VPC, Subnet, VpcEgressGateway
from lab.manifests import Manifests
from lab.routing import ANY, Policy
from lab.world import netns_name

# Priorities of the logical router's policies as Kube-OVN's controller numbers them.
SUBNET_POLICY, EGRESS_POLICY, DROP_POLICY = 31000, 29100, 29090
Free = Callable[[str, str], IPv4Address]
_TABLE = 20000  # routing tables 20000.. are changed while the lab stands, one for each egress gateway
SUPERVISOR_MULTIPLIER_MAX = 255


def refusals(m: Manifests) -> Iterator[str]:
    """Every reason not to build the egress gateways."""
    for gw in m.egress_gateways.values():
        yield from _references(m, gw)
        yield from _counts(gw)
        yield from _places(m, gw)
        yield from _bfd(m, gw)
    yield from _addresses(m)


def _references(m: Manifests, gw: VpcEgressGateway) -> Iterator[str]:
    wanted = [("externalSubnet", gw.external_subnet)]
    wanted += [("internalSubnet", gw.internal_subnet)] if gw.internal_subnet else []
    wanted += [(f"policies[{i}].subnets", name) for i, policy in enumerate(gw.policies) for name in policy.subnets]
    for where, name in wanted:
        if name not in m.subnets and ("Subnet", name) not in m.broken:
            yield f"{gw.title}: {where} names Subnet {name}, which these manifests do not define."
    vpc = gw.vpc or DEFAULT_VPC
    if vpc not in {DEFAULT_VPC, *m.vpcs} and ("Vpc", vpc) not in m.broken:
        yield f"{gw.title}: vpc names Vpc {vpc}, which these manifests do not define."
    elif not gw.internal_subnet and internal_subnet(m, gw) is None:
        yield f"{gw.title}: internalSubnet is missing, and Vpc {vpc} has no defaultSubnet."


def _counts(gw: VpcEgressGateway) -> Iterator[str]:
    for name, addresses in (("internalIPs", gw.internal_ips), ("externalIPs", gw.external_ips)):
        if addresses and len(addresses) < gw.replicas:
            yield f"{gw.title}: {gw.replicas} replicas need as many {name}, and there are {len(addresses)}."
        if len(set(addresses)) < len(addresses):
            yield f"{gw.title}: {name} names an address twice."
    if not gw.policies:
        yield f"{gw.title}: no policies, so it serves nobody (selectors are not simulated)."
    for i, policy in enumerate(gw.policies):
        if not policy.ip_blocks and not policy.subnets:
            yield f"{gw.title}: policies[{i}] names neither ipBlocks nor subnets."


def _places(m: Manifests, gw: VpcEgressGateway) -> Iterator[str]:
    inside, outside = internal_subnet(m, gw), m.subnets.get(gw.external_subnet)
    if inside is not None and inside.external:
        yield f"{gw.title}: internalSubnet {inside.name} is an external network."
    elif inside is not None and inside.vpc_name != (gw.vpc or DEFAULT_VPC):
        where = f"belongs to VPC {inside.vpc_name}, not to {gw.vpc or DEFAULT_VPC}"
        yield f"{gw.title}: internalSubnet {inside.name} {where}."
    if outside is None:
        return
    if not outside.external:
        yield (
            f"{gw.title}: externalSubnet {outside.name} has provider {outside.provider or 'ovn'!r}, an OVN network; "
            "the lab simulates external networks of a macvlan NetworkAttachmentDefinition only."
        )
        return
    nad = m.nads.get(outside.nad or "")
    if nad is None:
        if ("NetworkAttachmentDefinition", outside.nad or "") not in m.broken:
            yield f"{outside.title}: provider names NAD {outside.nad}, which these manifests do not define."
    elif nad.config.type != "macvlan" or not nad.config.master:
        yield f"{nad.title}: type {nad.config.type!r} with master {nad.config.master!r} is no macvlan on a NIC."
    elif nad.config.mode == "passthru" and gw.replicas > 1:
        yield f"{gw.title}: macvlan mode passthru on {nad.config.master} admits one pod, and there are {gw.replicas}."


def _bfd(m: Manifests, gw: VpcEgressGateway) -> Iterator[str]:
    if not gw.bfd.enabled:
        return
    vpc = m.vpcs.get(gw.vpc or DEFAULT_VPC)
    if vpc is not None and (not vpc.bfd_port.enabled or vpc.bfd_port.ip is None):
        yield f"{gw.title}: bfd is enabled, and {vpc.title} has no bfdPort (enabled: true and an IPv4 ip)."
    if gw.bfd.multiplier > SUPERVISOR_MULTIPLIER_MAX:
        yield f"{gw.title}: bfd multiplier {gw.bfd.multiplier} does not fit a BFD packet (255 at most)."


def _addresses(m: Manifests) -> Iterator[str]:
    """Fixed addresses against their subnets and against each other."""
    pools = {name: Pool.of(subnet) for name, subnet in m.subnets.items()}
    for nat in m.gateways.values():
        if nat.lan_ip is not None and nat.subnet in pools:
            pools[nat.subnet].take(nat.lan_ip, nat.title)
    for eip in m.eips.values():
        if eip.address is not None and eip.subnet in pools:
            pools[eip.subnet].take(eip.address, eip.title)
    for gw in m.egress_gateways.values():
        inside = internal_subnet(m, gw)
        sides = (("internalIPs", inside.name if inside else "", gw.internal_ips),)
        for name, subnet, addresses in (*sides, ("externalIPs", gw.external_subnet, gw.external_ips)):
            for address in dict.fromkeys(addresses):
                why = pools[subnet].take(address, gw.title) if subnet in pools else None
                if why is not None:
                    yield f"{gw.title}: {name}: {address} {why}."


def internal_subnet(m: Manifests, gw: VpcEgressGateway) -> Subnet | None:
    """The subnet of eth0: the one named, or the default one of the VPC."""
    vpc = m.vpcs.get(gw.vpc or DEFAULT_VPC)
    return m.subnets.get(gw.internal_subnet or (vpc.default_subnet if vpc else ""))


# --- who gets what --------------------------------------------------------------------------------------------


def take_fixed(m: Manifests, pools: dict[str, Pool]) -> None:
    """Take the addresses that the manifests fix; ``refusals`` has seen that they can be taken."""
    for gw in m.egress_gateways.values():
        inside = internal_subnet(m, gw)
        for subnet, addresses in (
            (inside.name if inside else "", gw.internal_ips),
            (gw.external_subnet, gw.external_ips),
        ):
            for address in addresses:
                pools[subnet].take(address, gw.title)


def plans(m: Manifests, lab: str, bridges: dict[str, str], free: Free) -> list[EgressPlan]:
    """The egress gateways; ``bridges`` by tenant subnet, ``free`` gives out an address of a subnet to a holder."""
    found = []
    for table, gw in enumerate(m.egress_gateways.values(), _TABLE):
        inside, outside = internal_subnet(m, gw), m.subnets[gw.external_subnet]
        assert inside is not None  # refused otherwise
        vpc = m.vpcs.get(gw.vpc or DEFAULT_VPC)
        cni = m.nads[outside.nad or ""].config
        peer = vpc.bfd_port.ip if vpc and gw.bfd.enabled else None
        plan = EgressPlan(
            name=f"{gw.meta.namespace}/{gw.name}", vpc=gw.vpc or DEFAULT_VPC, bridge=bridges[inside.name],
            internal_gateway=inside.gateway_address, external_gateway=outside.gateway_address,
            master=cni.master, mode=cni.mode, sources=tuple(_sources(m, gw)), table=table,
            replicas=tuple(_replica(gw, i, lab, (inside, outside), free) for i in range(gw.replicas)),
            bfd=peer and Bfd(peer=peer, min_tx=gw.bfd.min_tx, min_rx=gw.bfd.min_rx, multiplier=gw.bfd.multiplier),
        )  # fmt: skip
        found.append(plan)
    return found


def _replica(gw: VpcEgressGateway, number: int, lab: str, sides: tuple[Subnet, Subnet], free: Free) -> Replica:
    name = f"{gw.prefix}{gw.name}-{number}"
    inside, outside = sides
    internal = gw.internal_ips[number] if gw.internal_ips else free(inside.name, f"eth0 of {name}")
    external = gw.external_ips[number] if gw.external_ips else free(outside.name, f"net1 of {name}")
    return Replica(
        name=name, netns=netns_name(lab, "veg", gw.meta.namespace, name),
        internal=IPv4Interface((internal, inside.cidr.prefixlen)),
        external=IPv4Interface((external, outside.cidr.prefixlen)),
    )  # fmt: skip


def _sources(m: Manifests, gw: VpcEgressGateway) -> Iterator[Source]:
    seen: set[IPv4Network] = set()
    for policy in gw.policies:
        for cidr in (*policy.ip_blocks, *(m.subnets[name].cidr for name in policy.subnets)):
            if cidr not in seen:
                seen.add(cidr)
                yield Source(cidr=cidr, snat=policy.snat)


def policies(egresses: list[EgressPlan], subnets: list[IPv4Network]) -> list[Policy]:
    """What the controller adds to a VPC's router: inside stays inside, sources go to the replicas or, with BFD and
    none of them up, nowhere."""
    if not egresses:
        return []
    found = [Policy(priority=SUBNET_POLICY, src=ANY, dst=cidr, action="allow") for cidr in subnets]
    for egress in egresses:
        for source in egress.sources:
            away = Policy(priority=EGRESS_POLICY, src=source.cidr, dst=ANY, action="reroute", table=egress.table)
            if egress.replicas:
                found.append(away.model_copy(update={"next_hops": egress.internal_addresses}))
            if egress.bfd:
                found.append(Policy(priority=DROP_POLICY, src=source.cidr, dst=ANY, action="drop"))
    return found


def notes(egresses: list[EgressPlan], routed: set[str]) -> Iterator[str]:
    """What a reader must know; ``routed`` are the VPCs that have a default route."""
    for egress in egresses:
        if egress.bfd:
            yield (
                f"VpcEgressGateway {egress.name}: in OVN's place BFD is spoken by this project's own bfdd-beacon, not "
                "by a foreign daemon; the router takes a next hop out when its session goes down."
            )
        if egress.vpc not in routed:
            yield (
                f"Vpc {egress.vpc}: no route to 0.0.0.0/0, so OVN drops what leaves the VPC before the policy of "
                f"VpcEgressGateway {egress.name} speaks."
            )
