"""Network namespaces for tests: uniquely named, entered by the calling thread, always removed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

import pytest

_CLONE_NEWNET = 0x40000000
_TIMEOUT = 60.0  # seconds; nothing here waits for anybody for long, so only something that hangs takes that


def require(*programs: str) -> None:
    """Fail the test, with the reason, unless it runs as root and all programs are there."""
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces: run it as root")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"this test needs programs that are not installed: {', '.join(missing)}")


class Namespace:
    """A network namespace as ``ip netns`` knows it, with its loopback up."""

    def __init__(self, prefix: str = "t") -> None:
        self.name = f"{prefix}-{os.getpid()}-{secrets.token_hex(3)}"
        run("ip", "netns", "add", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """The stdout of a program that ran in the namespace; fails the test with its stderr if it fails."""
        return run_in(self.name, argv, stdin=stdin, check=check)

    def spawn(self, *argv: str) -> subprocess.Popen[str]:
        """A program left running in the namespace; the caller ends it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread (and what it starts) is inside the namespace; afterwards back where it was."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{self.name}", "rb") as target:
            _setns(target.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def remove(self) -> None:
        """Delete the namespace and with it all its interfaces; twice is once."""
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


def run_in(namespace: str, argv: Sequence[str], *, stdin: str | None = None, check: bool = True) -> str:
    """The stdout of a program that ran in the namespace of that name."""
    return run("ip", "netns", "exec", namespace, *argv, stdin=stdin, check=check)


def run(*argv: str, stdin: str | None = None, check: bool = True) -> str:
    """The stdout of a program; fails the test with its stderr if it fails."""
    done = subprocess.run(
        argv,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def veth(a: Namespace, a_name: str, b: Namespace, b_name: str) -> None:
    """A cable between two namespaces (or within one), both ends up."""
    run("ip", "-n", a.name, "link", "add", a_name, "type", "veth", "peer", "name", b_name, "netns", b.name)
    for end, name in ((a, a_name), (b, b_name)):
        run("ip", "-n", end.name, "link", "set", name, "up")
    for end, name in ((a, a_name), (b, b_name)):
        carried(end, name)


def carried(namespace: Namespace, name: str) -> None:
    """Wait until an interface that was set up carries frames, and the kernel has told so.

    It sees to that in a work queue of its own: before, frames are dropped, and afterwards the link's state changes.
    """
    deadline = time.monotonic() + _TIMEOUT
    while True:
        (link,) = json.loads(run("ip", "-n", namespace.name, "-j", "link", "show", "dev", name))
        if link["operstate"] == "UP":
            return
        assert time.monotonic() < deadline, link
        time.sleep(0.01)


_libc = ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
