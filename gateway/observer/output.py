"""The log of flows on stdout, and complaints on stderr. Whoever reads them slowly, or not at all, holds nobody up."""

from __future__ import annotations

import os
import select
import sys
from collections import deque
from collections.abc import Callable, Mapping

from gateway.observer.metrics import Tally, add

QUEUE = 4096
"""Records that wait for a reader at most."""

STDERR = 2


def write_if_possible(fileno: int, data: bytes) -> bool:
    """Write at most PIPE_BUF bytes: all of them, or nothing when that would have to wait. Raises OSError.

    A pipe that select calls writable has room for a page, and PIPE_BUF is no more than that. The descriptor may be
    shared with others, so it is not made non-blocking.
    """
    if not select.select([], [fileno], [], 0)[1]:
        return False
    while data:
        data = data[os.write(fileno, data) :]
    return True


class RecordWriter:
    """Writes log records in their order. ``write`` is ``write_if_possible`` of the descriptor."""

    def __init__(self, write: Callable[[bytes], bool], tally: Tally) -> None:
        self._write = write
        self._tally = tally
        self._waiting: deque[tuple[str, bytes]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: str, line: bytes) -> None:
        """Write a record when there is room, or drop it when too many wait."""
        if len(self._waiting) >= QUEUE:
            add(self._tally.drops, "queue_full")
        else:
            self._waiting.append((event, line))

    def flush(self) -> None:
        """Write as many records as there is room for, always whole ones."""
        while self._waiting:
            events: list[str] = []
            batch = b""
            for event, line in self._waiting:
                if events and len(batch) + len(line) > select.PIPE_BUF:
                    break
                events.append(event)
                batch += line
            try:
                if not self._write(batch):
                    return
            except OSError:
                add(self._tally.drops, "write_error", len(events))
            else:
                for event in events:
                    add(self._tally.records, event)
            for _ in events:
                self._waiting.popleft()


class Complaints:
    """Says on stderr what is wrong, once for as long as it is the same."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._last: dict[str, str] = {}

    @property
    def standing(self) -> Mapping[str, str]:
        """Who cannot do its work now, and why."""
        return self._last

    def say(self, who: str, what: str) -> None:
        """``who`` cannot do its work."""
        if self._last.get(who) == what:
            return
        self._last[who] = what
        try:
            write_if_possible(STDERR, f"{who}: {what}\n".encode()[: select.PIPE_BUF])
        except OSError:
            self._tally.errors[who, "diagnostic_write"] += 1

    def well(self, who: str) -> None:
        """``who`` can do its work; the next trouble is news."""
        self._last.pop(who, None)


def fail(program: str, reason: object) -> int:
    """Say why a program ends; its exit code."""
    if isinstance(reason, OSError) and reason.strerror:
        reason = f"{reason.filename}: {reason.strerror}" if reason.filename else reason.strerror
    print(f"{program}: {reason}", file=sys.stderr)
    return 1
