"""How soon a real OVN sends traffic elsewhere, by what happened to the gateway: a table on stdout. Needs root.

    .venv/bin/python bench/bfd_failover.py [--interval MS] [--runs N] [--only WORD]

A 10 ms stream goes through each of two gateways (netns-tests/ovn.py). ``moved`` is when the first datagram that took
the other gateway was sent, ``hole`` the longest time without an answer, ``lost`` the datagrams without one.
"Just after" means that OVN had just written another session's coming up to its database.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "netns-tests"), str(Path(__file__).parent.parent)]

from ovn import Gateway, Ovn  # noqa: E402 -- found by the line above
from ovn_failover import (  # noqa: E402 -- found by the line above
    Outcome,
    bfdd_control,
    cut_outside,
    drop_everything_inside,
    drop_nothing,
    failover,
    mend_outside,
)

HEALTH = {"NATGW_BFD_HEALTH_INTERVAL": "200", "NATGW_BFD_HEALTH_FALL": "400", "NATGW_BFD_HEALTH_RISE": "1000"}
SETTLED = 6.0
"""Seconds after which OVN writes a change at once."""
PATIENCE = 20


class Bench:
    def __init__(self, ovn: Ovn) -> None:
        self.ovn = ovn
        self.one, self.other = ovn.gateways

    def settle(self, disturbed: bool) -> None:
        """Both gateways serve, for a while or only just."""
        for gateway in self.ovn.gateways:
            if gateway.process is None:
                gateway.start()
        self.ovn.wait_serving(self.one, self.other)
        time.sleep(SETTLED)
        if disturbed:
            self.other.end(signal.SIGKILL)
            self.ovn.wait_serving(self.one)
            self.other.start()
            self.ovn.wait_serving(self.one, self.other)

    def deeds(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """By name: what is done to the gateway, and how it is undone."""
        one = self.one
        restart = lambda: (one.end(signal.SIGKILL), one.start())  # noqa: E731
        return {
            "speaker killed": (lambda: one.end(signal.SIGKILL), one.start),
            "black hole": (lambda: drop_everything_inside(one), lambda: drop_nothing(one)),
            "external cut": (lambda: cut_outside(self.ovn, one), lambda: mend_outside(self.ovn, one)),
            "external link down": (
                lambda: self.ovn.outside.run("ip", "link", "set", f"x-{one.port}", "down"),
                lambda: self.ovn.outside.run("ip", "link", "set", f"x-{one.port}", "up"),
            ),
            "forwarding off": (
                lambda: one.netns.run("sysctl", "-qw", "net.ipv4.ip_forward=0"),
                lambda: one.netns.run("sysctl", "-qw", "net.ipv4.ip_forward=1"),
            ),
            "AdminDown": (lambda: bfdd_control(one, "session all state admin"), restart),
            "silence": (lambda: bfdd_control(one, "session all suspend"), restart),
            "natgw drain": (lambda: one.natgw("drain"), lambda: one.natgw("undrain")),
            "SIGTERM": (lambda: one.process and one.process.send_signal(signal.SIGTERM), lambda: self.reap(one)),
        }

    def last_one(self, name: str, deed: Callable[[], object]) -> None:
        """The only gateway alive ends: when does OVN know?"""
        self.settle(disturbed=False)
        self.other.end(signal.SIGKILL)
        self.ovn.wait_serving(self.one)
        time.sleep(SETTLED)
        assert self.one.process is not None
        deed()
        begin = time.monotonic()
        while self.ovn.serving() and time.monotonic() < begin + PATIENCE:
            time.sleep(0.005)
        known = f"{1000 * (time.monotonic() - begin):.0f}" if not self.ovn.serving() else f"not in {PATIENCE} s"
        print(f"the only gateway, {name}: OVN knows after {known}", flush=True)
        if self.one.process.poll() is None:
            self.one.process.kill()
        self.reap(self.one)

    def last_ones(self) -> dict[str, Callable[[], object]]:
        """The ends of the only gateway, by name."""
        signaled = lambda how: self.one.process and self.one.process.send_signal(how)  # noqa: E731
        return {
            "SIGTERM": lambda: signaled(signal.SIGTERM),
            # Killed often enough that the next one comes after OVN's detection time.
            "its speaker killed again and again": lambda: [self.one.kill_speaker() for _ in range(6)],
            "its container killed": lambda: signaled(signal.SIGKILL),
        }

    @staticmethod
    def reap(gateway: Gateway) -> None:
        assert gateway.process is not None
        gateway.process.wait(30)
        gateway.process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interval", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    ovn = Ovn((chosen.interval, 3), HEALTH)
    print(f"3 x {chosen.interval} ms; health probes every 200 ms, fall 400 ms; {chosen.runs} runs each; milliseconds")
    print(f"{'':36}{'moved: least':>14}{'median':>8}{'most':>8}{'hole: most':>12}{'lost':>6}")
    try:
        bench = Bench(ovn)
        if not chosen.only:
            for name, deed in bench.last_ones().items():
                bench.last_one(name, deed)
        for name, (deed, undo) in bench.deeds().items():
            for disturbed in (False, True):
                if chosen.only not in name:
                    continue
                outcomes: list[Outcome] = []
                for _ in range(chosen.runs):
                    bench.settle(disturbed)
                    outcomes.append(failover(ovn, bench.one, deed))
                    undo()
                report(name + (", just after" if disturbed else ""), outcomes)
    finally:
        ovn.close()


def report(name: str, outcomes: list[Outcome]) -> None:
    moved = [1000 * outcome.moved for outcome in outcomes if outcome.moved is not None]
    hole = max(1000 * outcome.hole for outcome in outcomes)
    lost = max(outcome.lost for outcome in outcomes)
    figures = f"{min(moved):14.0f}{statistics.median(moved):8.0f}{max(moved):8.0f}{hole:12.0f}{lost:6d}"
    print(f"{name:36}{figures}", flush=True)


if __name__ == "__main__":
    main()
