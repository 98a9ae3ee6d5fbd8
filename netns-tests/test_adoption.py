"""Gateways that others left, and our own without a memory: what is adopted, what is done about it, and who notices.

``adoption/<release>/`` holds, for each release of Kube-OVN, the commands that leave what its script left
(``left.txt``), the spec that is adopted from that (``spec.json``) and what is then done to the kernel (``plan.txt``).
``NATGW_GOLDENS=write`` writes them anew: read the difference before you commit it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from adoption.golden import adopted, agrees, edits
from adoption.releases import A1, A2, FIP, PORTS, RELEASES, SPREAD, STALE_ROUTE, Release, populate
from netns import require
from share import reach
from traffic import Flow, Stream, tcp, udp
from world import INTERNET, World, wait_for

from rules.spec import GatewaySpec
from rules.state import Plan


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("tc", "nft")
    with World() as made:
        yield made


def flows(world: World, release: Release) -> list[Flow]:
    """100 connections through everything that the release's gateway does."""
    vpc, internet = world.vpc, world.internet
    web, backend, fip = internet.tcp_server(80), vpc.a2.tcp_server(80), vpc.a1.tcp_server(80)
    made = [tcp(internet, (PORTS, 8888), backend) for _ in range(25)]
    made += [tcp(internet, (FIP, 80), fip) for _ in range(20)]
    made += [tcp(vpc.a1, (INTERNET, 80), web) for _ in range(15)]
    made += [tcp(vpc.a2, (INTERNET, 80), web) for _ in range(15)]
    made += [tcp(vpc.b, (INTERNET, 80), web) for _ in range(15)]
    if release.name == "1.17":
        ends = {address: host.tcp_server(8080) for address, host in ((A1, vpc.a1), (A2, vpc.a2))}
        made += [reach(internet, (SPREAD, 80), ends)[1] for _ in range(5)]
    while len(made) < 100:
        made.append(tcp(vpc.a1, (PORTS, 8888), backend))  # by an EIP from inside
    return made


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_gateway_of_any_release_is_taken_over_and_nobody_notices(
    world: World, release: Release, variant: str
) -> None:
    gateway = world.plug(variant=variant, environment={} if release.name < "1.15" else None)
    try:
        populate(release, f"iptables-{variant}", gateway.run)
        spec, plan = adopted(gateway)
        agrees(release.name, release.commands, spec, plan)
        open_flows = flows(world, release)
        datagrams = udp(world.internet, (PORTS, 53), world.vpc.a2.udp(53))
        with Stream(datagrams) as stream:
            wait_for(lambda: stream.sent > 50, "the stream runs")
            gateway.verb("get-iptables-version")
            # The log is written by a thread that no verb waits for.
            wait_for(lambda: f"[{edits(plan)} steps, " in gateway.log(), "the log's line")
            assert GatewaySpec.model_validate(gateway.get("/v1/gateway")) == spec
            running = stream.sent
            wait_for(lambda: stream.sent > running + 50, "the stream runs on")
            for call in release.calls:
                gateway.verb(*call)
            running = stream.sent
            assert gateway.run("ip", "route", "show", STALE_ROUTE)  # not ours before a call names it
            gateway.verb("subnet-route-del", STALE_ROUTE)
            assert not gateway.run("ip", "route", "show", STALE_ROUTE)
            wait_for(lambda: stream.sent > running + 50, "the stream runs on after the calls")
        assert stream.lost == 0
        for flow in open_flows:
            flow.talk()
        assert len(open_flows) == 100
    finally:
        world.close_sockets()
        gateway.remove()


EVERYTHING = f"""
    subnet-route-add 10.0.2.0/24,10.0.1.1
    eip-add {FIP}/24 {PORTS}/24 {SPREAD}/24
    floating-ip-add {FIP},{A1}
    dnat-add {PORTS},8888,tcp,{A2},80 {PORTS},53,udp,{A2},53
    nft-dnat-map-add {SPREAD},80,tcp,{A1}:8080@{A2}:8080
    snat-add {PORTS},10.0.0.0/16,--random-fully {SPREAD},10.0.2.0/24
    eip-ingress-qos-add {FIP},1,20,20
    eip-egress-qos-add {FIP},1,2.5,0.3
    qos-add egress,net1,3,matchall,,,,50,50 ingress,eth0,2,u32,ip,src,10.0.1.0/24,10,10
"""


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_of_our_own_leavings_everything_is_known_and_nothing_is_to_be_done(world: World, variant: str) -> None:
    with world.gateway(variant=variant) as gateway:
        spec, plan = adopted(gateway)
        assert (spec, plan) == (GatewaySpec(), Plan())  # without an EIP: the guard stands, and ARP is off
        assert gateway.rules("ARP_GUARD", "DROP")
        for line in EVERYTHING.strip().splitlines():
            gateway.verb(*line.split())
        spec, plan = adopted(gateway)
        assert plan == Plan()
        known = gateway.get("/v1/gateway")
        gateway.kill()
        shutil.rmtree(gateway.state_dir)
        gateway.verb("get-iptables-version")
        wait_for(lambda: "no stored spec" in gateway.log(), "the log's line")
        assert " steps, " not in gateway.log().rpartition("no stored spec")[2]
        found = gateway.get("/v1/gateway")
        for parts in (*known.values(), *found.values()):
            if isinstance(parts, list):
                parts.sort(key=str)  # their order says nothing
        assert found == known
