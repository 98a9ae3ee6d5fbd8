"""Hypothesis strategies for specs, commands, packets and rules; and the pod they live in.

The pools are small on purpose: objects that meet (shared EIPs, nested prefixes, mappings to one host) are
what can go wrong.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import replace
from ipaddress import ip_network
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from rules import commands as c
from rules.apply import apply
from rules.delta import delta
from rules.desired import Facts, desired
from rules.keyed import HasKey, Keyed
from rules.packet import Packet
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainRef,
    Conntrack,
    Destination,
    DestinationPort,
    Drop,
    Foreign,
    Goto,
    InInterface,
    Jump,
    Mark,
    Masquerade,
    Match,
    OutInterface,
    Return,
    Rule,
    Ruleset,
    SetMark,
    Source,
    Target,
)
from rules.ruleset import Dnat as ToDestination
from rules.ruleset import Snat as ToSource
from rules.spec import (
    Backend,
    Dnat,
    Eip,
    EipLimit,
    Fip,
    GatewaySpec,
    InterfaceLimit,
    Interfaces,
    Part,
    Route,
    SharedDnat,
    Snat,
)
from rules.state import Actual, AddressKey, LinkState, RouteEntry, RouteKey
from rules.tc import Link, TableKey

H = TypeVar("H", bound=HasKey)
P = TypeVar("P", bound=Part)

# Repeatable everywhere, and quick on a small machine.
quick = settings(max_examples=60, deadline=None, derandomize="NATGW_FUZZ_CASES" not in os.environ)
thorough = settings(quick, max_examples=200)

EXTERNAL = [f"192.168.0.{n}" for n in range(20, 26)]
INTERNAL = [f"10.0.{subnet}.{host}" for subnet in (1, 2) for host in (5, 6, 200)]
CIDRS = ["10.0.0.0/16", "10.0.1.0/24", "10.0.1.128/25", "10.0.2.0/24", "10.0.1.5/32", "0.0.0.0/0"]
OUTSIDE = ["192.168.0.1", "203.0.113.7", "198.51.100.9"]
PORTS = [80, 443, 8888]

external_ips = st.sampled_from(EXTERNAL)
internal_ips = st.sampled_from(INTERNAL)
cidrs = st.sampled_from(CIDRS)
ports = st.sampled_from(PORTS)
protocols = st.sampled_from(["tcp", "udp"])
interfaces = st.sampled_from([Interfaces(), Interfaces(vpc="ovn0", external="ext-0.12")])


def _part(kind: type[P], **fields: st.SearchStrategy[object]) -> st.SearchStrategy[P]:
    """``st.builds`` would ask for every field by both its names."""
    return st.fixed_dictionaries(fields).map(kind.model_validate)


eips = _part(Eip, address=external_ips.map(lambda ip: f"{ip}/24"))
fips = _part(Fip, eip=external_ips, internal_ip=internal_ips)
dnats = _part(
    Dnat, eip=external_ips, external_port=ports, protocol=protocols, internal_ip=internal_ips, internal_port=ports
)
snats = _part(Snat, eip=external_ips, internal_cidr=cidrs, random_fully=st.booleans())
routes = _part(
    Route,
    cidr=st.sampled_from(["10.0.2.0/24", "10.0.3.0/24", "172.16.0.0/12"]),
    next_hop_ip=st.sampled_from(["10.0.1.1", "10.0.1.2"]),
)


rates = st.sampled_from(["0.5", "2.5", "10", "100", "40000"])
bursts = st.sampled_from(["0", "0.06", "0.3", "10"])
directions = st.sampled_from(["egress", "ingress"])
eip_limits = _part(
    EipLimit, eip=external_ips, direction=directions, priority=st.integers(0, 3), rate_max=rates, burst_max=bursts
)
interface_limits = _part(
    InterfaceLimit,
    interface=st.sampled_from(["eth0", "net1"]),
    direction=directions,
    match_type=st.sampled_from(["ip", ""]),
    match_value=st.tuples(st.sampled_from(["src", "dst"]), st.sampled_from([*CIDRS, "192.168.0.20/32"])).map(" ".join),
    priority=st.integers(0, 3),
    rate_max=rates,
    burst_max=bursts,
)
limits: st.SearchStrategy[EipLimit | InterfaceLimit] = eip_limits | interface_limits


def _keyed(items: st.SearchStrategy[H], size: int = 5) -> st.SearchStrategy[Keyed[H]]:
    def key(item: H) -> Hashable:
        return item.key  # type: ignore[no-any-return]

    return st.lists(items, max_size=size, unique_by=key).map(Keyed)


backends = _part(Backend, internal_ip=internal_ips, internal_port=ports)
shared_dnats = _part(
    SharedDnat,
    eip=external_ips,
    external_port=ports,
    protocol=protocols,
    backends=st.lists(backends, min_size=1, max_size=3),
    session_affinity=st.sampled_from(["None", "ClientIP"]),
    session_affinity_timeout_seconds=st.sampled_from([1, 10800, 86400]),
)


def _either_or(fields: dict[str, Any]) -> dict[str, Any]:
    """A port is mapped to one end or shared by several, not both."""
    shared = fields["shared_dnats"]
    return {**fields, "shared_dnats": Keyed(part for part in shared if part.key not in fields["dnats"])}


specs = (
    st.fixed_dictionaries(
        {
            "interfaces": interfaces,
            "gateway_v4": st.sampled_from([None, "192.168.0.1"]),
            "gateway_v6": st.sampled_from([None, "2001:db8::1"]),
            "eips": _keyed(eips),
            "fips": _keyed(fips),
            "dnats": _keyed(dnats),
            "snats": _keyed(snats),
            "routes": _keyed(routes, 3),
            "shared_dnats": _keyed(shared_dnats, 3),
            "qos": _keyed(limits),
        }
    )
    .map(_either_or)
    .map(GatewaySpec.model_validate)
)

adds: st.SearchStrategy[c.Command] = st.one_of(
    eips.map(lambda part: c.EipAdd(address=part.address)),
    fips.map(lambda part: c.FipAdd(eip=part.eip, internal_ip=part.internal_ip)),
    dnats.map(lambda part: c.DnatAdd.model_validate(dict(part))),
    snats.map(lambda part: c.SnatAdd.model_validate(dict(part))),
    routes.map(lambda part: c.RouteAdd.model_validate(dict(part))),
    _part(c.SetGateways, gateway_v4=st.sampled_from([None, "192.168.0.1", "192.168.0.2"])),
    _part(c.Init, interfaces=st.none() | interfaces),
)
dels: st.SearchStrategy[c.Command] = st.one_of(
    _part(c.EipDel, address=eips.map(lambda part: part.address)),
    _part(c.FipDel, eip=external_ips),
    _part(c.DnatDel, eip=external_ips, external_port=ports, protocol=protocols),
    _part(c.SnatDel, eip=external_ips, internal_cidr=cidrs),
    _part(c.RouteDel, cidr=routes.map(lambda part: part.cidr)),
)
commands = adds | dels


@st.composite
def packets(draw: st.DrawFn, sides: Interfaces = Interfaces()) -> Packet:  # noqa: B008 -- frozen
    """First packets of connections: from a tenant's host or from outside, to any kind of address."""
    inside = draw(st.booleans())
    protocol = draw(st.sampled_from(["tcp", "udp", "icmp"]))
    has_ports = protocol != "icmp"
    return Packet(
        protocol,
        draw(internal_ips if inside else st.sampled_from(OUTSIDE)),
        40000 if has_ports else 0,
        draw(st.one_of(external_ips, internal_ips, st.sampled_from(OUTSIDE))),
        draw(ports) if has_ports else 0,
        sides.vpc if inside else sides.external,
    )


