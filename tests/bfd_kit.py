"""Programs of BFD on the loopback, for tests that run them."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOTFS = Path(__file__).parent.parent / "image" / "rootfs"
SUPERVISOR = ROOTFS / "kube-ovn" / "kube-ovn-bfdd-supervisor"
PATIENCE = 60.0  # seconds to wait for what must come, on a busy machine


def loopback() -> str:
    """An address of our own, so that runs beside each other do not meet."""
    return f"127.{random.randint(64, 250)}.{random.randint(0, 255)}.{random.randint(1, 250)}"


def environment(run_dir: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "NATGW_RUN_DIR": str(run_dir),
        "NATGW_PYTHON": sys.executable,
        # This machine need not be a gateway.
        "NATGW_BFD_HEALTH": "off",
        "PATH": f"{ROOTFS / 'usr' / 'bin'}:{os.environ['PATH']}",
        **more,
    }


def run(environ: dict[str, str], *argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False)


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Look again until it holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def background(environ: dict[str, str], *argv: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "it ended without a word"
        yield process
    finally:
        process.kill()
        process.communicate()


def child_of(pid: int) -> int | None:
    """The only child of a process; None while it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) <= 1
    return int(children[0]) if children else None


def peak_mebibytes(pid: int) -> float:
    """The most memory that was resident of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
