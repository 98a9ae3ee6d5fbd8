"""What the lab refuses, and why: one clear sentence for each thing, all of them before anything is built. Pure.

Many of these are mistakes that a cluster accepts and that then surface as packets that go nowhere: a lanIp equal to
the subnet's gateway, an EIP outside its external subnet, two owners of one address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from ipaddress import IPv4Address
from itertools import combinations

from lab import egress
from lab.ipam import Pool
from lab.kinds import (
    DEFAULT_VPC,
    InwardRule,
    IptablesDnatRule,
    IptablesEIP,
    IptablesFIPRule,
    Pod,
    Subnet,
    VpcNatGateway,
)
from lab.manifests import Manifests
from lab.networks import NETWORKS, attachments, routes
from lab.routing import parse_match

_CONFIG = "ovn-vpc-nat-gw-config"


class Refused(Exception):
    """The manifests cannot be built. ``reasons`` has one sentence for each thing that is wrong."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n".join(self.reasons))


def refusals(m: Manifests) -> list[str]:
    """Every reason not to build what the manifests describe (besides those found while reading them)."""
    checks = (
        _switched_off, _references, _subnets, _overlaps, _gateways, _external_networks, _routes,
        _eips, _lan_addresses, _external_addresses, _rules, _rule_conflicts, _attachments,
        egress.refusals,
    )  # fmt: skip
    return list(dict.fromkeys(sentence for check in checks for sentence in check(m)))


def nad_of(m: Manifests, subnet: Subnet) -> str:
    """``namespace/name`` of the NAD behind an external subnet; Kube-OVN falls back to kube-system/<subnet>."""
    return subnet.nad or f"kube-system/{subnet.name}"


def subnet_of_nad(m: Manifests, nad: str) -> Subnet | None:
    """The OVN Subnet behind a NetworkAttachmentDefinition."""
    return next((s for s in m.subnets.values() if not s.external and s.nad == nad), None)


def pod_home(m: Manifests, pod: Pod) -> Subnet | None:
    """The Subnet a pod gets its address from: annotation, the namespace's Subnet, the default Subnet of its VPC.

    Without any of these another CNI serves the pod's eth0; its first network of Kube-OVN's is then its home here.
    """
    if pod.logical_switch:
        return m.subnets.get(pod.logical_switch)
    for subnet in m.subnets.values():
        if pod.meta.namespace in subnet.namespaces:
            return subnet
    for vpc in m.vpcs.values():
        if pod.meta.namespace in vpc.namespaces and vpc.default_subnet:
            return m.subnets.get(vpc.default_subnet)
    with suppress(ValueError):  # which _attachments tells
        networks = attachments(pod.meta.annotations, pod.meta.namespace)
        return next(filter(None, (subnet_of_nad(m, network.nad) for network in networks)), None)
    return None


def _subnets_known(m: Manifests) -> bool:
    """Whether every subnet was understood and has its VPC; else "in no subnet" would only echo that."""
    vpcs = {DEFAULT_VPC, *m.vpcs}
    return not any(kind in ("Subnet", "Vpc") for kind, _ in m.broken) and all(
        subnet.external or subnet.vpc_name in vpcs for subnet in m.subnets.values()
    )


def _switched_off(m: Manifests) -> Iterator[str]:
    config = m.config_maps.get(f"kube-system/{_CONFIG}")
    if config is not None and m.gateways and config.data.get("enable-vpc-nat-gw") != "true":
        yield f"{config.title}: enable-vpc-nat-gw is not 'true', so Kube-OVN would run none of the gateways."


