"""The egress gateway of a VPC (VpcEgressGateway): what its pod's environment asks for, as statements about the kernel.

Tenants' packets come in by the internal interface and leave by the external one under its address, except those of
the sources that are to keep theirs. The pod's default route leads outside and must not decide for what goes inside:
table 1000 leads to the internal gateway, and rules 1001 to 1004 say what asks which table:

    1001: iif INTERNAL lookup default             nothing is there: the main table decides, whose default leads out
    1002: iif EXTERNAL lookup 1000                what comes from outside goes inside
    1003: from INTERNAL-IP iif lo lookup 1000     our own packets (BFD) leave by the side whose address they bear
    1004: from EXTERNAL-IP iif lo lookup default

nat: PREROUTING marks what comes in by the internal interface with 0x4000; POSTROUTING begins with two RETURN rules for
each source that keeps its address and ends in VEG-MASQUERADE, which takes the marks off and masquerades. Shapes and
numbers are those that Kube-OVN's init script leaves. Both tables belong to everybody: what is not ours stays there.

With EVPN the internal interface is a port of the virtual router ``vrf-vpn`` (table 2000), as is a bridge with a
VXLAN tunnel; FRR does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from rules.ruleset import (
    FAMILIES,
    ChainRef,
    Destination,
    Family,
    InInterface,
    Jump,
    Masquerade,
    Return,
    Rule,
    Rules,
    SetMark,
    Source,
)
from rules.state import (
    DEFAULT_TABLE,
    ROUTE_PROTOCOL,
    Actual,
    Bridge,
    Desired,
    Device,
    PolicyRule,
    RouteEntry,
    RouteKey,
    Vrf,
    Vxlan,
)

INTERNAL_TABLE = 1000
PRIORITIES = (1001, 1002, 1003, 1004)
INTERNAL_MARK = 0x4000
ALL_BITS = 0xFFFFFFFF
MASQUERADE = "VEG-MASQUERADE"

VPN_TABLE = 2000
VRF, BRIDGE, VXLAN = "vrf-vpn", "br-vpn", "vxlan-vpn"
VNI_MAX = (1 << 24) - 1

_DEFAULTS: dict[Family, str] = {4: "0.0.0.0/0", 6: "::/0"}


class BadEnvironment(ValueError):
    """A variable of the environment says something that cannot be; the message names it."""


@dataclass(frozen=True)
class Request:
    """What is asked for one version of IP: the two gateways, and the sources that keep their addresses.

    Without an external gateway nothing is forwarded in this version.
    """

    internal_gateway: str
    external_gateway: str | None
    no_snat: tuple[str, ...] = ()


@dataclass(frozen=True)
class EgressSpec:
    """What the environment asks for. ``vni`` is the number of the EVPN's network, None without EVPN."""

    families: Mapping[Family, Request]
    bgp: bool = False
    vni: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> EgressSpec:
        """Read the variables that Kube-OVN's controller sets; raises BadEnvironment.

        A version of IP whose internal gateway is not named is not asked for.
        """
        families: dict[Family, Request] = {}
        for family in FAMILIES:
            internal = _gateway(environment, f"INTERNAL_GATEWAY_IPV{family}", family)
            external = _gateway(environment, f"EXTERNAL_GATEWAY_IPV{family}", family)
            no_snat = _prefixes(environment, f"NO_SNAT_SOURCES_IPV{family}", family)
            if internal:
                families[family] = Request(internal, external, no_snat)
        vni = _vni(environment) if environment.get("ENABLE_EVPN") == "true" else None
        if vni and not any(request.external_gateway for request in families.values()):
            raise BadEnvironment("ENABLE_EVPN needs an INTERNAL_GATEWAY_IPV4 or 6 and the EXTERNAL_GATEWAY beside it")
        return cls(families, environment.get("ENABLE_BGP") == "true", vni)


def _gateway(environment: Mapping[str, str], name: str, family: Family) -> str | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        address: IPv4Address | IPv6Address = ip_address(text)
    except ValueError:
        raise BadEnvironment(f"{name}: {text!r} is not an address") from None
    if address.version != family or address.is_unspecified or address.is_multicast or address.is_loopback:
        raise BadEnvironment(f"{name}: {text} is not an IPv{family} address of a gateway")
    return str(address)


def _prefixes(environment: Mapping[str, str], name: str, family: Family) -> tuple[str, ...]:
    """Prefixes in the order given, each once; an address is the prefix of itself alone."""
    found: dict[str, None] = {}
    for item in environment.get(name, "").split(","):
        text = item.strip()
        if not text:
            continue
        try:
            prefix: IPv4Network | IPv6Network = ip_network(text, strict=False)
        except ValueError:
            raise BadEnvironment(f"{name}: {text!r} is not a CIDR") from None
        if prefix.version != family:
            raise BadEnvironment(f"{name}: {text} is not an IPv{family} CIDR")
        found[str(prefix)] = None
    return tuple(found)


