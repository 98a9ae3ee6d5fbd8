"""Packets' fates: a spec's chains do to every packet what the spec's words say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.desired import Facts
from rules.keyed import Keyed
from rules.nft import ServiceKey
from rules.packet import Packet
from rules.routing import Host, route
from rules.ruleset import ChainRef, Drop, Foreign, InInterface, Jump, Mark, OutInterface, Rule, Ruleset, SetMark
from rules.share import services_of
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Interfaces, SharedDnat, Snat
from rules.state import Actual, AddressKey, LinkState, RouteEntry, RouteKey
from rules.trace import Fate, Uncertain, trace
from tests import strategies as some

EIP, FLOATING = "192.168.0.20", "192.168.0.21"
SPEC = GatewaySpec(
    eips=[Eip(address=f"{EIP}/24"), Eip(address=f"{FLOATING}/24")],
    fips=[Fip(eip=FLOATING, internal_ip="10.0.1.5")],
    dnats=[Dnat(eip=EIP, external_port=8888, protocol="tcp", internal_ip="10.0.1.6", internal_port=80)],
    snats=[Snat(eip=EIP, internal_cidr="10.0.0.0/16"), Snat(eip="192.168.0.22", internal_cidr="10.0.2.0/24")],
)


def fate(packet: Packet, spec: GatewaySpec = SPEC) -> Fate:
    actual = some.settled(spec)
    return trace(packet, actual.ruleset, Host.of(actual), strict=True, services=services_of(actual.nft))


def outside(dst: str, dport: int, protocol: str = "tcp") -> Packet:
    return Packet(protocol, "203.0.113.7", 40000, dst, dport, "net1")


def tenant(src: str, dst: str, dport: int = 80, protocol: str = "tcp") -> Packet:
    return Packet(protocol, src, 40000, dst, dport, "eth0")


@pytest.mark.parametrize(
    ("packet", "src", "dst", "dport", "leaves_by"),
    [
        (outside(EIP, 8888), "203.0.113.7", "10.0.1.6", 80, "eth0"),
        (outside(FLOATING, 22), "203.0.113.7", "10.0.1.5", 22, "eth0"),
        (outside(FLOATING, 0, "icmp"), "203.0.113.7", "10.0.1.5", 0, "eth0"),
        (outside(EIP, 8888, "udp"), "203.0.113.7", EIP, 8888, None),
        (outside(EIP, 80), "203.0.113.7", EIP, 80, None),
        (tenant("10.0.1.5", "203.0.113.7"), FLOATING, "203.0.113.7", 80, "net1"),
        (tenant("10.0.1.6", "203.0.113.7"), EIP, "203.0.113.7", 80, "net1"),
        (tenant("10.0.2.6", "203.0.113.7"), "192.168.0.22", "203.0.113.7", 80, "net1"),
        (tenant("10.9.0.1", "203.0.113.7"), "10.9.0.1", "203.0.113.7", 80, "net1"),
        # Hairpin: by an EIP back to the tenant's side; the owner of a floating IP shows its own.
        (tenant("10.0.1.6", FLOATING, 22), FLOATING, "10.0.1.5", 22, "eth0"),
        (tenant("10.0.1.200", EIP, 8888), EIP, "10.0.1.6", 80, "eth0"),
        (tenant("10.0.1.5", EIP, 8888), FLOATING, "10.0.1.6", 80, "eth0"),
        # Between tenants without an EIP nothing is translated.
        (tenant("10.0.1.200", "10.0.1.6"), "10.0.1.200", "10.0.1.6", 80, "eth0"),
    ],
)
def test_fates(packet: Packet, src: str, dst: str, dport: int, leaves_by: str | None) -> None:
    found = fate(packet)
    assert (found.final.src, found.final.dst, found.final.dport) == (src, dst, dport)
    assert found.out_interface == leaves_by
    assert found.verdict == ("forwarded" if leaves_by else "local")
    assert found.next_hop == ("192.168.0.1" if leaves_by == "net1" else None)
    assert found.certain


def expected(packet: Packet, spec: GatewaySpec, choice: int) -> tuple[str, Packet]:
    """What the spec's words say about a packet, without any chains."""
    final, sides = packet, spec.interfaces
    fip = spec.fips.get(packet.dst)
    dnat = spec.dnats.get((packet.dst, packet.dport, packet.protocol))
    shared = spec.shared_dnats.get((packet.dst, packet.dport, packet.protocol))
    if shared:
        backend = shared.backends[choice]
        final = replace(final, dst=backend.internal_ip, dport=backend.internal_port)
    elif fip:
        final = replace(final, dst=fip.internal_ip)
    elif dnat:
        final = replace(final, dst=dnat.internal_ip, dport=dnat.internal_port)
    if final.dst in {eip.ip for eip in spec.eips}:
        return "local", final
    out = sides.vpc if final.dst.startswith("10.0.1.") else sides.external
    if out == sides.external and not spec.eips:
        return "dropped", final
    floating = [fip.eip for fip in spec.fips if fip.internal_ip == packet.src]
    snats = [snat for snat in spec.snats if out == sides.external and _covers(snat, packet.src)]
    hairpin = packet.dst in spec.eips and final != packet and (packet.in_interface, out) == (sides.vpc, sides.vpc)
    if floating:
        final = replace(final, src=floating[0])
    elif snats:
        final = replace(final, src=max(snats, key=lambda snat: snat.prefix_length).eip)
    elif hairpin:
        final = replace(final, src=packet.dst)
    return "forwarded", final


