"""Share-type DNAT: real packets through the real daemon to several backends, beside both iptables variants."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from share import MANY, Servers, listed, reach, reach_again, send, sticky, times
from traffic import Flow, tcp
from world import A1, A2, INTERNET, B, Gateway, World

EIP = "192.168.0.60"
VPC_ROUTE = "10.0.2.0/24,10.0.1.1"
TWO, ONE = f"{A2}:80@{B}:80", f"{B}:80"
DOWN = ("nft-dnat-map-del", f"{EIP},80,tcp")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(scope="module", params=["legacy", "nft"])
def shared(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        yield made


@pytest.fixture
def gateway(world: World, shared: Gateway) -> Iterator[Gateway]:
    """A gateway with an EIP and the routes of the VPC; after the test it must be back to what ``init`` left."""
    shared.verb("subnet-route-add", VPC_ROUTE)
    shared.verb("eip-add", f"{EIP}/24")
    yield shared
    world.close_sockets()
    shared.reset()
    assert "goto" not in listed(shared)


def backends(world: World, protocol: str = "tcp", port: int = 80) -> Servers:
    """Servers on a2 and b."""
    hosts = {A2: world.vpc.a2, B: world.vpc.b}
    return {name: host.tcp_server(port) if protocol == "tcp" else host.udp(port) for name, host in hosts.items()}


def lines_with_port(gateway: Gateway, port: int) -> list[str]:
    """Connection tracking entries that name the port anywhere as a destination, as Kube-OVN's test greps for them."""
    return [line for line in gateway.run("conntrack", "-L").splitlines() if f"dport={port} " in line]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_connections_are_spread_over_all_backends(world: World, gateway: Gateway, protocol: str) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,{protocol},{TWO}")
    servers = backends(world, protocol)
    outside = times(MANY, world.internet, (EIP, 80), servers)
    inside = times(MANY, world.vpc.a1, (EIP, 80), servers)  # from the subnet of one of them
    assert set(outside) == set(inside) == {A2, B}
    _, flow = reach(world.internet, (EIP, 80), servers)
    assert flow.source[0] == INTERNET
    _, flow = reach(world.vpc.a1, (EIP, 80), servers)
    assert flow.source[0] == EIP  # so that the answer comes back by the gateway


def test_what_upstreams_tests_look_for(gateway: Gateway) -> None:
    for rule in ([f"{A1}:80"], [f"{A1}:80", f"{A2}:80"], [f"{A1}:80", f"{A2}:80", f"{B}:8080"], [f"{A1}:80"]):
        gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{'@'.join(rule)}")
        text = listed(gateway)
        digest = hashlib.md5(f"{EIP}:80:tcp".encode()).hexdigest()[:12]
        assert f"{EIP} . tcp . 80 : goto dnat-{digest}" in text
        assert f"numgen random mod {len(rule)} map" in text
        found = set(re.findall(r"\d : (\S+) \. (\d+)", text))
        assert found == {tuple(backend.split(":")) for backend in rule}
        assert re.search(r"hook prerouting priority (mangle|-150); policy accept;\s+ip daddr \. meta l4proto", text)
    gateway.cut(*DOWN)
    assert "goto" not in listed(gateway)
    assert "dnat-" not in listed(gateway)


def test_a_backend_that_goes_keeps_its_connections_and_the_identity_takes_them_along(
    world: World, gateway: Gateway
) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    servers = backends(world)
    flows: dict[str, Flow] = {}
    while set(flows) != {A2, B}:
        name, flow = reach(world.internet, (EIP, 80), servers)
        flows[name] = flow
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{ONE}")
    assert "numgen random mod 1 map" in listed(gateway)
    assert lines_with_port(gateway, 80)
    assert set(times(10, world.vpc.a1, (EIP, 80), servers)) == {B}
    for flow in flows.values():
        flow.talk()
    gateway.verb("dnat-add", f"{EIP},8080,tcp,{A2},80")
    control = tcp(world.internet, (EIP, 8080), servers[A2])
    gateway.cut(*DOWN)
    assert not [line for line in lines_with_port(gateway, 80) if "dport=8080" not in line]
    assert all(flow.is_cut(control) for flow in flows.values())