def _vni(environment: Mapping[str, str]) -> int | None:
    text = environment.get("VNI", "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,8}", text) or not 1 <= int(text) <= VNI_MAX:
        raise BadEnvironment(f"VNI: {text!r} is not a number from 1 to {VNI_MAX}")
    return int(text)


@dataclass(frozen=True)
class Side:
    """An interface of the pod, and the address that it uses there."""

    interface: str
    address: str


@dataclass(frozen=True)
class Way:
    """The two sides on which one version of IP passes the gateway, found by where its gateways are."""

    internal: Side
    external: Side | None


# --- what it means for the kernel -----------------------------------------------------------------------------


def desired(spec: EgressSpec, ways: Mapping[Family, Way], actual: Actual) -> Desired:
    """What the kernel shall look like; ``ways`` has every family that the spec asks for.

    Of ``actual`` what an earlier run left is used: what is no longer asked for is stated as "is not there".
    """
    statements = Desired(sysctls=_sysctls(ways, actual))
    for family in FAMILIES:
        way = ways.get(family)
        if way and way.external and not spec.bgp:  # with BGP the routing daemon beside us decides where packets go
            request = spec.families[family]
            statements = _merged(statements, _routing(request, way.internal, way.external, family, actual))
            statements = _merged(statements, _translation(request, way.internal, family, actual))
        elif _ran_before(actual, family):
            statements = _merged(statements, _nothing(family, actual))
    return _merged(statements, _evpn(spec, spec.vni, ways, actual) if spec.vni else _no_evpn(actual))


def _merged(one: Desired, other: Desired) -> Desired:
    return Desired(
        chains={**one.chains, **other.chains},
        hooks={**one.hooks, **other.hooks},
        heads={**one.heads, **other.heads},
        routes={**one.routes, **other.routes},
        policy_rules={**one.policy_rules, **other.policy_rules},
        sysctls={**one.sysctls, **other.sysctls},
        devices={**one.devices, **other.devices},
        masters={**one.masters, **other.masters},
        up={**one.up, **other.up},
    )


def _sysctls(ways: Mapping[Family, Way], actual: Actual) -> dict[str, int]:
    """Forward both versions of IP, and take packets of any source from inside (answers may leave by another way).

    A kernel without IPv6 lacks that setting; it is stated all the same where IPv6 is asked for.
    """
    settings = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}
    settings |= {f"net/ipv4/conf/{way.internal.interface}/rp_filter": 0 for way in ways.values()}
    optional = set() if 6 in ways else {"net/ipv6/conf/all/forwarding"} - actual.sysctls.keys()
    return {name: value for name, value in settings.items() if name not in optional}


def _routing(request: Request, internal: Side, external: Side, family: Family, actual: Actual) -> Desired:
    full = 32 if family == 4 else 128
    rules = (
        PolicyRule(internal.interface, DEFAULT_TABLE, 1001, None, family),
        PolicyRule(external.interface, INTERNAL_TABLE, 1002, None, family),
        PolicyRule("lo", INTERNAL_TABLE, 1003, f"{internal.address}/{full}", family),
        PolicyRule("lo", DEFAULT_TABLE, 1004, f"{external.address}/{full}", family),
    )
    key = RouteKey(_DEFAULTS[family], INTERNAL_TABLE)
    standing = actual.routes.get(key)
    route = RouteEntry(internal.interface, request.internal_gateway)
    # Whoever made it: what matters is where it leads.
    if standing and (standing.interface, standing.via) == (route.interface, route.via):
        route = standing
    return Desired(routes={key: route}, policy_rules=_at_our_priorities(family, actual) | dict.fromkeys(rules, True))


def _at_our_priorities(family: Family, actual: Actual) -> dict[PolicyRule, bool]:
    """Rules that stand at our priorities, stated as "is not there"."""
    standing = (rule for rule in actual.policy_rules if rule.family == family and rule.priority in PRIORITIES)
    return dict.fromkeys(sorted(standing, key=str), False)


def _translation(request: Request, internal: Side, family: Family, actual: Actual) -> Desired:
    prerouting, postrouting, masquerade = _chains(family)
    jump = Rule((), Jump(MASQUERADE))
    keep = tuple(rule for prefix in request.no_snat for rule in _returns(prefix))
    return Desired(
        chains={masquerade: (Rule((), SetMark(0, ALL_BITS)), Rule((), Masquerade(random_fully=True)))},
        hooks=_leftovers(family, actual, keep) | {(prerouting, _mark(internal)): True, (postrouting, jump): True},
        heads={postrouting: keep},
    )


