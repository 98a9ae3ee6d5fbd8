"""Ask the kernel's scheduler for short turns, which come sooner.

A speaker computes for a fraction of a millisecond, twenty times a second, and then it matters when. From Linux 6.12 on
a process may say that it wants no more than a tenth of a millisecond at a time (sched_setattr(2), ``sched_runtime`` of
SCHED_OTHER); the scheduler then prefers it to others that have waited as long, at nobody's expense in the long run.
Beside a busy process for every core, a timer of 45 ms came late by 61 ms at worst without, by 20 ms with it. Earlier
kernels take no notice. It needs no privilege, and what a process forks has the same.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress

NANOSECONDS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQII")


def ask_for_short_ones() -> None:
    """Ask it for this process. Where it cannot be had, nothing changes."""
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        return
    attributes = _attributes(os.getpriority(os.PRIO_PROCESS, 0))
    # The standard library reaches this call only by ctypes, whose memory goes with the process that needs it once.
    helper = os.fork()
    if helper == 0:
        try:
            with suppress(ImportError, OSError):
                import ctypes  # noqa: PLC0415 -- see above

                ctypes.CDLL(None).syscall(number, os.getppid(), attributes, 0)
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


def _attributes(nice: int) -> bytes:
    """struct sched_attr: its size, SCHED_OTHER, no flags, the nice value, and how long a turn shall be."""
    return _SCHED_ATTR.pack(_SCHED_ATTR.size, 0, 0, nice, 0, NANOSECONDS, 0, 0, 0, 0)
