"""From manifests to the planned world, and from there to namespaces, links and exec calls."""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

import pytest

from lab.check import Refused
from lab.manifests import read
from lab.plan import plan
from lab.topology import steps, sysctls
from lab.world import World, netns_name

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def world_of(*files: str, lab: str = "lab", extra: str = "") -> tuple[World, tuple[str, ...]]:
    texts = [(name, (EXAMPLES / name).read_text(encoding="utf-8")) for name in files]
    return plan(read([*texts, ("extra", extra)]), lab)


def test_the_seeds_example_gets_the_addresses_kube_ovn_would_give() -> None:
    world, notes = world_of("vpc-nat-gateway.yaml")
    (gw,) = world.gateways
    assert (str(gw.lan), str(gw.external), gw.mode) == ("10.0.1.254/24", "192.168.0.11/24", "bridge")
    assert {eip.name: str(eip.address) for eip in gw.eips} == {
        "eip-random": "192.168.0.12/24",
        "eip-static": "192.168.0.111/24",
        "eipd01": "192.168.0.13/24",
        "eips01": "192.168.0.14/24",
        "eipf01": "192.168.0.15/24",
    }
    assert {(host.label, str(host.ip)) for host in world.hosts} == {
        ("ns1/vpc1-pod", "10.0.1.2"),
        ("test-vpc-1/10.0.1.5", "10.0.1.5"),
        ("test-vpc-1/10.0.1.10", "10.0.1.10"),
    }
    target = world.host_at("test-vpc-1", IPv4Address("10.0.1.10"))
    assert target is not None
    assert ("tcp", 80) in [(listen.protocol, listen.port) for listen in target.listens]
    assert notes == ("Pod ns1/vpc1-pod: its containers do not run; an echo server stands in for them.",)


def test_overlapping_tenants_are_separate_hosts() -> None:
    world, _ = world_of("two-vpcs.yaml")
    twins = [host for host in world.hosts if str(host.ip) == "10.0.1.10"]
    assert sorted(host.vpc for host in twins) == ["test-vpc-1", "test-vpc-2"]
    assert len({host.netns for host in twins}) == len({host.bridge for host in twins}) == 2
    assert [gw.external is None for gw in world.gateways] == [False, True]


def test_a_world_survives_being_written_down() -> None:
    for name in ("vpc-nat-gateway.yaml", "two-vpcs.yaml"):
        world, _ = world_of(name)
        assert World.model_validate_json(world.model_dump_json()) == world


def test_a_route_table_is_named_and_its_route_left_out() -> None:
    world, notes = world_of("vpc-nat-gateway.yaml", "seeds/002-13-static-routes.yaml")
    assert [str(static.cidr) for static in world.vpcs[0].router.statics] == ["0.0.0.0/0"]
    assert (
        "Vpc test-vpc-1: route table 'rtb1' is not simulated; "
        "its route 172.31.0.0/24 via 10.0.1.253 (policySrc) is left out."
    ) in notes


def test_what_the_guide_shows_beside_gateways_is_named_as_not_simulated() -> None:
    seeds = [
        f"seeds/002-{name}.yaml"
        for name in (
            "15-switch-lb-rule",
            "18-vpc-dns-config",
            "19-vpc-dns-dependencies",
            "20-vpc-dns",
            "17-ovn-default",
        )
    ]
    _, notes = world_of("vpc-nat-gateway.yaml", *seeds)
    said = "\n".join(notes)
    for what in (
        "SwitchLBRule cjh-slr-nginx", "VpcDns test-cjh1", "ClusterRole system:vpc-dns", "ClusterRoleBinding vpc-dns",
        "ServiceAccount vpc-dns", "ConfigMap kube-system/vpc-dns-config", "ConfigMap kube-system/vpc-dns-corefile",
        "natOutgoing",
    ):  # fmt: skip
        assert what in said


def test_a_vpc_without_a_way_to_its_gateway_is_told_so() -> None:
    text = (
        (EXAMPLES / "vpc-nat-gateway.yaml")
        .read_text(encoding="utf-8")
        .replace("nextHopIP: 10.0.1.254", "nextHopIP: 10.0.1.9")
    )
    _, notes = plan(read([("w", text)]))
    assert any("no route leads to lanIp 10.0.1.254 of gateway gw1" in note for note in notes)


