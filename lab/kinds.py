"""The Kube-OVN and Kubernetes objects the lab understands, each with the spec fields it simulates.

Field names on the wire are those of the CRDs (group ``kubeovn.io/v1``). Every kind also lists the fields of its CRD
that are the cluster's business: the loader names them as not simulated. A field in neither list is a mistake.
"""

from __future__ import annotations

import json
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr

DEFAULT_VPC = "ovn-cluster"
DEFAULT_EXTERNAL_SUBNET = "ovn-vpc-external-network"


def _address(value: Any) -> IPv4Address:
    try:
        return IPv4Address(str(value))  # Python takes a number, and `true`, for an address as well
    except AddressValueError:
        raise ValueError(f"{value!r} is not an IPv4 address") from None


def _optional_address(value: Any) -> IPv4Address | None:
    return None if value in (None, "") else _address(value)


def _network(value: Any) -> IPv4Network:
    try:
        return IPv4Network(str(value), strict=False)
    except (AddressValueError, NetmaskValueError, ValueError):
        raise ValueError(f"{value!r} is not an IPv4 CIDR") from None


def _ipv4_block(value: Any) -> IPv4Network:
    """The IPv4 half of a ``cidrBlock``, which in a dual-stack Subnet is ``<v4>,<v6>``."""
    parts = [part.strip() for part in str(value).split(",")]
    return _network(next((part for part in parts if ":" not in part), value))


def _ipv4_half(value: Any) -> IPv4Address | None:
    parts = [part.strip() for part in str(value or "").split(",")]
    return _optional_address(next((part for part in parts if ":" not in part), value))


def _range(value: Any) -> tuple[IPv4Address, IPv4Address]:
    if isinstance(value, tuple):
        return value
    first, dots, last = str(value).partition("..")
    start, end = _address(first.strip()), _address(last.strip() if dots else first.strip())
    if end < start:
        raise ValueError(f"the range {value!r} ends before it starts")
    return start, end


def _ranges(value: Any) -> Any:
    """``excludeIps`` without its IPv6 entries: the lab has IPv4 only."""
    return [item for item in value if ":" not in str(item)] if isinstance(value, list) else value


def _port(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f"must be a string: write it in quotes ('{value}')")
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 65535:
        raise ValueError(f"{value!r} is not a port from 1 to 65535")
    return int(value)


def _protocol(value: Any) -> str:
    if str(value).lower() not in ("tcp", "udp"):
        raise ValueError(f"{value!r} is neither tcp nor udp")
    return str(value)


Address = Annotated[IPv4Address, BeforeValidator(_address)]
OptionalAddress = Annotated[IPv4Address | None, BeforeValidator(_optional_address)]
Network = Annotated[IPv4Network, BeforeValidator(_network)]
AddressRange = Annotated[tuple[IPv4Address, IPv4Address], BeforeValidator(_range)]
Port = Annotated[int, BeforeValidator(_port)]


# Fields and kinds that are legal in Kube-OVN (as of 1.17) and the cluster's business.
_SUBNET_CLUSTER = """
default gatewayType gatewayNode gatewayNodeSelectors natOutgoing externalEgressGateway policyRoutingPriority
policyRoutingTableID mtu private allowSubnets vlan vips logicalGateway disableGatewayCheck
disableInterConnection enableDHCP dhcpV4Options dhcpV6Options enableIPv6RA ipv6RAConfigs acls allowEWTraffic
natOutgoingPolicyRules u2oInterconnectionIP u2oInterconnection u2oFeatures enableLb enableEcmp
enableMulticastSnoop enableExternalLBAddress routeTable namespaceSelectors nodeNetwork
"""
_GATEWAY_CLUSTER = """
namespace selector tolerations affinity qosPolicy bgpSpeaker bfd internalSubnets internalCIDRs annotations
"""
_OTHER_KINDS = """
BgpConf DNSNameResolver EvpnConf IP IPPool OvnDnatRule OvnEip OvnFip OvnSnatRule ProviderNetwork QoSPolicy
SecurityGroup RouterLBRule SwitchLBRule Vip Vlan VpcDns
"""
_EGRESS_CLUSTER = """
bgpConf evpnConf image internalIPPool externalIPPool selectors trafficPolicy podAntiAffinity nodeSelector tolerations
resources bandwidth observability
"""


