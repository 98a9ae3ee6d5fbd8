"""What becomes of a connection, told in order: arrival, rules, translation, route, neighbour, bandwidth, answers.

``rules.trace`` walks the packet through the netfilter rules; here the rest of its way is judged (routing back,
neighbours, forwarding, limits, other hands' rules), and what is missing is named together with what would mend it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rules import mending
from rules.appliance import Spec
from rules.fields import Direction
from rules.flows import Flow
from rules.mending import Fault, Way
from rules.packet import Packet
from rules.qos import limit_for
from rules.routing import Host, route
from rules.ruleset import Goto, Jump, Rule
from rules.spec import GatewaySpec, Part
from rules.state import Actual, RouteEntry
from rules.surroundings import Neighbour, Surroundings
from rules.trace import Fate, Step, Verdict

Topic = Literal[
    "connection", "arrival", "rules", "translation", "route", "neighbour", "bandwidth", "answers", "missing"
]


class Line(Part):
    """One sentence of the story, and what it is about."""

    topic: Topic
    text: str


@dataclass(frozen=True)
class Reading:
    """What the story is told from: the wanted state, one reading of the kernel, and what surrounds it.

    ``surveyed``: neighbours and settings were read, so that what is not among them is not there.
    """

    spec: Spec | None
    actual: Actual
    around: Surroundings = field(default_factory=Surroundings)
    surveyed: bool = True


@dataclass(frozen=True)
class Story:
    """The whole of it. ``verdict`` is the packet's real end: what the rules say, unless something stops it earlier."""

    lines: tuple[Line, ...]
    faults: tuple[Fault, ...]
    verdict: Verdict

    @property
    def works(self) -> bool:
        """Whether nothing is known that keeps the connection from working."""
        return not any(fault.breaks for fault in self.faults)


def tell(fate: Fate, reading: Reading, flow: Flow | None = None) -> Story:
    """The story of the packet with this fate; of an entry of the connection tracking table where ``flow`` is one."""
    host = Host.of(reading.actual)
    way = Way(fate, reading.spec, reading.actual, reading.around, reading.surveyed, *_back(fate, host))
    faults = tuple(mending.faults(way))
    dropped = any(fault.drops for fault in faults) and fate.verdict in ("forwarded", "local")
    lines = [*_connection(flow, fate), *_arrival(way), *_rules(fate), *_translation(fate), *_route(way)]
    lines += [*_neighbour(way), *_bandwidth(way)]
    if not dropped and fate.verdict == "forwarded":
        lines += _answers(way)
    lines += [Line(topic="missing", text=f"{fault.what}; {fault.remedy}") for fault in faults]
    return Story(tuple(lines), faults, "dropped" if dropped else fate.verdict)


def packet_of(flow: Flow, host: Host, fallback: str) -> Packet:
    """The first packet of a tracked connection, by where its source lies."""
    names = {1: "icmp", 6: "tcp", 17: "udp", 132: "sctp"}
    origin = route(host, flow.orig_src)
    return Packet(
        names.get(flow.protocol, str(flow.protocol)),
        flow.orig_src,
        flow.orig_sport,
        flow.orig_dst,
        flow.orig_dport,
        origin[1].interface if origin else fallback,
    )


def end(address: str, port: int) -> str:
    """An address with its port, where it has one."""
    return f"{address}:{port}" if port else address


def _back(fate: Fate, host: Host) -> tuple[tuple[str, RouteEntry] | None, Packet | None]:
    """The route of the answers, and the answer as it comes in."""
    if fate.reply is None:
        return None, None
    arrives, leaves = fate.reply
    return route(host, leaves.dst, arrives), arrives


# --- the chapters ----------------------------------------------------------------------------------------------


def _connection(flow: Flow | None, fate: Fate) -> Iterator[Line]:
    if flow is None:
        return
    there = f"{end(flow.orig_src, flow.orig_sport)} -> {end(flow.orig_dst, flow.orig_dport)}"
    back = f"{end(flow.reply_src, flow.reply_sport)} -> {end(flow.reply_dst, flow.reply_dport)}"
    yield Line(topic="connection", text=f"tracked: {there}, answered by {back}")
    now, then = _ends(fate), ((flow.reply_src, flow.reply_sport), flow.reply_dst)
    if fate.verdict in ("forwarded", "local") and (now == then or (fate.backends and now[1] == then[1])):
        yield Line(topic="connection", text="the rules would translate it the same way today")
    else:
        text = "it was translated by other rules and stays so for as long as it lives; a new one goes as told below"
        yield Line(topic="connection", text=text)