def _references(m: Manifests) -> Iterator[str]:
    """Names that name nothing. The default VPC exists in every cluster."""
    vpcs = {DEFAULT_VPC, *m.vpcs}
    subnets, gateways, eips = m.subnets.keys(), m.gateways.keys(), m.eips.keys()
    wanted: list[tuple[str, str, str, Set[str]]] = []
    for vpc in m.vpcs.values():
        if vpc.default_subnet:
            wanted.append((f"{vpc.title}: defaultSubnet", "Subnet", vpc.default_subnet, subnets))
    for subnet in m.subnets.values():
        if subnet.vpc and not subnet.external:
            wanted.append((f"{subnet.title}: vpc", "Vpc", subnet.vpc, vpcs))
    for gw in m.gateways.values():
        wanted.append((f"{gw.title}: vpc", "Vpc", gw.vpc, vpcs))
        wanted.append((f"{gw.title}: subnet", "Subnet", gw.subnet, subnets))
        for name in gw.external_subnets or (gw.external_subnet,):
            wanted.append((f"{gw.title}: externalSubnets", "Subnet", name, subnets))
    for eip in m.eips.values():
        wanted.append((f"{eip.title}: natGwDp", "VpcNatGateway", eip.gateway, gateways))
        wanted.append((f"{eip.title}: externalSubnet", "Subnet", eip.subnet, subnets))
    for rule in m.rules:
        wanted.append((f"{rule.title}: eip", "IptablesEIP", rule.eip, eips))
    for pod in m.pods.values():
        if pod.logical_switch:
            wanted.append((f"{pod.title}: logical_switch", "Subnet", pod.logical_switch, subnets))
    for where, kind, name, known in wanted:
        if name not in known and (kind, name) not in m.broken:
            yield f"{where} names {kind} {name}, which these manifests do not define."


def _subnets(m: Manifests) -> Iterator[str]:
    for subnet in m.subnets.values():
        if subnet.cidr.prefixlen > 30:
            yield f"{subnet.title}: {subnet.cidr} has no room for a gateway and a host."
        elif subnet.gateway_address not in subnet.cidr:
            yield f"{subnet.title}: its gateway {subnet.gateway_address} lies outside {subnet.cidr}."
        elif subnet.gateway_address in (subnet.cidr.network_address, subnet.cidr.broadcast_address):
            yield f"{subnet.title}: its gateway {subnet.gateway_address} is no host address of {subnet.cidr}."


def _overlaps(m: Manifests) -> Iterator[str]:
    """Overlapping CIDRs are fine in different VPCs, and nowhere else."""
    for one, other in combinations(m.subnets.values(), 2):
        if not one.cidr.overlaps(other.cidr):
            continue
        both = f"Subnets {one.name} ({one.cidr}) and {other.name} ({other.cidr})"
        if one.external and other.external:
            yield f"{both} overlap outside, where one physical gateway serves both."
        elif not one.external and not other.external and one.vpc_name == other.vpc_name:
            yield f"{both} of VPC {one.vpc_name} overlap."
    for gw in m.gateways.values():
        outside = m.subnets.get(gw.external_subnet)
        for subnet in m.subnets.values():
            if outside and not subnet.external and subnet.vpc_name == gw.vpc and subnet.cidr.overlaps(outside.cidr):
                yield (
                    f"{gw.title}: tenant subnet {subnet.name} ({subnet.cidr}) overlaps external subnet "
                    f"{outside.name} ({outside.cidr}), so the gateway could not tell inside from outside."
                )


def _gateways(m: Manifests) -> Iterator[str]:
    for gw in m.gateways.values():
        if gw.replicas > 1:
            yield f"{gw.title}: replicas {gw.replicas} (a highly available gateway) is not simulated; use replicas 1."
        elif gw.replicas < 1:
            yield f"{gw.title}: replicas {gw.replicas} is less than 1."
        subnet = m.subnets.get(gw.subnet)
        if subnet is None:
            continue
        if subnet.external:
            yield f"{gw.title}: subnet {subnet.name} is an external network, not a subnet of VPC {gw.vpc}."
        elif subnet.vpc_name != gw.vpc:
            yield f"{gw.title}: subnet {subnet.name} belongs to VPC {subnet.vpc_name}, not to {gw.vpc}."
        for route in gw.routes:
            if route.next_hop != "gateway" and route.next_hop not in subnet.cidr:
                yield f"{gw.title}: next hop {route.next_hop} of route {route.cidr} is not on its subnet {subnet.name}."


