"""VpcEgressGateways in the lab: what is refused, what is planned, and what is expected of it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from lab.check import refusals
from lab.egressprobes import judge, trials
from lab.egressrun import environment
from lab.manifests import read
from lab.nexthops import commands, route, up
from lab.plan import plan
from lab.topology import steps, sysctls
from lab.world import World

EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "vpc-egress-gateway.yaml").read_text(encoding="utf-8")


def world_of(text: str = EXAMPLE) -> tuple[World, tuple[str, ...]]:
    return plan(read([("example", text)]), "lab")


def refused(old: str, new: str) -> list[str]:
    assert old in EXAMPLE
    manifests = read([("example", EXAMPLE.replace(old, new, 1))])
    return [*manifests.problems, *refusals(manifests)]


def test_the_example_is_planned_as_kube_ovn_would() -> None:
    world, notes = world_of()
    (gw,) = world.egresses
    assert [(r.name, str(r.internal), str(r.external)) for r in gw.replicas] == [
        ("gateway1-0", "10.0.0.2/24", "192.168.0.21/24"),
        ("gateway1-1", "10.0.0.3/24", "192.168.0.22/24"),
    ]
    assert gw.bfd is not None
    assert (str(gw.bfd.peer), gw.bfd.min_tx, gw.bfd.multiplier) == ("10.255.255.255", 100, 3)
    assert environment(gw) == {
        "INTERNAL_GATEWAY_IPV4": "10.0.0.1",
        "EXTERNAL_GATEWAY_IPV4": "192.168.0.1",
        "NO_SNAT_SOURCES_IPV4": "10.0.2.0/24",
    }
    assert [note for note in notes if "bfdd-beacon" in note]
    assert World.model_validate_json(world.model_dump_json()) == world


def test_the_router_sends_sources_to_the_replicas_and_keeps_inside_what_is_inside() -> None:
    world, _ = world_of()
    router = world.vpc("vpc1").router
    tenant, other, outside = map(IPv4Address, ("10.0.1.2", "10.0.2.2", "198.51.100.2"))
    assert router.hop(tenant, outside).next_hops == world.egresses[0].internal_addresses
    assert router.hop(tenant, other).kind == "deliver"
    assert router.hop(IPv4Address("10.0.0.9"), outside).next_hops == (IPv4Address("10.0.0.254"),)
    lines = [line for step in steps(world) for line in step.lines]
    hops = "nexthop via 10.0.0.2 dev lan0 nexthop via 10.0.0.3 dev lan0"
    assert lines.count(f"route add 0.0.0.0/0 table 20000 {hops}") == 1
    assert "addr add 10.255.255.255/32 dev lo" in lines
    assert "route replace 10.0.2.0/24 nexthop via 192.168.0.21 dev ext0 nexthop via 192.168.0.22 dev ext0" in lines


def test_forwarding_is_the_init_scripts_to_switch_on() -> None:
    world, _ = world_of()
    settings = sysctls(world)
    for replica in world.egresses[0].replicas:
        assert not any("forward" in setting for setting in settings[replica.netns])


def test_without_a_default_route_nothing_is_expected_to_get_out() -> None:
    start, end = EXAMPLE.index("  # OVN looks for"), EXAMPLE.index("---")
    world, notes = world_of(EXAMPLE[:start] + EXAMPLE[end:])
    assert any("no route to 0.0.0.0/0" in note for note in notes)
    assert {trial.expected for trial in trials(world, world.egresses[0], world.egresses[0].replicas)} == {()}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("replicas: 2", "replicas: 3", "3 replicas need as many externalIPs, and there are 2."),
        ("internalSubnet: internal", "internalSubnet: nowhere", "internalSubnet names Subnet nowhere, which"),
        ("externalSubnet: macvlan1", "externalSubnet: hidden", "externalSubnet hidden has provider 'ovn'"),
        ("  vpc: vpc1\n  replicas", "  vpc: vpc9\n  replicas", "vpc names Vpc vpc9, which"),
        ("  - 192.168.0.22", "  - 192.168.0.21", "externalIPs names an address twice."),
        ("  - 192.168.0.22", "  - 192.168.0.5", "externalIPs: 192.168.0.5 is excluded by excludeIps"),
        ("  - 192.168.0.22", "  - 10.9.9.9", "externalIPs: 10.9.9.9 lies outside subnet macvlan1"),
        ("    - shown", "    - unknown", "policies[1].subnets names Subnet unknown, which"),
        ("    - 10.0.1.0/24", "    - 10.0.1.0/33", "'10.0.1.0/33' is not an IPv4 CIDR"),
        ("    ipBlocks:\n    - 10.0.1.0/24\n", "", "policies[0] names neither ipBlocks nor subnets."),
        ("bfdPort:\n    enabled: true", "bfdPort:\n    enabled: false", "bfd is enabled, and Vpc vpc1 has no bfdPort"),
        ("multiplier: 3", "multiplier: 256", "bfd multiplier 256 does not fit a BFD packet"),
        ("minRX: 100", "minRX: 0", "bfd.minRX"),
        ("minRX: 100", "minRx: 100", "unknown field bfd.minRx; did you mean minRX?"),
        (
            "name: internal\nspec:\n  vpc: vpc1",
            "name: internal\nspec:\n  vpc: ovn-cluster",
            "belongs to VPC ovn-cluster",
        ),
        ('"mode": "bridge"', '"mode": "passthru"', "macvlan mode passthru on eth1 admits one pod, and there are 2."),
        ('"type": "macvlan"', '"type": "ipvlan"', "is no macvlan on a NIC."),
        ("  internalSubnet: internal\n", "", "internalSubnet is missing, and Vpc vpc1 has no defaultSubnet."),
    ],
)
def test_a_mistake_is_named(old: str, new: str, reason: str) -> None:
    assert any(reason in sentence for sentence in refused(old, new)), refused(old, new)


def test_what_is_the_clusters_business_is_named_as_not_simulated() -> None:
    text = EXAMPLE.replace("  replicas: 2\n", "  replicas: 2\n  trafficPolicy: Local\n  image: x\n", 1)
    assert "VpcEgressGateway default/gateway1: not simulated: trafficPolicy, image." in world_of(text)[1]


def test_addresses_that_are_not_fixed_are_the_first_free_ones() -> None:
    start = EXAMPLE.index("  externalIPs:")
    world, _ = world_of(EXAMPLE[:start] + EXAMPLE[EXAMPLE.index("  bfd:\n") :])
    assert [replica.external for replica in world.egresses[0].replicas] == [
        IPv4Interface("192.168.0.11/24"),
        IPv4Interface("192.168.0.12/24"),
    ]


def test_a_trial_is_judged_by_all_its_attempts() -> None:
    world, _ = world_of()
    (gw,) = world.egresses
    found = list(trials(world, gw, gw.replicas))
    snat, hop = found[0], found[3]
    both = [{"host": "internet", "peer": "192.168.0.21"}, {"host": "internet", "peer": "192.168.0.22"}]
    assert judge(snat, both).ok
    assert not judge(snat, both[:1]).ok
    assert not judge(snat, [*both, {"error": "no answer"}]).ok
    assert not judge(snat, [*both, {"host": "internet", "peer": "10.0.1.2"}]).ok
    assert judge(hop, [{"host": "10.0.0.3", "peer": ""}]).ok
    assert not judge(hop, [{"host": "10.0.0.3", "peer": ""}, {"host": "192.168.0.21", "peer": ""}]).ok
    nothing = snat.model_copy(update={"expected": ()})
    assert judge(nothing, [{"error": "no answer"}]).ok
    assert not judge(nothing, both).ok


STATUS = """There are 2 sessions:
Session 1
 id=1 local=10.255.255.255 (p) remote=10.0.0.2 state=Up
Session 2
 id=2 local=10.255.255.255 (p) remote=10.0.0.3 state=Down
"""


def test_the_routers_routes_follow_its_sessions() -> None:
    hops = {"10.0.0.2": "lan0", "10.0.0.3": "lan0"}
    assert up(STATUS) == {"10.0.0.2"}
    assert route(20000, hops, up(STATUS)) == "route replace 0.0.0.0/0 table 20000 nexthop via 10.0.0.2 dev lan0"
    assert route(20000, hops, set()) == "route flush table 20000"
    config = {"local": "10.9.9.9", "gateways": [{"min_tx": 100, "min_rx": 200, "multiplier": 3, "hops": hops}]}
    assert commands(config) == [
        "session new set mintx 100 ms",
        "session new set minrx 200 ms",
        "session new set multi 3",
        "connect local 10.9.9.9 remote 10.0.0.2",
        "connect local 10.9.9.9 remote 10.0.0.3",
    ]
