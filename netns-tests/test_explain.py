"""natgw explain against the kernel: hundreds of random packets, each told beforehand and then sent for real.

Frames are put on the wire right at the gateway's two interfaces and caught there, so every packet can be sent that a
network might ever bring, at once, without hosts behind it. Each carries a number of its own; what comes out with that
number, and where, is the packet's real fate.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from traffic import PATIENCE
from world import A1, A2, OWN, ROUTER, Gateway, World, set_sysctl

from api.explain import Endpoint, Explanation, Question, explain
from api.state import offline

NATGW = Path(sys.executable).with_name("natgw")
FLOWS = 400
THROUGH_THE_FACE = 6
"""So many are asked of the daemon by the command itself; the others of its saved reading, which a test holds equal."""
SILENCE = 0.5  # seconds; more than was told would be there by then
ETH_P_ALL, PACKET_OUTGOING, SO_RCVBUFFORCE = 0x0003, 4, 33
STRANGER = "02:00:00:00:0f:0f"
MARK = b"packet"

EIPS = [f"192.168.0.{n}" for n in (40, 41, 42, 43)]
FIP_OWNER, UNROUTED, BEHIND = "10.0.1.5", "10.0.3.9", "10.0.2.13"
INSIDE = [FIP_OWNER, A1, A2, "10.0.1.99", BEHIND, "10.0.2.77", UNROUTED, "172.16.0.9"]
OUTSIDE = ["203.0.113.2", "203.0.113.77", "8.8.8.8", ROUTER, "192.168.0.99"]
NOBODY = "192.168.0.77"
PORTS = [22, 53, 80, 443, 8080, 8888]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=[("legacy", "auto"), ("nft", "auto"), ("legacy", "off")], ids="-".join)
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    variant, fastpath = request.param
    with world.gateway(variant=variant, environment={"NATGW_FASTPATH": fastpath}) as made:
        made.verb("eip-add", *(f"{eip}/24" for eip in EIPS))
        made.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        made.verb("floating-ip-add", f"{EIPS[0]},{FIP_OWNER}")
        made.verb(
            "dnat-add",
            f"{EIPS[1]},8080,tcp,{A1},80",
            f"{EIPS[1]},53,udp,{A2},5353",
            f"{EIPS[2]},443,tcp,{BEHIND},8443",
            f"{EIPS[2]},8888,udp,{UNROUTED},9",
        )
        made.verb("nft-dnat-map-add", f"{EIPS[3]},80,tcp,{A1}:8001@{A2}:8002")
        made.verb("snat-add", f"{EIPS[1]},10.0.1.0/24", f"{EIPS[2]},{A2}/32,--random-fully", f"{EIPS[2]},172.16.0.0/12")
        # Whoever is sent to is there, as far as ARP goes; and nothing that the gateway answers is held back.
        for interface, addresses in (("eth0", [*INSIDE, "10.0.1.1"]), ("net1", [*OUTSIDE, NOBODY])):
            made.ip(*(f"neigh replace {ip} lladdr {STRANGER} dev {interface} nud permanent" for ip in addresses))
        set_sysctl(made, {"ipv4/icmp_ratelimit": 0, "ipv4/icmp_msgs_per_sec": 100000, "ipv4/icmp_msgs_burst": 100000})
        yield made


@dataclass
class Sent:
    """A packet, its story, and what was seen of it."""

    number: int
    protocol: str
    src: str
    dst: str
    dport: int
    came: str
    told: Explanation | None = None
    left: list[tuple[str, str, int, str, int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def sport(self) -> int:
        """A source port (for ICMP: an identifier) of its own."""
        return 20000 + self.number

    def frame(self, to: str) -> bytes:
        layers = {
            "tcp": lambda: TCP(sport=self.sport, dport=self.dport, flags="S"),
            "udp": lambda: UDP(sport=self.sport, dport=self.dport),
            "icmp": lambda: ICMP(type=8, id=self.sport),
        }
        ip = IP(src=self.src, dst=self.dst, ttl=64)
        return bytes(Ether(src=STRANGER, dst=to) / ip / layers[self.protocol]() / (MARK + b"%06d" % self.number))

    @property
    def question(self) -> Question:
        ports = (None, None) if self.protocol == "icmp" else (self.sport, self.dport)
        return Question(
            protocol=self.protocol,
            source=Endpoint(address=self.src, port=ports[0]),
            destination=Endpoint(address=self.dst, port=ports[1]),
            in_interface=self.came,
        )

    def agrees(self) -> bool:
        """Whether what was seen is what was told."""
        told = self.told
        assert told is not None
        if told.verdict != "forwarded":
            # For the gateway itself: it answers. Dropped: nobody does. No route: the gateway says so.
            answered = {"local": {"echo", "reset", "port"}, "dropped": set(), "no route": {"network"}}[told.verdict]
            return not self.left and (set(self.answers) <= answered) and bool(self.answers) == bool(answered)
        if len(self.left) != 1:
            return False
        interface, src, sport, dst, dport = self.left[0]
        ends = {f"{told.final.destination}:{told.final.destination_port}", *told.backends}
        same_port = self.protocol == "icmp" or any("any port" in step.what for step in told.steps)
        return (
            interface == told.out_interface
            and src == told.final.source
            and (same_port or sport == told.final.source_port)
            and (dst == told.final.destination if self.protocol == "icmp" else f"{dst}:{dport}" in ends)
        )

    def __str__(self) -> str:
        assert self.told is not None
        story = "\n    ".join(self.told.text)
        seen = f"left: {self.left}; answers: {self.answers}"
        return f"{self.question}\n    {story}\n  told: {self.told.verdict}\n  seen: {seen}"


def drawn(chance: random.Random) -> list[Sent]:
    """Packets of all kinds: sensible ones and such as only a stranger would send."""
    found = []
    for number in range(FLOWS):
        came = chance.choice(["eth0", "net1"])
        near, far = (INSIDE, OUTSIDE) if came == "eth0" else (OUTSIDE, INSIDE)
        src = chance.choice(near) if chance.random() < 0.93 else chance.choice([*far, OWN, EIPS[0]])
        dst = chance.choice([*EIPS, *EIPS, *far, OWN, NOBODY])
        protocol = chance.choice(["tcp", "udp", "udp", "tcp", "icmp"])
        found.append(Sent(number, protocol, src, dst, 0 if protocol == "icmp" else chance.choice(PORTS), came))
    return found


class Ends:
    """The two wires of a gateway: frames are put on them towards it, and what it sends is caught."""

    def __init__(self, world: World, gateway: Gateway) -> None:
        self.gateway = gateway
        self.wires = {"eth0": self._open(world.vpc.router, "gw"), "net1": self._open(world.external, "p1")}
        self.macs = {name: gateway.link(name)["address"] for name in self.wires}

    def _open(self, host: Any, interface: str) -> socket.socket:
        opened: socket.socket = host.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        opened.bind((interface, ETH_P_ALL))
        return opened

    def send(self, sent: Sent) -> None:
        self.wires[sent.came].send(sent.frame(self.macs[sent.came]))

    def caught(self, silence: float) -> Iterator[tuple[str, Any]]:
        """What the gateway sends, by interface, until nothing comes for ``silence`` seconds."""
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            for interface, wire in self.wires.items():
                wire.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    while True:
                        data, (_, _, kind, _, _) = wire.recvfrom(65536)
                        frame = Ether(data)
                        if kind != PACKET_OUTGOING and IP in frame and frame.src == self.macs[interface]:
                            deadline = time.monotonic() + silence
                            yield interface, frame[IP]


def note(sent: list[Sent], interface: str, packet: Any) -> None:
    """Put down what was seen with the packet that it belongs to."""
    if ICMP in packet and packet[ICMP].type in (3, 11):  # an error: it quotes the packet
        inner = packet[ICMP].payload
        number = (inner.payload.id if inner.proto == 1 else inner.sport) - 20000
        code = {0: "network", 1: "host", 3: "port"}.get(packet[ICMP].code, "other")
        if 0 <= number < len(sent):
            sent[number].answers.append(code)
        return
    if TCP in packet and packet[TCP].flags & 0x04:
        sent[packet[TCP].dport - 20000].answers.append("reset")
        return
    body = bytes(packet)
    if MARK not in body:
        return  # a redirect, or ARP's like
    one = sent[int(body.partition(MARK)[2][:6])]
    if ICMP in packet and packet[ICMP].type == 0:
        one.answers.append("echo")
        return
    layer = packet.payload
    ports = (0, 0) if ICMP in packet else (layer.sport, layer.dport)
    assert packet.ttl == 63, "it was forwarded once"
    one.left.append((interface, packet.src, ports[0], packet.dst, ports[1]))


def asked_by_command(gateway: Gateway, sent: Sent) -> Explanation:
    """What the command says, by the daemon."""
    port = "" if sent.protocol == "icmp" else f":{sent.sport}"
    to = "" if sent.protocol == "icmp" else f":{sent.dport}"
    words = (sent.protocol, f"{sent.src}{port}", f"{sent.dst}{to}", "--in", sent.came, "--json")
    done = gateway.exec_argv([str(NATGW), "explain", *words], {"PATH": os.environ["PATH"]})
    assert done.returncode in (0, 2), done.stderr
    return Explanation.model_validate(json.loads(done.stdout))


def test_every_packet_fares_as_it_was_told(world: World, gateway: Gateway) -> None:
    sent = drawn(random.Random(f"packets {gateway.variant}"))
    reading = offline(gateway.get("/v1/state"))
    for one in sent:
        one.told = explain(one.question, reading)
    for one in sent[:THROUGH_THE_FACE]:
        assert asked_by_command(gateway, one).final == one.told.final if one.told else False
    ends = Ends(world, gateway)
    for one in sent:
        ends.send(one)
        if one.number % 50 == 49:  # before a queue overflows
            for interface, packet in ends.caught(0.05):
                note(sent, interface, packet)
    deadline = time.monotonic() + PATIENCE
    while True:  # what was told has come, and nothing else comes any more
        for interface, packet in ends.caught(SILENCE):
            note(sent, interface, packet)
        wrong = [one for one in sent if not one.agrees()]
        if not wrong or time.monotonic() > deadline:
            break
    assert not wrong, "\n\n".join(map(str, wrong[:5])) + f"\n{len(wrong)} of {len(sent)}"
    verdicts = {one.told.verdict for one in sent if one.told}
    assert verdicts >= {"forwarded", "local", "dropped"}
