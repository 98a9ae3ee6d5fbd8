"""Connections that a change makes stale end at once; all others live on. In both iptables variants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from traffic import Flow, anything, source_of, tcp, udp, udp_again
from world import A1, A2, INTERNET, Gateway, World

EIP, EIP2 = "192.168.0.50", "192.168.0.51"


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
    """A gateway with two EIPs, and nothing else; the second one is for flows that no change concerns."""
    shared.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    yield shared
    world.close_sockets()
    shared.reset()


@pytest.fixture
def control(world: World, gateway: Gateway) -> Flow:
    """A TCP connection through the second EIP, which must survive."""
    gateway.verb("dnat-add", f"{EIP2},9999,tcp,{A2},9999")
    return tcp(world.internet, (EIP2, 9999), world.vpc.a2.tcp_server(9999))


def through(gateway: Gateway, eip: str) -> list[str]:
    """Entries that were sent to the EIP, or whose answers are."""
    return gateway.flows(f"dst={eip}")


def test_dnat_del_cuts_its_flows_and_no_others(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80", f"{EIP},53,udp,{A1},53", f"{EIP},8889,tcp,{A1},80")
    backend, resolver = world.vpc.a1.tcp_server(80), world.vpc.a1.udp(53)
    connection, datagrams = tcp(world.internet, (EIP, 8888), backend), udp(world.internet, (EIP, 53), resolver)
    neighbour = tcp(world.internet, (EIP, 8889), backend)
    gateway.cut("dnat-del", f"{EIP},8888,tcp")
    assert not gateway.flows(f"dst={EIP}", "dport=8888")
    assert connection.is_cut(control)
    datagrams.talk()
    neighbour.talk()
    gateway.cut("dnat-del", f"{EIP},53,udp")
    assert not gateway.flows(f"dst={EIP}", "dport=53")
    assert datagrams.is_cut(control)
    neighbour.talk()


def test_floating_ip_del_cuts_both_directions(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    outside = world.internet.tcp_server(80)
    flows = [
        tcp(world.internet, (EIP, 22), world.vpc.a1.tcp_server(22)),
        udp(world.internet, (EIP, 53), world.vpc.a1.udp(53)),
        tcp(world.vpc.a1, (INTERNET, 80), outside),
        udp(world.vpc.a1, (INTERNET, 53), world.internet.udp(53)),
    ]
    assert len(through(gateway, EIP)) == len(flows)
    gateway.cut("floating-ip-del", EIP)
    assert not through(gateway, EIP)
    inbound_tcp, inbound_udp, outbound_tcp, outbound_udp = flows
    assert all(flow.is_cut(control) for flow in (inbound_tcp, inbound_udp, outbound_tcp))
    # What the tenant still sends leaves untranslated; it has lost the EIP.
    assert source_of(outbound_udp.near, outbound_udp.far)[0] == A1
    outbound_udp.back(b"answer to the EIP")
    control.talk()
    assert not anything(outbound_udp.near)


def test_snat_del_cuts_its_flows_and_no_others(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
    gateway.verb("snat-add", f"{EIP2},{A2}/32")
    web, resolver = world.internet.tcp_server(80), world.internet.udp(53)
    connection, datagrams = tcp(world.vpc.a1, (INTERNET, 80), web), udp(world.vpc.a1, (INTERNET, 53), resolver)
    neighbour = tcp(world.vpc.a2, (INTERNET, 80), web)
    gateway.cut("snat-del", f"{EIP},10.0.1.0/24")
    assert not through(gateway, EIP)
    assert connection.is_cut(control)
    datagrams.back(b"answer to the EIP")
    control.talk()
    assert not anything(datagrams.near)
    assert source_of(datagrams.near, datagrams.far)[0] == A1
    neighbour.talk()


def test_eip_del_cuts_everything_that_used_it(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80")
    gateway.verb("snat-add", f"{EIP},{A1}/32")
    inbound = tcp(world.internet, (EIP, 8888), world.vpc.a1.tcp_server(80))
    outbound = [
        tcp(world.vpc.a1, (INTERNET, 80), world.internet.tcp_server(80)),
        udp(world.vpc.a1, (INTERNET, 53), world.internet.udp(53)),
    ]
    gateway.cut("eip-del", f"{EIP}/24")
    assert not through(gateway, EIP)
    assert EIP not in gateway.net1_addresses()
    # Its rules stand, and may: but nobody finds the way to the address, once the router asks for it again.
    world.router.ip(f"neigh del {EIP} dev eth0")
    assert not inbound.forth_arrives(control)
    assert not any(flow.back_arrives(control) for flow in outbound)


def test_a_changed_dnat_moves_new_flows(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80", f"{EIP},53,udp,{A1},53")
    backends = world.vpc.a1.tcp_server(80), world.vpc.a2.tcp_server(81)
    resolvers = world.vpc.a1.udp(53), world.vpc.a2.udp(54)
    connection = tcp(world.internet, (EIP, 8888), backends[0])
    client = udp(world.internet, (EIP, 53), resolvers[0]).near
    gateway.cut("dnat-del", f"{EIP},8888,tcp", f"{EIP},53,udp")
    gateway.cut("dnat-add", f"{EIP},8888,tcp,{A2},81", f"{EIP},53,udp,{A2},54")
    assert connection.is_cut(control)
    tcp(world.internet, (EIP, 8888), backends[1])
    # The client keeps its source port: for the kernel that is the same connection.
    udp_again(client, resolvers[1])
    assert not anything(resolvers[0])


def test_a_datagram_between_deletion_and_addition_pins_nothing(world: World, gateway: Gateway, control: Flow) -> None:
    gateway.verb("dnat-add", f"{EIP},53,udp,{A1},53")
    client = udp(world.internet, (EIP, 53), world.vpc.a1.udp(53)).near
    gateway.cut("dnat-del", f"{EIP},53,udp")
    client.send(b"to nobody")
    with pytest.raises(ConnectionRefusedError):
        client.recv(64)
    assert gateway.flows(f"dst={EIP}", "dport=53")  # an entry, without translation
    gateway.cut("dnat-add", f"{EIP},53,udp,{A2},54")
    udp_again(client, world.vpc.a2.udp(54))


@pytest.mark.parametrize("rule", [("snat-add", f"{EIP},10.0.1.0/24"), ("floating-ip-add", f"{EIP},{A1}")])
def test_what_left_untranslated_is_translated_once_there_is_a_rule(
    world: World, gateway: Gateway, rule: tuple[str, str]
) -> None:
    server = world.internet.udp(53)
    client, bystander = world.vpc.a1.udp(4000), world.vpc.b.udp(4000)
    for near, source in ((client, (A1, 4000)), (bystander, ("10.0.2.13", 4000))):
        near.connect((INTERNET, 53))
        assert source_of(near, server) == source
    gateway.cut(*rule)
    assert not gateway.flows(f"src={A1}", f"dst={A1}")
    assert gateway.flows("src=10.0.2.13")  # no rule is for it
    assert udp_again(client, server).source[0] == EIP
    assert source_of(bystander, server) == ("10.0.2.13", 4000)


def test_repeated_verbs_cut_nothing(world: World, gateway: Gateway, control: Flow) -> None:
    verbs = (
        ("dnat-add", f"{EIP},8888,tcp,{A2},80"),
        ("snat-add", f"{EIP},10.0.1.0/24"),
        ("floating-ip-add", f"{EIP},{A1}"),
    )
    for verb in verbs:
        gateway.verb(*verb)
    flows = [
        tcp(world.internet, (EIP, 22), world.vpc.a1.tcp_server(22)),
        udp(world.vpc.a2, (INTERNET, 53), world.internet.udp(53)),
        control,
    ]
    before = sorted(line.split(" src=")[1] for line in gateway.flows())
    gateway.verb("init")
    for verb in (*verbs, ("eip-add", f"{EIP}/24")):
        gateway.verb(*verb)
    assert sorted(line.split(" src=")[1] for line in gateway.flows()) == before
    for flow in flows:
        flow.talk()
