"""GatewaySpec: the one truth about what a gateway shall do.

The names on the wire are those of the Kube-OVN CRDs (camelCase); addresses and prefixes are kept as
canonical text. Every part has a ``key``, its identity: what an ``add`` may not contradict and what a
``del`` names.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address, ip_network
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from rules.keyed import Keyed


def _unicast(address: IPv4Address | IPv6Address) -> None:
    if address.is_unspecified or address.is_multicast or address.is_loopback or str(address) == "255.255.255.255":
        raise ValueError(f"{address} is not a unicast address")


def _ipv4(text: str) -> str:
    address = IPv4Address(text)
    _unicast(address)
    return str(address)


def _ipv6(text: str) -> str:
    address = IPv6Address(text)
    _unicast(address)
    return str(address)


def _ipv4_interface(text: str) -> str:
    interface = IPv4Interface(text)
    _unicast(interface.ip)
    return str(interface)


def _ipv4_network(text: str) -> str:
    return str(IPv4Network(text, strict=False))


def _network(text: str) -> str:
    return str(ip_network(text, strict=False))


def _address(text: str) -> str:
    address = ip_address(text)
    _unicast(address)
    return str(address)


def _interface_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", text):
        raise ValueError(f"{text!r} is not an interface name (1 to 15 characters)")
    return text


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


IPv4 = Annotated[str, AfterValidator(_ipv4)]
IPv6 = Annotated[str, AfterValidator(_ipv6)]
IPv4WithPrefix = Annotated[str, AfterValidator(_ipv4_interface)]
IPv4Prefix = Annotated[str, AfterValidator(_ipv4_network)]
Prefix = Annotated[str, AfterValidator(_network)]
Address = Annotated[str, AfterValidator(_address)]
InterfaceName = Annotated[str, AfterValidator(_interface_name)]
Port = Annotated[int, Field(ge=1, le=65535)]
Protocol = Annotated[Literal["tcp", "udp"], BeforeValidator(_lower)]
SessionAffinity = Literal["None", "ClientIP"]
AffinityTimeout = Annotated[int, Field(ge=1, le=86400, description="seconds")]
Gateway4 = Annotated[IPv4 | None, BeforeValidator(_empty_is_none)]
Gateway6 = Annotated[IPv6 | None, BeforeValidator(_empty_is_none)]


class Part(BaseModel):
    """A frozen value with camelCase names on the wire; unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True
    )


class Interfaces(Part):
    """The two sides of the gateway: the tenant's interface and the external one."""

    vpc: InterfaceName = "eth0"
    external: InterfaceName = "net1"

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        if self.vpc == self.external:
            raise ValueError(f"{self.vpc} cannot be both the tenant's and the external interface")
        return self


class Eip(Part):
    """An external address (IptablesEIP) with the prefix length of the external subnet."""

    address: IPv4WithPrefix = Field(examples=["192.168.0.10/24"])

    @property
    def ip(self) -> str:
        """The address without its prefix length."""
        return self.address.partition("/")[0]

    @property
    def key(self) -> str:
        return self.ip

    def __str__(self) -> str:
        return f"EIP {self.address}"


class Fip(Part):
    """A floating IP (IptablesFIPRule): one EIP mapped whole to one internal address, both ways."""

    eip: IPv4 = Field(examples=["192.168.0.10"])
    internal_ip: IPv4 = Field(examples=["10.0.1.5"])

    @property
    def key(self) -> str:
        return self.eip

    def __str__(self) -> str:
        return f"floating IP {self.eip} -> {self.internal_ip}"


class Dnat(Part):
    """A port mapping (IptablesDnatRule, type exclusive): EIP and port to one internal address and port."""

    eip: IPv4 = Field(examples=["192.168.0.10"])
    external_port: Port = Field(examples=[8888])
    protocol: Protocol = Field(examples=["tcp"])
    internal_ip: IPv4 = Field(examples=["10.0.1.10"])
    internal_port: Port = Field(examples=[80])

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.eip, self.external_port, self.protocol)

    def __str__(self) -> str:
        return f"DNAT {self.eip}:{self.external_port}/{self.protocol} -> {self.internal_ip}:{self.internal_port}"