def test_adding_cuts_nobody_and_takes_in_what_passed_untranslated(world: World, gateway: Gateway) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    _, standing = reach(world.internet, (EIP, 80), backends(world))
    near = world.internet.udp()
    near.connect((EIP, 53))
    near.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):  # ICMP port unreachable, from the gateway itself
        near.recv(64)
    gateway.cut("nft-dnat-map-add", f"{EIP},53,udp,{A2}:80@{B}:80")
    assert reach_again(near, backends(world, "udp"))[1].near is near
    standing.talk()


@pytest.mark.parametrize("first", ["tcp", "TCP"])
def test_upper_case_protocols_are_the_same_identity(world: World, gateway: Gateway, first: str) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,{first},{TWO}")
    gateway.verb("nft-dnat-map-add", f"{EIP},80,{first.swapcase()},{ONE}")
    assert listed(gateway).count("goto") == 1
    assert set(times(5, world.internet, (EIP, 80), backends(world))) == {B}
    gateway.verb("nft-dnat-map-del", f"{EIP},80,{first}")
    assert "goto" not in listed(gateway)


def test_what_upstream_left_for_upper_case_protocols_is_taken_over(world: World, gateway: Gateway) -> None:
    old = "dnat-" + hashlib.md5(f"{EIP}:80:TCP".encode()).hexdigest()[:12]
    gateway.run(
        "nft",
        "-f",
        "-",
        stdin=f"""add table ip kube-ovn
add map ip kube-ovn service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add chain ip kube-ovn {old}
add rule ip kube-ovn {old} meta l4proto tcp dnat ip to numgen random mod 1 map {{ 0 : {A1} . 80 }}
add element ip kube-ovn service-ips {{ {EIP} . tcp . 80 : goto {old} }}
""",
    )
    gateway.verb("nft-dnat-map-add", f"{EIP},80,TCP,{TWO}")
    assert old not in listed(gateway)
    assert set(times(MANY, world.internet, (EIP, 80), backends(world))) == {A2, B}


def test_repeating_changes_nothing(gateway: Gateway) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    before = listed(gateway, "-a"), gateway.status()["generation"]  # with the handles, which grow with every change
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    gateway.verb("nft-dnat-map-add", f"{EIP},80,TCP,{A2}:80@{B}:80@{A2}:80")
    gateway.verb("nft-dnat-map-del", f"{EIP},81,tcp")
    gateway.verb("nft-dnat-map-del", ",,")
    assert (listed(gateway, "-a"), gateway.status()["generation"]) == before


def test_a_shared_and_an_exclusive_mapping_of_one_port(gateway: Gateway) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    refused = gateway.exec("dnat-add", f"{EIP},80,TCP,{A1},80")
    assert (refused.returncode, refused.stderr) == (1, "")
    assert "conflicts with shared DNAT" in refused.stdout
    assert send(gateway, "PUT", f"/v1/dnats/{EIP}/80/tcp", dnat(A1))[0] == 409
    gateway.cut(*DOWN)
    gateway.verb("dnat-add", f"{EIP},80,tcp,{A1},80")
    before = listed(gateway, "-a")
    refused = gateway.exec("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    assert refused.returncode == 1
    assert "conflicts with DNAT" in refused.stdout
    assert listed(gateway, "-a") == before


def dnat(backend: str) -> dict[str, object]:
    return {"eip": EIP, "externalPort": 80, "protocol": "tcp", "internalIp": backend, "internalPort": 80}


MALFORMED = [
    f"{EIP},80,tcp",
    f"{EIP},80,tcp,",
    f"{EIP},80,tcp,{A1}",
    f"{EIP},80,tcp,{A1}:80@",
    f"{EIP},80,tcp,{A1}:0",
    f"{EIP},80,tcp,{A1}:65536",
    f"{EIP},80,tcp,{A1}:80,{A2}:80",
    f"{EIP},80,tcp,{A1}:80:80",
    f"{EIP},80,tcp,fd00::1:80",
    f"{EIP},80,sctp,{A1}:80",
    f"{EIP},0,tcp,{A1}:80",
    f"256.1.1.1,80,tcp,{A1}:80",
    f"{EIP},80,tcp,{A1}:80; delete table ip kube-ovn",
    f"{EIP},80,tcp,{A1}:\u0668\u0660",
]


@pytest.mark.parametrize("rule", MALFORMED)
def test_malformed_rules_change_nothing(gateway: Gateway, rule: str) -> None:
    before = listed(gateway, "-a"), gateway.status()["generation"]
    refused = gateway.exec("nft-dnat-map-add", rule)
    assert refused.returncode == 1, refused
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1), refused
    assert (listed(gateway, "-a"), gateway.status()["generation"]) == before


