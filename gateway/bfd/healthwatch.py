"""Runs the probes, and lets the sessions say what they find: Up only while the gateway can do its job."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.bfd import netlink
from gateway.bfd.health import Health, Result
from gateway.bfd.netlink import Netlink
from gateway.bfd.packet import Diag, State
from gateway.bfd.probes import (
    FAMILY_NAMES,
    ForwardingProbe,
    GatewayProbe,
    LinkProbe,
    Outside,
    Probe,
    RulesProbe,
    not_applicable,
)
from gateway.bfd.quicken import Quicken
from gateway.bfd.settings import HealthSettings
from gateway.bfd.table import SessionTable
from gateway.bfd.targets import TargetsProbe
from gateway.bfd.udp import family_of
from gateway.bfd.withdrawal import Withdrawal
from gateway.small.loop import Loop


class HealthWatch:
    """A participant of ``loop``: probes begin every ``interval`` microseconds and have half of it to answer.

    Sessions are kept from their peers while the health is bad, those too that come to be meanwhile. One that somebody
    else holds down stays so when the health is good again.
    """

    def __init__(
        self,
        loop: Loop,
        table: SessionTable,
        withdrawal: Withdrawal,
        *,
        health: Health,
        probes: Sequence[Probe],
        interval: int,
        log: Callable[[str], None],
    ) -> None:
        self.health = health
        self._loop = loop
        self._table = table
        self._withdrawal = withdrawal
        self._probes = list(probes)
        self._interval = interval
        self._log = log
        self._held: dict[int, Diag] = {}
        self._told: tuple[bool, str] | None = None
        self._asked = False
        self._next = loop.clock()
        loop.add(self)

    def next_timer(self) -> int | None:
        """When probes begin or end next."""
        return self._next

    def tick(self, now: int) -> None:
        """Let probes begin or end when it is time, and sessions be as the health is."""
        if now >= self._next:
            # Also after a pause of this process a round has its full time.
            self._next = now + self._interval // 2
            if self._asked:
                self.look(self._probes, now)
            else:
                self._ask(now)
            self._asked = not self._asked
        self._enforce(now)

    def look(self, probes: Iterable[Probe], now: int) -> None:
        """Take what these probes have found."""
        for probe in probes:
            try:
                result = probe.finish(now)
            except OSError as error:
                # A kernel or a sandbox that does not let us look says nothing about the gateway.
                result = not_applicable(f"cannot be looked at: {error.strerror}")
            if result is not None:
                self.health.record(probe.name, result, now)

    def _ask(self, now: int) -> None:
        for probe in self._probes:
            try:
                probe.start(now)
            except OSError as error:
                self.health.record(probe.name, not_applicable(f"cannot be looked at: {error.strerror}"), now)

    def _enforce(self, now: int) -> None:
        health = self.health
        self._tell()
        for entry in self._table.entries:
            if health.healthy:
                diag = self._held.pop(entry.id, None)
                if diag is not None and self._withdrawal.taken(entry, diag):
                    self._withdrawal.give(entry, now)
            elif entry.session.state is not State.ADMIN_DOWN:
                self._held[entry.id] = health.diag
                self._withdrawal.take(entry, health.diag, now)
        for gone in [known for known in self._held if self._table.get(known) is None]:
            del self._held[gone]

    def _tell(self) -> None:
        said = (self.health.healthy, self.health.reason.partition(":")[0])
        if said != self._told:
            self._told = said
            self._log("healthy" if self.health.healthy else f"unhealthy: {self.health.reason}")

    def status(self, now: int) -> dict[str, Any]:
        """For people and programs."""
        health = self.health
        return {
            "Healthy": health.healthy,
            "Reason": health.reason,
            "Seconds": (now - health.since) / 1_000_000,
            "Probes": {name: _described(result) for name, result in health.results.items()},
        }


def _described(result: Result | None) -> dict[str, str]:
    if result is None:
        return {"Verdict": "pending", "Detail": ""}
    return {"Verdict": result.verdict.value, "Detail": result.detail}


def watch(
    loop: Loop,
    table: SessionTable,
    withdrawal: Withdrawal,
    *,
    addresses: Sequence[str],
    settings: HealthSettings,
    log: Callable[[str], None],
) -> HealthWatch | None:
    """Watch the health of a gateway that speaks BFD from ``addresses``; None when that is off, or cannot be."""
    if not settings.enabled:
        log("health is not watched: NATGW_BFD_HEALTH is off")
        return None
    try:
        kernel, events = Netlink(), Netlink(groups=netlink.RTMGRP_LINK)
    except OSError as error:
        log(f"health is not watched: no netlink: {error.strerror}")
        return None
    families = sorted({int(family_of(address)) for address in addresses})
    quicken = Quicken(loop, settings.interval, log)
    links: list[LinkProbe] = []
    probes: list[Probe] = []
    for family in families:
        outside = Outside(kernel, family, settings.gateways.get(family), required=len(families) == 1)
        links.append(LinkProbe(outside))
        probes += [links[-1], GatewayProbe(outside, quicken)]
    if settings.targets:
        probes.append(TargetsProbe(settings.targets, log))
    # Failures of what lies beyond us and of ourselves: RFC 5880 6.8.17 and 4.1.
    diags = dict.fromkeys((probe.name for probe in probes), Diag.CONCATENATED_PATH_DOWN)
    probes += [ForwardingProbe(families), RulesProbe(kernel, families)]
    diags |= dict.fromkeys(("forwarding", "rules"), Diag.PATH_DOWN)
    health = Health(diags, settings.hysteresis, loop.clock())
    made = HealthWatch(loop, table, withdrawal, health=health, probes=probes, interval=settings.interval, log=log)

    def changed() -> None:
        events.drain()
        made.look(links, loop.clock())

    loop.watch(events.socket.fileno(), changed)
    names = " and ".join(FAMILY_NAMES[socket.AddressFamily(family)] for family in families)
    log(f"health is watched every {settings.interval // 1000} ms, {names}")
    return made
