"""Drift: what others changed in the kernel of what is ours. When to look for it, and what was found.

First comes cheap evidence (``gateway.watch``), asked for when the kernel sends an event and twice a second anyway.
Where it says that somebody wrote, everything is read and compared; what differs is repaired by the same one operation
that every change goes through, or (``NATGW_DRIFT=report``) only told. Because not every write leaves evidence, a full
comparison is made now and then as well, so rarely that it costs a thousandth of a core.

Another program that insists on its own state would make this a busy loop: after a few repairs in a row the next one
waits, each time twice as long, and the status says so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from gateway import meters
from gateway.journal import Journal
from gateway.ports import Clock
from gateway.status import DriftEntry, DriftStatus

Policy = Literal["repair", "report"]

POLL_SECONDS = 0.5
COMPARE_SHARE, COMPARE_SECONDS = 1000, 60.0
"""A full comparison comes at intervals of so many times what it took, and of at least so many seconds."""
LOOK_SHARE, LOOK_PAUSE = 9, 0.5
"""After a look that evidence asked for there is none for so many times what it took: a tenth of a core at most. The
pause is no longer than this, or than the look was: what the kernel tells of is to be seen within a second."""
REPAIRS_IN_A_ROW, CALM_SECONDS, LONGEST_HOLD = 5, 10.0, 60.0
"""Repairs follow at once until there were so many of the same things, each within the calm after the one before; then
they wait."""
_KEPT, _LINES = 20, 50
_FIGHT = "another program keeps changing what is ours: repairs wait from now on, longer each time"


class Evidence(Protocol):
    """What is asked of ``gateway.watch.Watch``."""

    def changed(self) -> Collection[str]: ...

    def settle(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Look:
    """Look now: because of evidence about these domains or, with none, because it is time to compare everything."""

    because: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.because) or "comparison"


class Drift:
    """The schedule and the ledger. The writer's thread calls everything but ``status`` and ``differs``."""

    def __init__(
        self, clock: Clock, journal: Journal, policy: Policy = "repair", watch: Evidence | None = None
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._journal = journal
        self._watch = watch
        now = clock.monotonic()
        self._next_poll = now + POLL_SECONDS
        self._next_compare = now + COMPARE_SECONDS
        self._not_before = now
        self._told: set[str] = set()  # domains of which there is news, until they were looked at
        self._cost = 0.0
        self._looks = self._repairs = self._row = 0
        self._last_repair = -CALM_SECONDS
        self._held_until = now
        self._lately: deque[frozenset[str]] = deque(maxlen=REPAIRS_IN_A_ROW)
        self._differs: tuple[str, ...] = ()
        self._entries: deque[DriftEntry] = deque(maxlen=_KEPT)

    # --- when to look -------------------------------------------------------------------------------------

    def hint(self) -> None:
        """Somebody says that something happened: ask for the evidence at the next ``due`` already."""
        self._next_poll = self._clock.monotonic()
        if self._watch is None:
            self._told.add("kernel")

    def wait(self) -> float:
        """Seconds until ``due`` is worth asking."""
        next_look = max(self._not_before, self._held_until) if self._told else self._next_compare
        return max(0.0, min(next_look, self._next_poll) - self._clock.monotonic())

    def due(self, *, writing: bool = False) -> Look | None:
        """Whether to look now; ``writing``: chains are about to be made good, which must not hide what others did."""
        now = self._clock.monotonic()
        if now >= self._next_poll or writing:
            self._next_poll = now + POLL_SECONDS
            self._told |= set(self._watch.changed() if self._watch else ())
        if now < max(self._not_before, self._held_until) and not (writing and self._told):
            return None
        if self._told:
            return Look(tuple(sorted(self._told)))
        return Look() if now >= self._next_compare else None

    def looked(self, seconds: float) -> None:
        """Book a look at everything that took this long."""
        now = self._clock.monotonic()
        self._told.clear()
        self._looks += 1
        self._cost = seconds
        self._not_before = now + min(LOOK_SHARE * seconds, max(LOOK_PAUSE, seconds))
        self._next_compare = now + max(COMPARE_SECONDS, COMPARE_SHARE * seconds)

    # --- what was found -----------------------------------------------------------------------------------

    @property
    def differs(self) -> tuple[str, ...]:
        """What differed at the last look and was not repaired since."""
        return self._differs

    def agrees(self) -> None:
        """The kernel, as it was read last, is as wanted."""
        self._settle()
        self._differs = ()

    def found(self, differences: tuple[str, ...], by: Look) -> None:
        """The kernel differs. What is only reported is told once, as long as it stays the same."""
        if self.policy == "report" and differences != self._differs:
            self._note(differences, by, repaired=False, seconds=0.0)
        self._settle()
        self._differs = differences

    def _settle(self) -> None:
        if self._watch is not None:
            self._watch.settle()

    def repaired(self, differences: tuple[str, ...], by: Look, seconds: float) -> None:
        """What was found is right again."""
        now = self._clock.monotonic()
        self._repairs += 1
        if now > max(self._held_until, self._last_repair) + CALM_SECONDS:
            self._lately.clear()
        again = any(not earlier.isdisjoint(differences) for earlier in self._lately)
        self._lately.append(frozenset(differences))
        self._row = self._row + 1 if again else 1
        self._last_repair = now
        over = self._row - REPAIRS_IN_A_ROW
        self._held_until = now + min(LONGEST_HOLD, 2.0**over) if over >= 0 else now
        self._note(differences, by, repaired=True, seconds=seconds)
        if over == 0:
            self._journal.record("drift", "others", _FIGHT, level=logging.WARNING)

    def _note(self, differences: tuple[str, ...], by: Look, *, repaired: bool, seconds: float) -> None:
        meters.DRIFT_FOUND.add(str(by), amount=len(differences))
        if repaired:
            meters.DRIFT_REPAIRS.add(str(by), amount=len(differences))
        kept = list(differences[:_LINES])
        at = self._clock.time()
        entry = DriftEntry(
            at=at, noticed_by=str(by), differences=kept, count=len(differences), repaired=repaired, seconds=seconds
        )
        self._entries.appendleft(entry)
        first = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        done = "" if repaired else "; not repaired (NATGW_DRIFT=report)"
        self._journal.record(
            "repair" if repaired else "drift",
            f"others, noticed by {by}",
            first + done,
            level=logging.WARNING,
            seconds=seconds if repaired else None,
            data={"noticedBy": str(by), "differences": kept, "count": len(differences), "repaired": repaired},
        )

    def status(self) -> DriftStatus:
        """How it stands; any thread."""
        now = self._clock.monotonic()
        held = self._held_until - now
        return DriftStatus(
            policy=self.policy,
            differs=list(self._differs[:_LINES]),
            repairs=self._repairs,
            repairs_in_a_row=self._row if now < max(self._held_until, self._last_repair) + CALM_SECONDS else 0,
            next_repair_in_seconds=held if held > 0 else None,
            looks=self._looks,
            look_seconds=self._cost,
            compare_in_seconds=max(0.0, self._next_compare - now),
            last=self._entries[0] if self._entries else None,
        )

    def entries(self) -> list[DriftEntry]:
        """What was found lately, the newest first; any thread."""
        return list(self._entries)