def test_it_decides_before_iptables_and_only_what_is_its_own(world: World, gateway: Gateway) -> None:
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    a1 = world.vpc.a1
    servers = {A1: a1.tcp_server(80), **backends(world)}
    assert set(times(MANY, world.internet, (EIP, 80), servers)) == {A2, B}
    tcp(world.internet, (EIP, 22), a1.tcp_server(22))
    # The other variant's tables beside ours are nobody's trouble.
    other = "iptables-nft" if gateway.variant == "legacy" else "iptables-legacy"
    gateway.run(other, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9", "-j", "ACCEPT")
    assert set(times(MANY, world.internet, (EIP, 80), servers)) == {A2, B}
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{ONE}")
    gateway.cut(*DOWN)
    assert set(times(5, world.internet, (EIP, 80), servers)) == {A1}
    gateway.run(other, "-t", "nat", "-F", "PREROUTING")


@pytest.mark.parametrize("lost", ["memory", "files"])
def test_it_stands_again_after_a_restart(world: World, gateway: Gateway, lost: str) -> None:
    gateway.verb("nft-dnat-map-add", f"{EIP},80,tcp,{TWO}")
    assert send(gateway, "PUT", f"/v1/shared-dnats/{EIP}/81/tcp", sticky(EIP, 81, [A2, B], 77))[0] == 201
    spec = gateway.get("/v1/gateway")
    servers = backends(world)
    _, flow = reach(world.internet, (EIP, 80), servers)
    before = listed(gateway, "-a")
    gateway.kill()
    if lost == "files":
        shutil.rmtree(gateway.state_dir)
    gateway.verb("eip-add", f"{EIP}/24")
    found = gateway.get("/v1/gateway")
    found["sharedDnats"].sort(key=lambda shared: shared["externalPort"])
    assert found["sharedDnats"] == spec["sharedDnats"]
    assert re.sub(r"timeout.*", "", listed(gateway, "-a")) == re.sub(r"timeout.*", "", before)
    flow.talk()
    if lost == "memory":
        gateway.run("nft", "delete", "table", "ip", "kube-ovn")  # the container's network is another one
        gateway.kill()
        gateway.verb("eip-add", f"{EIP}/24")
        assert set(times(MANY, world.internet, (EIP, 80), servers)) == {A2, B}
    assert send(gateway, "DELETE", f"/v1/shared-dnats/{EIP}/81/tcp")[0] == 204


def test_without_nft_everything_else_works(world: World, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for directory in filter(Path.is_dir, map(Path, os.environ["PATH"].split(":"))):
        for program in directory.iterdir():
            if program.name != "nft" and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    with world.gateway(vpc=world.make_vpc(), own="192.168.0.12/24", environment={"PATH": str(programs)}) as bare:
        bare.verb("eip-add", "192.168.0.61/24")
        bare.verb("dnat-add", f"192.168.0.61,80,tcp,{A1},80")
        refused = bare.exec("nft-dnat-map-add", f"192.168.0.61,81,tcp,{TWO}")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "nft -f -: nft is not installed\n"
        bare.verb("dnat-del", "192.168.0.61,80,tcp")
        assert bare.status()["ready"]
        assert bare.get("/v1/gateway")["sharedDnats"] == []