class Backend(Part):
    """One of the internal ends of a shared port mapping."""

    internal_ip: IPv4 = Field(examples=["10.0.1.10"])
    internal_port: Port = Field(examples=[80])

    def __str__(self) -> str:
        return f"{self.internal_ip}:{self.internal_port}"


def _each_once(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    return tuple(dict.fromkeys(backends))


class SharedDnat(Part):
    """A port mapping to several backends (IptablesDnatRule, type share), of which each connection gets one.

    ``sessionAffinity`` ClientIP: a client stays with its backend until it made no new connection for
    ``sessionAffinityTimeoutSeconds``. Both mean what they mean in a Kubernetes Service.
    """

    eip: IPv4 = Field(examples=["192.168.0.10"])
    external_port: Port = Field(examples=[443])
    protocol: Protocol = Field(examples=["tcp"])
    backends: Annotated[tuple[Backend, ...], AfterValidator(_each_once)] = Field(
        min_length=1, examples=[[{"internalIp": "10.0.1.10", "internalPort": 8443}]]
    )
    session_affinity: SessionAffinity = "None"
    session_affinity_timeout_seconds: AffinityTimeout = 10800

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.eip, self.external_port, self.protocol)

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.backends))
        return f"shared DNAT {self.eip}:{self.external_port}/{self.protocol} -> {listed}"


class Snat(Part):
    """A source translation (IptablesSnatRule) of a prefix that leaves through the external interface."""

    eip: IPv4 = Field(examples=["192.168.0.10"])
    internal_cidr: IPv4Prefix = Field(alias="internalCIDR", examples=["10.0.1.0/24"])
    random_fully: bool = True

    @property
    def key(self) -> tuple[str, str]:
        return (self.eip, self.internal_cidr)

    @property
    def prefix_length(self) -> int:
        """Length of the internal prefix in bits: longer ones are matched first."""
        return int(self.internal_cidr.rpartition("/")[2])

    def __str__(self) -> str:
        return f"SNAT {self.internal_cidr} -> {self.eip}"


class Route(Part):
    """A route of the tenant's side (VpcNatGateway spec.routes, other subnets of the VPC)."""

    cidr: Prefix = Field(examples=["10.0.2.0/24"])
    next_hop_ip: Address = Field(alias="nextHopIP", examples=["10.0.1.1"])

    @property
    def key(self) -> str:
        return self.cidr

    def __str__(self) -> str:
        return f"route {self.cidr} via {self.next_hop_ip}"


class GatewaySpec(Part):
    """The whole desired state of one gateway. Rules may name an EIP that is not (yet) in ``eips``."""

    interfaces: Interfaces = Interfaces()
    gateway_v4: Gateway4 = Field(default=None, examples=["192.168.0.1"])
    gateway_v6: Gateway6 = None
    eips: Keyed[Eip] = Field(default_factory=Keyed)
    fips: Keyed[Fip] = Field(default_factory=Keyed)
    dnats: Keyed[Dnat] = Field(default_factory=Keyed)
    snats: Keyed[Snat] = Field(default_factory=Keyed)
    routes: Keyed[Route] = Field(default_factory=Keyed)
    shared_dnats: Keyed[SharedDnat] = Field(default_factory=Keyed)

    @model_validator(mode="after")
    def _shared_or_exclusive(self) -> Self:
        if clash := self.shared_and_exclusive():
            shared, exclusive = map(str, clash)
            raise PydanticCustomError(
                "conflict", "{wanted} conflicts with {standing}", {"wanted": shared, "standing": exclusive}
            )
        return self

    def shared_and_exclusive(self) -> tuple[SharedDnat, Dnat] | None:
        """A shared and an exclusive DNAT of one identity, which cannot both stand; None where there are none."""
        pairs = ((shared, self.dnats.get(shared.key)) for shared in self.shared_dnats)
        return next(((shared, exclusive) for shared, exclusive in pairs if exclusive), None)
