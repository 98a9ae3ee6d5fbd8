"""ARP on the external interface, end to end: off without EIPs, on with them, announcements, other holders."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from traffic import ping, tcp
from wire import ETH_P_IP, Capture, Frame, gratuitous, send_arp
from world import A1, INTERNET, OWN, RIVAL, ROUTER, Gateway, World, identical, wait_for

EIP, EIP2 = "192.168.0.50", "192.168.0.51"
STALE_MAC = "02:00:5e:00:00:ff"
OTHER_MAC = "02:00:5e:00:00:77"
QUIET = 1.5  # seconds without a frame: repeats are one second apart, so none is to come


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def gateway(world: World) -> Iterator[Gateway]:
    with world.gateway() as made:
        yield made


def answers(world: World, gateway: Gateway, address: str) -> bool:
    """Whether the gateway answers a request for the address that somebody outside broadcasts; it had better.

    Where it should not, ``silent`` is to be asked.
    """
    ear = Capture(world.router, "eth0")
    send_arp(world.router, "eth0", op=1, psrc=ROUTER, pdst=address)
    return ear.next(wanted=answer(gateway, address)) is not None


def silent(world: World, gateway: Gateway, address: str) -> bool:
    """Whether the gateway has not answered when somebody has that was asked later."""
    ear = Capture(world.router, "eth0")
    for wanted in (address, RIVAL):
        send_arp(world.router, "eth0", op=1, psrc=ROUTER, pdst=wanted)
    heard = ear.until(lambda frame: frame.arp.op == 2 and frame.arp.psrc == RIVAL) + ear.rest(0.1)
    return not any(map(answer(gateway, address), heard))


def answer(gateway: Gateway, address: str) -> Callable[[Frame], bool]:
    """Answers of the gateway's about the address."""
    wanted = (2, address, gateway.mac)
    return lambda frame: (frame.arp.op, frame.arp.psrc, frame.arp.hwsrc) == wanted


def noarp(gateway: Gateway) -> bool:
    return "NOARP" in gateway.link("net1")["flags"]


def announcements(frames: list[Frame]) -> Counter[tuple[str, str]]:
    return Counter(frame.announces() for frame in frames)


def test_without_eips_the_gateway_is_silent_outside(world: World, gateway: Gateway) -> None:
    assert noarp(gateway)
    assert gateway.status()["arp"] == {"policy": "auto", "on": False}
    assert silent(world, gateway, OWN)
    # Not even to somebody who knows its hardware address.
    world.router.ip(f"neigh replace {OWN} lladdr {gateway.mac} dev eth0 nud permanent")
    try:
        with pytest.raises(TimeoutError):
            ping(world.router, OWN, gateway, patience=0.5)
    finally:
        world.router.ip(f"neigh del {OWN} dev eth0")
    gateway.verb("eip-add", f"{EIP}/24")
    assert not noarp(gateway)
    assert answers(world, gateway, OWN)
    assert answers(world, gateway, EIP)
    ping(world.router, OWN, gateway)


def test_without_eips_nothing_is_forwarded_out_and_nothing_circles(world: World, gateway: Gateway) -> None:
    tenant = world.vpc.a1.udp()
    tenant.connect((INTERNET, 53))
    inside, parent = Capture(gateway, "net1", ETH_P_IP), Capture(world.external, "parent", ETH_P_IP)
    arrived = Capture(gateway, "eth0", ETH_P_IP)
    for number in range(5):
        tenant.send(b"%d" % number)
    arrived.take(5)
    assert not inside.rest(0.2)
    assert not parent.rest(0.2)
    # The same captures do see what leaves once there is an EIP.
    gateway.verb("eip-add", f"{EIP}/24")
    tenant.send(b"now")
    inside.take(1)
    parent.take(1)


