"""One packet's walk through a ruleset: what each rule does to it, and what becomes of it.

The walk is that of the first packet of a connection which arrives on an interface (IPv4): mangle PREROUTING, the
table of share-type DNAT, our maps and, if neither decides, nat PREROUTING; routing; then mangle INPUT and nat INPUT
for what is ours, else mangle FORWARD, mangle POSTROUTING, our maps and nat POSTROUTING. The filter table is not looked
at. Tests assert packets' fates by it; ``natgw explain`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from types import MappingProxyType
from typing import Literal

from rules.iptables import render_rule
from rules.maps import MISSED, Asking, EntryKey, FipIn, FipOut, Hairpin, MapTable, Missed, Ports, PrefixSnat
from rules.maps import TABLE as MAPS
from rules.nft import Endpoint, ServiceKey
from rules.packet import Packet, endpoint
from rules.routing import Host, route, within
from rules.ruleset import (
    AnyRule,
    ChainRef,
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Foreign,
    Goto,
    InInterface,
    Jump,
    Mark,
    Masquerade,
    Match,
    OutInterface,
    Protocol,
    Return,
    Rule,
    Ruleset,
    SetMark,
    Snat,
    Source,
    States,
    Target,
)
from rules.share import Service, Services
from rules.state import (
    RouteEntry,
)

_NO_MAPS = MapTable()
_SERVICES = ChainRef("ip kube-ovn", "service-ips")

Verdict = Literal["forwarded", "local", "dropped", "no route"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened. ``index`` (from 0) and ``rule`` are None where no single rule did it."""

    ref: ChainRef | None
    index: int | None
    rule: AnyRule | None
    what: str

    def __str__(self) -> str:
        if self.ref is None:
            return self.what
        if self.index is None or self.rule is None:
            return f"{self.ref.table} {self.ref.chain}: {self.what}"
        return f"{self.ref.table} {self.ref.chain} rule {self.index + 1} [{render_rule(self.rule)}]: {self.what}"


@dataclass(frozen=True)
class Fate:
    """What becomes of ``packet``: it ends or leaves as ``final``. Not ``certain`` if foreign rules had a say.

    ``backends`` are those of the shared DNAT that decided; the walk is that to one of them.
    """

    packet: Packet
    final: Packet
    verdict: Verdict
    out_interface: str | None
    next_hop: str | None
    steps: tuple[Step, ...]
    certain: bool = True
    backends: tuple[Endpoint, ...] = ()

    @property
    def outcome(self) -> tuple[Verdict, Packet, str | None, str | None]:
        """The fate without the way to it: equal for two rulesets that treat the packet alike."""
        return self.verdict, self.final, self.out_interface, self.next_hop

    @property
    def reply(self) -> tuple[Packet, Packet] | None:
        """The answer as it comes in and as it is passed on, with both translations undone; None if there is none."""
        if self.verdict not in ("forwarded", "local"):
            return None
        came = self.out_interface or self.packet.in_interface
        return _reversed(self.final, came), _reversed(self.packet, came)

    def describe(self) -> list[str]:
        """The walk, one readable line for each step, and how it ends."""
        lines = [f"{self.packet} comes in by {self.packet.in_interface}", *map(str, self.steps), self._end()]
        if self.reply is not None and len(set(self.reply)) > 1:
            lines.append("the answer, {}, becomes {}".format(*self.reply))
        if not self.certain:
            lines.append("uncertain: foreign rules stand in the way, taken here as not matching")
        return lines

    def _end(self) -> str:
        if self.verdict == "forwarded":
            hop = f" to {self.next_hop}" if self.next_hop else ""
            return f"{self.final} leaves by {self.out_interface}{hop}"
        return (
            f"{self.final}: " + {"local": "for this host", "dropped": "dropped", "no route": "no route"}[self.verdict]
        )


class Uncertain(Exception):
    """A foreign rule stands in the packet's way, and what it does is not known."""


def trace(
    packet: Packet,
    ruleset: Ruleset,
    host: Host,
    *,
    strict: bool = False,
    services: Services = MappingProxyType({}),
    choice: int = 0,
    maps: MapTable = _NO_MAPS,
) -> Fate:
    """Walk the packet through; with ``strict`` a foreign rule on the way raises Uncertain.

    Of the backends of a shared DNAT (one of ``services``) the walk follows the one with the index ``choice``.
    """
    return _Walk(packet, ruleset, host, strict=strict, services=services, choice=choice, maps=maps).run()


