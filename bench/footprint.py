"""What the daemon itself takes: memory with many rules, processor time when idle, and time to come back."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from bench import scenes, timing
from bench.bed import Bed, Gateway, cpu_seconds, gateway, settle
from bench.bulk import empty_bed
from bench.report import Figure, Report
from bench.scale import Scale


def memory(scale: Scale) -> Report:
    """Resident memory by the number of port mappings."""
    sizes = scale.pick((10, 1000, 10_000, 50_000), (10, 50_000), (20,))
    notes = (
        "Resident memory of the daemon (VmRSS) after a PUT of the state and one verb; and the most that it was (VmHWM)."
    )
    report = Report("memory", "How much memory does the daemon take?", "MiB", notes)
    now, most = {}, {}
    for size in sizes:
        with gateway(polled=False) as made:
            made.put(scenes.spec(dnats=size, eips=size // scenes.PORTS_PER_EIP + 1))
            with made.host.entered():
                made.verb("dnat-add", "172.18.250.1,40000,udp,10.9.9.9,80")
            now[size], most[size] = (kilobytes(made.pid, field) / 1024 for field in ("VmRSS", "VmHWM"))
    report.figures = [Figure("resident", (value,), size) for size, value in now.items()]
    report.figures += [Figure("at most", (value,), size) for size, value in most.items()]
    report.limit(f"resident, {sizes[-1]:,} rules", [now[sizes[-1]]], at_most=256, unit="MiB")
    return report


def kilobytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status that is in kB."""
    (line,) = (one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith(field + ":"))
    return int(line.split()[1])


def idle(scale: Scale) -> Report:
    """Processor time of a daemon that has nothing to do."""
    seconds = scale.pick(20.0, 5.0, 0.5)
    sizes = scale.pick((10, 10_000), (10, 10_000), (20,))
    notes = f"CPU time of the daemon's process over {seconds:g} s without any request."
    report = Report("idle", "What does an idle daemon take?", "percent of a processor", notes)
    for size in sizes:
        with gateway(polled=False) as made:
            made.put(scenes.spec(dnats=size))
            settle([made], scale.pick(4, 4, 0))
            before = cpu_seconds(made.pid)
            time.sleep(seconds)
            used = 100 * (cpu_seconds(made.pid) - before) / seconds
        report.figures.append(Figure("idle", (used,), size))
        report.limit(f"idle, {size:,} rules", [used], at_most=0.2, unit="%")
    return report


def recovery(scale: Scale) -> Report:
    """Until verbs are answered and all stands again."""
    count = scale.pick(1000, 1000, 20)
    notes = (
        f"{count:,} EIPs with {count:,} floating IPs. Killed: the daemon alone, its keeper starts another; until the "
        "next verb is answered. New network namespace: the first verb makes everything anew from the store."
    )
    report = Report("recovery", "How long does a gateway take to come back?", "milliseconds", notes)
    killed, anew, without = [], [], []
    state = scenes.spec(fips=count)
    for _ in range(scale.pick(3, 2, 1)):
        with gateway(polled=False) as made, made.host.entered():
            without.append(_restart(made))
            made.put(state)
            settle([made], scale.pick(2, 2, 0))
            killed.append(_restart(made))
            made.put(state)  # the HTTP face is there, the store is written
            with empty_bed() as bed:
                anew.append(_elsewhere(made, bed))
    report.figures = [
        Figure("killed, no rules", tuple(without)),
        Figure(f"killed, {count:,} EIPs", tuple(killed)),
        Figure(f"new network namespace, {count:,} EIPs", tuple(anew)),
    ]
    report.limit(f"new network namespace, {count:,} EIPs", anew, at_most=1000 + min(without), unit="ms")
    return report


def _restart(made: Gateway) -> timing.Milliseconds:
    """Kill the daemon; until the next one, which a verb asks the keeper for, has answered that verb."""
    begun = time.perf_counter()
    made.kill()
    made.verb("subnet-route-add", "10.0.0.0/8,10.255.0.1")
    return 1000 * (time.perf_counter() - begun)


def _elsewhere(made: Gateway, bed: Bed) -> timing.Milliseconds:
    """The same store in an empty namespace: until `init` has returned there."""
    other = Gateway(bed, variant=made.variant)
    try:
        shutil.copytree(made.environment["NATGW_STATE_DIR"], other.environment["NATGW_STATE_DIR"])
        with bed.gateway.entered():
            return timing.call(lambda: other.verb("init"))
    finally:
        other.remove()
