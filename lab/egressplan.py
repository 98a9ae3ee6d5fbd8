"""What the lab knows of a VpcEgressGateway: its replicas, whom it serves, and how its VPC's router watches it. Pure."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from lab.routing import Frozen


class Source(Frozen):
    """A range of tenants that leave through the gateway, under its address or (``snat`` False) their own."""

    cidr: IPv4Network
    snat: bool


class Bfd(Frozen):
    """The session between each replica and the VPC's router: the router's address, intervals in milliseconds."""

    peer: IPv4Address
    min_tx: int
    min_rx: int
    multiplier: int


class Replica(Frozen):
    """A pod of the gateway: eth0 on the internal subnet, net1 a macvlan on the external one."""

    name: str
    netns: str
    internal: IPv4Interface
    external: IPv4Interface


class EgressPlan(Frozen):
    """A VpcEgressGateway. Its VPC's router spreads the sources' packets over the replicas by routing ``table``."""

    name: str
    vpc: str
    bridge: str
    internal_gateway: IPv4Address
    external_gateway: IPv4Address
    master: str
    mode: str
    sources: tuple[Source, ...]
    replicas: tuple[Replica, ...]
    table: int
    bfd: Bfd | None = None

    @property
    def internal_addresses(self) -> tuple[IPv4Address, ...]:
        return tuple(replica.internal.ip for replica in self.replicas)

    @property
    def external_addresses(self) -> tuple[IPv4Address, ...]:
        return tuple(replica.external.ip for replica in self.replicas)

    def keeps(self, address: IPv4Address) -> bool:
        """Whether a tenant is seen outside under its own address: the rules for that come first."""
        return any(address in source.cidr for source in self.sources if not source.snat)