def _covers(snat: Snat, src: str) -> bool:
    octets = snat.prefix_length // 8
    if snat.prefix_length % 8:  # 10.0.1.128/25
        return src.startswith("10.0.1.") and int(src.rpartition(".")[2]) >= 128
    return src.split(".")[:octets] == snat.internal_cidr.split("/")[0].split(".")[:octets]


@some.quick
@given(some.specs, st.data())
def test_the_chains_do_what_the_spec_says(spec: GatewaySpec, data: st.DataObject) -> None:
    spec = spec.model_copy(update={"routes": GatewaySpec().routes})
    packet = data.draw(some.packets(spec.interfaces))
    actual = some.settled(spec, some.pod(spec.interfaces))
    services = services_of(actual.nft)
    shared = services.get(ServiceKey(packet.dst, packet.protocol, packet.dport))
    for choice in range(len(shared.backends) if shared else 1):
        host = Host.of(actual)
        found = trace(packet, actual.ruleset, host, strict=True, services=services, choice=choice)
        assert (found.verdict, replace(found.final, mark=0)) == expected(packet, spec, choice)
        assert found.backends == (shared.backends if shared else ())


def test_a_shared_mapping_decides_first_and_names_all_backends() -> None:
    shared = SharedDnat.model_validate(
        {
            "eip": FLOATING,
            "external_port": 443,
            "protocol": "tcp",
            "backends": [{"internal_ip": f"10.0.1.{n}", "internal_port": 8443} for n in (6, 7)],
            "session_affinity": "ClientIP",
        }
    )
    spec = SPEC.model_copy(update={"shared_dnats": Keyed([shared])})
    found = fate(outside(FLOATING, 443), spec)
    assert (found.final.dst, found.final.dport) == ("10.0.1.6", 8443)
    assert found.backends == (("10.0.1.6", 8443), ("10.0.1.7", 8443))
    assert (
        "ip kube-ovn service-ips: destination becomes one of 2 backends at random (10.0.1.6:8443, 10.0.1.7:8443) "
        "unless the client came within 10800 s, here 10.0.1.6:8443"
    ) in found.describe()
    assert "DNAT_FILTER" not in "".join(found.describe())
    # A tenant is seen as the EIP; other ports are those of the floating IP.
    assert fate(tenant("10.0.1.200", FLOATING, 443), spec).final.src == FLOATING
    assert fate(outside(FLOATING, 444), spec).final.dst == "10.0.1.5"


@some.quick
@given(some.specs, some.packets())
def test_a_reply_undoes_both_translations(spec: GatewaySpec, packet: Packet) -> None:
    found = fate(packet, spec)
    if found.reply is None:
        assert found.verdict in ("dropped", "no route")
        return
    seen, passed_on = found.reply
    assert (seen.src, seen.sport, seen.dst, seen.dport) == (
        found.final.dst,
        found.final.dport,
        found.final.src,
        found.final.sport,
    )
    assert (passed_on.src, passed_on.sport, passed_on.dst, passed_on.dport) == (
        packet.dst,
        packet.dport,
        packet.src,
        packet.sport,
    )


