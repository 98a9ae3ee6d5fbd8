"""Timing programs from outside, as a controller sees them: from their start until all they hold is closed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

Milliseconds = float


def program(argv: Sequence[str], *, stdin: str = "", environment: Mapping[str, str] | None = None) -> Milliseconds:
    """How long a program takes that must succeed in silence; it runs in the calling thread's namespace."""
    begun = time.perf_counter()
    done = subprocess.run(argv, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False)
    took = 1000 * (time.perf_counter() - begun)
    if (done.returncode, done.stderr) != (0, ""):
        raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr or done.stdout}")
    return took


def call(function: Callable[[], object]) -> Milliseconds:
    """How long a call takes."""
    begun = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begun)
