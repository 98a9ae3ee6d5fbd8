"""How long a verb takes through ``bash nat-gateway.sh``, beside the bare edit of the kernel and a bare interpreter."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Literal

from netns import run
from wire import Capture

from bench import scenes, timing, upstream
from bench.bed import ROUTER, SCRIPT, Bed, Gateway, gateway, settle
from bench.report import Figure, Report, ratios
from bench.scale import Scale

Variant = Literal["legacy", "nft"]
UNIT = "milliseconds"
NOTES = (
    "Every call is timed from outside, process start included, as a controller sees it; calls take turns. The bare "
    "edit is one rule through iptables-restore --noflush, in a namespace that holds the same rules. The plain script "
    "is what one does without a daemon: list the table, run iptables, wait for arping. An eip-add comes straight "
    "behind a dnat-del; in the nft variant the kernel lets it wait until what that deleted has been given back."
)
INTERPRETER, DNAT_ADD, DNAT_DEL = "python3 -I -S -c pass", "dnat-add", "dnat-del"
BARE, REPEATED, EIP_ADD, ON_WIRE = "bare edit", "dnat-add, repeated", "eip-add", "eip-add, first frame"
BY_PYTHON = "dnat-add, repeated, without Perl"
PLAIN = "plain script, one port mapping"
NEW = ("172.18.250.1", 40000, "10.9.9.9:80")
NEW_EIP = "172.18.250.2"


class Pair:
    """A gateway with so many port mappings, and a namespace without a gateway that holds the same rules."""

    def __init__(self, stack: contextlib.ExitStack, variant: Variant, size: int) -> None:
        self.variant, self.size = variant, size
        self.gateway = stack.enter_context(gateway(polled=False, variant=variant))
        self.gateway.put(scenes.spec(dnats=size, eips=-(-size // scenes.PORTS_PER_EIP) + 1))
        self.bare = stack.enter_context(copy(self.gateway))
        self.capture = Capture(self.gateway.bed.outside, "west")

    def measure(self) -> Iterator[tuple[str, float]]:
        """Every call once: what it is, and its milliseconds."""
        eip, port, inside = NEW
        rule = f"{eip},{port},udp,{inside.replace(':', ',')}"
        with self.gateway.host.entered():
            yield DNAT_ADD, self._verb("dnat-add", rule)
            yield REPEATED, self._verb("dnat-add", rule)
            yield BY_PYTHON, self._verb("dnat-add", rule, NATGW_PERL="")
            yield DNAT_DEL, self._verb("dnat-del", rule.rpartition(",")[0].rpartition(",")[0])
            begun = time.time()
            yield EIP_ADD, self._verb("eip-add", f"{NEW_EIP}/16")
            first = self.capture.next(wanted=lambda frame: frame.arp.psrc == NEW_EIP and frame.at > begun)
            assert first is not None, "no announcement"
            yield ON_WIRE, 1000 * (first.at - begun)
            self._verb("eip-del", f"{NEW_EIP}/16")
        with self.bare.gateway.entered():
            yield BARE, self._restore("-A")
            self._restore("-D")

    def plain(self) -> float:
        """The same port mapping by a plain script, in the other namespace."""
        eip, port, inside = NEW
        argv = upstream.script(upstream.DNAT_ADD, variant=self.variant, eip=eip, port=port, inside=inside)
        with self.bare.gateway.entered():
            took = timing.program(argv)
            self._restore("-D")
        return took

    def _verb(self, *words: str, **environment: str) -> float:
        return timing.program(["bash", str(SCRIPT), *words], environment=self.gateway.environment | environment)

    def _restore(self, action: str) -> float:
        eip, port, inside = NEW
        rule = f"{action} SHARED_DNAT -d {eip}/32 -p udp -m udp --dport {port} -j DNAT --to-destination {inside}"
        argv = [f"iptables-{self.variant}-restore", "--noflush"]
        return timing.program(argv, stdin=f"*nat\n{rule}\nCOMMIT\n")


@contextlib.contextmanager
def copy(of: Gateway) -> Iterator[Bed]:
    """A bed whose gateway namespace has the same iptables rules, and nobody who cares for them."""
    bed = Bed(polled=False)
    try:
        for table in ("mangle", "nat"):
            rules = of.host.run(f"iptables-{of.variant}-save", "-t", table)
            bed.gateway.run(f"iptables-{of.variant}-restore", stdin=rules)
        yield bed
    finally:
        bed.remove()


def verbs(scale: Scale, variant: Variant) -> Report:
    """Single verbs, by how many rules stand."""
    sizes = scale.pick((10, 1000, 10_000, 50_000), (10, 10_000), (20,))
    question = f"How long does one verb take? (iptables variant {variant})"
    report = Report(f"verbs-{variant}", question, UNIT, NOTES)
    values: dict[tuple[str, int | None], list[float]] = {}

    def note(label: str, size: int | None, value: float) -> None:
        values.setdefault((label, size), []).append(value)

    with contextlib.ExitStack() as stack:
        pairs = [Pair(stack, variant, size) for size in sizes]
        settle([pair.gateway for pair in pairs], scale.pick(2, 2, 0))
        for turn in range(scale.pick(11, 7, 1)):
            note(INTERPRETER, None, timing.program(interpreter()))
            for pair in random.sample(pairs, len(pairs)):
                for label, value in pair.measure():
                    note(label, pair.size, value)
                if turn < scale.pick(5, 3, 1):
                    note(PLAIN, pair.size, pair.plain())
    report.figures = [Figure(label, tuple(found), size) for (label, size), found in values.items()]
    _claims(report, sizes)
    return report


def _claims(report: Report, sizes: tuple[int, ...]) -> None:
    few, many, most = sizes[0], 10_000 if 10_000 in sizes else sizes[-1], sizes[-1]

    def values(label: str, size: int | None) -> tuple[float, ...]:
        return report.figure(label, size).values

    report.limit(f"{DNAT_ADD}, {few} rules", values(DNAT_ADD, few), at_most=20, unit="ms")
    beyond = [verb - bare for verb, bare in zip(values(DNAT_ADD, many), values(BARE, many), strict=True)]
    report.limit(f"{DNAT_ADD}, {many:,} rules, less the bare edit", beyond, at_most=20, unit="ms")
    constant = ratios(values(DNAT_ADD, most), values(DNAT_ADD, few))
    report.limit(f"{DNAT_ADD}, {most:,} rules against {few}", constant, at_most=1.25)
    report.limit(f"{REPEATED}, {many:,} rules", values(REPEATED, many), at_most=15, unit="ms")
    by_python = ratios(values(REPEATED, many), values(BY_PYTHON, many))
    report.limit(f"{REPEATED}, {many:,} rules, against Python's client", by_python, at_most=0.75)
    report.limit(f"{EIP_ADD}, {few} rules", values(EIP_ADD, few), at_most=30, unit="ms")


def interpreter() -> list[str]:
    """Nothing but the start of the interpreter that is the client where there is no Perl."""
    return [str(SCRIPT.parents[3] / ".venv/bin/python"), "-I", "-S", "-B", "-c", "pass"]


def announcing(scale: Scale) -> Report:
    """An EIP by a verb and by a plain script that waits for arping."""
    report = Report("eip-add", "How long does a controller wait for one EIP?", UNIT, NOTES)
    with gateway(polled=False) as made, copy(made) as bare:
        eip = scenes.eip(0)
        argv = upstream.script(upstream.EIP_ADD, variant="legacy", eip=eip, router=ROUTER)
        daemon, plain = [], []
        for _ in range(scale.pick(5, 3, 1)):
            with made.host.entered():
                words = ["bash", str(SCRIPT), "eip-add", f"{eip}/16"]
                daemon.append(timing.program(words, environment=made.environment))
                made.verb("eip-del", f"{eip}/16")
            with bare.gateway.entered():
                plain.append(timing.program(argv))
                run("iptables-legacy", "-t", "nat", "-F", "HAIRPIN_SNAT")
                run("ip", "addr", "del", f"{eip}/16", "dev", "net1")
    report.figures = [Figure("eip-add", tuple(daemon)), Figure("plain script, arping -c 3", tuple(plain))]
    report.ratio("plain script against eip-add", report.figures[1], report.figures[0], at_least=10)
    return report