def _external_networks(m: Manifests) -> Iterator[str]:
    """The external subnet must lead to a macvlan NAD: that is what net1 is made of."""
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for gw in m.gateways.values():
        subnet = m.subnets.get(gw.external_subnet)
        if subnet is None:
            continue
        if not subnet.external:
            yield (
                f"{gw.title}: external subnet {subnet.name} has provider {subnet.provider or 'ovn'!r}, an OVN network; "
                "the lab simulates external networks of a macvlan NetworkAttachmentDefinition only."
            )
            continue
        name = nad_of(m, subnet)
        nad = m.nads.get(name)
        if nad is None:
            if ("NetworkAttachmentDefinition", name) not in m.broken:
                yield f"{subnet.title}: provider names NAD {name}, which these manifests do not define."
            continue
        if nad.config.type != "macvlan" or not nad.config.master:
            yield f"{nad.title}: type {nad.config.type!r} with master {nad.config.master!r} is no macvlan on a NIC."
            continue
        if len(nad.config.master) > 15 or "/" in nad.config.master or nad.config.master == "lo":
            yield f"{nad.title}: {nad.config.master!r} cannot be the name of a NIC."
        if nad.config.provider and nad.config.provider != subnet.provider:
            told = nad.config.provider
            yield f"{nad.title}: its ipam provider {told!r} is not that of {subnet.title} ({subnet.provider!r})."
        users[nad.config.master, nad.config.mode].append(gw.name)
    for master, mode in users:
        sharers = [name for (nic, _), names in users.items() if nic == master for name in names]
        if mode == "passthru" and len(sharers) > 1:
            yield f"macvlan mode passthru on {master} admits one gateway, and {', '.join(sharers)} want it."


def _routes(m: Manifests) -> Iterator[str]:
    for vpc in m.vpcs.values():
        cidrs = [s.cidr for s in m.subnets.values() if s.vpc_name == vpc.name and not s.external]
        hops: list[tuple[str, IPv4Address]] = [
            (f"staticRoutes {r.cidr}", r.next_hop) for r in vpc.static_routes if not r.route_table
        ]
        for policy in vpc.policy_routes:
            where = f"policyRoutes {policy.priority} ({policy.match})"
            if policy.action == "reroute" and policy.next_hop is None:
                yield f"{vpc.title}: {where}: reroute without nextHopIP."
            elif policy.action == "reroute" and policy.next_hop and parse_match(policy.match):
                hops.append((where, policy.next_hop))
        for where, hop in hops:
            if _subnets_known(m) and not any(hop in cidr for cidr in cidrs):
                yield f"{vpc.title}: {where}: next hop {hop} is in none of the VPC's subnets."


def _eips(m: Manifests) -> Iterator[str]:
    for eip in m.eips.values():
        gw = m.gateways.get(eip.gateway)
        if gw is None:
            continue
        allowed = gw.external_subnets or (gw.external_subnet,)
        if eip.subnet not in allowed:
            names = ", ".join(allowed)
            yield f"{eip.title}: external subnet {eip.subnet} is not among those of its gateway {gw.name} ({names})."
        elif eip.subnet != gw.external_subnet:
            yield f"{eip.title}: a gateway uses only the first of its externalSubnets, {gw.external_subnet}."


def _lan_addresses(m: Manifests) -> Iterator[str]:
    """lanIp and fixed pod addresses against their subnets and against each other."""
    pools = {name: Pool.of(subnet) for name, subnet in m.subnets.items()}
    for gw in m.gateways.values():
        pool = pools.get(gw.subnet)
        if pool is not None and gw.lan_ip is not None:
            why = pool.take(gw.lan_ip, gw.title)
            if why is not None:
                yield f"{gw.title}: lanIp {gw.lan_ip} {why}."
    for pod in m.pods.values():
        home = pod_home(m, pod)
        if home is None or not pod.ip_address:
            continue
        try:
            address = IPv4Address(pod.ip_address)
        except ValueError:
            yield f"{pod.title}: ip_address {pod.ip_address!r} is not an IPv4 address."
            continue
        why = pools[home.name].take(address, pod.title)
        if why is not None:
            yield f"{pod.title}: ip_address {address} {why}."


