"""One thread, one ``select``, and everybody's timers: what each of the small processes runs in.

``select`` and not ``epoll``, because Python rounds the timeout of the latter up to whole milliseconds, and because a
dozen descriptors are all there ever are.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from typing import Protocol


def monotonic_us() -> int:
    """Microseconds of a clock that never jumps."""
    return time.monotonic_ns() // 1000


class Participant(Protocol):
    """Something that has timers."""

    def next_timer(self) -> int | None:
        """When ``tick`` wants to be called, microseconds of the loop's clock."""
        ...

    def tick(self, now: int) -> None:
        """Do what is due; called at least once per turn of the loop."""
        ...


class Loop:
    """Waits for descriptors and timers. Callbacks must not block."""

    def __init__(self, clock: Callable[[], int] = monotonic_us) -> None:
        self.clock = clock
        self._selector = selectors.SelectSelector()
        self._participants: list[Participant] = []
        self._stopped = False

    def add(self, participant: Participant) -> None:
        """Serve its timers from now on; first added, first served."""
        self._participants.append(participant)

    def watch(self, fileno: int, readable: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        """Call ``readable`` when the descriptor is ready; replaces what was asked for this descriptor before."""
        if fileno in self._selector.get_map():
            self._selector.modify(fileno, events, readable)
        else:
            self._selector.register(fileno, events, readable)

    def forget(self, fileno: int) -> None:
        """Undo ``watch``."""
        self._selector.unregister(fileno)

    def stop(self) -> None:
        """Make ``run`` return after this turn."""
        self._stopped = True

    def run(self) -> None:
        """Turn until ``stop``."""
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Wait for the next thing to happen and let everybody react."""
        due = [at for participant in self._participants if (at := participant.next_timer()) is not None]
        timeout = max(0, min(due) - self.clock()) / 1_000_000 if due else None
        for key, _ in self._selector.select(timeout):
            # A callback earlier in this turn may have closed this one's descriptor.
            if key.fd in self._selector.get_map():
                key.data()
        for participant in self._participants:
            participant.tick(self.clock())


def on_signals(loop: Loop, asked: Callable[[], None]) -> None:
    """Call ``asked`` inside the loop for every SIGTERM and SIGINT, also while it waits."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def read() -> None:
        for number in os.read(read_end, 64):
            if number in (signal.SIGTERM, signal.SIGINT):
                asked()

    loop.watch(read_end, read)