class _Walk:
    """One packet under way: what it looks like by now, and what has happened."""

    def __init__(
        self,
        packet: Packet,
        ruleset: Ruleset,
        host: Host,
        *,
        strict: bool,
        services: Services,
        choice: int,
        maps: MapTable,
    ) -> None:
        self.original = packet
        self.packet = packet
        self.chains = ruleset.chains
        self.host = host
        self.strict = strict
        self.services = services
        self.choice = choice
        self.maps = maps
        self.backends: tuple[Endpoint, ...] = ()
        self.out: RouteEntry | None = None
        self.steps: list[Step] = []
        self.certain = True

    def run(self) -> Fate:
        if not self.pass_hooks("PREROUTING"):
            return self.fate("dropped")
        if (holder := self.holder()) is not None:
            self.note(f"routing: {self.packet.dst} is an address of {holder}")
            return self.fate("local" if self.pass_hooks("INPUT") else "dropped")
        found = route(self.host, self.packet.dst, self.packet)
        if found is None:
            self.note(f"routing: no route to {self.packet.dst}")
            return self.fate("no route")
        prefix, self.out = found
        hop = f" via {self.out.via}" if self.out.via else ""
        self.note(f"routing: {prefix}{hop} by {self.out.interface}")
        if not self.pass_hooks("FORWARD", "POSTROUTING"):
            return self.fate("dropped")
        if not self.host.arp.get(self.out.interface, True):
            self.note(f"ARP is off on {self.out.interface}: the packet comes back until its TTL ends")
        return self.fate("forwarded")

    def fate(self, verdict: Verdict) -> Fate:
        out, via = (self.out.interface, self.out.via) if self.out and verdict == "forwarded" else (None, None)
        return Fate(self.original, self.packet, verdict, out, via, tuple(self.steps), self.certain, self.backends)

    def note(self, what: str) -> None:
        self.steps.append(Step(None, None, None, what))

    def holder(self) -> str | None:
        own = (key.interface for key in self.host.addresses if key.address.partition("/")[0] == self.packet.dst)
        return next(own, None)

    def pass_hooks(self, *hooks: str) -> bool:
        """Through each hook's tables by priority, mangle (-150) before nat (±100); False where it is dropped."""
        for hook in hooks:
            for table in ("mangle", "nat"):
                if (table, hook) == ("nat", "PREROUTING") and self.meet_service():
                    continue  # the connection is bound: no other nat chain is asked
                if table == "nat" and self.meet_maps(hook.lower()):
                    continue
                if isinstance(self.pass_chain(ChainRef(table, hook)), Drop):
                    return False
        return True

    def pass_chain(self, ref: ChainRef) -> Target | None:
        """Rule by rule; what ended the packet's way through this table, if anything did."""
        for index, rule in enumerate(self.chains.get(ref, ())):
            if isinstance(rule, Foreign):
                self.meet_foreign(ref, index, rule)
            elif all(map(self.matches, rule.matches)) and (end := self.act(ref, index, rule)):
                return None if isinstance(end, Return) else end
        return None

    def meet_service(self) -> bool:
        """Whether a shared DNAT decides where the connection goes."""
        service = self.services.get(ServiceKey(self.packet.dst, self.packet.protocol, self.packet.dport))
        if service is None:
            return False
        self.backends = service.backends
        address, port = service.backends[self.choice]
        self.packet = replace(self.packet, dst=address, dport=port)
        self.steps.append(Step(_SERVICES, None, None, f"{_picked(service)}, here {endpoint(address, port)}"))
        return True

    def meet_maps(self, chain: str) -> bool:
        """Whether one of our maps decides; else the packet is marked, where there are maps at all."""
        for rule in self.maps.chains.get(chain, ()):
            if isinstance(rule, Missed):
                self.packet = replace(self.packet, mark=self.packet.mark | MISSED)
                self.steps.append(Step(ChainRef(f"ip {MAPS}", chain), None, None, "in none of the maps"))
            elif isinstance(rule, Asking) and (key := self.asks(rule)) and (target := self.maps.entries.get(key)):
                self.translate(rule, *target)
                return True
        return False

    def asks(self, rule: Asking) -> EntryKey | None:
        """What the rule looks up, if it concerns the packet at all."""
        packet, out = self.packet, self.out.interface if self.out else None
        match rule:
            case FipIn():
                return EntryKey(rule.map, packet.dst)
            case Ports():
                return EntryKey(rule.map, packet.dst, packet.protocol, packet.dport)
            case FipOut():
                return EntryKey(rule.map, packet.src)
            case PrefixSnat(interface, length):
                network = IPv4Network((packet.src, length), strict=False)
                return EntryKey(rule.map, str(network.network_address)) if out == interface else None
            case Hairpin(interface, mark):
                first = self.original.dst
                concerned = out == interface and packet.mark & mark == mark
                return EntryKey(rule.map, first) if concerned and self.matches(Conntrack("DNAT", first)) else None

    def translate(self, rule: Asking, address: str, port: int) -> None:
        """Give the packet what a map has for it."""
        if isinstance(rule, FipIn | Ports):
            self.packet = replace(self.packet, dst=address, dport=port or self.packet.dport)
            what = f"destination becomes {endpoint(self.packet.dst, self.packet.dport)}"
        else:
            self.packet = replace(self.packet, src=address)
            what = _source_becomes(
                address, isinstance(rule, Hairpin) or (isinstance(rule, PrefixSnat) and rule.random_fully)
            )
        self.steps.append(Step(ChainRef(f"ip {MAPS}", rule.map), None, None, what))

    def meet_foreign(self, ref: ChainRef, index: int, rule: Foreign) -> None:
        if self.strict:
            raise Uncertain(f"{ref.table} {ref.chain} rule {index + 1} is foreign: {rule.text}")
        self.certain = False
        self.steps.append(Step(ref, index, rule, "a foreign rule, not interpreted"))

    def act(self, ref: ChainRef, index: int, rule: Rule) -> Target | None:
        """Let the rule's target act on the packet; what ended the table, if anything did."""
        match rule.target:
            case Jump(chain):
                self.steps.append(Step(ref, index, rule, f"on to {chain}"))
                return self.pass_chain(ChainRef(ref.table, chain))
            case Goto(chain):
                self.steps.append(Step(ref, index, rule, f"on to {chain}, and not back"))
                return self.pass_chain(ChainRef(ref.table, chain)) or Return()
            case SetMark(value, mask):
                self.packet = replace(self.packet, mark=(self.packet.mark & ~mask) ^ value)
                self.steps.append(Step(ref, index, rule, f"mark becomes {self.packet.mark:#x}"))
                return None
            case Dnat(address, port):
                self.packet = replace(self.packet, dst=address, dport=self.packet.dport if port is None else port)
                what = f"destination becomes {endpoint(self.packet.dst, self.packet.dport)}"
            case Snat(address, random_fully):
                self.packet = replace(self.packet, src=address)
                what = _source_becomes(address, random_fully)
            case Masquerade():
                source = self.leaving_as()
                self.packet = replace(self.packet, src=source)
                what = f"source becomes {source}"
            case Return():
                what = "the rest of the chain is passed over"
            case Drop():
                what = "dropped"
        self.steps.append(Step(ref, index, rule, what))
        return rule.target

    def leaving_as(self) -> str:
        """An address of the interface by which the packet leaves, or its own source where there is none."""
        out = self.out.interface if self.out else None
        own = (key.address.partition("/")[0] for key in self.host.addresses if key.interface == out)
        return next(own, self.packet.src)

    def matches(self, match: Match) -> bool:  # noqa: PLR0911 -- one line a match
        match match:
            case Source(prefix):
                return within(self.packet.src, prefix)
            case Destination(prefix):
                return within(self.packet.dst, prefix)
            case InInterface(name):
                return name == self.packet.in_interface
            case OutInterface(name):
                return self.out is not None and name == self.out.interface
            case DestinationPort(protocol, port):
                return (protocol, port) == (self.packet.protocol, self.packet.dport)
            case Protocol(name):
                return name == self.packet.protocol
            case States():
                return False  # it is the first packet
            case Mark(value, mask):
                return self.packet.mark & mask == value
            case Conntrack("DNAT", orig_dst):
                now, first = (self.packet.dst, self.packet.dport), (self.original.dst, self.original.dport)
                return now != first and orig_dst == self.original.dst
            case Conntrack():
                raise ValueError(f"no such state of a first packet: {match.state}")


def _source_becomes(address: str, random_fully: bool) -> str:
    return f"source becomes {address}, " + ("any port" if random_fully else "the same port if it is free")


def _picked(service: Service) -> str:
    listed = ", ".join(endpoint(*backend) for backend in service.backends)
    picked = f"destination becomes one of {len(service.backends)} backends at random ({listed})"
    return picked if service.affinity is None else f"{picked} unless the client came within {service.affinity} s"


def _reversed(packet: Packet, in_interface: str) -> Packet:
    return Packet(packet.protocol, packet.dst, packet.dport, packet.src, packet.sport, in_interface)
