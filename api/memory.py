"""How the daemon's memory is kept: for a state of many thousand objects that stay, and threads that take turns."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_ARENA_MAX = -8  # malloc.h of glibc


def one_heap() -> None:
    """Have all threads allocate from one heap; before there are any others.

    A heap for each keeps what another thread could use: a sixth of all with 50,000 rules. As one thread runs at a time,
    they need not wait for each other. C libraries but glibc have no such setting.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector away while the last state is read: it would take a quarter of the time, and find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def spare_what_stays() -> None:
    """Have the collector pass over what has been loaded: it lives as long as the daemon.

    A state of thousands of objects is made without cycles, in one go: with the usual thresholds the collector would
    look through all that there is several times meanwhile, for 50 ms each.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