def test_nothing_leaves_by_the_external_interface_while_arp_is_off() -> None:
    spec = SPEC.model_copy(update={"eips": GatewaySpec().eips})
    packet = tenant("10.0.1.6", "203.0.113.7")
    assert fate(packet, spec).verdict == "dropped"
    # Without the guard the packet would circle, and the trace says so.
    actual = some.settled(spec)
    open_chains = {**actual.ruleset.chains, ChainRef("mangle", "ARP_GUARD"): ()}
    circling = trace(packet, Ruleset(open_chains), Host.of(actual))
    assert circling.verdict == "forwarded"
    assert "ARP is off on net1: the packet comes back until its TTL ends" in circling.describe()


def test_the_walk_is_told_step_by_step() -> None:
    assert fate(tenant("10.0.1.200", EIP, 8888)).describe() == [
        f"tcp 10.0.1.200:40000 -> {EIP}:8888 comes in by eth0",
        "mangle PREROUTING rule 1 [-j VPC_MARK]: on to VPC_MARK",
        "mangle VPC_MARK rule 1 [-i eth0 -j MARK --set-xmark 0x1/0x1]: mark becomes 0x1",
        "nat PREROUTING rule 1 [-j DNAT_FILTER]: on to DNAT_FILTER",
        "nat DNAT_FILTER rule 1 [-j EXCLUSIVE_DNAT]: on to EXCLUSIVE_DNAT",
        "nat DNAT_FILTER rule 2 [-j SHARED_DNAT]: on to SHARED_DNAT",
        f"nat SHARED_DNAT rule 1 [-d {EIP}/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 10.0.1.6:80]: "
        "destination becomes 10.0.1.6:80",
        "routing: 10.0.1.0/24 by eth0",
        "mangle FORWARD rule 1 [-j ARP_GUARD]: on to ARP_GUARD",
        "nat POSTROUTING rule 1 [-j SNAT_FILTER]: on to SNAT_FILTER",
        "nat SNAT_FILTER rule 1 [-j EXCLUSIVE_SNAT]: on to EXCLUSIVE_SNAT",
        "nat SNAT_FILTER rule 2 [-j SHARED_SNAT]: on to SHARED_SNAT",
        "nat SNAT_FILTER rule 3 [-j HAIRPIN_SNAT]: on to HAIRPIN_SNAT",
        f"nat HAIRPIN_SNAT rule 1 [-o eth0 -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst {EIP} "
        f"-j SNAT --to-source {EIP} --random-fully]: source becomes {EIP}, any port",
        f"tcp {EIP}:40000 -> 10.0.1.6:80 leaves by eth0",
        f"the answer, tcp 10.0.1.6:80 -> {EIP}:40000, becomes tcp {EIP}:8888 -> 10.0.1.200:40000",
    ]


def test_the_end_is_told_in_words() -> None:
    ends = {
        outside(EIP, 80): f"tcp 203.0.113.7:40000 -> {EIP}:80: for this host",
        tenant("10.0.1.6", "203.0.113.7"): f"tcp {EIP}:40000 -> 203.0.113.7:80 leaves by net1 to 192.168.0.1",
    }
    for packet, end in ends.items():
        assert end in fate(packet).describe()


def test_a_foreign_rule_on_the_way_makes_the_fate_uncertain() -> None:
    actual = some.settled(SPEC)
    ref = ChainRef("nat", "POSTROUTING")
    foreign = Foreign("-m statistic --mode random --probability 0.5 -j MASQUERADE")
    ruleset = Ruleset({**actual.ruleset.chains, ref: (foreign, *actual.ruleset.chains[ref])})
    packet = tenant("10.0.1.6", "203.0.113.7")
    found = trace(packet, ruleset, Host.of(actual))
    assert not found.certain
    assert f"nat POSTROUTING rule 1 [{foreign.text}]: a foreign rule, not interpreted" in found.describe()
    assert found.outcome == fate(packet).outcome
    with pytest.raises(Uncertain, match="POSTROUTING rule 1 is foreign: -m statistic"):
        trace(packet, ruleset, Host.of(actual), strict=True)
    # What another packet never meets says nothing about it.
    assert trace(outside(EIP, 80), ruleset, Host.of(actual), strict=True).certain


