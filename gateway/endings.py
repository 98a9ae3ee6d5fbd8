"""Connections that changes made stale, and how far they are ended: soon, but never for long at a time.

A change is answered when its connections are gone, or after ANSWER_SECONDS: one address may have carried hundreds of
thousands. The others go between whatever comes next, SLICE_SECONDS at a time, and readiness is false until they have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway import meters
from gateway.ports import Clock, Flows, Refused
from rules.appliance import Spec, staleness, suspects
from rules.flows import Flow

log = logging.getLogger(__name__)

ANSWER_SECONDS, SLICE_SECONDS = 2.0, 0.2


@dataclass(eq=False)
class _Debt:
    """Connections that began while one of the specs ``since`` stood and do not fit what stands now."""

    since: tuple[Spec, ...]
    work: Iterator[int] | None = None
    """The ending of them, where it has begun."""
    new: Spec | None = None
    """What stands, by which they are judged."""
    judges: tuple[Callable[[Flow], bool], ...] = ()

    def stale(self, flow: Flow) -> bool:
        return any(judge(flow) for judge in self.judges)


class Endings:
    """What is owed, and how it is paid; for the writer's thread, but for ``pending``."""

    def __init__(self, flows: Flows, clock: Clock) -> None:
        self._flows = flows
        self._clock = clock
        self._debts: list[_Debt] = []

    def pending(self) -> list[str]:
        """What is outstanding, in words; any thread."""
        if not self._debts:
            return []
        return [f"stale connections are {'being' if self.under_way else 'not'} deleted"]

    @property
    def under_way(self) -> bool:
        """Whether more can be done at once."""
        return any(debt.work for debt in self._debts)

    def owe(self, old: Spec) -> None:
        """Owe the connections that ``old`` had and that do not fit what stands from now on."""
        self._debts.append(_Debt((old,)))

    def begin(self, new: Spec) -> int:
        """End what is owed and not begun, as far as an answer may wait for it; returns how many connections went."""
        return self._pay(new, [debt for debt in self._debts if not debt.work], ANSWER_SECONDS)

    def go_on(self, new: Spec) -> None:
        """One more slice of what has begun."""
        self._pay(new, [debt for debt in self._debts if debt.work], SLICE_SECONDS)

    def finish(self, new: Spec) -> None:
        """All of what has begun."""
        self._pay(new, [debt for debt in self._debts if debt.work], math.inf)

    def _pay(self, new: Spec, debts: list[_Debt], seconds: float) -> int:
        until = self._clock.monotonic() + seconds
        gone = 0
        try:
            for debt in debts:
                for deleted in self._work(debt, new):
                    gone += deleted
                    if self._clock.monotonic() >= until:
                        return gone
                self._debts.remove(debt)
        except Refused as error:
            log.error("stale connections stay for now: %s", error)
            # What was read so far is of no use for the next try, and one try is enough for all.
            self._debts = [_Debt(tuple(old for debt in self._debts for old in debt.since))]
        finally:
            meters.STALE_FLOWS.add(amount=gone)
        return gone

    def _work(self, debt: _Debt, new: Spec) -> Iterator[int]:
        """The ending of a debt, begun or gone on with; what stands may have changed in the meantime."""
        if debt.new is not new:
            debt.new, debt.judges = new, tuple(staleness(old, new) for old in debt.since)
        if debt.work is None:
            filters = dict.fromkeys(each for old in debt.since for each in suspects(old, new))
            debt.work = self._flows.end(filters, debt.stale) if filters else iter(())
        return debt.work