def test_the_first_eip_is_announced_with_the_own_address_before_the_verb_returns(
    world: World, gateway: Gateway
) -> None:
    ours = gratuitous(gateway.mac)
    ear, sent = Capture(world.router, "eth0"), Capture(gateway, "net1")
    began = time.time()
    gateway.verb("eip-add", f"{EIP}/24")
    returned = time.time()
    first = sent.take(2, ours)
    assert announcements(first) == {(EIP, gateway.mac): 1, (OWN, gateway.mac): 1}
    assert max(frame.at for frame in first) < returned
    # Three times each, a second apart, and that is all.
    assert announcements(ear.take(6, ours)) == {(EIP, gateway.mac): 3, (OWN, gateway.mac): 3}
    repeats = sent.take(4, ours)
    assert announcements(repeats) == {(EIP, gateway.mac): 2, (OWN, gateway.mac): 2}
    assert repeats[-1].at - began > 1.9
    waited = [returned > repeats[-1].at]
    assert not ear.rest(QUIET, ours)
    # A second one is announced alone.
    gateway.verb("eip-add", f"{EIP2}/24")
    returned = time.time()
    last = ear.take(3, ours)
    assert announcements(last) == {(EIP2, gateway.mac): 3}
    waited.append(returned > last[-1].at)
    assert not ear.rest(QUIET, ours)
    assert not all(waited)  # for the repeats; this program may have stood still after one of the calls


def test_a_repeated_eip_add_announces_once_more_and_writes_nothing(world: World, gateway: Gateway) -> None:
    ours = gratuitous(gateway.mac)
    ear = Capture(world.router, "eth0")
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    ear.take(9, ours)
    for _ in range(2):
        identical(gateway, lambda: gateway.verb("eip-add", f"{EIP}/24"))
        assert announcements(ear.take(1, ours)) == {(EIP, gateway.mac): 1}
        assert not ear.rest(QUIET, ours)
    # Paced: many in one second do not become many frames.
    began = time.time()
    for _ in range(5):
        gateway.verb("eip-add", f"{EIP}/24")
    paced = ear.take(1, ours)
    paced += ear.rest(QUIET, ours)
    assert announcements(paced)[EIP, gateway.mac] == len(paced) <= paced[-1].at - began + 1


def test_stale_caches_outside_are_corrected(world: World, gateway: Gateway) -> None:
    gateway.verb("dnat-add", f"{EIP},80,tcp,{A1},80")
    world.router.ip(*(f"neigh replace {a} lladdr {STALE_MAC} dev eth0 nud reachable" for a in (EIP, OWN)))
    gateway.verb("eip-add", f"{EIP}/24")
    wait_for(lambda: world.external_mac(EIP) == gateway.mac, "the router's entry for the EIP is corrected")
    wait_for(lambda: world.external_mac(OWN) == gateway.mac, "the router's entry for the own address is corrected")
    tcp(world.internet, (EIP, 80), world.vpc.a1.tcp_server(80))


