"""Makes the kernel ask its neighbours on the outer interface as often as the health probes want to know.

Left alone the kernel trusts an answer for up to 45 s, and then waits another 5 s before it asks again. Its timers are
per interface (``ip ntable``), and to set them takes CAP_NET_ADMIN. A pod that speaks BFD runs as user 65534, which has
no capability of its own, and iproute2 throws away what it was given as a file capability. So the pod's init container
does it, which is root (init-vpc-egress-gateway.sh); the speaker only tries where the timers are not set yet, and says
what is to be expected where it may not.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gateway.bfd.netlink import Netlink
from gateway.bfd.probes import NOWHERE
from gateway.bfd.settings import HealthSettings
from gateway.small.loop import Loop

_SILENT = tuple((os.POSIX_SPAWN_OPEN, descriptor, "/dev/null", os.O_RDWR, 0) for descriptor in (0, 1, 2))


def commands(family: int, interface: str, gateway: str, interval: int) -> list[list[str]]:
    """What sets the timers, and what makes them apply to the gateway's entry; ``interval`` is microseconds."""
    table = "arp_cache" if family == socket.AF_INET else "ndisc_cache"
    milliseconds = interval // 1000
    # The kernel draws its reachable time between a half and one and a half of the base, which it rounds to its ticks.
    timers = f"base_reachable {milliseconds // 2} delay_probe 0 retrans {milliseconds}"
    return [
        f"ip ntable change name {table} dev {interface} {timers}".split(),
        # An entry from before goes by the timers that it began with, unless it is doubted now. There may be none.
        f"ip neigh change {gateway} dev {interface} nud stale".split(),
    ]


def is_quick(family: int, interface: str, interval: int, root: Path = Path("/proc/sys/net")) -> bool:
    """Whether the kernel asks on this interface at least once per interval."""
    timers = root / ("ipv4" if family == socket.AF_INET else "ipv6") / "neigh" / interface
    try:
        base = int((timers / "base_reachable_time_ms").read_text())
        delay = int((timers / "delay_first_probe_time").read_text())
    except (OSError, ValueError):
        return False
    return delay == 0 and base * 3 <= 2 * interval // 1000


class Quicken:
    """``commands`` without waiting for them, where they are needed. ``log`` is told where they are not allowed."""

    def __init__(self, loop: Loop, interval: int, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._interval = interval
        self._log = log

    def __call__(self, family: int, interface: str, gateway: str) -> None:
        if is_quick(family, interface, self._interval):
            return
        timers, doubt = commands(family, interface, gateway, self._interval)
        self._run(
            timers,
            lambda: self._run(doubt, lambda: None, lambda: None),
            lambda: self._log(
                f"may not set the kernel's timers: that the gateway behind {interface} is gone is noticed at the "
                "kernel's own pace, within a minute"
            ),
        )

    def _run(self, argv: list[str], done: Callable[[], None], refused: Callable[[], None]) -> None:
        try:
            pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=_SILENT)
            descriptor = os.pidfd_open(pid)
        except OSError:
            refused()
            return

        def ended() -> None:
            self._loop.forget(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            (refused if os.waitstatus_to_exitcode(status) else done)()

        self._loop.watch(descriptor, ended)


def apply(environment: Mapping[str, str]) -> list[str]:
    """Set the timers on the way out of each family, and return the interfaces where they are set; none where health is
    not watched. Raises OSError, ValueError."""
    settings = HealthSettings.read(environment)
    done: list[str] = []
    if not settings.enabled:
        return done
    kernel = Netlink()
    for family, nowhere in NOWHERE.items():
        egress = kernel.egress(settings.gateways.get(family, nowhere))
        gateway = settings.gateways.get(family) or (egress.gateway if egress is not None else None)
        link = kernel.link(egress.interface) if egress is not None else None
        if gateway is None or link is None:
            continue
        for argv in commands(family, link.name, gateway, settings.interval):
            pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=_SILENT)
            os.waitpid(pid, 0)
        if is_quick(family, link.name, settings.interval):
            done.append(link.name)
    return done


def main(argv: Sequence[str]) -> int:
    """``natgw_bfd.py quicken``, as root, before the speaker starts. Ends with 1 when no timer could be set."""
    try:
        done = apply(os.environ)
    except (OSError, ValueError) as error:
        print(f"quicken: {error}", file=sys.stderr)
        return 1
    print(f"neighbour timers are set on: {', '.join(done) or 'no interface'}")
    return 0 if done else 1