def _ends(fate: Fate) -> tuple[tuple[str, int], str]:
    """Who is answered from and to whom; the port of a translated source is the kernel's choice."""
    return (fate.final.dst, fate.final.dport), fate.final.src


def _arrival(way: Way) -> Iterator[Line]:
    packet, spec = way.fate.packet, way.spec
    side = ""
    if spec is not None:
        sides = {spec.interfaces.vpc: " (the tenants' side)", spec.interfaces.external: " (the external side)"}
        side = sides.get(packet.in_interface, "")
    yield Line(topic="arrival", text=f"{packet} comes in by {packet.in_interface}{side}")


def _rules(fate: Fate) -> Iterator[Line]:
    """What did something to the packet; the ways from chain to chain are among the fate's steps."""
    acted = [step for step in fate.steps if step.ref is not None and not _leads_on(step)]
    for step in acted:
        yield Line(topic="rules", text=str(step))
    if not acted:
        yield Line(topic="rules", text="no rule concerns it")


def _leads_on(step: Step) -> bool:
    return isinstance(step.rule, Rule) and isinstance(step.rule.target, Jump | Goto)


def _translation(fate: Fate) -> Iterator[Line]:
    before, after = fate.packet, fate.final
    if (before.src, before.sport, before.dst, before.dport) == (after.src, after.sport, after.dst, after.dport):
        yield Line(topic="translation", text="nothing is translated")
    else:
        yield Line(topic="translation", text=f"it becomes {after}")


def _route(way: Way) -> Iterator[Line]:
    fate = way.fate
    if fate.verdict == "forwarded":
        hop = f" to {fate.next_hop}" if fate.next_hop else ", on the link"
        yield Line(topic="route", text=f"{_decided(fate)}it leaves by {fate.out_interface}{hop}")
    elif fate.verdict == "local":
        yield Line(topic="route", text=f"{fate.final.dst} is an address of the gateway itself: it goes no further")
    elif fate.verdict == "no route":
        yield Line(topic="route", text=f"no route leads to {fate.final.dst}")


def _decided(fate: Fate) -> str:
    said = next((step.what for step in fate.steps if step.ref is None and step.what.startswith("routing: ")), "")
    return f"{said.removeprefix('routing: ')} decides: " if said else ""


def _neighbour(way: Way) -> Iterator[Line]:
    if way.fate.verdict != "forwarded" or not way.surveyed:
        return
    interface, hop = way.hop
    yield Line(topic="neighbour", text=_asked(way.around.neighbour(interface, hop), interface, hop))


def _asked(neighbour: Neighbour | None, interface: str, hop: str) -> str:
    if neighbour is None:
        return f"{hop} on {interface}: not asked for yet, the first packet will ask"
    where = f" is {neighbour.mac}" if neighbour.mac else " has no known hardware address"
    return f"{hop} on {interface}{where} ({neighbour.state})"


def _bandwidth(way: Way) -> Iterator[Line]:
    if not isinstance(way.spec, GatewaySpec):
        return
    fate = way.fate
    points: list[tuple[str, Direction, Packet, str]] = [(fate.packet.in_interface, "ingress", fate.packet, "")]
    if fate.verdict == "forwarded" and fate.out_interface and fate.reply:
        arrives, leaves = fate.reply
        points += [
            (fate.out_interface, "egress", fate.final, ""),
            (fate.out_interface, "ingress", arrives, "answers: "),
            (fate.packet.in_interface, "egress", leaves, "answers: "),
        ]
    for interface, direction, packet, whose in points:
        limit = limit_for(way.spec, interface, direction, packet.src, packet.dst)
        if limit is not None:
            yield Line(topic="bandwidth", text=f"{whose}{limit}, burst {limit.burst_max} MiB")


def _answers(way: Way) -> Iterator[Line]:
    reply = way.fate.reply
    if reply is None:
        return
    arrives, leaves = reply
    text = f"they come in by {arrives.in_interface} as {arrives}"
    if (arrives.src, arrives.dst) != (leaves.src, leaves.dst):
        text += f", become {leaves}"
    if way.back is not None:
        prefix, entry = way.back
        hop = f" via {entry.via}" if entry.via else ""
        text += f", and leave by {entry.interface}{hop} ({prefix})"
    yield Line(topic="answers", text=text)
    if way.back is not None and way.surveyed:
        entry = way.back[1]
        hop = entry.via or leaves.dst
        yield Line(topic="answers", text=_asked(way.around.neighbour(entry.interface, hop), entry.interface, hop))
