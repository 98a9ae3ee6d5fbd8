"""What becomes of one packet: the walk through what the gateway renders, told step by step."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field

from rules.fields import InterfaceName, IPv4, Port
from rules.flows import Flow, FlowFilter
from rules.iptables import render_rule
from rules.mending import Fault
from rules.packet import Packet
from rules.routing import Host, route
from rules.share import services_of
from rules.spec import Interfaces, Part
from rules.story import Line, Reading, packet_of, tell
from rules.trace import Verdict, trace

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}


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


class FlowModel(Part):
    """A tracked connection: its first packet as it came, and the answers as they come."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    reply_source: str
    reply_source_port: int
    reply_destination: str
    reply_destination_port: int


class Explanation(Part):
    """The packet's walk and the whole story around it.

    ``story`` is for people, sentence by sentence; ``text`` the same without its topics. ``faults`` is what is missing,
    with what would mend it; ``works``: nothing is known that keeps the connection from working. ``verdict`` is the
    packet's real end: what the rules say, unless something stops it before. ``certain``: no rules of others had a say.
    ``backends``: where a shared DNAT sends such packets; the walk is that to the first. ``flow``: the tracked
    connection that was asked for, the first of 1 + ``other_flows``.
    """

    packet: PacketModel
    in_interface: str
    steps: list[StepModel]
    verdict: Verdict
    certain: bool
    works: bool
    final: PacketModel
    out_interface: str | None
    next_hop: str | None
    reply: Translation | None
    backends: list[str]
    flow: FlowModel | None = None
    other_flows: int = 0
    story: list[Line]
    faults: list[Fault]
    text: list[str]


def endpoint(text: str) -> Endpoint:
    """``192.168.0.10:8888`` or ``192.168.0.10``; raises ValueError (pydantic's, or one sentence)."""
    found = re.fullmatch(r"([^:]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not an IPv4 address with a port (192.168.0.10:8888)")
    return Endpoint(address=found[1], port=int(found[2]) if found[2] else None)


def explain(question: Question, reading: Reading) -> Explanation:
    """Walk the packet through the rules of one reading, by its addresses and routes, and tell its story."""
    host = Host.of(reading.actual)
    origin = route(host, question.source.address)
    fallback = reading.spec.interfaces.external if reading.spec else Interfaces().external
    came = question.in_interface or (origin[1].interface if origin else fallback)
    packet = Packet(
        question.protocol,
        question.source.address,
        question.source.port or 0,
        question.destination.address,
        question.destination.port or 0,
        came,
    )
    return _explained(packet, reading)


def explain_flow(found: Sequence[Flow], reading: Reading) -> Explanation:
    """The story of the first of these tracked connections."""
    flow = found[0]
    external = reading.spec.interfaces.external if reading.spec else Interfaces().external
    told = _explained(packet_of(flow, Host.of(reading.actual), external), reading, flow)
    return told.model_copy(update={"flow": _flow(flow), "other_flows": len(found) - 1})


def filters_for(protocol: str, end: Endpoint) -> list[FlowFilter]:
    """Where connections are looked for that have this end on any of their four corners."""
    number = PROTOCOLS[protocol]
    address = end.address
    return [
        FlowFilter(protocol=number, orig_src=address),
        FlowFilter(protocol=number, orig_dst=address),
        FlowFilter(protocol=number, reply_dst=address),
        FlowFilter(protocol=number, reply_src=address),
    ]


def has_end(flow: Flow, end: Endpoint) -> bool:
    """Whether one of the connection's corners is this end."""
    corners = (
        (flow.orig_src, flow.orig_sport),
        (flow.orig_dst, flow.orig_dport),
        (flow.reply_src, flow.reply_sport),
        (flow.reply_dst, flow.reply_dport),
    )
    return any(address == end.address and end.port in (None, port) for address, port in corners)


def _explained(packet: Packet, reading: Reading, flow: Flow | None = None) -> Explanation:
    actual = reading.actual
    fate = trace(packet, actual.ruleset, Host.of(actual), services=services_of(actual.nft), maps=actual.maps)
    story = tell(fate, reading, flow)
    return Explanation(
        packet=_packet(packet),
        in_interface=packet.in_interface,
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
        verdict=story.verdict,
        certain=fate.certain,
        works=story.works,
        final=_packet(fate.final),
        out_interface=fate.out_interface if story.verdict == "forwarded" else None,
        next_hop=fate.next_hop if story.verdict == "forwarded" else None,
        reply=Translation(arrives=_packet(fate.reply[0]), leaves=_packet(fate.reply[1])) if fate.reply else None,
        backends=[f"{address}:{port}" for address, port in fate.backends],
        story=list(story.lines),
        faults=list(story.faults),
        text=[line.text for line in story.lines],
    )


def _flow(flow: Flow) -> FlowModel:
    return FlowModel(
        protocol=flow.protocol,
        source=flow.orig_src,
        source_port=flow.orig_sport,
        destination=flow.orig_dst,
        destination_port=flow.orig_dport,
        reply_source=flow.reply_src,
        reply_source_port=flow.reply_sport,
        reply_destination=flow.reply_dst,
        reply_destination_port=flow.reply_dport,
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
