"""Interfaces of pods beyond the usual ones, and what lies behind them. Pure.

A Pod's further interfaces on OVN subnets, with the routes of its annotations and the Services that these lead to; and
gateways where Kube-OVN is not the primary CNI, whose eth0 is that other CNI's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from lab.check import Refused, subnet_of_nad
from lab.ipam import Pool
from lab.kinds import Pod, Subnet, VpcNatGateway
from lab.manifests import Manifests
from lab.networks import NETWORKS, attachments, routes
from lab.world import ECHO_PORT, Host, Lan, Listen, Nic, ViaRoute, netns_name

_MANAGEMENTS = ("10.244.0.0/24", "10.245.0.0/24", "172.30.255.0/24")


@dataclass
class Further:
    """``free`` gives out an address of a subnet to a holder; ``note`` takes a sentence on what is not simulated."""

    m: Manifests
    lab: str
    lans: Mapping[str, Lan]
    free: Callable[[str, str], IPv4Address]
    note: Callable[[str], None]
    management: Pool | None = None
    beyond: dict[IPv4Address, tuple[str, Lan]] = field(default_factory=dict)

    def nics(self, pod: Pod, home: Subnet) -> Iterator[Nic]:
        """The pod's further interfaces on OVN subnets, each with an address and the routes of its annotation."""
        for attachment in attachments(pod.meta.annotations, pod.meta.namespace):
            subnet = subnet_of_nad(self.m, attachment.nad)
            if subnet is home:
                continue
            if subnet is None:
                self.note(f"{pod.title}: no tenant Subnet lies behind NAD {attachment.nad}; it is not simulated.")
                continue
            fixed = pod.meta.annotations.get(f"{subnet.provider}.kubernetes.io/ip_address")
            address = IPv4Address(fixed) if fixed else self.free(subnet.name, f"{attachment.interface} of {pod.title}")
            yield Nic(
                interface=attachment.interface, bridge=self.lans[subnet.name].bridge,
                address=IPv4Interface((address, subnet.cidr.prefixlen)),
                routes=routes(pod.meta.annotations, subnet.provider),
            )  # fmt: skip

    def handles(self, pod: Pod, annotation: str) -> bool:
        """Whether an annotation belongs to a further interface that is built."""
        subnets = (subnet_of_nad(self.m, a.nad) for a in attachments(pod.meta.annotations, pod.meta.namespace))
        providers = [subnet.provider for subnet in subnets if subnet]
        own = {f"{provider}.kubernetes.io/{what}" for provider in providers for what in ("routes", "ip_address")}
        return bool(providers) and (annotation == NETWORKS or annotation in own)

    def services(self) -> Iterator[tuple[str, Host]]:
        """What lies behind further interfaces at a single address (the API server's Service, most of all), by VPC.

        In a cluster the router of that interface's VPC balances it; here it is a host on a link of its own.
        """
        for pod in self.m.pods.values():
            for attachment in attachments(pod.meta.annotations, pod.meta.namespace):
                subnet = subnet_of_nad(self.m, attachment.nad)
                for route in routes(pod.meta.annotations, subnet.provider) if subnet else ():
                    address = route.cidr.network_address
                    single = route.cidr.prefixlen == 32 and address not in self.beyond
                    if subnet and single and route.via == subnet.gateway_address:
                        yield subnet.vpc_name, self._service(subnet.vpc_name, address)

    def _service(self, vpc: str, address: IPv4Address) -> Host:
        link = IPv4Network((address, 31), strict=False)
        name, bridge = f"service {address}", f"svc{len(self.beyond)}"
        gateway = next(other for other in link if other != address)
        self.beyond[address] = (vpc, Lan(name=name, bridge=bridge, cidr=link, gateway=gateway))
        return Host(
            label=name, netns=netns_name(self.lab, "service", str(address)), address=IPv4Interface((address, 31)),
            gateway=gateway, bridge=bridge, vpc=vpc, subnet=name,
            listens=(Listen(protocol="tcp", port=ECHO_PORT), Listen(protocol="udp", port=ECHO_PORT)),
        )  # fmt: skip

    def lans_of(self, vpc: str) -> tuple[Lan, ...]:
        """The links of ``services`` on the router of a VPC."""
        return tuple(lan for where, lan in self.beyond.values() if where == vpc)

    def sides(self, gw: VpcNatGateway, inside: Subnet) -> tuple[str, str, Nic | None]:
        """A gateway's interfaces inside and outside and, where another CNI is the primary one, its eth0.

        A gateway's own list of networks counts in that mode only; the external network is put behind it.
        """
        wanted = attachments(gw.meta.annotations, gw.meta.namespace or "default")
        mine = next((a for a in wanted if a.nad == inside.nad), None)
        if mine is not None:
            return mine.interface, f"net{len(wanted) + 1}", self._management_nic(gw)
        if wanted:
            self.note(f"{gw.title}: annotation {NETWORKS} does not name that of subnet {inside.name}; not simulated.")
        return "eth0", "net1", None

    def _management_nic(self, gw: VpcNatGateway) -> Nic:
        """The gateway's eth0 on the network of the primary CNI, with that one's default route."""
        if self.management is None:
            used = [subnet.cidr for subnet in self.m.subnets.values()]
            nets = (IPv4Network(text) for text in _MANAGEMENTS)
            net = next((n for n in nets if not any(n.overlaps(cidr) for cidr in used)), None)
            if net is None:
                raise Refused(
                    [f"The primary CNI needs one of {', '.join(_MANAGEMENTS)}, and the subnets use them all."]
                )
            self.management = Pool("of the primary CNI", net, net[1])
        address = self.management.first_free(gw.title)
        if address is None:
            raise Refused([f"{gw.title}: the network of the primary CNI is full."])
        default = ViaRoute(cidr=IPv4Network("0.0.0.0/0"), via=self.management.gateway)
        length = self.management.cidr.prefixlen
        return Nic(interface="eth0", bridge="mgmt0", address=IPv4Interface((address, length)), routes=(default,))

    def management_lan(self) -> Lan | None:
        """The network of the primary CNI, if any gateway is on it."""
        if (pool := self.management) is None:
            return None
        return Lan(name="primary CNI", bridge="mgmt0", cidr=pool.cidr, gateway=pool.gateway)
