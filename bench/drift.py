"""How soon the gateway sees and repairs what others change, and what watching costs when nothing happens.

    .venv/bin/python -m bench.drift [VARIANT]

Twenty times each kind of change; the times are from the end of the program that made it until the kernel held again
what it should. Then half a minute of idleness: the processor time of the daemon and of what it starts, of one core.
Needs root.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from world import A2, Gateway, World

EIP = "192.168.0.50"
ROUNDS, IDLE_SECONDS, PATIENCE = 20, 30, 10.0


def main() -> int:
    """Measure and print."""
    variant = sys.argv[1] if len(sys.argv) > 1 else "legacy"
    with World() as world, world.gateway(variant=variant) as gateway:
        gateway.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("dnat-add", f"{EIP},53,udp,{A2},53")
        gateway.verb("nft-dnat-map-add", f"{EIP},8080,tcp,{A2}:80")
        gateway.verb("eip-egress-qos-add", f"{EIP},1,10,10")
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            # One kind after the other: repairs of the same thing again and again would be made to wait.
            for what, (command, restored) in changes(variant).items():
                times.setdefault(what, []).append(noticed(gateway, command, restored))
        for what, found in times.items():
            middle, last = statistics.median(found), max(found)
            print(f"{variant}, {what}: repaired after {middle * 1000:.0f} ms (median), {last * 1000:.0f} ms at most")
        print(f"{variant}, idle: {idle(gateway):.3%} of a core over {IDLE_SECONDS} s")
    return 0


Restored = Callable[[Gateway], bool]


def changes(variant: str) -> dict[str, tuple[tuple[str, ...], Restored]]:
    """Commands, and how to see that what they did is undone."""
    iptables = f"iptables-{variant}"
    return {
        "a chain flushed": (
            (iptables, "-t", "nat", "-F", "SHARED_DNAT"),
            lambda gateway: "--dport 53 " in gateway.run(iptables, "-t", "nat", "-S", "SHARED_DNAT"),
        ),
        "an address deleted": (
            ("ip", "addr", "del", f"{EIP}/24", "dev", "net1"),
            lambda gateway: EIP in gateway.run("ip", "addr", "show", "dev", "net1"),
        ),
        "a route deleted": (
            ("ip", "route", "del", "10.0.2.0/24"),
            lambda gateway: bool(gateway.run("ip", "route", "show", "10.0.2.0/24")),
        ),
        "ARP switched off": (
            ("ip", "link", "set", "net1", "arp", "off"),
            lambda gateway: "NOARP" not in gateway.run("ip", "link", "show", "net1"),
        ),
        "the shaper deleted": (
            ("tc", "qdisc", "del", "dev", "net1", "root"),
            lambda gateway: "htb" in gateway.run("tc", "qdisc", "show", "dev", "net1"),
        ),
        "the nft table deleted": (
            ("nft", "delete", "table", "ip", "kube-ovn"),
            lambda gateway: "kube-ovn" in gateway.run("nft", "list", "tables"),
        ),
    }


def noticed(gateway: Gateway, command: tuple[str, ...], restored: Restored) -> float:
    """Seconds until the change was undone."""
    time.sleep(0.3)  # a look has just been had; the next one comes after nine times what it took
    gateway.run(*command)
    began = time.monotonic()
    while not restored(gateway):
        if time.monotonic() > began + PATIENCE:
            raise TimeoutError(f"not repaired within {PATIENCE:.0f} s: {' '.join(command)}")
    return time.monotonic() - began


def idle(gateway: Gateway) -> float:
    """Processor time of the daemon and its children, by the time that passed."""
    time.sleep(15)  # what follows a change is over
    before, began = spent(gateway.pid), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (spent(gateway.pid) - before) / (time.monotonic() - began)


def spent(pid: int) -> float:
    """Seconds of processor time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
