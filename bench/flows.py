"""New connections per second of one processor, by how many rules there are."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import scenes, upstream
from bench.bed import Bed, Gateway, Spec, gateway, settle
from bench.generator import ENTRIES, Traffic, line
from bench.report import Figure, Report
from bench.scale import Scale

FORWARDING, BARE, CHAINS = "forwarding without NAT", "one iptables rule alone", "one rule in the usual chains"
MODES = {"maps": "auto", "chains alone": "off"}
"""What NATGW_FASTPATH says for each."""
UNIT = "new connections per second of one processor"
NOTES = (
    "Each connection is one frame; connections are counted where they arrive translated, and divided by the CPU time "
    "of the kernel thread that polls the gateway's interface, so neither the generator nor other work is in it. Of "
    "a few bursts the quickest counts, because other work can only slow them."
)
HEARD = (
    "All the while somebody listens for connections' beginnings in another namespace, as on a node with an egress "
    "gateway or a flow log; else a figure would depend on which of the gateways' watchers just do. What that costs is "
    "measured by itself."
)
WHICH = (
    "How many mappings there are and how many of them are met are told apart: connections to one mapping, to 1,000 and "
    "to 10,000 are compared among few mappings and among many. Meeting many has a price of its own. The kernel pays "
    "part of it without any rule (the last rows): every connection finds other memory, which the processor's cache "
    "lacks. In the maps that is an entry's place in the table, and the entry. A chain is walked to its end for the "
    "last mapping and where no rule matches, half as far where all are met; so the maps gain half as much there."
)
EACH = (
    "Of many rules either the last one is met, and then only their number differs from what one rule does, or all of "
    "them are, and then every connection finds other memory, too."
)


NETLINK_NETFILTER = 12
NEW = 1
"""The multicast group NFNLGRP_CONNTRACK_NEW as netlink's bind has it."""


@contextlib.contextmanager
def heard(bed: Bed) -> Iterator[None]:
    """Somebody listens for beginnings where there are none."""
    with bed.outside.open_socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as listener:
        listener.bind((0, NEW))
        yield


@dataclass(frozen=True)
class Subject:
    """What is measured: traffic through a bed."""

    label: str
    size: int | None
    bed: Bed
    traffic: Traffic


def measure(subjects: list[Subject], rounds: int, bursts: int, seconds: float) -> list[Figure]:
    """Every subject once per round, in an order of chance, and of a few bursts the quickest: what disturbs only slows.

    Fails where a packet arrives otherwise than it should.
    """
    values: dict[tuple[str, int | None], list[float]] = {(one.label, one.size): [] for one in subjects}
    for _ in range(rounds):
        for subject in random.sample(subjects, len(subjects)):
            with line(subject.bed, subject.traffic) as through:
                ran = [through.round(seconds) for _ in range(bursts)]
            for done in ran:
                if done.astray or not done.arrived or done.arrived > ENTRIES:
                    raise RuntimeError(f"{subject.label}, {subject.size}: {done}")
            values[subject.label, subject.size].append(max(done.per_core for done in ran))
    return [Figure(label, tuple(found), size) for (label, size), found in values.items()]


@contextlib.contextmanager
def bare(rule: str | None = None, *, chains: bool = False, polled: bool = True) -> Iterator[Bed]:
    """A bed without a gateway: forwarding, and at most one rule, in nat's PREROUTING or in a gateway's chains."""
    bed = Bed(polled=polled)
    try:
        if rule is not None:
            bed.gateway.ip(f"addr add {scenes.eip(0)}/16 dev net1")
            text = upstream.CHAINS if chains else "*nat\n-A PREROUTING {rule}\nCOMMIT\n"
            bed.gateway.run("iptables-legacy-restore", stdin=text.format(rule=rule))
        yield bed
    finally:
        bed.remove()


class Gateways(contextlib.ExitStack):
    """Gateways that stand beside each other until all are measured."""

    def make(self, spec: Spec, fastpath: str) -> Gateway:
        made = self.enter_context(gateway(NATGW_FASTPATH=fastpath))
        made.put(spec)
        return made


TO_LAST, TO_ANY, MISS = "to the last mapping", "to all mappings", "no rule matches"
SOME = (1000, 10_000)
"""How many mappings are met, where that is the same for every number of mappings."""
ALL_PORTS = 0.8
"""How much of what one mapping does is wanted where all of many are met; the rest is waiting for memory."""


