"""The gateway's two interfaces: which they are, and what the kernel counts of them."""

from __future__ import annotations

import json
from typing import NamedTuple

INTERNAL, EXTERNAL = "internal", "external"


class InterfaceCounters(NamedTuple):
    """What the kernel counts of an interface."""

    rx_bytes: int = 0
    rx_packets: int = 0
    rx_errors: int = 0
    rx_drops: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    tx_drops: int = 0


def resolve(status: str, external_network: str) -> dict[str, str]:
    """The names of the interfaces by their types, from the network status that Multus writes.

    The internal one is the pod's default interface. Raises ValueError when one is missing.
    """
    found: dict[str, str] = {}
    networks = json.loads(status)
    if not isinstance(networks, list) or not all(isinstance(network, dict) for network in networks):
        raise ValueError("the network status is not a list of networks")
    for network in networks:
        interface = network.get("interface")
        if not isinstance(interface, str) or not interface:
            continue
        if network.get("default") is True:
            found[INTERNAL] = interface
        if network.get("name") == external_network:
            found[EXTERNAL] = interface
    missing = [kind for kind in (INTERNAL, EXTERNAL) if kind not in found]
    if missing:
        raise ValueError(f"the network status names no {' and no '.join(missing)} interface")
    return found


def parse_proc_net_dev(text: str) -> dict[str, InterfaceCounters]:
    """The counters of all interfaces in ``/proc/net/dev`` (proc_net(5)). Raises ValueError."""
    counters: dict[str, InterfaceCounters] = {}
    for line in text.splitlines():
        name, colon, rest = line.rpartition(":")
        fields = rest.split()
        if colon and len(fields) >= 16:
            counters[name.strip()] = InterfaceCounters(*map(int, fields[0:4] + fields[8:12]))
    return counters


class InterfaceSums:
    """Counters that only grow: an interface that was replaced begins at 0 again, its sums do not."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], InterfaceCounters] = {}
        """By name and type."""
        self._last: dict[tuple[str, str], InterfaceCounters] = {}

    def update(self, names: dict[str, str], counters: dict[str, InterfaceCounters]) -> None:
        """Add what was counted since the last time. Raises ValueError when an interface is not there."""
        for kind, name in names.items():
            if name not in counters:
                raise ValueError(f"there is no interface {name} ({kind})")
        for kind, name in names.items():
            now = counters[name]
            last = self._last.get((name, kind), InterfaceCounters())
            sums = self.sums.get((name, kind), InterfaceCounters())
            self._last[name, kind] = now
            self.sums[name, kind] = InterfaceCounters(
                *(have + (new - old if new >= old else new) for have, old, new in zip(sums, last, now, strict=True))
            )

    def clear(self) -> None:
        """Begin anew."""
        self.sums.clear()
        self._last.clear()
