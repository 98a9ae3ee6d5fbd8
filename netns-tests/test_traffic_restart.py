"""The daemon dies, its files vanish, its namespace is a new one: packets go on, and nothing is forgotten."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from traffic import Stream, ping, tcp, udp
from world import A1, A2, INTERNET, Gateway, World, identical, wait_for

EIP, EIP2 = "192.168.0.50", "192.168.0.51"
VPC_ROUTE = "10.0.2.0/24,10.0.1.1"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        fill(made)
        yield made


def fill(gateway: Gateway) -> None:
    gateway.verb("subnet-route-add", VPC_ROUTE)
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    gateway.verb("dnat-add", f"{EIP2},8888,tcp,{A2},80", f"{EIP2},53,udp,{A2},53")
    gateway.verb("snat-add", f"{EIP2},10.0.0.0/16,--random-fully")


def works(world: World) -> None:
    """Everything of ``fill`` works, by real packets."""
    backend, web = world.vpc.a2.tcp_server(80), world.internet.tcp_server(80)
    tcp(world.internet, (EIP2, 8888), backend)
    udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
    assert tcp(world.vpc.b, (INTERNET, 80), web).source[0] == EIP2
    assert tcp(world.vpc.a1, (INTERNET, 80), web).source[0] == EIP
    assert ping(world.internet, EIP, world.vpc.a1) == INTERNET
    assert tcp(world.vpc.a1, (EIP2, 8888), backend).source[0] == EIP
    world.close_sockets()


def test_the_daemons_death_and_return_loses_no_packet(world: World, gateway: Gateway) -> None:
    flow = udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
    with Stream(flow) as stream:
        wait_for(lambda: stream.sent > 50, "the stream runs")
        first = gateway.pid
        rules, generation = gateway.saved(), stream.sent
        gateway.kill_daemon()
        wait_for(lambda: stream.sent > generation + 50, "the stream ran without the daemon")
        gateway.verb("dnat-add", f"{EIP2},8888,tcp,{A2},80")
        second = gateway.pid
        running = stream.sent
        wait_for(lambda: stream.sent > running + 50, "the stream ran with the new daemon")
    assert stream.lost == 0
    assert first != second
    assert gateway.saved() == rules
    world.close_sockets()
    works(world)


def test_the_next_daemon_knows_everything(world: World, gateway: Gateway) -> None:
    known = gateway.get("/v1/gateway")
    for number in (signal.SIGKILL, signal.SIGTERM):
        rules = gateway.saved()
        gateway.kill(number)
        works(world)
        gateway.verb("init")
        assert gateway.saved() == rules
        assert gateway.get("/v1/gateway") == known
        assert gateway.exec("floating-ip-add", f"{EIP},{A2}").returncode == 1  # it knows what stands in the way
        identical(gateway, lambda: gateway.verb("snat-add", f"{EIP2},10.0.0.0/16"))
    works(world)


def test_without_its_files_the_daemon_learns_from_the_kernel(world: World, gateway: Gateway) -> None:
    """A container restarted in place: the network namespace is the same, the container's files are gone."""
    known = gateway.get("/v1/gateway")
    flow = tcp(world.internet, (EIP2, 8888), world.vpc.a2.tcp_server(80))
    rules = gateway.saved()
    gateway.kill()
    shutil.rmtree(gateway.run_dir)
    shutil.rmtree(gateway.state_dir)
    gateway.verb("eip-add", f"{EIP}/24")
    assert gateway.saved() == rules
    assert gateway.get("/v1/gateway") == known
    flow.talk()
    world.close_sockets()
    works(world)
    gateway.verb("dnat-del", f"{EIP2},8888,tcp")
    assert not gateway.rules("--dport 8888")
    assert gateway.exec("floating-ip-add", f"{EIP},{A2}").returncode == 1