def dnats(scale: Scale) -> Report:
    """Port mappings: connections that meet one of them, many, and none."""
    sizes = scale.pick((1, 10, 100, 1000, 10_000, 50_000), (1, 1000, 10_000), (20,))
    report = Report("flows-dnat", "New connections: what do port mappings cost?", UNIT, f"{NOTES} {HEARD} {WHICH}")
    with Gateways() as stack:
        one, rule = scenes.to_dnats(scenes.spec(dnats=1)), scenes.rule()
        subjects = [
            Subject(FORWARDING, None, stack.enter_context(bare()), scenes.untranslated()),
            Subject(BARE, None, stack.enter_context(bare(rule)), one),
            Subject(CHAINS, None, stack.enter_context(bare(rule, chains=True)), one),
        ]
        made = []
        for mode, size in itertools.product(MODES, sizes):
            spec = scenes.spec(dnats=size)
            made.append(stack.make(spec, MODES[mode]))
            traffics = {
                TO_LAST: scenes.to_dnats(scenes.last(spec)),
                TO_ANY: scenes.to_dnats(spec),
                MISS: scenes.untranslated(),
            }
            if mode == "maps":
                traffics |= {_to(some): scenes.to_some_dnats(spec, some) for some in SOME if some < size}
            for label, traffic in traffics.items():
                subjects.append(Subject(f"{label}, {mode}", size, made[-1].bed, traffic))
        for size in sorted({sizes[0], *SOME, sizes[-1]} & set(sizes)):
            subjects.append(Subject(f"{MISS}, addresses of as many mappings", size, made[0].bed, scenes.inwards(size)))
        settle(made, scale.pick(2, 2, 0))
        with heard(subjects[0].bed):
            report.figures = measure(subjects, *scale.pick((7, 4, 0.1), (3, 3, 0.1), (1, 1, 0.02)))
    _claims(report, sizes)
    return report


def _to(some: int) -> str:
    return f"to {some:,} of the mappings"


def _claims(report: Report, sizes: tuple[int, ...]) -> None:
    """What holds whatever the number of mappings, and what the maps gain over the chains.

    Met all over, a chain is walked half as far as to its end, so what the maps gain is half as much.
    """
    maps, chains = "{}, maps", "{}, chains alone"
    for label in (TO_LAST, MISS):
        for size in sizes[1:]:
            what, to = report.figure(maps.format(label), size), report.figure(maps.format(label), sizes[0])
            report.ratio(f"{label}: {size:,} port mappings against one", what, to, at_least=0.9)
    for some, size in itertools.product(SOME, sizes):
        if some in sizes and some < size:
            what, to = report.figure(maps.format(_to(some)), size), report.figure(maps.format(TO_ANY), some)
            report.ratio(f"{_to(some)}: {size:,} port mappings against {some:,}", what, to, at_least=0.9)
    for size in sizes[1:]:
        what, to = report.figure(maps.format(TO_ANY), size), report.figure(maps.format(TO_ANY), sizes[0])
        report.ratio(f"{TO_ANY}: {size:,} port mappings and as many met against one", what, to, at_least=ALL_PORTS)
    many = 10_000 if 10_000 in sizes else sizes[-1]
    for label, bound in ((TO_LAST, 12), (MISS, 12), (TO_ANY, 6)):
        what, to = report.figure(maps.format(label), many), report.figure(chains.format(label), many)
        report.ratio(f"{label}: maps against chains, {many:,} port mappings", what, to, at_least=bound)


Case = tuple[str, int, Spec, Callable[[Spec], Traffic], float]
"""A label, how many rules are many, a scene's fields (True where the number goes), the traffic; how much of what one
rule does is wanted where all of many are met."""


def kinds(scale: Scale) -> Report:
    """The other kinds of rule, each with few and with many; and connections of TCP."""
    fips, snats, many = scale.pick((10_000, 1000, 10_000), (1000, 1000, 10_000), (10, 10, 20))
    question = "New connections: what do floating IPs, SNAT and TCP cost?"
    report = Report("flows-kinds", question, UNIT, f"{NOTES} {HEARD} {EACH}")
    modes = scale.pick(MODES, {"maps": "auto"}, {"maps": "auto"})
    cases: tuple[Case, ...] = (
        ("floating IP, inwards", fips, {"fips": True}, scenes.to_fips, 0.9),
        ("floating IP, outwards", fips, {"fips": True}, scenes.from_fips, 0.9),
        ("port mapping, TCP", many, {"dnats": True, "protocol": "tcp"}, scenes.to_dnats, ALL_PORTS),
        ("SNAT", snats, {"snats": True, "eips": scenes.SNAT_EIPS}, scenes.from_snats, 0.9),
    )
    cases = scale.pick(cases, cases, cases[3:])
    with Gateways() as stack:
        subjects: list[Subject] = []
        standing: dict[tuple[str, int, str], Gateway] = {}
        for label, most, fields, traffic, _ in cases:
            for size in (1, most):
                spec = scenes.spec(**{name: size if value is True else value for name, value in fields.items()})
                for mode, fastpath in modes.items():
                    key = (str(sorted(fields)), size, fastpath)
                    if key not in standing:
                        standing[key] = stack.make(spec, fastpath)
                    bed = standing[key].bed
                    subjects.append(Subject(f"{label}, all, {mode}", size, bed, traffic(spec)))
                    if size > 1:
                        subjects.append(Subject(f"{label}, the last, {mode}", size, bed, traffic(scenes.last(spec))))
        settle(standing.values(), scale.pick(2, 2, 0))
        with heard(subjects[0].bed):
            report.figures = measure(subjects, *scale.pick((7, 4, 0.1), (3, 3, 0.1), (1, 1, 0.02)))
    for label, most, _, _, wanted in cases:
        one = report.figure(f"{label}, all, maps", 1)
        for which, bound in (("the last", 0.9), ("all", wanted)):
            what = report.figure(f"{label}, {which}, maps", most)
            report.ratio(f"{label}, {which}: {most:,} against one", what, one, at_least=bound)
    return report