# Rules of the whole vocabulary, not only those that a spec leads to.
_any_address = st.ip_addresses(v=4).map(str)
_any_port = st.integers(0, 0xFFFF)
_any_prefix = st.tuples(_any_address, st.integers(1, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}") | st.tuples(
    st.ip_addresses(v=6).filter(lambda ip: ip.ipv4_mapped is None), st.integers(1, 128)
).map(lambda pair: f"{pair[0]}/{pair[1]}")
_any_name = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", fullmatch=True)
_any_bits = st.integers(0, 0xFFFFFFFF)
CHAINS = ["DNAT_FILTER", "SHARED_DNAT", "OTHER-chain.28-characters_xx"]
_matches: list[st.SearchStrategy[Match]] = [  # in the order in which iptables-save prints them
    st.builds(Source, _any_prefix),
    st.builds(Destination, _any_prefix),
    st.builds(InInterface, _any_name),
    st.builds(OutInterface, _any_name),
    st.builds(DestinationPort, protocols | st.just("sctp"), _any_port),
    st.builds(Mark, _any_bits, st.just(0xFFFFFFFF) | _any_bits),
    st.builds(Conntrack, st.just("DNAT"), _any_address),
]
_targets: st.SearchStrategy[Target] = st.one_of(
    st.builds(ToDestination, _any_address, st.none() | _any_port),
    st.builds(ToSource, _any_address, st.booleans()),
    st.builds(SetMark, _any_bits, _any_bits),
    st.builds(Jump, st.sampled_from(CHAINS)),
    st.builds(Goto, st.sampled_from(CHAINS)),
    st.just(Drop()),
    st.builds(Masquerade, st.booleans()),
    st.just(Return()),
)
rules = st.builds(
    lambda drawn, target: Rule(tuple(match for match in drawn if match is not None), target),
    st.tuples(*(st.none() | match for match in _matches)),
    _targets,
)