LINK = LinkState(index=2, mac="02:00:00:00:00:02", up=True, arp=True, mtu=1400, promote_secondaries=False)


def test_routing_takes_the_longest_prefix() -> None:
    host = Host(
        [AddressKey("eth0", "10.0.1.254/24"), AddressKey("eth0", "2001:db8::2/64")],
        {
            RouteKey("10.0.0.0/8"): RouteEntry("net1", "192.168.0.1"),
            RouteKey("10.0.1.128/25"): RouteEntry("eth0", "10.0.1.3"),
            RouteKey("::/0"): RouteEntry("net1", "2001:db8::1"),
        },
    )
    assert route(host, "10.0.1.200") == ("10.0.1.128/25", RouteEntry("eth0", "10.0.1.3"))
    assert route(host, "10.0.1.5") == ("10.0.1.0/24", RouteEntry("eth0", None))
    assert route(host, "10.0.2.5") == ("10.0.0.0/8", RouteEntry("net1", "192.168.0.1"))
    assert route(host, "203.0.113.7") is None
    lost = trace(tenant("10.0.1.6", "203.0.113.7"), Ruleset(), host)
    assert lost.verdict == "no route"
    assert lost.reply is None
    assert lost.describe()[-2:] == [
        "routing: no route to 203.0.113.7",
        "tcp 10.0.1.6:40000 -> 203.0.113.7:80: no route",
    ]


@pytest.mark.parametrize(
    ("mark", "rule", "after"),
    [
        (0x0, SetMark(0x1, 0x1), 0x1),
        (0x4001, SetMark(0x1, 0x1), 0x4001),
        (0xFF, SetMark(0x10, 0xF0), 0x1F),
        (0xFF, SetMark(0x5, 0xFFFFFFFF), 0x5),
        (0xFF, SetMark(0x5, 0x0), 0xFA),
    ],
)
def test_marks_are_set_as_the_kernel_sets_them(mark: int, rule: SetMark, after: int) -> None:
    chains = {
        ChainRef("mangle", "PREROUTING"): (Rule((InInterface("net9"),), Drop()), Rule((), rule)),
        ChainRef("mangle", "INPUT"): (Rule((Mark(after, 0xFFFFFFFF), InInterface("eth0")), Drop()),),
    }
    host = Host([AddressKey("eth0", "10.0.1.254/24")])
    found = trace(replace(tenant("10.0.1.6", "10.0.1.254"), mark=mark), Ruleset(chains), host)
    assert (found.final.mark, found.verdict) == (after, "dropped")


def test_the_first_drop_ends_everything_and_out_interfaces_are_unknown_before_routing() -> None:
    chains = {
        ChainRef("mangle", "PREROUTING"): (Rule((OutInterface("eth0"),), Drop()), Rule((), Jump("A"))),
        ChainRef("mangle", "A"): (Rule((), Drop()), Rule((), SetMark(1, 1))),
    }
    found = trace(tenant("10.0.1.6", "10.0.1.7"), Ruleset(chains), Host())
    assert found.verdict == "dropped"
    assert [(step.ref, step.index) for step in found.steps] == [
        (ChainRef("mangle", "PREROUTING"), 1),
        (ChainRef("mangle", "A"), 0),
    ]


def test_a_host_is_known_from_a_reading_of_the_kernel() -> None:
    reading = Actual(
        links={"net1": replace(LINK, arp=False)},
        addresses={AddressKey("net1", "192.168.0.20/24"): True},
        routes={RouteKey("0.0.0.0/0"): RouteEntry("net1", "192.168.0.1")},
    )
    host = Host.of(reading)
    assert dict(host.arp) == {"net1": False}
    assert route(host, "192.168.0.7") == ("192.168.0.0/24", RouteEntry("net1", None))


def test_with_arp_always_on_packets_leave_without_an_eip() -> None:
    actual = some.settled(GatewaySpec(interfaces=Interfaces()), facts=Facts(arp="on"))
    found = trace(tenant("10.0.1.6", "203.0.113.7"), actual.ruleset, Host.of(actual), strict=True)
    assert (found.verdict, found.out_interface) == ("forwarded", "net1")
