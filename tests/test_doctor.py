"""The doctor's checks by made facts: a sound gateway has no finding, and each thing that ails it has just one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from api.rendered import rendered
from rules.checks_around import FALLBACKS
from rules.desired import Facts as Decided
from rules.doctor import examine
from rules.examination import Asked, Disk, Facts, Listener
from rules.ruleset import ChainRef, Foreign, Ruleset
from rules.spec import GatewaySpec
from rules.state import Actual, AddressKey, LinkState, RouteEntry, RouteKey
from rules.surroundings import CONNTRACK_COUNT, CONNTRACK_MAX, FORWARDING, OtherRule, Surroundings
from tests.gateway_kit import STATE, example
from tests.test_overview import WELL

OUR_MAC, THEIR_MAC = "02:00:00:00:00:01", "02:00:00:00:00:99"
LINK = LinkState(1, OUR_MAC, True, True, 1500, True)
SETTINGS = {
    FORWARDING: 1,
    CONNTRACK_COUNT: 10,
    CONNTRACK_MAX: 262144,
    "net/ipv4/conf/all/promote_secondaries": 0,
    "net/ipv4/conf/net1/promote_secondaries": 1,
    "net/ipv4/conf/net1/rp_filter": 0,
}
SOUND = Facts(
    spec=example(),
    actual=Actual(
        ruleset=rendered(example(), Decided()),
        links={"eth0": LINK, "net1": LINK},
        addresses={
            AddressKey("eth0", "10.0.1.254/24"): False,
            AddressKey("net1", "192.168.0.10/24"): True,
            AddressKey("net1", "192.168.0.12/24"): True,
        },
        routes={
            RouteKey("0.0.0.0/0"): RouteEntry("net1", "192.168.0.1"),
            RouteKey("10.0.2.0/24"): RouteEntry("eth0", "10.0.1.1"),
        },
    ),
    around=Surroundings(sysctls=SETTINGS),
    status=WELL.model_dump(mode="json"),
    gateways=(Asked("net1", "192.168.0.1", (THEIR_MAC,)), Asked("eth0", "10.0.1.1", (THEIR_MAC,))),
    holders=(Asked("net1", "192.168.0.10"), Asked("eth0", "10.0.1.254", (OUR_MAC,))),
    features=dict.fromkeys(FALLBACKS, ""),
    listeners=(Listener("tcp", "127.0.0.1", 8080), Listener("udp", "::1", 53)),
    disks=(Disk("/var/lib/natgw", free=1 << 30),),
)


def spec(**more: Any) -> GatewaySpec:
    return GatewaySpec.model_validate(STATE | more)


def settings(**named: int) -> Surroundings:
    return Surroundings(sysctls=SETTINGS | {name.replace("__", "/"): value for name, value in named.items()})


def links(**changed: LinkState | None) -> Actual:
    kept = {name: link for name, link in {**SOUND.actual.links, **changed}.items() if link is not None}
    return replace(SOUND.actual, links=kept)


def status(**changed: Any) -> Mapping[str, Any]:
    return {**WELL.model_dump(mode="json"), **changed}


def test_a_sound_gateway_has_no_finding() -> None:
    assert examine(SOUND) == []


ERROR = {"at": 0.0, "by": "x", "message": "no such interface", "retryable": True}
FORWARD = OtherRule(where="legacy", table="filter", chain="FORWARD", text="policy DROP")
UPSTREAM = OtherRule(where="nft", table="nat", chain="PREROUTING", text="-j DNAT_FILTER")
THEIRS = OtherRule(where="nft", table="nat", chain="POSTROUTING", text="-j MASQUERADE")
FOREIGN = Ruleset({**SOUND.actual.ruleset.chains, ChainRef("nat", "PREROUTING"): (Foreign("-p sctp -j DROP"),)})
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"status": None}, "daemon", "warning", "no daemon answers"),
    ({"status": status(initialized=False)}, "daemon", "warning", "not initialized"),
    (
        {"status": status(ready=False, pending=["kernel does not equal the spec"], lastError=ERROR)},
        "daemon",
        "error",
        "not ready: kernel does not equal the spec",
    ),
    ({"actual": links(net1=None)}, "links", "error", "net1 (external) is missing"),
    ({"actual": links(eth0=replace(LINK, up=False))}, "links", "error", "eth0 (vpc) is down"),
    ({"actual": links(net1=replace(LINK, arp=False))}, "links", "error", "ARP is off on net1"),
    ({"around": settings(**{FORWARDING.replace("/", "__"): 0})}, "forwarding", "error", "ip_forward is 0"),
    ({"spec": spec(eips=[{"address": "192.168.0.77/24"}])}, "addresses", "error", "not up on net1: 192.168.0.77"),
    (
        {"actual": replace(SOUND.actual, routes={RouteKey("10.0.2.0/24"): RouteEntry("eth0", "10.0.1.1")})},
        "default route",
        "error",
        "there is none",
    ),
    (
        {"spec": spec(fips=[{"eip": "192.168.0.12", "internalIp": "10.9.9.9"}])},
        "tenants' routes",
        "error",
        "not reached by eth0: 10.9.9.9",
    ),
    ({"around": settings(net__ipv4__conf__net1__rp_filter=1)}, "rp_filter", "info", "of net1 is strict"),
    (
        {"around": settings(net__ipv4__conf__net1__promote_secondaries=0)},
        "promote_secondaries",
        "warning",
        "off on net1, which has several addresses",
    ),
    ({"actual": links(eth0=replace(LINK, mtu=9000))}, "MTU", "warning", "eth0 has an MTU of 9000, net1 of 1500"),
    ({"actual": links(eth0=replace(LINK, mtu=1400))}, "MTU", "info", "eth0 has an MTU of 1400, net1 of 1500"),
    (
        {"around": settings(**{CONNTRACK_COUNT.replace("/", "__"): 260_000})},
        "connections",
        "error",
        "holds 260,000 of 262,144 (99%)",
    ),
    (
        {"around": settings(**{CONNTRACK_COUNT.replace("/", "__"): 262_144})},
        "connections",
        "error",
        "the connection tracking table is full (262,144 entries)",
    ),
    ({"around": settings(**{CONNTRACK_COUNT.replace("/", "__"): 200_000})}, "connections", "warning", "(76%)"),
    ({"around": settings(**{CONNTRACK_MAX.replace("/", "__"): 4096})}, "connections", "warning", "only 4,096 entries"),
    ({"gateways": (Asked("net1", "192.168.0.1"),)}, "gateway", "error", "192.168.0.1 does not answer ARP on net1"),
    ({"gateways": (Asked("eth0", "10.0.1.1"),)}, "gateway", "error", "10.0.1.1 does not answer ARP on eth0"),
    ({"silent": "as you wished"}, "gateway", "info", "as you wished"),
    (
        {"holders": (Asked("net1", "192.168.0.10", (OUR_MAC, THEIR_MAC)),)},
        "EIP conflict",
        "error",
        f"192.168.0.10 on net1 is also held by {THEIR_MAC}",
    ),
    ({"holders": (Asked("eth0", "10.0.1.254", (THEIR_MAC,)),)}, "lanIp", "error", "10.0.1.254, the lanIp on eth0"),
    (
        {"spec": spec(routes=[{"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.254"}])},
        "lanIp",
        "error",
        "next hop is the gateway's own lanIp: route 10.0.2.0/24 via 10.0.1.254",
    ),
    (
        {"around": Surroundings(sysctls=SETTINGS, other_rules=(UPSTREAM,))},
        "iptables variants",
        "error",
        "a gateway's chains",
    ),
    (
        {"around": Surroundings(sysctls=SETTINGS, other_rules=(THEIRS,))},
        "iptables variants",
        "warning",
        "rules, too (1 ",
    ),
    ({"around": Surroundings(sysctls=SETTINGS, other_rules=(FORWARD,))}, "rules of others", "error", "policy DROP"),
    ({"actual": replace(SOUND.actual, ruleset=FOREIGN)}, "rules of others", "info", "nat PREROUTING: -p sctp -j DROP"),
    ({"missing": ("address 192.168.0.10/24 on net1 is missing",)}, "drift", "error", "address 192.168.0.10/24"),
    ({"features": {"ifb": "Operation not supported"}}, "features", "warning", "no ifb: Operation not supported"),
    ({"listeners": (Listener("tcp", "0.0.0.0", 9100, "exporter"),)}, "listeners", "warning", "0.0.0.0:9100 (exporter)"),
    ({"disks": (Disk("/var/lib/natgw", "Read-only file system"),)}, "disk", "warning", "Read-only file system"),
    ({"disks": (Disk("/var/lib/natgw", free=1 << 20),)}, "disk", "warning", "1 MiB left"),
    ({"around": Surroundings(sysctls=SETTINGS, unread=("nft is not installed",))}, "examination", "info", "nft is not"),
]


@pytest.mark.parametrize(("ill", "check", "severity", "words"), CASES)
def test_what_ails_it_is_found(ill: dict[str, Any], check: str, severity: str, words: str) -> None:
    (finding,) = examine(replace(SOUND, **ill))
    assert (finding.check, finding.severity) == (check, severity)
    assert words in finding.finding
    assert finding.severity == "info" or (finding.consequence and (finding.remedy or check == "features"))


def test_the_worst_comes_first() -> None:
    ill = replace(SOUND, status=None, silent="as you wished", gateways=(Asked("net1", "192.168.0.1"),))
    assert [finding.severity for finding in examine(ill)] == ["error", "warning", "info"]


def test_the_prerequisites_of_macvlan_are_named_where_the_gateway_is_silent() -> None:
    (finding,) = examine(replace(SOUND, gateways=(Asked("net1", "192.168.0.1"),)))
    for word in ("port security", "promiscuous", "forged transmits", "trunk", "subinterface", "The node itself"):
        assert word in finding.remedy


def test_nothing_is_known_and_nothing_breaks() -> None:
    assert [finding.check for finding in examine(Facts())] == ["daemon"]