SECOND_SUBNET = """
apiVersion: kubeovn.io/v1
kind: Subnet
metadata: {name: far}
spec: {vpc: test-vpc-1, cidrBlock: 10.0.2.0/24}
---
apiVersion: kubeovn.io/v1
kind: IptablesSnatRule
metadata: {name: far}
spec: {eip: eips01, internalCIDR: 10.0.2.64/26}
---
apiVersion: kubeovn.io/v1
kind: VpcNatGateway
metadata: {name: gw1}
spec: {routes: [{cidr: 172.30.0.0/16, nextHopIP: gateway}, {cidr: 172.29.0.0/16, nextHopIP: 10.0.1.9}]}
"""


def test_the_gateways_routes_are_those_of_the_pods_annotations() -> None:
    world, _ = world_of("vpc-nat-gateway.yaml", extra=SECOND_SUBNET)
    (gw,) = world.gateways
    assert [(str(route.cidr), str(route.via)) for route in gw.routes] == [
        ("10.0.2.0/24", "10.0.1.1"),
        ("172.30.0.0/16", "10.0.1.1"),
        ("172.29.0.0/16", "10.0.1.9"),
    ]
    assert [str(cidr) for cidr in gw.vpc_cidrs] == ["10.0.2.0/24"]


def test_a_snat_without_a_tenant_behind_it_gets_one() -> None:
    world, _ = world_of("vpc-nat-gateway.yaml", extra=SECOND_SUBNET)
    assert world.host_at("test-vpc-1", IPv4Address("10.0.2.64")) is not None


def test_interface_names_fit_and_every_end_has_its_namespace() -> None:
    world, _ = world_of("two-vpcs.yaml")
    known = set(world.namespaces())
    assert len(known) == len(list(world.namespaces()))
    for step in steps(world):
        assert step.netns in known
        for line in step.lines:
            words = line.split()
            for before, word in pairwise(words):
                if before == "netns":
                    assert word in known
                elif before in ("dev", "name", "master"):
                    assert re.fullmatch(r"[a-z0-9]{1,15}", word), line


def test_net1_is_a_macvlan_of_the_attachments_mode_and_bare_without_default_eip() -> None:
    world, _ = world_of("two-vpcs.yaml")
    lines = {(step.netns, line) for step in steps(world) for line in step.lines}
    for gw in world.gateways:
        assert (world.node, f"link add link eth1 name net1 netns {gw.netns} type macvlan mode bridge") in lines
    first, second = world.gateways
    assert (first.netns, "route replace default via 172.17.88.1 dev net1") in lines
    assert (second.netns, "route replace default via 10.0.1.254 dev eth0") in lines
    assert not any(
        netns == second.netns and line.startswith("addr add") and line.endswith("net1") for netns, line in lines
    )
    assert "net.ipv4.ip_forward=1" in sysctls(world)[second.netns]


def test_labs_of_different_names_share_no_namespace() -> None:
    one, other = (set(world_of("two-vpcs.yaml", lab=name)[0].namespaces()) for name in ("a", "a-gw"))
    assert not one & other


def test_a_very_long_name_stays_usable_and_distinct() -> None:
    names = {netns_name("lab", "vpc", letter * 250) for letter in "ab"} | {netns_name("lab", "vpc", "a" * 251)}
    assert len(names) == 3
    assert all(len(name) <= 120 for name in names)


def test_the_internet_host_moves_out_of_the_way_of_the_manifests() -> None:
    world, _ = world_of("vpc-nat-gateway.yaml")
    assert str(world.internet.address) == "198.51.100.2/24"
    taken = SECOND_SUBNET.split("---", maxsplit=1)[0].replace("10.0.2.0/24", "198.51.0.0/16")
    assert str(world_of("vpc-nat-gateway.yaml", extra=taken)[0].internet.address) == "203.0.113.2/24"


def test_refused_carries_every_reason() -> None:
    with pytest.raises(Refused) as caught:
        world_of("two-vpcs-wrong.yaml")
    assert len(caught.value.reasons) == 3
