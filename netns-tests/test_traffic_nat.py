"""DNAT, SNAT, floating IPs and hairpins: real packets through the real daemon, in both iptables variants."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from traffic import anything, ping, tcp, udp
from world import A1, A2, INTERNET, Gateway, World

EIP, EIP2, EIP3 = "192.168.0.50", "192.168.0.51", "192.168.0.52"
VPC_ROUTE = "10.0.2.0/24,10.0.1.1"


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
    """A gateway after ``init``; after the test it must be back to that."""
    yield shared
    world.close_sockets()
    shared.reset()


def seen_as(world: World, tenant: str) -> set[str]:
    """The source addresses that the Internet sees of a tenant's TCP, UDP and ICMP."""
    client = getattr(world.vpc, tenant)
    servers = world.internet.tcp_server(0), world.internet.udp()
    ports = [server.getsockname()[1] for server in servers]
    sources = {
        tcp(client, (INTERNET, ports[0]), servers[0]).source[0],
        udp(client, (INTERNET, ports[1]), servers[1]).source[0],
        ping(client, INTERNET, world.internet),
    }
    for server in servers:
        server.close()
    return sources


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_dnat_reaches_the_backend_and_answers_come_from_the_eip(world: World, gateway: Gateway, protocol: str) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("dnat-add", f"{EIP},8888,{protocol},{A1},80")
    if protocol == "tcp":
        flow = tcp(world.internet, (EIP, 8888), world.vpc.a1.tcp_server(80))
    else:
        flow = udp(world.internet, (EIP, 8888), world.vpc.a1.udp(80))
    assert flow.source[0] == INTERNET  # the backend sees who called
    assert flow.near.getpeername() == (EIP, 8888)


def test_dnat_of_one_port_and_protocol_leaves_the_others_closed(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80")
    listening, bound = world.vpc.a1.tcp_server(80), world.vpc.a1.udp(80)
    with pytest.raises(ConnectionRefusedError):
        tcp(world.internet, (EIP, 80), listening)
    near = world.internet.udp()
    near.connect((EIP, 8888))
    near.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):  # ICMP port unreachable, from the gateway
        near.recv(64)
    assert not anything(bound)
    assert tcp(world.internet, (EIP, 8888), listening)


def test_snat_is_what_the_internet_sees(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("snat-add", f"{EIP},10.0.1.0/24,--random-fully")
    assert seen_as(world, "a1") == seen_as(world, "a2") == {EIP}


def test_a_floating_ip_works_both_ways(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    assert seen_as(world, "a1") == {EIP}
    inbound = tcp(world.internet, (EIP, 22), world.vpc.a1.tcp_server(22))
    assert inbound.source[0] == INTERNET
    udp(world.internet, (EIP, 69), world.vpc.a1.udp(69))
    assert ping(world.internet, EIP, world.vpc.a1) == INTERNET


def test_hairpin_by_a_floating_ip_comes_from_the_eip(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("floating-ip-add", f"{EIP},{A2}")
    assert tcp(world.vpc.a1, (EIP, 8080), world.vpc.a2.tcp_server(8080)).source[0] == EIP
    assert udp(world.vpc.a1, (EIP, 8080), world.vpc.a2.udp(8080)).source[0] == EIP
    assert ping(world.vpc.a1, EIP, world.vpc.a2) == EIP
    # Its owner, too, by its own name.
    assert tcp(world.vpc.a2, (EIP, 8081), world.vpc.a2.tcp_server(8081)).source[0] == EIP


def test_hairpin_by_a_port_mapping_comes_from_the_eip(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A2},80", f"{EIP},53,udp,{A2},5353")
    gateway.verb("snat-add", f"{EIP2},10.0.1.0/24")  # which is for what leaves, and not for this
    assert tcp(world.vpc.a1, (EIP, 8888), world.vpc.a2.tcp_server(80)).source[0] == EIP
    assert udp(world.vpc.a1, (EIP, 53), world.vpc.a2.udp(5353)).source[0] == EIP


def test_hairpin_between_two_floating_ips(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("floating-ip-add", f"{EIP},{A1}", f"{EIP2},{A2}")
    # The caller's own EIP decides before the hairpin rule: the answer finds back either way.
    assert tcp(world.vpc.a1, (EIP2, 8080), world.vpc.a2.tcp_server(8080)).source[0] == EIP


def test_one_eip_for_floating_ip_port_mapping_and_snat(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A2},80")
    gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
    backend = world.vpc.a2.tcp_server(80)
    tcp(world.internet, (EIP, 8888), backend)
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    # The floating IP wins for what comes in: port 8888 is now that of its owner.
    tcp(world.internet, (EIP, 8888), world.vpc.a1.tcp_server(8888))
    assert seen_as(world, "a1") == seen_as(world, "a2") == {EIP}
    gateway.verb("floating-ip-del", EIP)
    tcp(world.internet, (EIP, 8888), backend)


def test_the_longest_prefix_decides_whatever_the_order_of_creation(world: World, gateway: Gateway) -> None:
    gateway.verb("subnet-route-add", VPC_ROUTE)
    gateway.verb("eip-add", *(f"{eip}/24" for eip in (EIP, EIP2, EIP3)))
    for rule in (f"{EIP},10.0.0.0/16", f"{EIP2},10.0.1.0/24", f"{EIP3},{A1}/32"):
        gateway.verb("snat-add", rule)
    assert (seen_as(world, "a1"), seen_as(world, "a2"), seen_as(world, "b")) == ({EIP3}, {EIP2}, {EIP})
    order = [re.search(r"-s (\S+)", line) for line in gateway.rules("-A SHARED_SNAT ")]
    assert [found and found[1] for found in order] == [f"{A1}/32", "10.0.1.0/24", "10.0.0.0/16"]
    gateway.verb("snat-del", f"{EIP3},{A1}/32")
    assert seen_as(world, "a1") == {EIP2}
    gateway.verb("snat-del", f"{EIP2},10.0.1.0/24")
    assert seen_as(world, "a1") == seen_as(world, "a2") == {EIP}


def test_the_older_of_two_snats_of_one_prefix_decides(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("snat-add", f"{EIP2},10.0.1.0/24")
    gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
    assert seen_as(world, "a1") == {EIP2}
    gateway.verb("snat-add", f"{EIP2},10.0.1.0/24,--random-fully")  # repeated, it keeps its place
    assert seen_as(world, "a1") == {EIP2}
    gateway.verb("snat-del", f"{EIP2},10.0.1.0/24")
    assert seen_as(world, "a1") == {EIP}


def test_rules_may_come_before_their_eip(world: World, gateway: Gateway) -> None:
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A2},80")
    gateway.verb("floating-ip-add", f"{EIP2},{A1}")
    gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("eip-add", f"{EIP2}/24")
    tcp(world.internet, (EIP, 8888), world.vpc.a2.tcp_server(80))
    tcp(world.internet, (EIP2, 22), world.vpc.a1.tcp_server(22))
    assert (seen_as(world, "a1"), seen_as(world, "a2")) == ({EIP2}, {EIP})


def test_the_protocol_may_be_upper_case(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("dnat-add", f"{EIP},8888,TCP,{A1},80")
    gateway.verb("dnat-add", f"{EIP},8888,TCP,{A1},80")
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80")
    backend = world.vpc.a1.tcp_server(80)
    tcp(world.internet, (EIP, 8888), backend)
    assert len(gateway.rules("-A SHARED_DNAT", "--dport 8888")) == 1
    gateway.verb("dnat-del", f"{EIP},8888,TCP")
    with pytest.raises(ConnectionRefusedError):
        tcp(world.internet, (EIP, 8888), backend)
