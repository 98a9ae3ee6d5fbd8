"""Bandwidth limits as iperf3 measures them, in both directions, and that no change of them opens a gap."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from iperf import TRIES, assert_rate, limited_mbit, received_mbit
from netns import require
from traffic import PATIENCE
from wire import ETH_P_IP, Capture
from world import A1, INTERNET, Gateway, World

pytestmark = pytest.mark.alone

EIP, OTHER = "192.168.0.50", "192.168.0.99"
DIRECTIONS = pytest.mark.parametrize("direction", ["ingress", "egress"])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("iperf3", "ss", "tc")
    with World() as made:
        yield made


@pytest.fixture(scope="module")
def shared(world: World) -> Iterator[Gateway]:
    with world.gateway() as made:
        made.verb("eip-add", f"{EIP}/24")
        made.verb("floating-ip-add", f"{EIP},{A1}")
        yield made


@pytest.fixture
def gateway(world: World, shared: Gateway) -> Iterator[Gateway]:
    """A gateway with one floating IP and no limits; it has none again afterwards."""
    yield shared
    for direction in ("ingress", "egress"):
        shared.verb(f"eip-{direction}-qos-del", EIP, OTHER)
        shared.verb("qos-del", f"{direction},net1,3,matchall,,,,,", *specific(direction))
    assert shared.status()["counts"]["qos"] == 0


def specific(direction: str) -> list[str]:
    side = "src" if direction == "ingress" else "dst"
    return [f"{direction},net1,2,u32,ip,{side},{INTERNET}/32,10,0.1"]


def burst(mbit: float) -> float:
    """In MB: some tenths of a second."""
    return max(0.03, mbit / 80)


def measured(world: World, direction: str, udp: float | None = None) -> float:
    """What arrives from the Internet at the tenant (ingress), or from the tenant at the Internet."""
    return limited_mbit(world.internet, world.vpc.a1, EIP, udp_mbit=udp, reverse=direction == "egress")


@DIRECTIONS
@pytest.mark.parametrize("mbit", [1, 10, 100])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_limit_is_kept_within_ten_per_cent(
    world: World, gateway: Gateway, protocol: str, mbit: int, direction: str
) -> None:
    gateway.verb(f"eip-{direction}-qos-add", f"{EIP},1,{mbit},{burst(mbit)}")
    offered = mbit * 1.5 if protocol == "udp" else None
    assert_rate(lambda: measured(world, direction, offered), mbit)


@DIRECTIONS
def test_the_eip_comes_before_the_prefix_and_the_prefix_before_the_interface(
    world: World, gateway: Gateway, direction: str
) -> None:
    gateway.verb("qos-add", f"{direction},net1,3,matchall,,,,50,0.5")
    assert_rate(lambda: measured(world, direction), 50)
    gateway.verb("qos-add", *specific(direction))
    assert_rate(lambda: measured(world, direction), 10)
    gateway.verb(f"eip-{direction}-qos-add", f"{EIP},1,2,0.05")
    assert_rate(lambda: measured(world, direction), 2)
    gateway.verb(f"eip-{direction}-qos-del", EIP)
    assert_rate(lambda: measured(world, direction), 10)


def test_limits_stand_without_the_daemon_and_return_with_it(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-ingress-qos-add", f"{EIP},1,5,0.05")
    gateway.kill(signal.SIGKILL)
    assert_rate(lambda: measured(world, "ingress"), 5)
    gateway.run("tc", "qdisc", "del", "dev", "ifb-net1", "root")
    gateway.verb("eip-add", f"{EIP}/24")
    assert_rate(lambda: measured(world, "ingress"), 5)


FLOOD = """
import socket, sys, time
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.connect((sys.argv[1], int(sys.argv[2])))
print("going", flush=True)
payload, end = bytes(1372), time.monotonic() + 100
while time.monotonic() < end:
    for _ in range(100):
        try:
            out.send(payload)
        except OSError:
            pass
"""
FRAME = 1372 + 42


def test_no_change_of_a_limit_lets_anything_through_meanwhile(world: World, gateway: Gateway) -> None:
    """A flood meets rates, priorities and neighbours that change all the time: by the kernel's clock, no twentieth
    of a second has more than the higher rate, the burst and a moment's delay of the shaper's own allow.

    Heard where the gateway sends what its shaper has let go, so that no later queue can make a heap of it.
    """
    rates, size = (4, 8), 0.05
    world.vpc.a1.udp(9000)  # nobody answers that there is nobody
    ear = Capture(gateway, "eth0", ETH_P_IP)
    gateway.verb("eip-ingress-qos-add", f"{EIP},1,{rates[0]},{size}")
    flood = world.internet.spawn(sys.executable, "-c", FLOOD, EIP, "9000")
    times: list[float] = []
    try:
        ear.take(100)  # the first burst is allowed
        begun, turn, ended = time.time(), 0, time.time()
        # On a busy machine the flood may stand still for a while.
        while turn < 20 or (len(times) * FRAME * 8 < rates[0] * 0.8e6 * (ended - begun) and ended < begun + PATIENCE):
            gateway.verb("eip-ingress-qos-add", f"{EIP},{1 + turn % 4 // 2 * 4},{rates[turn % 2]},{size}")
            verb = "add" if turn % 2 else "del"
            gateway.verb(f"eip-ingress-qos-{verb}", f"{OTHER}{',1,100,1' if turn % 2 else ''}")
            turn, ended = turn + 1, time.time()
            times += [frame.at for frame in ear.rest(0) if begun <= frame.at]
    finally:
        flood.kill()
        flood.communicate()
        world.close_sockets()
    assert len(times) * FRAME * 8 / (ended - begun) > rates[0] * 0.8e6, "the flood did not fill the limit"
    window = 0.05
    most = max(sum(start <= at < start + window for at in times[n : n + 2000]) for n, start in enumerate(times))
    assert most * FRAME <= rates[1] * 1e6 / 8 * window + size * 2**20 + 30_000


def test_what_no_limit_claims_passes_unshaped(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-ingress-qos-add", f"{OTHER},1,1,0.1")
    gateway.verb("eip-egress-qos-add", f"{OTHER},1,1,0.1")
    for client, server, to in ((world.internet, world.vpc.a1, EIP), (world.vpc.a1, world.internet, INTERNET)):
        assert any(received_mbit(client, server, to, seconds=1) > 100 for _ in range(TRIES))


def test_other_protocols_than_ipv4_are_not_limited(world: World, gateway: Gateway) -> None:
    """ARP of the external network goes on while all IPv4 traffic waits for a limit of nearly nothing."""
    gateway.verb("qos-add", "ingress,net1,3,matchall,,,,0.01,0", "egress,net1,3,matchall,,,,0.01,0")
    flood = world.internet.spawn(sys.executable, "-c", FLOOD, EIP, "9000")
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "going\n"
        done = subprocess.run(
            ["ip", "netns", "exec", world.rival.name, "arping", "-c", "2", "-w", "30", "-I", "eth0", EIP],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        flood.kill()
        flood.communicate()
    assert done.returncode == 0, done.stdout + done.stderr
