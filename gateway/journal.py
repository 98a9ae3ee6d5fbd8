"""What happened to the gateway, as a bounded ring of events that anybody may read, follow and resume.

One event for each change, repair, refusal or thing noticed; nothing while nothing happens. Whoever causes an event
records it, and the log line is made from it, so that log, ``/v1/events`` and the console cannot disagree.

A reader never holds up a writer: each subscription keeps a bounded number of events that its reader has not taken
yet, and counts those it had to let go.

Numbers rise by one from event to event, across restarts of the daemon too (they begin at the milliseconds of the
start), so that a reader that comes back with the last number it saw gets what it missed, as far as the ring reaches.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakSet

from pydantic import Field

from gateway.ports import Clock
from rules.appliance import Spec
from rules.changes import Change, first, summary, touched
from rules.spec import Part
from rules.state import EditTable, Plan

log = logging.getLogger(__name__)

KEPT = 2048
"""Events that the ring holds."""
BACKLOG = 512
"""Events that a subscription holds for its reader."""
SUBSCRIBERS = 64
"""Readers at a time."""
DETAILED = 64
"""Changes that one event lists; of the others it tells the number."""

Outcome = Literal["done", "failed"]


class TooManyReaders(Exception):
    """As many subscriptions as there may be are open."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asked for a change: with which words, and as far as known by which process, user or client."""

    words: str
    pid: int | None = None
    uid: int | None = None
    client: str | None = None

    def __str__(self) -> str:
        return self.words

    @property
    def whence(self) -> str:
        """Process, user and client in words; empty where nothing is known."""
        known = (("pid", self.pid), ("uid", self.uid), ("from", self.client))
        return ", ".join(f"{name} {value}" for name, value in known if value is not None)


class Event(Part):
    """Something that happened.

    ``kind``: change (somebody asked), repair (the gateway made good what was missing), refused (a change that
    contradicts what stands, or that the kernel refused), conflict (another holder of an address), and what other parts
    of the gateway record. ``by``: a verb's words, an HTTP method and path, or a part of the gateway. ``what`` is one
    sentence; ``changes`` the same as data, of which ``more`` are not listed. ``seconds`` without waiting for others.
    """

    id: int
    at: float = Field(description="Unix seconds")
    kind: str
    by: str
    pid: int | None = None
    uid: int | None = None
    client: str | None = None
    what: str
    outcome: Outcome = "done"
    changes: tuple[Change, ...] = ()
    more: int = 0
    steps: int = Field(default=0, description="edits of the kernel")
    flows_deleted: int = 0
    announced: tuple[str, ...] = ()
    seconds: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def line(self) -> str:
        """The event as one line of the log."""
        asker = Asker(self.by, self.pid, self.uid, self.client)
        said = [f"{self.by} ({asker.whence})" if asker.whence else self.by, ": ", self.what]
        if self.outcome == "failed":
            said.insert(0, "failed: ")
        numbers = [
            _counted(self.steps, "step"),
            _counted(self.flows_deleted, "flow", "flows ended"),
            "" if self.seconds is None else f"{self.seconds * 1000:.1f} ms",
        ]
        told = ", ".join(number for number in numbers if number)
        return "".join(said) + (f" [{told}]" if told else "")


def _counted(number: int, one: str, many: str = "") -> str:
    """``1 step``, ``2 steps``; nothing for none."""
    if not number:
        return ""
    return f"{number:,} {many or one + 's'}" if number > 1 else f"1 {one}{many.removeprefix(one + 's')}"


