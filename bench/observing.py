"""What it costs to watch: a scrape of a large gateway, verbs meanwhile, and following every connection with a log."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from world import set_sysctl, wait_for

from api.client import Client
from bench import scenes
from bench.bed import Gateway, cpu_seconds, gateway
from bench.generator import Line
from bench.report import Figure, Report
from bench.scale import Scale

NATGW = Path(__file__).parent.parent / "image/rootfs/usr/bin/natgw"
# So long that connections of one packet live through a measurement.
LONG = {"netfilter/nf_conntrack_udp_timeout": 900}


def scrapes(scale: Scale) -> Report:
    """1,000 EIPs with floating IPs, port mappings and source translations, 200,000 connections, and Prometheus."""
    eips, entries = scale.pick((1000, 200_000), (1000, 200_000), (20, 2000))
    rounds = scale.pick(15, 7, 2)
    report = Report(
        "observe-scrape",
        f"How long does a scrape take at {eips:,} EIPs and {entries:,} connections, and do verbs wait for it?",
        "milliseconds",
        "Connections are real ones of real packets, through floating IPs. A verb is `eip-add` and `eip-del` by turns, "
        "with the shell that runs it; the second figure is taken while another process scrapes without a pause.",
    )
    with gateway() as made, _line(made, eips) as line:
        tracked = line.fill(entries, 20_000)
        while _traffic(made)["collector"]["flows"] < 0.98 * tracked:
            time.sleep(0.2)
        over_http = [_timed(lambda: _metrics(made)) for _ in range(rounds)]
        by_exec = [_timed(lambda: _exec(made)) for _ in range(rounds)]
        size = len(_metrics(made))
        alone = _verbs(made, 2 * rounds)
        with _scraping(made) as count:
            scraped = _verbs(made, 2 * rounds)
        report.notes += (
            f" Measured at {_traffic(made)['conntrack']['count']:,} connections; the text has {size / 1e6:.1f} MB; "
            f"{count[0]} scrapes during the verbs; the flow watcher has {_memory(_watcher(made)):.0f} MiB and its "
            f"last resync took {_traffic(made)['collector']['resyncSeconds']:.2f} s."
        )
    report.figures = [
        Figure("GET /metrics", tuple(over_http)),
        Figure("exec natgw metrics", tuple(by_exec)),
        Figure("a verb, nobody scrapes", tuple(alone)),
        Figure("a verb, scraped without a pause", tuple(scraped)),
    ]
    report.limit("a scrape", over_http, at_most=300, unit="ms")
    report.limit(
        "a verb while scraped, against one alone", [statistics.median(scraped) / statistics.median(alone)], at_most=2
    )
    return report


def followed(scale: Scale) -> Report:
    """Ten thousand new connections a second, each with a line in the log when it begins and when it ends."""
    rate, seconds = scale.pick((10_000, 10.0), (10_000, 5.0), (2000, 0.3))
    report = Report(
        "observe-log",
        f"What does it cost to follow {rate:,} new connections a second and to log each?",
        "microseconds of CPU per connection, of the flow watcher's process",
        "The log is a file. The ends come in one burst, when all connections are deleted; what the kernel's buffer "
        "cannot hold of it is found, and logged, by the next dump. Dumps are in it.",
    )
    figures: dict[str, list[float]] = {"with the log": [], "without it": []}
    missed: dict[str, list[float]] = {label: [] for label in figures}
    for label, values in figures.items():
        for _ in range(scale.pick(3, 2, 1)):
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "flows.log"
                log = {"NATGW_FLOW_LOG": str(path), "NATGW_FLOW_LOG_RATE": "1000000"} if label == "with the log" else {}
                used, complete, said = _follow(rate, seconds, log)
                values.append(used)
                missed[label].append(100 * (1 - complete))
                if log:
                    lines = sum(1 for file in Path(directory).iterdir() for _ in file.open("rb"))
                    records, drops = said["flowLog"]["records"], sum(said["flowLog"]["drops"].values())
                    report.notes += f" {records:,} records, {lines:,} lines, {drops:,} dropped."
    report.figures = [Figure(label, tuple(values)) for label, values in figures.items()]
    report.claims = []
    # Without the log beginnings are heard of a moment after there are many, and the ends of those before may be lost.
    for label, most in (("with the log", 0.0), ("without it", 1.0)):
        report.limit(f"connections that were missed, in a hundred, {label}", missed[label], at_most=most, unit="%")
    return report


def _follow(rate: float, seconds: float, environment: dict[str, str]) -> tuple[float, float, dict[str, Any]]:
    """Microseconds of CPU per connection, which part of the connections was counted, and what the gateway says."""
    with gateway(**environment) as made, _line(made, 200) as line:
        wait_for(lambda: bool(_traffic(made)["collector"]["resyncs"]), "a watcher")
        before, cpu = _counted(_traffic(made)), cpu_seconds(_watcher(made))
        done = line.round(seconds, rate=rate)
        made.host.run("conntrack", "-F")
        # More ends at once than the socket's buffer holds: what is lost of them is found by the next dump.
        while _traffic(made)["collector"]["flows"]:
            time.sleep(0.2)
        used = cpu_seconds(_watcher(made)) - cpu
        said = _traffic(made)
        # A few connections of the generator's first round, which resolves neighbours, are among them.
        return 1e6 * used / done.tracked, min(1.0, (_counted(said) - before) / done.tracked), said


def _counted(said: dict[str, Any]) -> int:
    """New connections, as many as have been counted."""
    number: int = said["total"]["in"]["newFlows"]
    return number


@contextlib.contextmanager
def _line(made: Gateway, eips: int) -> Iterator[Line]:
    """Traffic through floating IPs on half of the EIPs; the others have a source translation and a port mapping."""
    set_sysctl(made.host, LONG)
    spec = scenes.spec(eips=eips, fips=eips // 2, dnats=eips // 2, snats=eips)
    made.put(spec)
    wait_for(lambda: len(_traffic(made)["fips"]) == eips // 2, "the watcher knows the rules")
    line = Line(made.bed, scenes.to_fips(spec))
    try:
        yield line
    finally:
        line.close()


def _traffic(made: Gateway) -> dict[str, Any]:
    return made.request("GET", "/v1/traffic")


def _metrics(made: Gateway) -> bytes:
    answer = Client(made.run_dir).request("GET", "/metrics")
    if not answer.ok or b"natgw_flow_watcher_up 1" not in answer.body:
        raise RuntimeError(f"/metrics: {answer.status}, and no flow watcher")
    return answer.body


def _exec(made: Gateway) -> bytes:
    environment = {**made.environment, "NATGW_PYTHON": sys.executable}
    return subprocess.run([str(NATGW), "metrics"], env=environment, capture_output=True, check=True).stdout


def _timed(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def _verbs(made: Gateway, count: int) -> list[float]:
    """Milliseconds of each."""
    address = f"{scenes.eip(20_000)}/16"
    with made.host.entered():
        return [_timed(lambda n=n: made.verb(("eip-add", "eip-del")[n % 2], address)) for n in range(count)]


@contextlib.contextmanager
def _scraping(made: Gateway) -> Iterator[list[int]]:
    """Scrape without a pause, from another process, as Prometheus is one; how many were done."""
    program = (
        "import sys, pathlib; from api.client import Client; c = Client(pathlib.Path(sys.argv[1]))\n"
        "while True: print(len(c.request('GET', '/metrics').body), flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(made.run_dir)], stdout=subprocess.PIPE, text=True)
    count = [0]
    assert process.stdout is not None
    process.stdout.readline()
    stream = process.stdout

    def counting() -> None:
        for _ in stream:
            count[0] += 1

    thread = threading.Thread(target=counting)
    thread.start()
    try:
        yield count
    finally:
        process.kill()
        process.wait()
        thread.join()


def _watcher(made: Gateway) -> int:
    """Process id of the flow watcher."""
    children = Path(f"/proc/{made.pid}/task/{made.pid}/children").read_text().split()
    (found,) = [int(child) for child in children if b"gateway.watcher" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return found


def _memory(pid: int) -> float:
    """Resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
