"""The world a set of manifests describes: hosts, links, routes and gateways, as plain data. Pure.

Nothing here says how it is built; `lab.topology` turns it into namespaces and links, `lab.controller` into exec
calls, `lab.probes` into traffic with a predicted outcome. A World is stored beside the lab while the lab stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Literal

from lab.egressplan import EgressPlan
from lab.routing import Frozen, Router

ECHO_PORT = 7007
"""TCP and UDP port on which every host answers, besides the ports that DNAT rules lead to."""

Protocol = Literal["tcp", "udp"]


def netns_name(lab: str, *parts: str) -> str:
    """A namespace's name, ``<lab>.<part>…``; a very long one ends in a hash. Lab names hold no dot."""
    name = ".".join((lab, *parts))
    return name if len(name) <= 120 else f"{name[:110]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Listen(Frozen):
    """A port on which a host answers."""

    protocol: Protocol
    port: int


class ViaRoute(Frozen):
    cidr: IPv4Network
    via: IPv4Address


class Nic(Frozen):
    """A further interface of a pod, on a bridge of the hub, with routes of its own."""

    interface: str
    bridge: str
    address: IPv4Interface
    routes: tuple[ViaRoute, ...] = ()


class Host(Frozen):
    """Something that sends and answers: a tenant's pod, or the host on the internet."""

    label: str
    netns: str
    address: IPv4Interface
    gateway: IPv4Address
    bridge: str = ""
    vpc: str = ""
    subnet: str = ""
    listens: tuple[Listen, ...] = ()
    nics: tuple[Nic, ...] = ()

    @property
    def ip(self) -> IPv4Address:
        return self.address.ip


class Lan(Frozen):
    """A tenant subnet: a bridge in the hub, a port of the VPC's router (of the same name as the bridge) on it."""

    name: str
    bridge: str
    cidr: IPv4Network
    gateway: IPv4Address


class VpcPlan(Frozen):
    name: str
    netns: str
    lans: tuple[Lan, ...]
    router: Router
    bfd: IPv4Address | None = None
    """The address from which the router speaks BFD with its egress gateways."""


class Segment(Frozen):
    """One external layer 2 network: everything behind one NAD master. The physical gateway has a port on it."""

    master: str
    bridge: str
    gateways: tuple[IPv4Interface, ...]


class Eip(Frozen):
    name: str
    address: IPv4Interface


class Fip(Frozen):
    name: str
    eip: IPv4Address
    internal: IPv4Address


class Dnat(Frozen):
    name: str
    eip: IPv4Address
    external_port: int
    protocol: str
    internal: IPv4Address
    internal_port: int

    @property
    def transport(self) -> Protocol:
        return "udp" if self.protocol.lower() == "udp" else "tcp"


class Share(Frozen):
    """IptablesDnatRules of type share that have one identity: each connection goes to one of their backends."""

    name: str
    eip: IPv4Address
    external_port: int
    protocol: str
    backends: tuple[tuple[IPv4Address, int], ...]

    @property
    def transport(self) -> Protocol:
        return "udp" if self.protocol.lower() == "udp" else "tcp"


class Snat(Frozen):
    name: str
    eip: IPv4Address
    cidr: IPv4Network


class GatewayPlan(Frozen):
    """A NAT gateway: one interface on a tenant subnet, one a macvlan on an external segment, and what it shall do."""

    name: str
    netns: str
    vpc: str
    subnet: str
    bridge: str
    lan: IPv4Interface
    lan_gateway: IPv4Address
    master: str
    mode: str
    external_cidr: IPv4Network
    external_gateway: IPv4Address
    external: IPv4Interface | None
    """Address of the external interface from the pod's own IPAM; None with noDefaultEIP."""
    routes: tuple[ViaRoute, ...]
    """Routes of the tenant's interface that the CNI sets: the other subnets of the VPC and spec.routes."""
    vpc_cidrs: tuple[IPv4Network, ...]
    """CIDRs of the VPC's subnets that do not hold the internal gateway: what `subnet-route-add` names."""
    eips: tuple[Eip, ...] = ()
    fips: tuple[Fip, ...] = ()
    dnats: tuple[Dnat, ...] = ()
    snats: tuple[Snat, ...] = ()
    shares: tuple[Share, ...] = ()
    vpc_interface: str = "eth0"
    external_interface: str = "net1"
    management: Nic | None = None
    """The pod's eth0 where Kube-OVN is not the primary CNI: a network of another CNI, with its default route."""

    def fip_of(self, internal: IPv4Address) -> Fip | None:
        """The floating IP that names what an internal address sends; the oldest rule wins, as in the chain."""
        return next((fip for fip in self.fips if fip.internal == internal), None)

    def source_outside(self, internal: IPv4Address) -> IPv4Address | None:
        """The source address a packet of this internal address shows outside; None when nothing translates it."""
        fip = self.fip_of(internal)
        if fip is not None:
            return fip.eip
        matching = [snat for snat in self.snats if internal in snat.cidr]
        return max(matching, key=lambda snat: snat.cidr.prefixlen).eip if matching else None


class World(Frozen):
    """Everything a lab is made of. ``internet`` is the host behind the physical gateway, over ``transit``."""

    lab: str
    hub: str
    node: str
    phys: str
    transit: IPv4Interface
    """The physical gateway's address on the link to the internet host."""
    internet: Host
    vpcs: tuple[VpcPlan, ...] = ()
    segments: tuple[Segment, ...] = ()
    gateways: tuple[GatewayPlan, ...] = ()
    hosts: tuple[Host, ...] = ()
    egresses: tuple[EgressPlan, ...] = ()
    management: Lan | None = None
    """The network of the primary CNI, where that is not Kube-OVN; the node is its gateway."""

    def namespaces(self) -> Iterator[str]:
        """Every namespace of the lab."""
        yield from (self.hub, self.node, self.phys, self.internet.netns)
        yield from (vpc.netns for vpc in self.vpcs)
        yield from (gateway.netns for gateway in self.gateways)
        yield from (host.netns for host in self.hosts)
        yield from (replica.netns for egress in self.egresses for replica in egress.replicas)

    def vpc(self, name: str) -> VpcPlan:
        return next(vpc for vpc in self.vpcs if vpc.name == name)

    def host_at(self, vpc: str, address: IPv4Address) -> Host | None:
        """The tenant host with this address in this VPC."""
        return next((host for host in self.hosts if host.vpc == vpc and host.ip == address), None)

    def exit_of(self, vpc: str, src: IPv4Address, dst: IPv4Address) -> GatewayPlan | None:
        """The gateway to which the VPC's router sends a packet, if it sends it to exactly one."""
        hop = self.vpc(vpc).router.hop(src, dst)
        found = [gw for gw in self.gateways if gw.vpc == vpc and gw.lan.ip in hop.next_hops]
        return found[0] if len(found) == 1 and len(set(hop.next_hops)) == 1 else None