def test_after_the_last_eip_arp_is_off_again(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("eip-del", f"{EIP}/24")
    assert not noarp(gateway)
    assert answers(world, gateway, EIP2)
    gateway.verb("eip-del", f"{EIP2}/24")
    assert noarp(gateway)
    assert gateway.net1_addresses() == [OWN]
    assert silent(world, gateway, OWN)
    tenant = world.vpc.a1.udp()
    tenant.connect((INTERNET, 53))
    inside, arrived = Capture(gateway, "net1", ETH_P_IP), Capture(gateway, "eth0", ETH_P_IP)
    tenant.send(b"anybody?")
    arrived.take(1)
    assert not inside.rest(0.2)
    assert not Capture(world.router, "eth0").rest(QUIET, gratuitous(gateway.mac))  # no repeats of what is gone
    gateway.verb("eip-add", f"{EIP}/24")
    assert not noarp(gateway)
    assert answers(world, gateway, EIP)


def test_arp_stays_on_where_the_operator_says_so(world: World) -> None:
    with world.gateway(environment={"NATGW_ARP": "on"}) as gateway:
        assert not noarp(gateway)
        assert gateway.status()["arp"] == {"policy": "on", "on": True}
        assert answers(world, gateway, OWN)
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("eip-del", f"{EIP}/24")
        assert not noarp(gateway)
        # With ARP there is no loop, so what is not translated may leave.
        server, tenant = world.internet.udp(53), world.vpc.a1.udp()
        tenant.connect((INTERNET, 53))
        tenant.send(b"as myself")
        assert server.recvfrom(64)[1][0] == A1


def test_link_up_and_a_new_hardware_address_are_announced(world: World, gateway: Gateway) -> None:
    ear = Capture(world.router, "eth0")
    gateway.verb("eip-add", f"{EIP}/24")
    ear.take(6, gratuitous(gateway.mac))
    gateway.ip("link set net1 down", "link set net1 up")
    again = ear.take(6, gratuitous(gateway.mac))
    assert announcements(again) == {(EIP, gateway.mac): 3, (OWN, gateway.mac): 3}
    gateway.ip(f"link set net1 address {OTHER_MAC}")
    moved = ear.take(6, gratuitous(OTHER_MAC))
    assert announcements(moved) == {(EIP, OTHER_MAC): 3, (OWN, OTHER_MAC): 3}
    assert world.external_mac(EIP) in (None, OTHER_MAC)
    wait_for(lambda: gateway.status()["links"]["net1"]["mac"] == OTHER_MAC, "the status knows the new address")


def test_another_holder_is_reported_and_nothing_is_defended(world: World, gateway: Gateway) -> None:
    ear = Capture(world.router, "eth0")
    world.rival.ip(f"addr add {EIP}/24 dev eth0")
    rival = world.rival.ip_json("link", "show", "eth0")[0]["address"]
    try:
        gateway.verb("eip-add", f"{EIP}/24")
        ear.take(6, gratuitous(gateway.mac))
        began = time.time()
        for _ in range(3):
            send_arp(world.rival, "eth0", op=1, psrc=EIP, pdst=EIP)
        wait_for(lambda: sum(c["count"] for c in gateway.status()["conflicts"]) == 3, "three sightings in the status")
        (conflict,) = gateway.status()["conflicts"]
        assert {name: conflict[name] for name in ("interface", "address", "mac")} == {
            "interface": "net1",
            "address": EIP,
            "mac": rival,
        }
        assert began - 10 <= conflict["firstSeen"] <= conflict["lastSeen"] <= time.time() + 10
        gateway.logged(rival)
        assert gateway.status()["ready"]
        assert not ear.rest(QUIET, gratuitous(gateway.mac))
        # The controller may repeat the verb: a success, and one announcement as ever.
        gateway.verb("eip-add", f"{EIP}/24")
        assert announcements(ear.take(1, gratuitous(gateway.mac))) == {(EIP, gateway.mac): 1}
        assert not ear.rest(QUIET, gratuitous(gateway.mac))
        gateway.verb("eip-del", f"{EIP}/24")
        assert gateway.status()["conflicts"] == []
    finally:
        world.rival.ip(f"addr del {EIP}/24 dev eth0")


def test_an_answer_of_another_holder_is_a_sighting_too(world: World, gateway: Gateway) -> None:
    gateway.verb("eip-add", f"{EIP}/24")
    send_arp(world.rival, "eth0", op=2, psrc=EIP, pdst=ROUTER, hwsrc=OTHER_MAC)
    wait_for(lambda: [c["mac"] for c in gateway.status()["conflicts"]] == [OTHER_MAC], "the holder in the status")


def test_two_gateways_of_one_eip_report_each_other(world: World, gateway: Gateway) -> None:
    """Replicas hold the same EIPs: both announce, both say so, neither fails."""
    gateway.verb("eip-add", f"{EIP}/24")
    with world.gateway(vpc=world.make_vpc(), own="192.168.0.12/24") as replica:
        replica.verb("eip-add", f"{EIP}/24")
        gateway.verb("eip-add", f"{EIP}/24")  # as the controller does with all replicas when one is new
        for one, other in ((gateway, replica), (replica, gateway)):
            wait_for(
                lambda one=one, other=other: other.mac in {c["mac"] for c in one.status()["conflicts"]},  # type: ignore[misc]
                "each replica knows the other",
            )
            assert one.status()["ready"]
