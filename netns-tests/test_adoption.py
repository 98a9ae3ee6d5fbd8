"""Gateways that others left, and our own without a memory: what is adopted, what is done about it, and who notices.

``adoption/<release>/`` holds, for each release of Kube-OVN, the commands that leave what its script left
(``left.txt``), the spec that is adopted from that (``spec.json``) and what is then done to the kernel (``plan.txt``).
``NATGW_GOLDENS=write`` writes them anew: read the difference before you commit it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from adoption.releases import A1, A2, FIP, PORTS, RELEASES, SPREAD, STALE_ROUTE, Release, populate
from netns import require
from share import reach
from traffic import Flow, Stream, tcp, udp
from world import INTERNET, Gateway, World, wait_for

from api.http_models import plan_model
from gateway import transaction
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.generation import Generation
from gateway.kernel.legacy import LegacyFirewall
from gateway.kernel.links import KernelLinks
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.kernel.shaper import KernelShaper
from gateway.transaction import Kernel
from rules.appliance import adopt
from rules.desired import Facts
from rules.spec import GatewaySpec
from rules.state import EditTable, Plan

GOLDENS = Path(__file__).parent / "adoption"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("tc", "nft")
    with World() as made:
        yield made


def adopted(gateway: Gateway) -> tuple[GatewaySpec, Plan]:
    """What a daemon without a file would adopt here, and what it would do first."""
    with gateway.entered():
        generation = Generation()
        firewall = LegacyFirewall() if gateway.variant == "legacy" else NftVariantFirewall(generation)
        maps = KernelMaps(gateway.variant, generation)
        kernel = Kernel(firewall, KernelLinks(), KernelFlows(), KernelNft(generation), KernelShaper(), maps=maps)
        actual = transaction.read(kernel)
        spec = adopt(actual)
        assert isinstance(spec, GatewaySpec)
        return spec, transaction.plan(spec, Facts(), actual)


def text_of(plan: Plan) -> str:
    """A plan as lines, with the edits of a table and the commands of nft below their step."""
    lines = []
    for step in plan_model(plan).model_dump(mode="json")["steps"]:
        lines.append(step["text"])
        lines += [f"  {edit['text']}" for edit in step.get("edits", [])]
        lines += [f"  {command}" for command in step.get("commands", [])]
    return "".join(f"{line}\n" for line in lines)


def agrees(path: Path, text: str) -> None:
    """Compare with a golden, or write it."""
    if os.environ.get("NATGW_GOLDENS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


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
    directory = GOLDENS / release.name
    try:
        populate(release, f"iptables-{variant}", gateway.run)
        agrees(directory / "left.txt", left(release))
        spec, plan = adopted(gateway)
        agrees(directory / "spec.json", spec.model_dump_json(indent=2, by_alias=True) + "\n")
        agrees(directory / "plan.txt", text_of(plan))
        open_flows = flows(world, release)
        datagrams = udp(world.internet, (PORTS, 53), world.vpc.a2.udp(53))
        with Stream(datagrams) as stream:
            wait_for(lambda: stream.sent > 50, "the stream runs")
            gateway.verb("get-iptables-version")
            edits = sum(len(step.edits) if isinstance(step, EditTable) else 1 for step in plan.steps)
            assert f"[{edits} steps, " in gateway.log()
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


def left(release: Release) -> str:
    return "".join(f"{' '.join(command)}\n" for command in release.commands)


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
        assert " steps, " not in gateway.log().rpartition("no stored spec")[2]
        found = gateway.get("/v1/gateway")
        for parts in (*known.values(), *found.values()):
            if isinstance(parts, list):
                parts.sort(key=str)  # their order says nothing
        assert found == known
