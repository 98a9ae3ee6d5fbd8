"""What becomes of one packet: the walk through what the gateway renders, told step by step."""

from __future__ import annotations

import re

from pydantic import Field

from api.rendered import rendered
from rules.desired import Facts
from rules.iptables import render_rule
from rules.share import services
from rules.spec import GatewaySpec, InterfaceName, IPv4, Part, Port
from rules.state import Actual
from rules.trace import Host, Packet, Verdict, route, trace


class Endpoint(Part):
    """An IPv4 address with a port, or without one (0) where there is none or it does not matter."""

    address: IPv4
    port: Port | None = None


class Question(Part):
    """The first packet of a connection. Without ``inInterface`` it comes by where its source lies."""

    protocol: str = Field(pattern="^(tcp|udp|icmp)$")
    source: Endpoint
    destination: Endpoint
    in_interface: InterfaceName | None = None


class PacketModel(Part):
    """A packet as it is at one place; ports are 0 where it has none."""

    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    mark: int


class StepModel(Part):
    """One thing that happened; without a chain it is routing's doing. ``position`` counts from 1."""

    table: str | None
    chain: str | None
    position: int | None
    rule: str | None
    what: str


class Translation(Part):
    """The answer's way back: how it comes in, and what it is passed on as."""

    arrives: PacketModel
    leaves: PacketModel


class Explanation(Part):
    """The packet's walk. ``text`` tells all of it to people, a line a step.

    ``backends``: where a shared DNAT sends such packets; the walk is that to the first.
    """

    packet: PacketModel
    in_interface: str
    steps: list[StepModel]
    verdict: Verdict
    final: PacketModel
    out_interface: str | None
    next_hop: str | None
    reply: Translation | None
    backends: list[str]
    text: list[str]


def endpoint(text: str) -> Endpoint:
    """``192.168.0.10:8888`` or ``192.168.0.10``; raises ValueError (pydantic's, or one sentence)."""
    found = re.fullmatch(r"([^:]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not an IPv4 address with a port (192.168.0.10:8888)")
    return Endpoint(address=found[1], port=int(found[2]) if found[2] else None)


def explain(question: Question, spec: GatewaySpec, facts: Facts, actual: Actual) -> Explanation:
    """Walk the packet through the rendering of ``spec``, by addresses, routes and maps of one reading of the kernel."""
    host = Host.of(actual)
    origin = route(host, question.source.address)
    came = question.in_interface or (origin[1].interface if origin else spec.interfaces.external)
    packet = Packet(
        question.protocol,
        question.source.address,
        question.source.port or 0,
        question.destination.address,
        question.destination.port or 0,
        came,
    )
    ruleset = rendered(spec, facts, maps=actual.maps.stands)
    fate = trace(packet, ruleset, host, services=services(spec), maps=actual.maps)
    return Explanation(
        packet=_packet(packet),
        in_interface=came,
        steps=[
            StepModel(
                table=step.ref.table if step.ref else None,
                chain=step.ref.chain if step.ref else None,
                position=None if step.index is None else step.index + 1,
                rule=render_rule(step.rule) if step.rule else None,
                what=step.what,
            )
            for step in fate.steps
        ],
        verdict=fate.verdict,
        final=_packet(fate.final),
        out_interface=fate.out_interface,
        next_hop=fate.next_hop,
        reply=Translation(arrives=_packet(fate.reply[0]), leaves=_packet(fate.reply[1])) if fate.reply else None,
        backends=[f"{address}:{port}" for address, port in fate.backends],
        text=fate.describe(),
    )


def _packet(packet: Packet) -> PacketModel:
    return PacketModel(
        protocol=packet.protocol,
        source=packet.src,
        source_port=packet.sport,
        destination=packet.dst,
        destination_port=packet.dport,
        mark=packet.mark,
    )
