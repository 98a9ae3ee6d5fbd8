"""Running the kernel's own tools: no shell, quiet, bounded in time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.ports import Refused

TIMEOUT = 30.0  # seconds; 50,000 rules are restored in one, the rest is for a machine under load


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended and what it said."""

    code: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str], *, stdin: str = "", timeout: float = TIMEOUT, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a program of the PATH in the C locale, with ``environment`` besides ours, and wait for its end.

    Raises Refused if it is not installed (retrying is of no use) or takes longer than ``timeout`` seconds (it is
    killed then, and may be retried).
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise Refused(" ".join(argv), f"{argv[0]} is not installed", retryable=False) from error
    except subprocess.TimeoutExpired as error:
        raise Refused(" ".join(argv), f"took longer than {timeout:g} s", retryable=True) from error
    return Ended(done.returncode, done.stdout, done.stderr)