def _chains(family: Family) -> tuple[ChainRef, ChainRef, ChainRef]:
    names = ("PREROUTING", "POSTROUTING", MASQUERADE)
    prerouting, postrouting, masquerade = (ChainRef("nat", name, family) for name in names)
    return prerouting, postrouting, masquerade


def _mark(internal: Side) -> Rule:
    return Rule((InInterface(internal.interface),), SetMark(INTERNAL_MARK, INTERNAL_MARK))


def _returns(prefix: str) -> tuple[Rule, Rule]:
    """What the source sends keeps its address, and so does what is sent to it."""
    return Rule((Destination(prefix),), Return()), Rule((Source(prefix),), Return())


def _leftovers(family: Family, actual: Actual, keep: Rules) -> dict[tuple[ChainRef, Rule], bool]:
    """Rules that an earlier run left in the built-in chains and nobody asks for any more.

    RETURN rules bear no mark: ours come in pairs (from a prefix, to the same prefix) ahead of the jump to our chain.
    """
    prerouting, postrouting, _ = _chains(family)
    marks = [rule for rule in actual.ruleset.chains.get(prerouting, ()) if isinstance(rule, Rule) and _is_mark(rule)]
    pairs = [rule for rule in _standing_returns(actual.ruleset.chains.get(postrouting, ())) if rule not in keep]
    return {(prerouting, rule): False for rule in marks} | {(postrouting, rule): False for rule in pairs}


def _is_mark(rule: Rule) -> bool:
    match rule:
        case Rule((InInterface(_),), SetMark(mark, mask)):
            return mark == mask == INTERNAL_MARK
    return False


def _standing_returns(rules: Rules) -> Iterator[Rule]:
    jump = Rule((), Jump(MASQUERADE))
    ahead = rules[: rules.index(jump)] if jump in rules else ()
    for rule in dict.fromkeys(ahead):
        match rule:
            case Rule((Source(prefix) | Destination(prefix),), Return()) if set(_returns(prefix)) <= set(ahead):
                yield rule


def _ran_before(actual: Actual, family: Family) -> bool:
    return ChainRef("nat", MASQUERADE, family) in actual.ruleset.chains


def _nothing(family: Family, actual: Actual) -> Desired:
    """An earlier run served a version of IP that is not asked for any more."""
    _, postrouting, masquerade = _chains(family)
    return Desired(
        chains={masquerade: None},
        hooks={**_leftovers(family, actual, ()), (postrouting, Rule((), Jump(MASQUERADE))): False},
        routes={RouteKey(_DEFAULTS[family], INTERNAL_TABLE): None},
        policy_rules=_at_our_priorities(family, actual),
    )


def _evpn(spec: EgressSpec, vni: int, ways: Mapping[Family, Way], actual: Actual) -> Desired:
    """The virtual router with its ports, and in its table the ways to the sources that keep their addresses."""
    external = next(way.external for _, way in sorted(ways.items()) if way.external)
    devices: dict[str, Device | None] = {
        VRF: Vrf(VPN_TABLE),
        BRIDGE: Bridge(),
        VXLAN: Vxlan(vni, _local(external, actual)),
    }
    masters: dict[str, str | None] = {BRIDGE: VRF, VXLAN: BRIDGE}
    wanted: dict[RouteKey, RouteEntry | None] = {
        RouteKey(prefix, VPN_TABLE): RouteEntry(ways[family].internal.interface, request.internal_gateway)
        for family, request in spec.families.items()
        for prefix in request.no_snat
    }
    return Desired(
        devices=devices,
        up=dict.fromkeys(devices, True),
        masters=masters | {way.internal.interface: VRF for way in ways.values()},
        routes=_vpn_routes(actual) | wanted,
    )


def _vpn_routes(actual: Actual) -> dict[RouteKey, RouteEntry | None]:
    """Our routes in the virtual router's table, stated as "is not there"; FRR's stand beside them without our mark."""
    routes = actual.routes.items()
    return {key: None for key, entry in routes if key.table == VPN_TABLE and entry.protocol == ROUTE_PROTOCOL}


def _local(external: Side, actual: Actual) -> str:
    """The address from which the tunnel is sent: the first IPv4 address of the external interface, else IPv6's."""
    own = (key.address.partition("/")[0] for key in actual.addresses if key.interface == external.interface)
    return next((address for address in own if ":" not in address), external.address)


def _no_evpn(actual: Actual) -> Desired:
    """An earlier run made the virtual router, and nobody asks for it any more."""
    vrf = actual.links.get(VRF)
    if vrf is None or vrf.device != Vrf(VPN_TABLE):
        return Desired()
    ours = [name for name in (VXLAN, BRIDGE, VRF) if name in actual.links]
    ports = [name for name, link in actual.links.items() if link.master == VRF and name not in ours]
    return Desired(devices=dict.fromkeys(ours, None), masters=dict.fromkeys(ports, None), routes=_vpn_routes(actual))
