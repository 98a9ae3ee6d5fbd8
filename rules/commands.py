"""The typed commands: every change of a GatewaySpec is one of these, whichever face it came through.

Their ``op`` names are the verbs of Kube-OVN's nat-gateway.sh; ``PATCH /v1/gateway`` takes a list of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rules.fields import (
    AffinityTimeout,
    Gateway4,
    Gateway6,
    IPv4,
    IPv4Prefix,
    IPv4WithPrefix,
    Port,
    Prefix,
    Protocol,
    SessionAffinity,
)
from rules.qos_commands import (
    EipEgressQosAdd,
    EipEgressQosDel,
    EipIngressQosAdd,
    EipIngressQosDel,
    QosAdd,
    QosDel,
)
from rules.spec import Backend, Dnat, Eip, Fip, Interfaces, Part, Route, Snat


class Init(Part):
    """Make the gateway ready: chains in place, ARP decided. Without interfaces, those that stand stay."""

    op: Literal["init"] = "init"
    interfaces: Interfaces | None = None


class SetGateways(Part):
    """Name the external gateways; None leaves what is stored."""

    op: Literal["set-gateways"] = "set-gateways"
    gateway_v4: Gateway4 = None
    gateway_v6: Gateway6 = None


class EipAdd(Eip):
    """Put an external address up; one that stands gets its prefix length from the newest call."""

    op: Literal["eip-add"] = "eip-add"


class EipDel(Part):
    op: Literal["eip-del"] = "eip-del"
    address: IPv4WithPrefix


class FipAdd(Fip):
    op: Literal["floating-ip-add"] = "floating-ip-add"


class FipDel(Part):
    op: Literal["floating-ip-del"] = "floating-ip-del"
    eip: IPv4


class DnatAdd(Dnat):
    op: Literal["dnat-add"] = "dnat-add"


class DnatDel(Part):
    op: Literal["dnat-del"] = "dnat-del"
    eip: IPv4
    external_port: Port
    protocol: Protocol


class SharedDnatAdd(Part):
    """Spread a port over exactly these backends. The affinity that is not named stays as it is."""

    op: Literal["nft-dnat-map-add"] = "nft-dnat-map-add"
    eip: IPv4
    external_port: Port
    protocol: Protocol
    backends: tuple[Backend, ...] = Field(min_length=1)
    session_affinity: SessionAffinity | None = None
    session_affinity_timeout_seconds: AffinityTimeout | None = None


class SharedDnatDel(Part):
    op: Literal["nft-dnat-map-del"] = "nft-dnat-map-del"
    eip: IPv4
    external_port: Port
    protocol: Protocol


class SnatAdd(Snat):
    op: Literal["snat-add"] = "snat-add"


class SnatDel(Part):
    op: Literal["snat-del"] = "snat-del"
    eip: IPv4
    internal_cidr: IPv4Prefix = Field(alias="internalCIDR")


class RouteAdd(Route):
    op: Literal["subnet-route-add"] = "subnet-route-add"


class RouteDel(Part):
    op: Literal["subnet-route-del"] = "subnet-route-del"
    cidr: Prefix


Command = Annotated[
    Init
    | SetGateways
    | EipAdd
    | EipDel
    | FipAdd
    | FipDel
    | DnatAdd
    | DnatDel
    | SnatAdd
    | SnatDel
    | RouteAdd
    | RouteDel
    | SharedDnatAdd
    | SharedDnatDel
    | EipEgressQosAdd
    | EipEgressQosDel
    | EipIngressQosAdd
    | EipIngressQosDel
    | QosAdd
    | QosDel,
    Field(discriminator="op"),
]
