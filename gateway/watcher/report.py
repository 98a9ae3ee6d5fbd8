"""The sums as the daemon asks for them: the JSON of ``gateway.traffic.Traffic``, without what the daemon adds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.watcher.accounts import TOTAL, Key
from gateway.watcher.ledger import Ledger
from gateway.watcher.talkers import Talker

_MOVING = ("bytes", "packets", "activeFlows", "newFlows")
_RATED = {0: "bytesPerSecond", 1: "packetsPerSecond", 3: "newFlowsPerSecond"}
_NO_RATES = (0.0,) * 8
# The places in sums of each direction's four figures.
_IN, _OUT = (0, 1, 4, 6), (2, 3, 5, 7)


class Rates:
    """What changed in the last interval, per second."""

    def __init__(self) -> None:
        self.at = 0.0
        """When it ended, Unix seconds."""
        self.seconds = 0.0
        self._began: float | None = None
        self._before: dict[Key, list[int]] = {}
        self._rates: dict[Key, tuple[float, ...]] = {}

    def tick(self, sums: dict[Key, list[int]] | None, monotonic: float, now: float) -> None:
        """An interval ends; ``monotonic`` and ``now`` in seconds. Without sums none has changed in it."""
        if sums is None:
            self.seconds = 0.0 if self._began is None else monotonic - self._began
            self._began, self.at, self._rates = monotonic, now, {}
            return
        if self._began is not None and monotonic > self._began:
            self.seconds = monotonic - self._began
            self._rates = {
                key: tuple((value - old) / self.seconds for value, old in zip(held, self._before[key], strict=True))
                for key, held in sums.items()
                if key in self._before
            }
        self._began, self.at, self._before = monotonic, now, sums

    def of(self, key: Key) -> tuple[float, ...]:
        """The rates of an object, at the places of its sums."""
        return self._rates.get(key, _NO_RATES)


def report(ledger: Ledger, rates: Rates, collector: Mapping[str, Any], flow_log: Mapping[str, Any]) -> str:
    """The whole document."""
    accounts = ledger.accounts
    objects, sums = accounts.objects, accounts.sums()

    def both(key: Key) -> dict[str, Any]:
        return _both(sums[key], rates.of(key))

    ports = {eip: _ports(len(use), use.busiest()) for eip, use in accounts.ports.items()}
    document = {
        "at": rates.at,
        "intervalSeconds": round(rates.seconds, 3),
        "collector": {
            "running": True,
            "accounting": ledger.accounting,
            "flows": len(ledger),
            "capacity": ledger.capacity,
            "beyondCapacity": ledger.beyond,
            "events": ledger.events,
            **collector,
        },
        "flowLog": flow_log,
        "total": both(TOTAL),
        "eips": [
            {"eip": eip, **both(("eip", eip)), **({"snatPorts": ports[eip]} if eip in ports else {})}
            for eip in objects.eips
        ],
        "fips": [{"eip": eip, "internalIp": inside, **both(("fip", eip, inside))} for eip, inside in objects.fips],
        "dnats": [
            {
                "eip": eip,
                "externalPort": port,
                "protocol": protocol,
                "shared": shared,
                **both(("dnat", eip, port, protocol)),
            }
            for eip, port, protocol, shared in objects.dnats
        ],
        "snats": [{"eip": eip, "internalCIDR": cidr, **both(("snat", eip, cidr))} for eip, cidr in objects.snats],
        "topSources": _talkers(ledger.sources.top, rates.seconds),
        "topDestinations": _talkers(ledger.destinations.top, rates.seconds),
    }
    return json.dumps(document, separators=(",", ":"))


def _both(sums: list[int], rates: tuple[float, ...]) -> dict[str, Any]:
    return {"in": _direction(sums, rates, _IN), "out": _direction(sums, rates, _OUT)}


def _direction(sums: list[int], rates: tuple[float, ...], places: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {name: sums[place] for name, place in zip(_MOVING, places, strict=True)}
    for which, name in _RATED.items():
        found[name] = round(rates[places[which]], 3)
    return found


def _ports(in_use: int, busiest: tuple[str, str, int, int] | None) -> dict[str, Any]:
    names = ("protocol", "address", "port", "inUse")
    return {"inUse": in_use, "busiest": dict(zip(names, busiest, strict=True)) if busiest else None}


def _talkers(top: Iterable[Talker], seconds: float) -> list[dict[str, Any]]:
    def rates(sums: list[int]) -> tuple[float, ...]:
        return tuple(value / seconds for value in sums) if seconds else _NO_RATES

    return [{"address": each.address, **_both(each.sums, rates(each.sums))} for each in top]
