"""A gateway beside another primary CNI: eth0 is that one's, net1 the VPC's, net2 leads out; ``init net1,net2`` says so.

And whole labs from the example manifests of such a gateway and of one without an external address of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import require, veth
from traffic import ping, tcp, udp
from world import A1, INTERNET, RIVAL, ROUTER, Gateway, World, set_sysctl

ROOT = Path(__file__).parent.parent
EIP, FLOATING = "192.168.0.20", "192.168.0.21"
MANAGEMENT = "10.244.0.7"


class SecondaryGateway(Gateway):
    """eth0 on a management network with the default route, net1 on the VPC, net2 outside."""

    def attach(self) -> None:
        world, vpc = self._world, self._vpc
        set_sysctl(self, {"ipv4/ip_forward": 1})
        veth(world.external, "mgmt", self, "eth0")
        world.external.ip("addr replace 10.244.0.1/24 dev mgmt")
        veth(vpc.router, "gw", self, "net1")
        vpc.router.ip("link set gw master br1")
        self.ip(
            f"addr add {MANAGEMENT}/24 dev eth0",
            "route add default via 10.244.0.1",
            f"link set net1 address {vpc.LAN_MAC}",
            f"addr add {vpc.LAN_IP}/24 dev net1",
        )
        name = f"m{self.name[-6:]}"
        world.external.ip(
            f"link add {name} link parent type macvlan mode bridge",
            f"link set {name} netns {self.name} name net2",
        )
        self.ip("link set net2 up")
        if self._own:
            self.ip(f"addr add {self._own} dev net2")
        world.router.ip("neigh flush dev eth0")
        self.mac = self.link("net2")["address"]

    def remove(self) -> None:
        for where, name in ((self._world.external.name, "mgmt"), (self.name, "net2")):
            subprocess.run(["ip", "-n", where, "link", "del", name], check=False, capture_output=True)
        super().remove()

    def addresses(self, interface: str) -> list[str]:
        return [info["local"] for link in self.ip_json("-4", "addr", "show", interface) for info in link["addr_info"]]

    def create(self) -> None:
        """What the controller sends for a new gateway with an EIP of each kind."""
        self.verb("init", "net1,net2")
        self.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        self.verb("eip-add", f"{EIP}/24")
        self.verb("eip-add", f"{FLOATING}/24")
        self.verb("dnat-add", f"{EIP},8888,tcp,{A1},80")
        self.verb("floating-ip-add", f"{FLOATING},10.0.2.13")
        self.verb("snat-add", f"{EIP},10.0.1.0/24,--random-fully")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[SecondaryGateway]:
    made = SecondaryGateway(world, variant=request.param, own=None)
    try:
        made.attach()
        yield made
    finally:
        world.close_sockets()
        made.remove()


def passes(world: World) -> None:
    """Traffic by every kind of rule, in and out, and to a subnet that does not hold the gateway."""
    web = world.vpc.a1.tcp_server(80)
    assert tcp(world.internet, (EIP, 8888), web).source[0] == INTERNET
    outside = world.internet.tcp_server(9000)
    assert tcp(world.vpc.a2, (INTERNET, 9000), outside).source[0] == EIP
    hairpin = tcp(world.vpc.a2, (EIP, 8888), web)
    assert hairpin.source[0] == EIP
    inside = world.vpc.b.udp(5353)
    assert udp(world.rival, (FLOATING, 5353), inside).source[0] == RIVAL
    assert ping(world.vpc.b, INTERNET, world.internet) == FLOATING
    world.close_sockets()


def test_the_names_are_taken_literally(world: World, gateway: SecondaryGateway) -> None:
    gateway.create()
    passes(world)
    assert gateway.addresses("net2") == [EIP, FLOATING]
    assert (gateway.addresses("eth0"), gateway.addresses("net1")) == ([MANAGEMENT], [world.vpc.LAN_IP])
    assert [(r["gateway"], r["dev"]) for r in gateway.default_routes()] == [(ROUTER, "net2")]
    assert gateway.rules("-A VPC_MARK") == ["-A VPC_MARK -i net1 -j MARK --set-xmark 0x1/0x1"]
    assert gateway.rules("-A SHARED_SNAT") == [
        f"-A SHARED_SNAT -s 10.0.1.0/24 -o net2 -j SNAT --to-source {EIP} --random-fully"
    ]
    assert len(gateway.rules("-A HAIRPIN_SNAT -o net1 ")) == 2
    assert not gateway.rules("eth0")


def test_before_the_first_eip_arp_is_off_outside_and_only_there(gateway: SecondaryGateway) -> None:
    gateway.verb("init", "net1,net2")
    silent = [name for name in ("eth0", "net1", "net2") if "NOARP" in gateway.link(name)["flags"]]
    assert silent == ["net2"]
    assert gateway.addresses("net2") == []
    assert [r["dev"] for r in gateway.default_routes()] == ["eth0"]  # the other CNI's, until the first EIP
    gateway.verb("eip-add", f"{EIP}/24")
    assert "NOARP" not in gateway.link("net2")["flags"]


@pytest.mark.parametrize("lost", [(), ("state",), ("state", "env"), ("state", "env", "run")])
def test_the_names_outlive_the_daemon_and_its_files(
    world: World, gateway: SecondaryGateway, lost: tuple[str, ...]
) -> None:
    gateway.create()
    rules = gateway.saved()
    gateway.kill()
    places = {"state": gateway.state_dir, "run": gateway.run_dir}
    for name in lost:
        if name == "env":
            gateway.run_dir.with_name("nat-gateway.env").unlink()
        else:
            shutil.rmtree(places[name])
    gateway.verb("eip-add", f"{EIP}/24")  # a redo does not begin with init
    assert gateway.status()["interfaces"] == {"vpc": "net1", "external": "net2"}
    assert gateway.saved() == rules
    passes(world)
    gateway.verb("init", "net1,net2")
    assert gateway.saved() == rules
    env_file = gateway.run_dir.with_name("nat-gateway.env")
    assert env_file.read_text() == "VPC_INTERFACE=net1\nEXTERNAL_INTERFACE=net2\n"


def test_an_interface_that_is_not_there_is_refused(gateway: SecondaryGateway) -> None:
    done = gateway.exec("init", "net1,net9")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "net9" in done.stderr
    gateway.verb("init", "net1,net2")


def test_the_status_warns_of_the_controllers_default(gateway: SecondaryGateway) -> None:
    gateway.verb("init", "net1,net2")
    (warning,) = gateway.status()["warnings"]
    assert warning.startswith("net1 is the tenants' side here")


# --- whole labs -------------------------------------------------------------------------------------------------


@pytest.fixture
def lab_name() -> Iterator[str]:
    require("ip", "bash", "sysctl", "setsid")
    name = f"t{os.getpid()}{secrets.token_hex(2)}"
    yield name
    natgw("lab", "down", "--name", name)


def natgw(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line, from this checkout."""
    program = "import sys; from api.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", program, *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(320)  # three programs, each of which has a limit of its own
@pytest.mark.parametrize(
    ("example", "must_show"),
    [
        ("non-primary-cni.yaml", {"DNAT web", "SNAT out, outward", "FIP floating", "FIP floating, hairpin"}),
        (
            "no-default-eip.yaml",
            {
                "shop-gw: noDefaultEIP",
                "subnet backends of shop",
                "SNAT backends-out, outward",
                "service 10.96.0.1 by net1",
                "service 10.96.0.1 without net1",
            },
        ),
    ],
)
def test_the_example_works_as_a_lab(lab_name: str, example: str, must_show: set[str]) -> None:
    built = natgw("lab", "up", "--name", lab_name, "-f", f"examples/{example}", "--json")
    assert built.returncode == 0, built.stderr
    (planned,) = json.loads(built.stdout)["world"]["gateways"]
    tried = natgw("lab", "test", "--name", lab_name, "--json")
    results: list[dict[str, Any]] = json.loads(tried.stdout)["results"]
    assert [result for result in results if not result["ok"]] == []
    assert must_show <= {result["what"] for result in results}
    if example == "non-primary-cni.yaml":
        assert (planned["vpc_interface"], planned["external_interface"]) == ("net1", "net2")
