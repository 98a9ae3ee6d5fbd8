"""natgw doctor on the real kernel: a sound gateway is well, and what is broken for real is found, all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from world import PATIENCE, ROUTER, Gateway, World, set_sysctl, wait_for

NATGW = Path(sys.executable).with_name("natgw")
EIP = "192.168.0.50"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def gateway(world: World) -> Iterator[Gateway]:
    # Drift is only told, so that what this test breaks stays broken.
    with world.gateway(environment={"NATGW_DRIFT": "report"}) as made:
        made.verb("eip-add", f"{EIP}/24", "192.168.0.51/24")
        made.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        made.verb("dnat-add", f"{EIP},8080,tcp,10.0.2.13,80")
        made.verb("snat-add", f"{EIP},10.0.1.0/24")
        yield made


def doctor(gateway: Gateway, *words: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the findings."""
    done = gateway.exec_argv([str(NATGW), "doctor", "--json", *words], environment | {"PATH": os.environ["PATH"]})
    assert done.stderr == "", done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_sound_gateway_is_well(world: World, gateway: Gateway) -> None:
    gateway.status()  # the HTTP face is up
    assert doctor(gateway) == (0, [])
    gateway.run("ping", "-c", "1", "-W", "5", ROUTER)
    met = gateway.get("/v1/surroundings")["neighbours"]
    (router,) = [each for each in met if each["address"] == ROUTER]
    assert router["mac"] == world.router.ip_json("link", "show", "eth0")[0]["address"]


def test_without_a_daemon_that_is_the_only_thing(gateway: Gateway) -> None:
    gateway.status()
    gateway.kill()
    code, found = doctor(gateway)
    assert (code, [each["check"] for each in found]) == (1, ["daemon"])


def test_everything_that_is_broken_is_found(world: World, gateway: Gateway) -> None:
    gateway.status()
    world.rival.ip(f"addr add {EIP}/24 dev eth0")  # another holder of the EIP
    world.vpc.router.ip("addr add 10.0.1.254/24 dev br1")  # lanIp is the subnet's gateway
    world.router.ip("link set eth0 arp off")  # the external gateway does not answer
    set_sysctl(gateway, {"ipv4/ip_forward": 0})
    gateway.ip("link set eth0 mtu 9000", "addr del 192.168.0.51/24 dev net1", "route del 10.0.2.0/24")
    gateway.run("iptables-nft", "-t", "nat", "-N", "DNAT_FILTER")
    gateway.run("iptables-nft", "-t", "nat", "-A", "PREROUTING", "-j", "DNAT_FILTER")
    gateway.run("iptables-legacy", "-w", "-P", "FORWARD", "DROP")
    listening = subprocess.Popen(["ip", "netns", "exec", gateway.name, "nc", "-l", "-p", "9100"], stdin=subprocess.PIPE)
    try:
        wait_for(lambda: "9100" in gateway.run("ss", "-Hltn"), "nc listens")
        code, found = doctor(gateway, NATGW_STATE_DIR="/proc/no-room")
    finally:
        listening.kill()
        listening.wait(PATIENCE)
        world.rival.ip(f"addr del {EIP}/24 dev eth0")
        world.vpc.router.ip("addr del 10.0.1.254/24 dev br1")
        world.router.ip("link set eth0 arp on")
    assert code == 2
    said = {each["check"]: each["finding"] for each in found}
    assert {check: words in said.get(check, "") for check, words in BROKEN.items()} == dict.fromkeys(BROKEN, True), said


BROKEN = {
    "forwarding": "ip_forward is 0",
    "addresses": "192.168.0.51",
    "tenants' routes": "10.0.2.13",
    "MTU": "eth0 has an MTU of 9000",
    "gateway": f"{ROUTER} does not answer ARP on net1",
    "EIP conflict": f"{EIP} on net1 is also held by",
    "lanIp": "10.0.1.254, the lanIp on eth0, is also held by 02:00:0a:00:01:01",
    "iptables variants": "iptables-nft holds a gateway's chains",
    "rules of others": "policy DROP",
    "drift": "192.168.0.51",
    "listeners": ":9100 (nc)",
    "disk": "/proc/no-room cannot be written",
}
