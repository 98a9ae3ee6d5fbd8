"""A planned end: peers are led to send their traffic elsewhere, and what is on its way still goes through.

The kernel forwards for as long as the pod is there, so draining is waiting: until every peer has noticed, and then
until the count of forwarded packets stands still, or the grace is over.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from gateway.bfd.packet import Diag, State
from gateway.bfd.speaker import Speaker
from gateway.bfd.withdrawal import Withdrawal
from gateway.small.loop import Loop

QUIET = 1_000_000
"""Microseconds without a forwarded packet after which the traffic counts as moved."""
LOOK = 100_000
"""Microseconds between looks at the count."""


class Phase(Enum):
    """How far a drain is; the value is what people read."""

    NONE = "none"
    TELLING = "telling the peers"
    MOVING = "traffic is moving"
    DONE = "done"


def forwarded(root: Path = Path("/proc/self/net")) -> int:
    """How many packets the kernel has forwarded in this network namespace (RFC 4293, ipForwDatagrams). 0 if unknown."""
    total = 0
    try:
        names, values = [line.split() for line in (root / "snmp").read_text().splitlines() if line.startswith("Ip: ")]
        total += int(values[names.index("ForwDatagrams")])
        for line in (root / "snmp6").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "Ip6OutForwDatagrams":
                total += int(value)
    except (OSError, ValueError):
        # A kernel without IPv6 has no snmp6; what was read before counts.
        return total
    return total


class Drain:
    """Takes all sessions away and watches the traffic go, as a participant of ``loop``.

    ``grace`` is how long that may take at most, in microseconds, ``done`` is called at its end.
    """

    def __init__(
        self,
        loop: Loop,
        speaker: Speaker,
        withdrawal: Withdrawal,
        *,
        grace: int,
        done: Callable[[], None],
        count: Callable[[], int] = forwarded,
    ) -> None:
        self.phase = Phase.NONE
        self.told: int | None = None
        """After how many microseconds every peer had noticed."""
        self.moved: int | None = None
        """After how many microseconds the last packet was forwarded; None also when the grace ended before."""
        self._loop = loop
        self._speaker = speaker
        self._withdrawal = withdrawal
        self._grace = grace
        self._done = done
        self._count = count
        self._begun = 0
        self._seen = 0
        self._grown = 0
        self._next_look = 0
        loop.add(self)

    @property
    def active(self) -> bool:
        """The gateway is being drained, or is drained."""
        return self.phase is not Phase.NONE

    def begin(self) -> None:
        """Send the traffic elsewhere. Without effect on a drain that has begun."""
        if self.active:
            return
        now = self._loop.clock()
        self._begun = self._next_look = self._grown = now
        self.told = self.moved = None
        serving = any(entry.session.state is State.UP for entry in self._speaker.table.entries)
        self._disable(now)
        self.phase = Phase.TELLING
        if not serving:
            # No peer sends anything here.
            self._finish(now)

    def cancel(self) -> None:
        """Take traffic again."""
        if not self.active:
            return
        self.phase = Phase.NONE
        now = self._loop.clock()
        for entry in self._speaker.table.entries:
            if self._withdrawal.taken(entry, Diag.ADMINISTRATIVELY_DOWN):
                self._withdrawal.give(entry, now)

    def status(self) -> dict[str, Any]:
        """For people and programs; seconds."""
        return {
            "Phase": self.phase.value,
            "ToldAfter": None if self.told is None else self.told / 1_000_000,
            "MovedAfter": None if self.moved is None else self.moved / 1_000_000,
        }

    def next_timer(self) -> int | None:
        """When the traffic is looked at next."""
        return self._next_look if self.phase in (Phase.TELLING, Phase.MOVING) else None

    def tick(self, now: int) -> None:
        """Keep sessions down that came to be meanwhile, and look whether the traffic has gone."""
        if not self.active:
            return
        self._disable(now)
        if self.phase is Phase.DONE:
            return
        if self.phase is Phase.TELLING and self._withdrawal.done:
            self.phase, self.told, self._grown = Phase.MOVING, now - self._begun, now
            self._seen = self._count()
        if now < self._next_look:
            return
        self._next_look = now + LOOK
        if self.phase is Phase.MOVING:
            seen = self._count()
            if seen != self._seen:
                self._seen, self._grown = seen, now
            elif now - self._grown >= QUIET:
                self.moved = self._grown - self._begun
                self._finish(now)
                return
        if now - self._begun >= self._grace:
            self._finish(now)

    def _disable(self, now: int) -> None:
        for entry in self._speaker.table.entries:
            if not self._withdrawal.taken(entry, Diag.ADMINISTRATIVELY_DOWN):
                self._withdrawal.take(entry, Diag.ADMINISTRATIVELY_DOWN, now)

    def _finish(self, now: int) -> None:
        self.phase = Phase.DONE
        if self.told is None and self._withdrawal.done:
            self.told = now - self._begun
        self._done()
