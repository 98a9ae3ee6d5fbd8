"""GatewaySpec: the one truth about what a gateway shall do.

The names on the wire are those of the Kube-OVN CRDs (camelCase); addresses and prefixes are kept as
canonical text. Every part has a ``key``, its identity: what an ``add`` may not contradict and what a
``del`` names.
"""

from __future__ import annotations

from functools import cache
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from rules.fields import (
    Address,
    AffinityTimeout,
    Direction,
    Gateway4,
    Gateway6,
    InterfaceName,
    IPv4,
    IPv4Prefix,
    IPv4WithPrefix,
    Mbit,
    MiB,
    Port,
    Prefix,
    Protocol,
    SessionAffinity,
    ipv4_network,
)
from rules.keyed import Keyed


class Part(BaseModel):  # noqa: PLW1641 -- frozen, so pydantic makes its hash
    """A frozen value with camelCase names on the wire; unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True
    )

    def __eq__(self, other: object) -> bool:
        """Equal fields of one kind: a part has nothing else (pydantic looks for more, in four times the time)."""
        return type(self) is type(other) and self.__dict__ == other.__dict__


class ManyPart(Part):
    """A part of which there may be 50,000: all of a kind share one set of the names of their fields, of 700 bytes."""

    def model_post_init(self, context: Any, /) -> None:
        object.__setattr__(self, "__pydantic_fields_set__", _field_names(type(self)))


@cache
def _field_names(kind: type[Part]) -> set[str]:
    return set(kind.model_fields)


class Interfaces(Part):
    """The two sides of the gateway: the tenant's interface and the external one."""

    vpc: InterfaceName = "eth0"
    external: InterfaceName = "net1"

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        if self.vpc == self.external:
            raise ValueError(f"{self.vpc} cannot be both the tenant's and the external interface")
        return self


class Eip(ManyPart):
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


class Fip(ManyPart):
    """A floating IP (IptablesFIPRule): one EIP mapped whole to one internal address, both ways."""

    eip: IPv4 = Field(examples=["192.168.0.10"])
    internal_ip: IPv4 = Field(examples=["10.0.1.5"])

    @property
    def key(self) -> str:
        return self.eip

    def __str__(self) -> str:
        return f"floating IP {self.eip} -> {self.internal_ip}"


class Dnat(ManyPart):
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


class Snat(ManyPart):
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

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        if ip_network(self.cidr).version != ip_address(self.next_hop_ip).version:
            raise ValueError(f"{self.next_hop_ip} is not of the same address family as {self.cidr}")
        return self

    @property
    def key(self) -> str:
        return self.cidr

    def __str__(self) -> str:
        return f"route {self.cidr} via {self.next_hop_ip}"


PRIORITY_MAX = 65534


def _priority(value: int, usual: int) -> int:
    """0 is what a policy holds that names none; the kernel counts from 1 to 65535, and 65535 is the redirection's."""
    if not 0 <= value <= PRIORITY_MAX:
        raise ValueError(f"{value} is not a priority between 1 and {PRIORITY_MAX}")
    return value or usual


class EipLimit(Part):
    """A bandwidth limit of one EIP (QoSPolicy bound to an EIP): what leaves by it, or what comes to it."""

    eip: IPv4 = Field(examples=["192.168.0.10"])
    direction: Direction = Field(examples=["egress"])
    priority: int = Field(default=1, examples=[1])
    rate_max: Mbit = Field(examples=["10"])
    burst_max: MiB = Field(examples=["10"])

    @field_validator("priority")
    @classmethod
    def _usual_priority(cls, value: int) -> int:
        return _priority(value, 1)

    @property
    def key(self) -> tuple[str, str]:
        return (self.eip, self.direction)

    def __str__(self) -> str:
        return f"{self.direction} limit of EIP {self.eip}: {self.rate_max} Mbit/s"


class LimitIdentity(Part):
    """What tells the limits of interfaces apart: all that differ here hold at once, the lowest priority first.

    ``matchValue`` is ``src <CIDR>`` or ``dst <CIDR>``; without ``matchType`` a limit is that of all IPv4 traffic.
    """

    direction: Direction = Field(examples=["egress"])
    interface: InterfaceName = Field(examples=["net1"])
    match_type: Literal["ip", ""] = ""
    match_value: str = Field(default="", examples=["dst 203.0.113.0/24"])
    priority: int = Field(default=0, validate_default=True, examples=[2])

    @field_validator("match_value")
    @classmethod
    def _field_and_prefix(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("match_type") != "ip":
            return ""
        side, _, prefix = value.partition(" ")
        if side not in ("src", "dst"):
            raise ValueError(f"{value!r} is not src or dst and an IPv4 prefix")
        return f"{side} {ipv4_network(prefix)}"

    @field_validator("priority")
    @classmethod
    def _usual_priority(cls, value: int, info: ValidationInfo) -> int:
        return _priority(value, 2 if info.data.get("match_type") == "ip" else 3)

    @model_validator(mode="after")
    def _match_is_said(self) -> Self:
        if self.match_type == "ip" and not self.match_value:
            raise ValueError("matchType ip needs a matchValue")
        return self

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        return (self.interface, self.direction, self.priority, self.match_type, self.match_value)


class InterfaceLimit(LimitIdentity):
    """A bandwidth limit of an interface (QoSPolicy bound to a gateway): of all its traffic or of a prefix's."""

    rate_max: Mbit = Field(examples=["50"])
    burst_max: MiB = Field(examples=["50"])

    def __str__(self) -> str:
        what = f" {self.match_value}" if self.match_value else ""
        return f"{self.direction} limit {self.priority} of {self.interface}{what}: {self.rate_max} Mbit/s"


def _limit_kind(value: Any) -> str:
    of_eip = "eip" in value if isinstance(value, dict) else isinstance(value, EipLimit)
    return "EipLimit" if of_eip else "InterfaceLimit"


Limit = Annotated[
    Annotated[EipLimit, Tag("EipLimit")] | Annotated[InterfaceLimit, Tag("InterfaceLimit")], Discriminator(_limit_kind)
]


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
    qos: Keyed[Limit] = Field(default_factory=Keyed)
    initialized: bool = Field(
        default=True,
        exclude_if=bool,
        description="false while nothing but limits was asked for, which may come before `init`",
    )

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