def _external_addresses(m: Manifests) -> Iterator[str]:
    """An EIP belongs to its external subnet, and to one owner, whichever gateway and VPC it serves."""
    pools = {name: Pool.of(subnet) for name, subnet in m.subnets.items()}
    for eip in m.eips.values():
        pool = pools.get(eip.subnet)
        if pool is None or eip.address is None:
            continue
        why = pool.take(eip.address, eip.title)
        if why is not None:
            yield f"{eip.title}: v4ip {eip.address} {why}."


def _gateway_of(m: Manifests, rule: InwardRule) -> VpcNatGateway | None:
    eip: IptablesEIP | None = m.eips.get(rule.eip)
    return m.gateways.get(eip.gateway) if eip else None


def _rules(m: Manifests) -> Iterator[str]:
    """Internal addresses must be able to be a tenant's."""
    for rule in m.inward_rules:
        gw = _gateway_of(m, rule)
        if gw is None:
            continue
        subnets = [s for s in m.subnets.values() if s.vpc_name == gw.vpc and not s.external]
        home = next((s for s in subnets if rule.internal_ip in s.cidr), None)
        if home is None:
            if _subnets_known(m):
                yield f"{rule.title}: internalIp {rule.internal_ip} is in no subnet of VPC {gw.vpc}."
            continue
        reserved = Pool(home.name, home.cidr, home.gateway_address).refusal(rule.internal_ip)
        if reserved is not None:
            yield f"{rule.title}: internalIp {rule.internal_ip} {reserved}."
        for other in m.gateways.values():
            if other.subnet == home.name and other.lan_ip == rule.internal_ip:
                yield f"{rule.title}: internalIp {rule.internal_ip} is the lanIp of {other.title}."


def _rule_conflicts(m: Manifests) -> Iterator[str]:
    floating: dict[str, IptablesFIPRule] = {}
    for fip in m.fips.values():
        first = floating.setdefault(fip.eip, fip)
        if first is not fip:
            yield (
                f"{first.title} and {fip.title} both use EIP {fip.eip}: a floating IP has one internal address, "
                f"not {first.internal_ip} and {fip.internal_ip}."
            )
    identities: dict[tuple[str, int, str], IptablesDnatRule] = {}
    for dnat in m.dnats.values():
        if dnat.eip in floating and dnat.type != "share":  # a shared one decides before the floating IP
            owner = floating[dnat.eip].title
            yield f"{dnat.title} uses EIP {dnat.eip}, which {owner} owns whole: no packet would reach it."
        known = identities.setdefault((dnat.eip, dnat.external_port, dnat.protocol.lower()), dnat)
        if known is not dnat and not known.type == dnat.type == "share":
            yield (
                f"{known.title} and {dnat.title} both claim "
                f"port {dnat.external_port}/{dnat.protocol.lower()} of EIP {dnat.eip}, "
                f"for {known.internal_ip}:{known.internal_port} and {dnat.internal_ip}:{dnat.internal_port}."
            )


def _attachments(m: Manifests) -> Iterator[str]:
    """Annotations that ask for further interfaces, of pods and gateways."""
    for thing in (*m.pods.values(), *m.gateways.values()):
        annotations = thing.meta.annotations
        try:
            wanted = attachments(annotations, thing.meta.namespace or "default")
        except ValueError as error:
            yield f"{thing.title}: annotation {NETWORKS}: {error}."
            continue
        for attachment in wanted:
            if attachment.nad not in m.nads and ("NetworkAttachmentDefinition", attachment.nad) not in m.broken:
                where = f"{thing.title}: annotation {NETWORKS}"
                yield f"{where} names NAD {attachment.nad}, which these manifests do not define."
            subnet = subnet_of_nad(m, attachment.nad)
            if subnet is not None:
                yield from _attachment_routes(thing.title, annotations, subnet)


def _attachment_routes(title: str, annotations: Mapping[str, str], subnet: Subnet) -> Iterator[str]:
    try:
        wanted = routes(annotations, subnet.provider)
    except ValueError as error:
        yield f"{title}: annotation {subnet.provider}.kubernetes.io/routes: {error}."
        return
    for route in wanted:
        if route.via not in subnet.cidr:
            yield f"{title}: next hop {route.via} of route {route.cidr} is not on subnet {subnet.name} ({subnet.cidr})."