class Part(BaseModel):
    """A value inside a manifest. ``cluster_fields`` are legal in the CRD and not simulated."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cluster_fields: ClassVar[frozenset[str]] = frozenset()


class Meta(BaseModel):
    """The metadata the lab reads; other metadata (labels, owners, …) never changes what packets do."""

    model_config = ConfigDict(frozen=True)
    name: str
    namespace: str = ""
    annotations: dict[str, str] = {}


class Kind(Part):
    """One object: its metadata and, beside it, the simulated fields of its spec."""

    api_version: ClassVar[str] = "kubeovn.io/v1"
    namespaced: ClassVar[bool] = False
    meta: Meta

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def title(self) -> str:
        """How messages call the object, e.g. ``VpcNatGateway gw1`` or ``Pod ns1/web``."""
        return f"{type(self).__name__} {self.meta.namespace + '/' if self.namespaced else ''}{self.name}"


class StaticRoute(Part):
    cluster_fields = frozenset({"ecmpMode", "bfdId"})
    cidr: Network
    next_hop: Address = Field(alias="nextHopIP")
    policy: Literal["policyDst", "policySrc", ""] = "policyDst"
    route_table: str = Field("", alias="routeTable")


class PolicyRoute(Part):
    priority: int = Field(0, ge=0, le=32767)
    match: str = ""
    action: Literal["allow", "drop", "reroute"]
    next_hop: OptionalAddress = Field(None, alias="nextHopIP")


class BfdPort(Part):
    """The port of a VPC's router that speaks BFD with its egress gateways."""

    cluster_fields = frozenset({"nodeSelector"})
    enabled: bool = False
    ip: Annotated[IPv4Address | None, BeforeValidator(_ipv4_half)] = None


class Vpc(Kind):
    cluster_fields = frozenset({"vpcPeerings", "enableExternal", "extraExternalSubnets", "enableBfd", "dynamicRouting"})
    bfd_port: BfdPort = Field(BfdPort(), alias="bfdPort")
    namespaces: tuple[str, ...] = ()
    default_subnet: str = Field("", alias="defaultSubnet")
    static_routes: tuple[StaticRoute, ...] = Field((), alias="staticRoutes")
    policy_routes: tuple[PolicyRoute, ...] = Field((), alias="policyRoutes")


class Subnet(Kind):
    cluster_fields = frozenset(_SUBNET_CLUSTER.split())
    vpc: str = ""
    protocol: Literal["IPv4", "Dual", ""] = ""
    namespaces: tuple[str, ...] = ()
    cidr: Annotated[IPv4Network, BeforeValidator(_ipv4_block)] = Field(alias="cidrBlock")
    gateway: Annotated[IPv4Address | None, BeforeValidator(_ipv4_half)] = None
    exclude_ips: Annotated[tuple[AddressRange, ...], BeforeValidator(_ranges)] = Field((), alias="excludeIps")
    provider: str = ""

    @property
    def external(self) -> bool:
        """Whether the subnet lies outside OVN: Kube-OVN's own providers are '', 'ovn' and ``<nad>.<namespace>.ovn``."""
        parts = self.provider.split(".")
        return self.provider not in ("", "ovn") and not (len(parts) == 3 and parts[2] == "ovn")

    @property
    def nad(self) -> str | None:
        """``namespace/name`` of the NetworkAttachmentDefinition the provider names, if it names one."""
        parts = self.provider.split(".")
        return f"{parts[1]}/{parts[0]}" if len(parts) == 2 or (len(parts) == 3 and parts[2] == "ovn") else None

    @property
    def vpc_name(self) -> str:
        return self.vpc or DEFAULT_VPC

    @property
    def gateway_address(self) -> IPv4Address:
        """The gateway; without one Kube-OVN takes the first address of the CIDR."""
        return self.gateway or self.cidr.network_address + (1 if self.cidr.prefixlen < 31 else 0)


class GatewayRoute(Part):
    """A route of the gateway's eth0; next hop ``gateway`` stands for the subnet's gateway."""

    cidr: Network
    next_hop: Literal["gateway"] | Address = Field(alias="nextHopIP")


class VpcNatGateway(Kind):
    cluster_fields = frozenset(_GATEWAY_CLUSTER.split())
    vpc: str
    subnet: str
    external_subnets: tuple[str, ...] = Field((), alias="externalSubnets")
    lan_ip: OptionalAddress = Field(None, alias="lanIp")
    replicas: int = 1
    routes: tuple[GatewayRoute, ...] = ()
    no_default_eip: bool = Field(False, alias="noDefaultEIP")

    @property
    def external_subnet(self) -> str:
        """The controller uses the first external subnet, or the default one when none is named."""
        return self.external_subnets[0] if self.external_subnets else DEFAULT_EXTERNAL_SUBNET


