"""Manifests -> World: who gets which address, which hosts exist, what each gateway shall do. Pure.

Addresses are given out as Kube-OVN's IPAM does, with one difference that makes a lab repeatable: addresses that the
manifests fix (lanIp, v4ip, internalIp) are taken before the first free ones are handed out, in document order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from lab import egress
from lab.check import Refused, nad_of, pod_home, refusals
from lab.egressplan import EgressPlan
from lab.further import Further
from lab.ipam import Pool
from lab.kinds import DEFAULT_VPC, IptablesDnatRule, Pod, Subnet, Vpc, VpcNatGateway
from lab.manifests import Manifests
from lab.routing import Connected, Policy, Router, Static, intersection, parse_match
from lab.world import (
    ECHO_PORT,
    Dnat,
    Eip,
    Fip,
    GatewayPlan,
    Host,
    Lan,
    Listen,
    Segment,
    Share,
    Snat,
    ViaRoute,
    VpcPlan,
    World,
    netns_name,
)  # fmt: skip

_TRANSITS = ("198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24", "198.18.0.0/24")
_HANDLED_ANNOTATIONS = {"ovn.kubernetes.io/logical_switch", "ovn.kubernetes.io/ip_address"}


def plan(m: Manifests, lab: str = "lab") -> tuple[World, tuple[str, ...]]:
    """The world and the notes on what of the manifests is not simulated. Raises `Refused` with every reason."""
    reasons = [*m.problems, *refusals(m)]
    if reasons:
        raise Refused(reasons)
    return _Planner(m, lab).build()


@dataclass
class _Planner:
    m: Manifests
    lab: str
    pools: dict[str, Pool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    exhausted: list[str] = field(default_factory=list)
    lans: dict[str, Lan] = field(default_factory=dict)
    eip_addresses: dict[str, IPv4Address] = field(default_factory=dict)
    hosts: dict[tuple[str, IPv4Address], Host] = field(default_factory=dict)
    further: Further = field(init=False)
    egresses: list[EgressPlan] = field(default_factory=list)

    def build(self) -> tuple[World, tuple[str, ...]]:
        m = self.m
        self.notes.extend(m.notes)
        self.pools = {name: Pool.of(subnet) for name, subnet in m.subnets.items()}
        tenants = [subnet for subnet in m.subnets.values() if not subnet.external]
        self.lans = {
            s.name: Lan(name=s.name, bridge=f"lan{i}", cidr=s.cidr, gateway=s.gateway_address)
            for i, s in enumerate(tenants)
        }
        self.further = Further(m, self.lab, self.lans, self._free, self.notes.append)
        self.hosts.update(((vpc, host.ip), host) for vpc, host in self.further.services())
        self._fixed_addresses()
        bridges = {name: lan.bridge for name, lan in self.lans.items()}
        self.egresses = egress.plans(m, self.lab, bridges, self._free)
        names = dict.fromkeys([*m.vpcs, *(s.vpc_name for s in tenants)])
        vpcs = tuple(self._vpc(name) for name in names)
        segments = self._segments()
        gateways = tuple(self._gateway(gw) for gw in m.gateways.values())
        self._rule_hosts(gateways)
        for pod in m.pods.values():
            self._pod(pod)
        self._spare_hosts(gateways)
        if self.exhausted:
            raise Refused(self.exhausted)
        self._general_notes(vpcs, gateways)
        transit, internet = self._internet()
        world = World(
            lab=self.lab, hub=netns_name(self.lab, "hub"), node=netns_name(self.lab, "node"),
            phys=netns_name(self.lab, "phys"), transit=transit, internet=internet, vpcs=vpcs, segments=segments,
            gateways=gateways, hosts=tuple(self.hosts.values()), management=self.further.management_lan(),
            egresses=tuple(self.egresses),
        )  # fmt: skip
        return world, tuple(dict.fromkeys(self.notes))

    def _vpc(self, name: str) -> VpcPlan:
        lans = tuple(self.lans[s.name] for s in self.m.subnets.values() if s.name in self.lans and s.vpc_name == name)
        lans += self.further.lans_of(name)
        connected = tuple(Connected(cidr=lan.cidr, device=lan.bridge, gateway=lan.gateway) for lan in lans)
        vpc = self.m.vpcs.get(name)
        statics, policies = (self._statics(vpc), self._policies(vpc)) if vpc else ((), ())
        mine = [plan for plan in self.egresses if plan.vpc == name]
        policies += tuple(egress.policies(mine, [lan.cidr for lan in lans]))
        router = Router(connected=connected, statics=statics, policies=policies)
        bfd = vpc.bfd_port.ip if vpc and vpc.bfd_port.enabled else None
        return VpcPlan(name=name, netns=netns_name(self.lab, "vpc", name), lans=lans, router=router, bfd=bfd)

    def _statics(self, vpc: Vpc) -> tuple[Static, ...]:
        kept = []
        for route in vpc.static_routes:
            if route.route_table:
                self.notes.append(
                    f"{vpc.title}: route table {route.route_table!r} is not simulated; "
                    f"its route {route.cidr} via {route.next_hop} ({route.policy}) is left out."
                )
                continue
            kept.append(Static(cidr=route.cidr, next_hop=route.next_hop, by_source=route.policy == "policySrc"))
        return tuple(kept)

    def _policies(self, vpc: Vpc) -> tuple[Policy, ...]:
        kept = []
        for policy in vpc.policy_routes:
            match = parse_match(policy.match)
            if match is None:
                self.notes.append(
                    f"{vpc.title}: policy route {policy.priority}: the match {policy.match!r} is not simulated "
                    "(ip4.src == and ip4.dst ==, joined by &&, are); the policy is left out."
                )
                continue
            kept.append(
                Policy(
                    priority=policy.priority, src=match[0], dst=match[1], action=policy.action, next_hop=policy.next_hop
                )
            )
        return tuple(kept)

    def _fixed_addresses(self) -> None:
        """Take what the manifests fix, so that nothing dynamic gets in its way. `refusals` has seen it is takeable."""
        for gw in self.m.gateways.values():
            if gw.lan_ip is not None:
                self.pools[gw.subnet].take(gw.lan_ip, gw.title)
        for eip in self.m.eips.values():
            if eip.address is not None:
                self.pools[eip.subnet].take(eip.address, eip.title)
        egress.take_fixed(self.m, self.pools)
        for pod in self.m.pods.values():
            home = pod_home(self.m, pod)
            if home is not None and pod.ip_address and not home.external:
                self.pools[home.name].take(IPv4Address(pod.ip_address), pod.title)
        for rule in self.m.inward_rules:
            home = self._home(self.m.gateways[self.m.eips[rule.eip].gateway].vpc, rule.internal_ip)
            self.pools[home.name].holders.setdefault(rule.internal_ip, rule.title)

    def _home(self, vpc: str, address: IPv4Address) -> Subnet:
        return next(
            s for s in self.m.subnets.values() if s.name in self.lans and s.vpc_name == vpc and address in s.cidr
        )

    def _free(self, subnet: str, holder: str, within: IPv4Network | None = None) -> IPv4Address:
        address = self.pools[subnet].first_free(holder, within)
        if address is None:
            self.exhausted.append(f"{holder}: subnet {subnet} ({self.pools[subnet].cidr}) has no free address left.")
            return self.pools[subnet].cidr.network_address
        return address

    def _segments(self) -> tuple[Segment, ...]:
        """External subnets, grouped by the NIC they are behind."""
        by_master: dict[str, list[IPv4Interface]] = {}
        for subnet in self.m.subnets.values():
            nad = self.m.nads.get(nad_of(self.m, subnet)) if subnet.external else None
            if nad is not None and nad.config.type == "macvlan" and nad.config.master:
                gateway = IPv4Interface((subnet.gateway_address, subnet.cidr.prefixlen))
                by_master.setdefault(nad.config.master, []).append(gateway)
            elif subnet.external:
                self.notes.append(
                    f"{subnet.title}: provider {subnet.provider} leads to no macvlan NAD; the network is not simulated."
                )
        return tuple(
            Segment(master=master, bridge=f"ext{i}", gateways=tuple(gateways))
            for i, (master, gateways) in enumerate(by_master.items())
        )

    def _gateway(self, gw: VpcNatGateway) -> GatewayPlan:
        inside, outside = self.m.subnets[gw.subnet], self.m.subnets[gw.external_subnet]
        cni = self.m.nads[nad_of(self.m, outside)].config
        lan = gw.lan_ip or self._free(inside.name, gw.title)
        net1 = None if gw.no_default_eip else self._free(outside.name, f"net1 of {gw.title}")
        others = [
            s.cidr for s in self.m.subnets.values() if s.name in self.lans and s.vpc_name == gw.vpc and s is not inside
        ]
        routes = [ViaRoute(cidr=cidr, via=inside.gateway_address) for cidr in others]
        routes += [
            ViaRoute(cidr=r.cidr, via=inside.gateway_address if r.next_hop == "gateway" else r.next_hop)
            for r in gw.routes
        ]
        eips = self._eips(gw, outside)
        names = {eip.name for eip in eips}
        inner, outer, management = self.further.sides(gw, inside)
        return GatewayPlan(
            name=gw.name, netns=netns_name(self.lab, "gw", gw.name), vpc=gw.vpc, subnet=inside.name,
            bridge=self.lans[inside.name].bridge, lan=IPv4Interface((lan, inside.cidr.prefixlen)),
            lan_gateway=inside.gateway_address, master=cni.master, mode=cni.mode,
            external_cidr=outside.cidr, external_gateway=outside.gateway_address,
            external=None if net1 is None else IPv4Interface((net1, outside.cidr.prefixlen)),
            routes=tuple(dict.fromkeys(routes)), vpc_cidrs=tuple(others), eips=eips, fips=self._fips(names),
            dnats=self._dnats(names), snats=self._snats(names), shares=self._shares(names),
            vpc_interface=inner, external_interface=outer, management=management,
        )  # fmt: skip

    def _eips(self, gw: VpcNatGateway, outside: Subnet) -> tuple[Eip, ...]:
        built = []
        for eip in self.m.eips.values():
            if eip.gateway != gw.name:
                continue
            address = eip.address or self._free(outside.name, eip.title)
            self.eip_addresses[eip.name] = address
            built.append(Eip(name=eip.name, address=IPv4Interface((address, outside.cidr.prefixlen))))
        return tuple(built)

    def _fips(self, eips: set[str]) -> tuple[Fip, ...]:
        """The floating IPs on these EIPs, in document order."""
        mine = [fip for fip in self.m.fips.values() if fip.eip in eips]
        return tuple(Fip(name=f.name, eip=self.eip_addresses[f.eip], internal=f.internal_ip) for f in mine)

    def _dnats(self, eips: set[str]) -> tuple[Dnat, ...]:
        mine = [dnat for dnat in self.m.dnats.values() if dnat.eip in eips and dnat.type != "share"]
        return tuple(
            Dnat(
                name=d.name, eip=self.eip_addresses[d.eip], external_port=d.external_port, protocol=d.protocol,
                internal=d.internal_ip, internal_port=d.internal_port,
            )
            for d in mine
        )  # fmt: skip

    def _shares(self, eips: set[str]) -> tuple[Share, ...]:
        """The rules of type share, those of one EIP, port and protocol together."""
        groups: dict[tuple[str, int, str], list[IptablesDnatRule]] = {}
        for dnat in self.m.dnats.values():
            if dnat.eip in eips and dnat.type == "share":
                groups.setdefault((dnat.eip, dnat.external_port, dnat.protocol.lower()), []).append(dnat)
        return tuple(self._share(eip, port, rules) for (eip, port, _), rules in groups.items())

    def _share(self, eip: str, port: int, rules: list[IptablesDnatRule]) -> Share:
        backends = dict.fromkeys((rule.internal_ip, rule.internal_port) for rule in rules)
        return Share(
            name=", ".join(rule.name for rule in rules), eip=self.eip_addresses[eip], external_port=port,
            protocol=rules[0].protocol, backends=tuple(backends),
        )  # fmt: skip

    def _snats(self, eips: set[str]) -> tuple[Snat, ...]:
        mine = [snat for snat in self.m.snats.values() if snat.eip in eips]
        return tuple(Snat(name=s.name, eip=self.eip_addresses[s.eip], cidr=s.internal_cidr) for s in mine)

    def _rule_hosts(self, gateways: tuple[GatewayPlan, ...]) -> None:
        """A host behind every internal address that a rule names; DNAT's internal ports listen."""
        for gw in gateways:
            for fip in gw.fips:
                self._host(gw.vpc, fip.internal)
            for dnat in gw.dnats:
                self._host(gw.vpc, dnat.internal, Listen(protocol=dnat.transport, port=dnat.internal_port))
            for share in gw.shares:
                for address, port in share.backends:
                    self._host(gw.vpc, address, Listen(protocol=share.transport, port=port))

    def _host(self, vpc: str, address: IPv4Address, *listens: Listen, label: str = "", netns: str = "") -> Host:
        """Add a host, or ports and a name to the one that has the address already."""
        lan = self.lans[self._home(vpc, address).name]
        known = self.hosts.get((vpc, address))
        always = (Listen(protocol="tcp", port=ECHO_PORT), Listen(protocol="udp", port=ECHO_PORT))
        ports = dict.fromkeys((*(known.listens if known else always), *listens))
        host = Host(
            label=label or (known.label if known else f"{vpc}/{address}"),
            netns=netns or (known.netns if known else netns_name(self.lab, "host", vpc, str(address))),
            address=IPv4Interface((address, lan.cidr.prefixlen)), gateway=lan.gateway, bridge=lan.bridge,
            vpc=vpc, subnet=lan.name, listens=tuple(ports),
        )  # fmt: skip
        self.hosts[vpc, address] = host
        return host

    def _pod(self, pod: Pod) -> None:
        home = pod_home(self.m, pod)
        if home is None or home.external:
            self.notes.append(
                f"{pod.title}: no tenant Subnet here serves namespace {pod.meta.namespace}; the pod is not simulated."
            )
            return
        extra = sorted(k for k in pod.meta.annotations if "kubernetes.io/" in k or "cni.cncf.io/" in k)
        nics = tuple(self.further.nics(pod, home))
        for key in (k for k in extra if k not in _HANDLED_ANNOTATIONS and not self.further.handles(pod, k)):
            self.notes.append(f"{pod.title}: annotation {key} is not simulated.")
        self.notes.append(f"{pod.title}: its containers do not run; an echo server stands in for them.")
        address = IPv4Address(pod.ip_address) if pod.ip_address else self._free(home.name, pod.title)
        name = f"{pod.meta.namespace}/{pod.name}"
        host = self._host(
            home.vpc_name, address, label=name, netns=netns_name(self.lab, "pod", pod.meta.namespace, pod.name)
        )
        self.hosts[home.vpc_name, address] = host.model_copy(update={"nics": nics})

    def _spare_hosts(self, gateways: tuple[GatewayPlan, ...]) -> None:
        """A plain tenant wherever a test needs one: behind each SNAT, and beside each target of a hairpin."""
        for gw in gateways:
            floating = {fip.internal for fip in gw.fips}
            targets = [{fip.internal} for fip in gw.fips] + [{dnat.internal} for dnat in gw.dnats]
            targets += [{address for address, _ in share.backends} for share in gw.shares]
            for together in targets:
                for home in (self._home(gw.vpc, address) for address in sorted(together)):
                    if not self._tenants(gw.vpc, home.cidr, floating | together):
                        self._spare(gw.vpc, home, home.cidr)
            for snat in gw.snats:
                for subnet in self.m.subnets.values():
                    within = intersection(snat.cidr, subnet.cidr)
                    ours = subnet.name in self.lans and subnet.vpc_name == gw.vpc
                    if ours and within is not None and not self._tenants(gw.vpc, within, floating):
                        self._spare(gw.vpc, subnet, within)
        for plan in self.egresses:
            for source in plan.sources:
                for subnet in self.m.subnets.values():
                    within = intersection(source.cidr, subnet.cidr)
                    ours = subnet.name in self.lans and subnet.vpc_name == plan.vpc
                    if ours and within is not None and not self._tenants(plan.vpc, within, set()):
                        self._spare(plan.vpc, subnet, within)

    def _tenants(self, vpc: str, within: IPv4Network, without: set[IPv4Address]) -> list[Host]:
        return [
            host for host in self.hosts.values() if host.vpc == vpc and host.ip in within and host.ip not in without
        ]

    def _spare(self, vpc: str, subnet: Subnet, within: IPv4Network) -> None:
        """A host on the first free address; a range too small or too full for one simply goes without."""
        address = self.pools[subnet.name].first_free("a tenant of the lab", within)
        if address is not None:
            self._host(vpc, address)

    def _internet(self) -> tuple[IPv4Interface, Host]:
        """The host behind the physical gateway, on a documentation range that no manifest uses."""
        used = [subnet.cidr for subnet in self.m.subnets.values()]
        nets = [IPv4Network(text) for text in _TRANSITS]
        net = next((n for n in nets if not any(n.overlaps(cidr) for cidr in used)), None)
        if net is None:
            raise Refused(
                [f"The lab's internet host needs one of {', '.join(_TRANSITS)}, and the subnets use them all."]
            )
        always = (Listen(protocol="tcp", port=ECHO_PORT), Listen(protocol="udp", port=ECHO_PORT))
        host = Host(
            label="internet", netns=netns_name(self.lab, "inet"), address=IPv4Interface((net[2], net.prefixlen)),
            gateway=net[1], listens=always,
        )  # fmt: skip
        return IPv4Interface((net[1], net.prefixlen)), host

    def _general_notes(self, vpcs: tuple[VpcPlan, ...], gateways: tuple[GatewayPlan, ...]) -> None:
        for config in self.m.config_maps.values():
            if config.name == "ovn-vpc-nat-config":
                self.notes.append(f"{config.title}: no image is run; gateways run the nat-gateway.sh of this checkout.")
            elif config.name != "ovn-vpc-nat-gw-config":
                self.notes.append(f"{config.title}: this ConfigMap is not simulated.")
        if any(vpc.name == DEFAULT_VPC for vpc in vpcs):
            self.notes.append(
                f"Vpc {DEFAULT_VPC}: the default VPC is a router like any other; nodes and Services are not simulated."
            )
        routed = {vpc.name for vpc in vpcs if any(static.cidr.prefixlen == 0 for static in vpc.router.statics)}
        self.notes.extend(egress.notes(self.egresses, routed))
        for gw in gateways:
            router = next(vpc.router for vpc in vpcs if vpc.name == gw.vpc)
            if not any(static.next_hop == gw.lan.ip for static in router.statics) and not any(
                policy.next_hop == gw.lan.ip for policy in router.policies
            ):
                self.notes.append(
                    f"Vpc {gw.vpc}: no route leads to lanIp {gw.lan.ip} of gateway {gw.name}, so nothing of the VPC "
                    "goes out through it, answers to outside included."
                )
