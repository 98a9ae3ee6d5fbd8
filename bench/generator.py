"""New connections through a bed's gateway: sent by flowgen.c, counted where they arrive."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from netns import require
from traffic import Host

from bench.bed import Bed, cpu_seconds

SOURCE = Path(__file__).with_name("flowgen.c")
BUILD = Path(__file__).parent.parent / "build" / "bench"
ENTRIES = 250_000
"""Connections one round may make: nf_conntrack_max is 262,144 by default, and one value for all namespaces."""


@dataclass(frozen=True)
class Traffic:
    """First packets from one side, and what is true of them (in nft's language) when they come out of the other."""

    inbound: bool
    templates: tuple[str, ...]
    arrives: str
    protocol: Literal["udp", "tcp"] = "udp"


@dataclass(frozen=True)
class Round:
    """What one run of the generator came to."""

    sent: int
    arrived: int
    astray: int
    """IPv4 packets that arrived otherwise than they should."""
    tracked: int
    """Connections that the gateway's kernel holds afterwards."""
    seconds: float
    cpu: float
    """CPU seconds of the thread that polls the interface on which they came in."""

    @property
    def per_core(self) -> float:
        """Connections that one processor would open per second."""
        return self.arrived / self.cpu

    @property
    def per_second(self) -> float:
        return self.arrived / self.seconds


@cache
def compiled() -> str:
    """Path of the generator, built anew when its source is newer."""
    require("gcc")
    program = BUILD / "flowgen"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = f"{program}.{os.getpid()}"
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", partial, str(SOURCE)], check=True)
        Path(partial).replace(program)
    return str(program)


class Line:
    """Traffic on its way through a bed, with a counter at the far end that lets nothing pass."""

    def __init__(self, bed: Bed, traffic: Traffic) -> None:
        self._bed, self._traffic = bed, traffic
        self._near: tuple[Host, str] = (bed.outside, "west") if traffic.inbound else (bed.tenants, "east")
        self._far: tuple[Host, str] = (bed.tenants, "east") if traffic.inbound else (bed.outside, "west")
        entrance = "net1" if traffic.inbound else "eth0"
        self._mac = bed.gateway.ip_json("link", "show", entrance)[0]["address"]
        self._poller = bed.pollers[entrance]
        self._sending, self._forwarding = processors()
        os.sched_setaffinity(self._poller, {self._forwarding})
        # Ahead of whatever else wants that processor, or on a busy machine it may not have begun when it is counted.
        os.sched_setscheduler(self._poller, os.SCHED_FIFO, os.sched_param(1))
        host, device = self._far
        host.run(
            "nft",
            "-f",
            "-",
            stdin=f"""
            table netdev count {{
                counter right {{ }}
                counter wrong {{ }}
                chain in {{
                    type filter hook ingress device "{device}" priority 0
                    {traffic.arrives} counter name right drop
                    meta protocol ip counter name wrong drop
                }}
            }}""",
        )

    def close(self) -> None:
        self._far[0].run("nft", "delete", "table", "netdev", "count")

    def round(self, seconds: float, rate: float = 0, connections: int = 0) -> Round:
        """Send for that long, at most ``rate`` frames per second (0: as many as can be).

        Every frame is of a connection of its own, or else of one of so many ``connections``.

        What connections there were is forgotten first, and a few new ones resolve the neighbours.
        """
        self._send(0.005, 1000, 1)
        self._settled()
        gateway = self._bed.gateway
        gateway.run("conntrack", "-F")
        right, wrong = self._counted()
        cpu = cpu_seconds(self._poller)
        sent, took = self._send(seconds, rate, connections)
        after = self._settled()
        used = cpu_seconds(self._poller) - cpu
        return Round(sent, after[0] - right, after[1] - wrong, self._tracked(), took, used)

    def send(self, seconds: float, rate: float) -> None:
        """Send for that long, and look at nothing."""
        self._send(seconds, rate, 0)

    def fill(self, entries: int, rate: float) -> int:
        """Open connections, at most ``rate`` a second, until the gateway tracks about so many; how many it tracks.

        On a busy machine some do not arrive, so all are sent again until enough did: they are the same every time.
        """
        while entries - self._tracked() > entries / 100:
            self._send(entries / rate, rate, 0)
            self._settled()
        return self._tracked()

    def _tracked(self) -> int:
        with self._bed.gateway.entered():
            return int(Path("/proc/thread-self/net/stat/nf_conntrack").read_text().split("\n")[1].split()[0], 16)

    def _send(self, seconds: float, rate: float, connections: int) -> tuple[int, float]:
        host, device = self._near
        traffic = self._traffic
        with host.entered():
            done = subprocess.run(
                [
                    compiled(),
                    device,
                    self._mac,
                    traffic.protocol,
                    *map(str, (round(1000 * seconds), rate, connections)),
                ],
                input="\n".join(traffic.templates),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {self._sending}),
            )
        sent, nanoseconds = map(int, done.stdout.split())
        return sent, nanoseconds / 1e9

    def _counted(self) -> tuple[int, int]:
        listed = json.loads(self._far[0].run("nft", "-j", "list", "counters", "table", "netdev", "count"))["nftables"]
        packets = {one["counter"]["name"]: one["counter"]["packets"] for one in listed if "counter" in one}
        return packets["right"], packets["wrong"]

    def _settled(self) -> tuple[int, int]:
        """The counters when what was still in a queue has come through."""
        now = self._counted()
        while True:
            time.sleep(0.02)
            before, now = now, self._counted()
            if now == before:
                return now


def processors() -> tuple[int, int]:
    """One processor to send with and another to forward with."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise RuntimeError("one processor sends while another forwards: two are needed")
    return usable[0], usable[1]


@contextlib.contextmanager
def line(bed: Bed, traffic: Traffic) -> Iterator[Line]:
    made = Line(bed, traffic)
    try:
        yield made
    finally:
        made.close()
