"""Maps and chains on the real kernel: every packet of many fares alike with either, and as the trace says."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from netns import Namespace, require, veth
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from specs import EIPS, PORTS, TENANTS, random_spec
from world import QUIET, ROUTES, set_sysctl, wait_for

from gateway import transaction
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.generation import Generation
from gateway.kernel.legacy import LegacyFirewall
from gateway.kernel.links import KernelLinks
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.transaction import Kernel
from rules.desired import Facts, without_maps
from rules.flows import IP_PROTOCOLS, FlowFilter
from rules.maps import MISSED
from rules.packet import Packet
from rules.routing import Host
from rules.share import services
from rules.spec import GatewaySpec, Interfaces, Route
from rules.state import Actual
from rules.trace import Fate, trace

ON, OFF = Facts(), Facts(fastpath="off")
OUTSIDE = ["203.0.113.7", "198.51.100.9"]
MACS = {"eth0": "02:00:00:00:01:fe", "net1": "02:00:00:00:00:0b"}
# Of others, behind the jump to our chains; the second pair decides about packets that ours leave alone.
FOREIGN = (
    ("PREROUTING", "-s", "203.0.113.0/24", "-j", "MARK", "--or-mark", "0x40"),
    ("PREROUTING", "-d", "192.168.0.77", "-j", "DNAT", "--to-destination", "10.0.1.6"),
    ("POSTROUTING", "-s", "10.0.2.0/24", "-o", "net1", "-j", "SNAT", "--to-source", "192.168.0.88"),
)
LEAKS = f"""
table ip leaks {{
    chain forward {{ type filter hook forward priority -300; meta mark & {MISSED:#x} != 0 counter; }}
    chain input {{ type filter hook input priority -300; meta mark & {MISSED:#x} != 0 counter; }}
    chain postrouting {{ type filter hook postrouting priority 300; meta mark & {MISSED:#x} != 0 counter; }}
}}
"""


@dataclass
class Gateway:
    """A namespace with both interfaces, the drivers for it, and a socket at the far end of each cable."""

    namespace: Namespace
    kernel: Kernel
    flows: KernelFlows
    ends: dict[str, socket.socket]
    variant: str

    def apply(self, spec: GatewaySpec, facts: Facts) -> Actual:
        return transaction.apply(self.kernel, spec, facts).actual

    def send(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            self.ends[packet.in_interface].send(frame(packet))

    def seen(self) -> dict[tuple[object, ...], tuple[object, ...]]:
        """What became of each connection: its first packet's tuple, and what it was translated to."""
        return {
            (f.protocol, f.orig_src, f.orig_sport, f.orig_dst, f.orig_dport): (f.reply_dst, f.reply_src, f.reply_sport)
            for f in self.flows.matching([FlowFilter()])
        }


@pytest.fixture(params=["legacy", "nft"])
def gateway(request: pytest.FixtureRequest, make_netns: Callable[[], Namespace]) -> Iterator[Gateway]:
    require("nft", "conntrack", "iptables-legacy", "iptables-nft")
    inside, peers = make_netns(), make_netns()
    set_sysctl(inside, QUIET | ROUTES | {"ipv4/conf/all/rp_filter": 0, "ipv4/conf/default/rp_filter": 0})
    set_sysctl(peers, QUIET)
    for name, mac in MACS.items():
        veth(inside, name, peers, f"to-{name}")
        inside.run("ip", "link", "set", name, "address", mac)
    inside.run("ip", "addr", "add", "10.0.1.254/24", "dev", "eth0")
    inside.run("ip", "addr", "add", "192.168.0.11/24", "dev", "net1")
    inside.run("ip", "route", "add", "default", "via", "192.168.0.1", "dev", "net1")
    inside.run("nft", "-f", "-", stdin=LEAKS)
    with peers.entered():
        ends = {name: socket.socket(socket.AF_PACKET, socket.SOCK_RAW) for name in MACS}
        for name, end in ends.items():
            end.bind((f"to-{name}", 0))
    with inside.entered():
        generation, flows = Generation(), KernelFlows()
        firewall = LegacyFirewall() if request.param == "legacy" else NftVariantFirewall(generation)
        maps = KernelMaps(firewall.variant, generation)
        kernel = Kernel(firewall, KernelLinks(), flows, KernelNft(generation), maps=maps)
        try:
            yield Gateway(inside, kernel, flows, ends, request.param)
        finally:
            for end in ends.values():
                end.close()


def frame(packet: Packet) -> bytes:
    inner = ICMP(id=packet.sport) if packet.protocol == "icmp" else {"tcp": TCP, "udp": UDP}[packet.protocol]()
    if packet.protocol != "icmp":
        inner.sport, inner.dport = packet.sport, packet.dport
    return bytes(Ether(dst=MACS[packet.in_interface]) / IP(src=packet.src, dst=packet.dst) / inner)


def random_packets(chance: random.Random, number: int) -> list[Packet]:
    """First packets of connections, each from a source port of its own."""
    made = []
    for n in range(number):
        inside = chance.random() < 0.6
        protocol = chance.choice(["tcp", "udp", "udp", "icmp"])
        ports = (0, 0) if protocol == "icmp" else (20000 + n, chance.choice(PORTS))
        source = chance.choice(TENANTS if inside else OUTSIDE)
        destination = chance.choice([*EIPS, *EIPS, "192.168.0.77", *OUTSIDE, *TENANTS])
        if source != destination:
            made.append(Packet(protocol, source, ports[0], destination, ports[1], "eth0" if inside else "net1"))
    return made


def key(packet: Packet) -> tuple[object, ...]:
    number = {**IP_PROTOCOLS, "icmp": socket.IPPROTO_ICMP}[packet.protocol]
    return number, packet.src, packet.sport, packet.dst, packet.dport


def observed(gateway: Gateway, spec: GatewaySpec, facts: Facts, packets: Sequence[Packet]) -> tuple[Actual, dict]:  # type: ignore[type-arg]
    """What the kernel does to the packets, once all that can leave a trace has.

    A connection that is forgotten at once may still be seen by chance, and is left out.
    """
    actual = gateway.apply(spec, facts)
    gateway.namespace.run("conntrack", "-F")
    gateway.send(packets)
    fates = {key(packet): fate(packet, spec, actual) for packet in packets}
    lasting = {known for known, found in fates.items() if lasts(found)}
    passing = {known for known, found in fates.items() if found.certain and found.verdict == "local"} - lasting
    wait_for(lambda: lasting <= gateway.seen().keys(), f"connections of {len(lasting)} packets")
    return actual, {known: became for known, became in gateway.seen().items() if known not in passing}


def fate(packet: Packet, spec: GatewaySpec, actual: Actual) -> Fate:
    return trace(packet, actual.ruleset, Host.of(actual), services=services(spec), maps=actual.maps)


def lasts(found: Fate) -> bool:
    """Whether there is a connection to be seen: where nobody listens, TCP's is reset and forgotten at once."""
    return found.verdict == "forwarded" or (found.verdict == "local" and found.packet.protocol != "tcp")


def expected(found: Fate) -> tuple[object, ...]:
    return found.final.src, found.final.dst, found.final.dport


def leaked(gateway: Gateway) -> bool:
    listed = gateway.namespace.run("nft", "list", "table", "ip", "leaks")
    assert listed.count("counter") == 3
    return listed.count("packets 0 ") != 3


def test_packets_fare_alike_with_maps_and_with_chains(gateway: Gateway) -> None:
    asked: Counter[str] = Counter()
    for seed in range(6):
        chance = random.Random(seed)
        spec = random_spec(chance, Interfaces())
        spec = spec.model_copy(update={"routes": spec.routes.put(Route(cidr="10.0.2.0/24", next_hop_ip="10.0.1.1"))})
        packets = random_packets(chance, 100)
        if seed == 3:
            for rule in FOREIGN:
                gateway.namespace.run(f"iptables-{gateway.variant}", "-t", "nat", "-A", *rule)
        chains, slow = observed(gateway, spec, OFF, packets)
        maps, quick = observed(gateway, spec, ON, packets)
        assert not chains.maps.stands
        assert maps.maps.stands, without_maps(ON, maps)
        assert quick == slow
        for packet in packets:
            for found in (fate(packet, spec, actual) for actual in (chains, maps)):
                if found.certain and lasts(found):
                    assert quick[key(packet)] == expected(found), found.describe()
                asked.update(s.ref.chain for s in found.steps if s.ref and s.ref.table == "ip natgw")
    assert {"fip-in", "ports", "fip-out", "hairpin", "prerouting", "postrouting"} < asked.keys()
    assert len([name for name in asked if name.startswith("snat-")]) > 4
    assert not leaked(gateway)


def test_rules_of_others_ahead_of_ours_switch_the_maps_off_and_on_again(gateway: Gateway) -> None:
    spec = random_spec(random.Random(1), Interfaces())
    assert gateway.apply(spec, ON).maps.stands
    tool = f"iptables-{gateway.variant}"
    gateway.namespace.run(tool, "-t", "nat", "-I", "PREROUTING", "-s", "203.0.113.0/24", "-j", "RETURN")
    actual = gateway.apply(spec, ON)
    assert not actual.maps.stands
    assert "ahead of ours in nat PREROUTING: -s 203.0.113.0/24 -j RETURN" in without_maps(ON, actual)
    assert "MAPS_MISSED" not in gateway.namespace.run(f"{tool}-save", "-t", "nat")
    gateway.namespace.run(tool, "-t", "nat", "-D", "PREROUTING", "1")
    assert gateway.apply(spec, ON).maps.stands
    other = "nft" if gateway.variant == "legacy" else "legacy"
    gateway.namespace.run(f"iptables-{other}", "-t", "nat", "-A", "POSTROUTING", "-j", "RETURN")
    assert not gateway.apply(spec, ON).maps.stands
    gateway.namespace.run(f"iptables-{other}", "-t", "nat", "-F")
    assert gateway.apply(spec, ON).maps.stands
    assert not gateway.apply(spec, OFF).maps.stands
    assert "natgw" not in gateway.namespace.run("nft", "list", "tables")