def test_a_new_namespace_is_restored_by_the_first_call(world: World, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with world.gateway(state_dir=state) as old:
        fill(old)
        known, rules, mac = old.get("/v1/gateway"), old.saved(), old.mac
        old.kill()
    gateway = world.plug(state_dir=state)
    try:
        assert gateway.mac != mac
        world.router.ip(*(f"neigh replace {a} lladdr {mac} dev eth0 nud stale" for a in (EIP, EIP2)))
        began = time.monotonic()
        gateway.verb("get-iptables-version")
        print(f"restored by the first call within {time.monotonic() - began:.3f} s")
        assert gateway.saved() == rules
        assert gateway.get("/v1/gateway") == known
        works(world)
        assert gateway.status()["ready"]
    finally:
        gateway.remove()


def test_a_changed_kernel_is_put_right_at_the_start(world: World, gateway: Gateway) -> None:
    rules = gateway.saved()
    gateway.kill()
    gateway.run(f"iptables-{gateway.variant}", "-t", "nat", "-F", "SHARED_DNAT")
    gateway.run(
        f"iptables-{gateway.variant}", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "7", "-j", "RETURN"
    )
    gateway.ip(f"addr del {EIP2}/24 dev net1", "route del 10.0.2.0/24")
    gateway.verb("init")
    foreign = gateway.rules("--dport 7")
    assert len(foreign) == 1  # what is not ours stays
    assert gateway.saved().replace(foreign[0] + "\n", "") == rules
    works(world)


def test_two_gateways_of_the_same_tenant_addresses_do_not_meet(world: World) -> None:
    other = world.make_vpc()
    with (
        world.gateway(variant="legacy") as one,
        world.gateway(vpc=other, variant="nft", own="192.168.0.12/24") as two,
    ):
        for gateway, eip in ((one, EIP), (two, EIP2)):
            gateway.verb("eip-add", f"{eip}/24")
            gateway.verb("dnat-add", f"{eip},80,tcp,{A1},80")
            gateway.verb("snat-add", f"{eip},10.0.1.0/24")
        servers = world.vpc.a1.tcp_server(80), other.a1.tcp_server(80)
        web, resolver = world.internet.tcp_server(80), world.internet.udp(53)
        tcp(world.internet, (EIP, 80), servers[0])
        inbound = tcp(world.internet, (EIP2, 80), servers[1])
        # The same source address and port in both VPCs, at once.
        flows = [udp(vpc.a2, (INTERNET, 53), resolver, port=4000) for vpc in (world.vpc, other)]
        assert [flow.source[0] for flow in flows] == [EIP, EIP2]
        assert [tcp(vpc.a2, (INTERNET, 80), web).source[0] for vpc in (world.vpc, other)] == [EIP, EIP2]
        # From one VPC to the other by its EIP.
        assert tcp(world.vpc.a2, (EIP2, 80), servers[1]).source[0] == EIP
        # A call that names the other gateway's directory changes neither.
        wrong = two.exec("eip-del", f"{EIP}/24", NATGW_RUN_DIR=str(one.run_dir))
        assert wrong.returncode == 1
        assert "another network namespace" in wrong.stderr
        one.verb("snat-del", f"{EIP},10.0.1.0/24")
        one.verb("dnat-del", f"{EIP},80,tcp")
        one.verb("eip-del", f"{EIP}/24")
        one.kill()
        for flow in (inbound, flows[1]):
            flow.talk()


def test_an_external_link_that_goes_down_and_up_gets_its_routes_back(world: World, gateway: Gateway) -> None:
    """The kernel drops a downed interface's routes and does not bring them back."""
    before = gateway.run("ip", "route", "show", "default")
    assert "dev net1" in before
    gateway.ip("link set net1 down")
    wait_for(lambda: not gateway.status()["ready"], "the gateway to say that it is not ready")
    gateway.ip("link set net1 up")
    wait_for(lambda: gateway.status()["ready"], "the gateway to be ready again")
    assert gateway.run("ip", "route", "show", "default") == before
    works(world)