class IptablesEIP(Kind):
    cluster_fields = frozenset({"v6ip", "macAddress", "qosPolicy", "namespace"})
    gateway: str = Field(alias="natGwDp", min_length=1)
    address: OptionalAddress = Field(None, alias="v4ip")
    external_subnet: str = Field("", alias="externalSubnet")

    @property
    def subnet(self) -> str:
        return self.external_subnet or DEFAULT_EXTERNAL_SUBNET


class EipRule(Kind):
    """What all rules share: the name of their IptablesEIP."""

    eip: str = Field(min_length=1)


class InwardRule(EipRule):
    """A rule that leads inside, to one tenant address."""

    internal_ip: Address = Field(alias="internalIp")


class IptablesFIPRule(InwardRule):
    pass


class IptablesDnatRule(InwardRule):
    external_port: Port = Field(alias="externalPort")
    protocol: Annotated[str, BeforeValidator(_protocol)]
    internal_port: Port = Field(alias="internalPort")
    type: Literal["exclusive", "share", ""] = "exclusive"


class IptablesSnatRule(EipRule):
    internal_cidr: Network = Field(alias="internalCIDR")


class EgressBfd(Part):
    enabled: bool = False
    min_rx: int = Field(1000, alias="minRX", ge=1, le=3600000)
    min_tx: int = Field(1000, alias="minTX", ge=1, le=3600000)
    multiplier: int = Field(3, ge=1, le=3600000)


class EgressPolicy(Part):
    """Tenants that leave through the gateway; without ``snat`` under their own addresses."""

    snat: bool = False
    ip_blocks: Annotated[tuple[Network, ...], BeforeValidator(_ranges)] = Field((), alias="ipBlocks")
    subnets: tuple[str, ...] = ()


def _ipv4_halves(value: Any) -> Any:
    """Addresses, of which a dual-stack one is ``<v4>,<v6>``; IPv6 alone is left out."""
    items = value if isinstance(value, list) else []
    halves = [next((part for part in str(item).split(",") if ":" not in part), "") for item in items]
    return [half.strip() for half in halves if half] if isinstance(value, list) else value


class VpcEgressGateway(Kind):
    namespaced = True
    cluster_fields = frozenset(_EGRESS_CLUSTER.split())
    vpc: str = ""
    replicas: int = Field(1, ge=0, le=10)
    prefix: str = ""
    internal_subnet: str = Field("", alias="internalSubnet")
    external_subnet: str = Field(alias="externalSubnet", min_length=1)
    internal_ips: Annotated[tuple[Address, ...], BeforeValidator(_ipv4_halves)] = Field((), alias="internalIPs")
    external_ips: Annotated[tuple[Address, ...], BeforeValidator(_ipv4_halves)] = Field((), alias="externalIPs")
    bfd: EgressBfd = EgressBfd()
    policies: tuple[EgressPolicy, ...] = ()


class CniConfig(BaseModel):
    """What the lab reads of a CNI configuration; CNI plugins define the rest."""

    type: str
    master: str = ""
    mode: Literal["bridge", "private", "vepa", "passthru"] = "bridge"
    provider: str = ""


def _cni(value: Any) -> CniConfig:
    if not isinstance(value, str):
        raise ValueError("must be a string holding JSON")
    try:
        body = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(body, dict) or "type" not in body:
        raise ValueError("is not a CNI configuration: it has no type")
    ipam = body.get("ipam") or {}
    kept = {key: body[key] for key in ("type", "master", "mode") if key in body}
    return CniConfig(provider=ipam.get("provider", body.get("provider", "")), **kept)


class NetworkAttachmentDefinition(Kind):
    api_version = "k8s.cni.cncf.io/v1"
    namespaced = True
    config: Annotated[CniConfig, BeforeValidator(_cni)]


class ConfigMap(Kind):
    api_version = "v1"
    namespaced = True
    data: dict[str, StrictStr] = {}


class Pod(Kind):
    api_version = "v1"
    namespaced = True

    @property
    def logical_switch(self) -> str:
        return self.meta.annotations.get("ovn.kubernetes.io/logical_switch", "")

    @property
    def ip_address(self) -> str:
        return self.meta.annotations.get("ovn.kubernetes.io/ip_address", "")


SIMULATED: dict[str, type[Kind]] = {
    kind.__name__: kind
    for kind in (
        Vpc, Subnet, VpcNatGateway, IptablesEIP, IptablesFIPRule, IptablesDnatRule, IptablesSnatRule,
        NetworkAttachmentDefinition, ConfigMap, Pod, VpcEgressGateway,
    )
}  # fmt: skip

KUBE_OVN_KINDS = frozenset(_OTHER_KINDS.split())
"""Kinds of group kubeovn.io that exist and are not simulated; any other unknown kind of the group is a mistake."""
