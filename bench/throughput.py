"""Connections that stand already: do they notice how many rules there are?"""

from __future__ import annotations

import contextlib
import random

from iperf import received_mbit

from bench import scenes
from bench.bed import Bed, gateway, settle
from bench.flows import BARE, CHAINS, bare
from bench.generator import line
from bench.report import Figure, Report
from bench.scale import Scale

CONNECTIONS = 1000
WITH = "gateway"
PACKET_NOTES = (
    f"Frames of {CONNECTIONS:,} connections that were opened before, over and over, divided by the CPU time of the "
    "kernel thread that polls the gateway's interface. One gateway's rounds differ by a third, whatever its size, so "
    "no closer bound can be told from chance."
)
STREAM_NOTES = (
    "One TCP connection through a port mapping with iperf3, the two turn about; the whole path shares the processors "
    "with sender and receiver."
)


def packets(scale: Scale) -> Report:
    """Packets per processor through the one rule of a bare kernel, and through gateways."""
    sizes = scale.pick((1, 10_000, 50_000), (1, 10_000), (20,))
    unit = "packets per second of one processor"
    report = Report("packets", "Standing connections: what does a packet cost?", unit, PACKET_NOTES)
    values: dict[tuple[str, int | None], list[float]] = {}
    with contextlib.ExitStack() as stack:
        traffic = scenes.to_dnats(scenes.spec(dnats=1))
        beds: list[tuple[str, int | None, Bed]] = [
            (BARE, None, stack.enter_context(bare(scenes.rule()))),
            (CHAINS, None, stack.enter_context(bare(scenes.rule(), chains=True))),
        ]
        made = [stack.enter_context(gateway()) for _ in sizes]
        for size, one in zip(sizes, made, strict=True):
            one.put(scenes.spec(dnats=size))
            beds.append((WITH, size, one.bed))
        settle(made, scale.pick(2, 2, 0))
        bursts, seconds = scale.pick((4, 0.1), (4, 0.1), (1, 0.05))
        for _ in range(scale.pick(13, 3, 1)):
            for label, size, bed in random.sample(beds, len(beds)):
                with line(bed, traffic) as through:
                    ran = [through.round(seconds, connections=CONNECTIONS) for _ in range(bursts)]
                for done in ran:
                    if done.astray or done.tracked > CONNECTIONS:
                        raise RuntimeError(f"{label}, {size}: {done}")
                # What disturbs only slows, so of a few bursts the quickest is what a packet costs.
                values.setdefault((label, size), []).append(max(done.per_core for done in ran))
    report.figures = [Figure(label, tuple(found), size) for (label, size), found in sorted(values.items(), key=str)]
    for size in sizes:
        text = f"gateway with {size:,} port mappings against {CHAINS}"
        report.ratio(text, report.figure(WITH, size), report.figure(CHAINS), at_least=0.9)
    return report


def streams(scale: Scale) -> Report:
    """iperf3 through one bare rule and through a gateway with everything on."""
    size = scale.pick(10_000, 10_000, 20)
    report = Report("streams", "Standing connections: what does a TCP stream get?", "Mbit/s", STREAM_NOTES)
    rule = f"-d {scenes.eip(0)} -p tcp --dport 5201 -j DNAT --to 10.255.0.1:5201"
    spec = scenes.spec(dnats=size, protocol="tcp")
    mapping = {"eip": scenes.eip(0), "externalPort": 5201, "protocol": "tcp", "internalIp": "10.255.0.1"}
    spec["dnats"].append({**mapping, "internalPort": 5201})
    plain, full = [], []
    with bare(rule, chains=True, polled=False) as bed, gateway(polled=False) as made:
        made.put(spec)
        settle([made], scale.pick(2, 2, 0))
        turn = [(plain, bed), (full, made.bed)]
        for _ in range(scale.pick(21, 3, 1)):
            for into, one in random.sample(turn, len(turn)):
                into.append(_stream(one, 1))
    report.figures = [Figure(CHAINS, tuple(plain)), Figure(f"gateway with {size:,} port mappings", tuple(full))]
    report.ratio(f"gateway against {CHAINS}", report.figures[1], report.figures[0], at_least=0.97)
    return report


def _stream(bed: Bed, seconds: int) -> float:
    got = received_mbit(bed.outside, bed.tenants, scenes.eip(0), seconds=seconds)
    if not got:
        raise RuntimeError("iperf3 did not come to an end")
    return got