class Journal:
    """The ring and its readers; every method may be called by any thread."""

    def __init__(self, clock: Clock, *, kept: int = KEPT) -> None:
        self._clock = clock
        self._changed = Condition()
        self._ring: deque[Event] = deque(maxlen=kept)
        self._last = int(clock.time() * 1000)
        # Weak: the place of a reader that is lost before it begins to read is free again.
        self._subscriptions: WeakSet[Subscription] = WeakSet()

    def record(
        self,
        kind: str,
        by: Asker | str,
        what: str = "",
        *,
        changed: tuple[Sequence[Change], int] = ((), 0),
        level: int = logging.INFO,
        **more: Any,
    ) -> Event:
        """Keep one event, tell the readers, and write its line to the log at ``level``.

        Without ``what``, the sentence is made from the changes: those listed, and how many more there are. ``more`` are
        other fields of ``Event``.
        """
        asker = Asker(by) if isinstance(by, str) else by
        listed, left = changed
        event = Event(
            id=0,
            at=self._clock.time(),
            kind=kind,
            by=asker.words,
            pid=asker.pid,
            uid=asker.uid,
            client=asker.client,
            what=what or summary(listed, left),
            changes=tuple(listed),
            more=left,
            **more,
        )
        with self._changed:
            self._last += 1
            event = event.model_copy(update={"id": self._last})
            self._ring.append(event)
            for subscription in self._subscriptions:
                subscription._offer(event)
        log.log(level, "%s", event.line, extra={"event": event})
        return event

    def tell(
        self,
        kind: str,
        by: Asker | str,
        old: Spec | None,
        new: Spec,
        plan: Plan,
        *,
        flows_deleted: int = 0,
        announced: tuple[str, ...] = (),
        seconds: float | None = None,
    ) -> Event:
        """Record what was done: by its objects or, where none changed, by what was written."""
        changed = first(DETAILED, old, new)
        return self.record(
            kind,
            by,
            "" if changed[0] else touched(plan),
            changed=changed,
            steps=sum(len(step.edits) if isinstance(step, EditTable) else 1 for step in plan.steps),
            flows_deleted=flows_deleted,
            announced=announced[:DETAILED],
            seconds=seconds,
        )

    def events(self, after: int | None = None, *, limit: int | None = None) -> list[Event]:
        """The events kept whose number is above ``after``, oldest first; of them the last ``limit``."""
        with self._changed:
            found = [event for event in self._ring if after is None or event.id > after]
        return found if limit is None else found[max(len(found) - limit, 0) :]

    def subscribe(self, after: int | None = None, *, wake: Callable[[], None] | None = None) -> Subscription:
        """Follow the events from now on or, with a number, from the one behind it.

        ``wake`` is called (by the recording thread; it must not block) whenever there is something to take.
        Raises TooManyReaders.
        """
        with self._changed:
            if len(self._subscriptions) >= SUBSCRIBERS:
                raise TooManyReaders(f"{SUBSCRIBERS} readers follow the events already")
            subscription = Subscription(self, wake)
            if after is not None:
                missed = [event for event in self._ring if event.id > after]
                if missed and len(missed) == self._ring.maxlen:
                    subscription.lost += max(0, missed[0].id - after - 1)
                for event in missed:
                    subscription._offer(event)
            self._subscriptions.add(subscription)
        return subscription

    def hang_up(self) -> None:
        """End every subscription, so that nobody waits for the events of a daemon that ends."""
        with self._changed:
            for subscription in list(self._subscriptions):
                subscription._end()


class Subscription:
    """One reader's view: events that it has not taken yet. A context manager; leaving it ends it."""

    def __init__(self, journal: Journal, wake: Callable[[], None] | None) -> None:
        self._journal = journal
        self._wake = wake
        self._waiting: deque[Event] = deque()
        self.lost = 0
        """Events that the reader will not get because it was too slow, or came back too late."""
        self.ended = False
        """No more events will come."""

    def take(self) -> list[Event]:
        """What there is, without waiting."""
        with self._journal._changed:
            return self._taken()

    def wait(self, seconds: float | None = None) -> list[Event]:
        """What there is, or else what comes within ``seconds`` (None: however long it takes); empty at the end."""
        with self._journal._changed:
            self._journal._changed.wait_for(lambda: self._waiting or self.ended, seconds)
            return self._taken()

    def close(self) -> None:
        """Take no more."""
        with self._journal._changed:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    # --- with the journal's lock held ---------------------------------------------------------------------

    def _taken(self) -> list[Event]:
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def _offer(self, event: Event) -> None:
        if len(self._waiting) >= BACKLOG:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(event)
        self._tell()

    def _end(self) -> None:
        self.ended = True
        self._journal._subscriptions.discard(self)
        self._tell()

    def _tell(self) -> None:
        self._journal._changed.notify_all()
        if self._wake is not None:
            with suppress(RuntimeError):  # the reader's event loop has been closed
                self._wake()