def _of_kernel(rule: Rule) -> Rule:
    """The rule with IPv4 prefixes without host bits, and ports of protocols that are no extension of their own."""

    def match(one: Match) -> Match:
        if isinstance(one, Source | Destination):
            prefix = "10.0.0.0/9" if ":" in one.prefix else str(ip_network(one.prefix, strict=False))
            return type(one)(prefix)
        return DestinationPort("udp", one.port) if isinstance(one, DestinationPort) else one

    return Rule(tuple(map(match, rule.matches)), rule.target)


kernel_rules = rules.map(_of_kernel)
"""Such as the kernel tells them of IPv4."""
foreign_rules = st.sampled_from(
    [
        "",
        "-j ACCEPT",
        "-j REDIRECT",
        "-j MASQUERADE --random",
        "-g NOT-A-CHAIN",
        "-j NOT-A-CHAIN",
        "-s 10.0.0.0/255.0.255.0 -j DROP",
        "! -s 10.0.0.0/8 -j DROP",
        "-o net+ -j DROP",
        "-p tcp -m tcp --dport 80:90 -j DNAT --to-destination 10.0.0.1",
        '-m comment --comment "a # :b *c \\" d" -j DROP',
        "-o net1 -j SNAT --to-source 192.168.0.10-192.168.0.12",
        "-j DNAT --to-destination 10.0.1.5:80-90",
    ]
).map(Foreign)
any_rules: st.SearchStrategy[AnyRule] = rules | foreign_rules
rulesets = st.dictionaries(
    st.sampled_from([ChainRef("nat", name) for name in (*BUILTIN["nat"], *CHAINS)]),
    st.lists(any_rules, max_size=6).map(tuple),
).map(lambda chains: Ruleset({**{ChainRef("nat", name): () for name in CHAINS}, **chains}))


def pod(sides: Interfaces = Interfaces()) -> Actual:  # noqa: B008 -- frozen
    """The namespace as the container network leaves it: both interfaces up and addressed, tables empty."""
    link = LinkState(index=2, mac="02:00:00:00:00:02", up=True, arp=True, mtu=1400, promote_secondaries=False)
    return Actual(
        ruleset=Ruleset({ChainRef(table, name): () for table, names in BUILTIN.items() for name in names}),
        links={sides.vpc: link, sides.external: link},
        addresses={AddressKey(sides.vpc, "10.0.1.254/24"): False, AddressKey(sides.external, "192.168.0.11/24"): False},
        routes={RouteKey("0.0.0.0/0"): RouteEntry(sides.external, "192.168.0.1", protocol=3)},
    )


def both_pods() -> Actual:
    """A namespace that has the interfaces of every spec which ``specs`` draws."""
    one, other = pod(), pod(Interfaces(vpc="ovn0", external="ext-0.12"))
    return Actual(one.ruleset, {**one.links, **other.links}, one.addresses, one.routes)


def bare(actual: Actual) -> Actual:
    """Without hash tables and the links to them, which stay once a limit needed them."""
    tc = {k: v for k, v in actual.tc.items() if not isinstance(k, TableKey) and not isinstance(v, Link)}
    return replace(actual, tc=tc)


def settled(spec: GatewaySpec, actual: Actual | None = None, facts: Facts = Facts()) -> Actual:  # noqa: B008 -- frozen
    """The kernel after the spec was applied to it."""
    before = actual or both_pods()
    return apply(delta(desired(spec, facts, before), before), before)
