"""Effects on network namespaces: make, fill, look into, empty and remove them, through iproute2."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lab.record import LabError

NETNS_DIRECTORY = Path("/run/netns")
_TERM_SECONDS = 5.0


def inside(netns: str, argv: Sequence[str]) -> list[str]:
    """The argument vector that runs a command in a namespace."""
    return ["ip", "netns", "exec", netns, *argv]


def exists(netns: str) -> bool:
    return (NETNS_DIRECTORY / netns).exists()


def add(netns: str) -> None:
    _run(["ip", "netns", "add", netns])


def remove(netns: str) -> None:
    """Remove the namespace, with every link in it; fine when it is gone already."""
    if exists(netns):
        _run(["ip", "netns", "delete", netns])


def batch(netns: str, lines: Iterable[str]) -> None:
    """Run ``ip`` command lines in a namespace; stops at the first that fails. Raises LabError with ip's words."""
    text = list(lines)
    if not text:
        return
    done = subprocess.run(
        ["ip", "-n", netns, "-batch", "-"], input="\n".join(text) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"in {netns}: {_failed_line(done.stderr, text)}")


def sysctl(netns: str, settings: Sequence[str]) -> None:
    _run(inside(netns, ["sysctl", "-q", "-w", *settings]))


def processes(namespaces: Iterable[str]) -> dict[int, str]:
    """Process id -> namespace, of every process that is in one of these namespaces."""
    homes: dict[tuple[int, int], str] = {}
    for name in namespaces:
        with contextlib.suppress(FileNotFoundError):
            status = (NETNS_DIRECTORY / name).stat()
            homes[status.st_dev, status.st_ino] = name
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            home = homes.get(_netns_of(int(entry.name)))
            if home is not None:
                found[int(entry.name)] = home
    return found


def command_of(pid: int) -> str:
    """A process's command line, or nothing when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def empty(namespaces: Sequence[str]) -> list[str]:
    """End every process in the namespaces: SIGTERM, after 5 s SIGKILL. Returns their command lines.

    A pidfd is taken before the namespace is looked at again, so that a reused process id can never be hit.
    """
    if _netns_of(os.getpid()) in {_identity(name) for name in namespaces if exists(name)}:
        raise LabError("This process runs inside one of the lab's namespaces: leave it first.")
    ended: list[str] = []
    for send in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):  # twice: something may have forked meanwhile
        running = processes(namespaces)
        if not running:
            return ended
        with contextlib.ExitStack() as stack:
            handles = [fd for pid, home in running.items() for fd in _handle(stack, pid, home)]
            ended.extend(command_of(pid) for pid in running if send is signal.SIGTERM)
            for fd in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, send)
            _wait_for_exit(handles)
    left = processes(namespaces)
    if left:
        raise LabError(f"Processes {', '.join(map(str, left))} in the lab's namespaces do not end.")
    return ended


def _handle(stack: contextlib.ExitStack, pid: int, home: str) -> Iterator[int]:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        fd = os.pidfd_open(pid)
        stack.callback(os.close, fd)
        if _netns_of(pid) == _identity(home):
            yield fd


def _wait_for_exit(handles: Iterable[int]) -> None:
    """Until every pidfd is readable (its process has ended), or time is up."""
    poller, waiting = select.poll(), set(handles)
    for fd in waiting:
        poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + _TERM_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            waiting.discard(fd)


def _identity(netns: str) -> tuple[int, int]:
    status = (NETNS_DIRECTORY / netns).stat()
    return status.st_dev, status.st_ino


def _netns_of(pid: int) -> tuple[int, int]:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino


def require(programs: Mapping[str, str]) -> None:
    """Raise LabError unless this is root and the programs (name -> Debian package) are there."""
    if os.geteuid() != 0:
        raise LabError("A lab is made of network namespaces, which takes root: run it with sudo.")
    for program, package in programs.items():
        paths = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
        if not any((Path(directory) / program).exists() for directory in paths if directory):
            raise LabError(f"The program {program} is missing: install {package} (apt-get install {package}).")


def _failed_line(stderr: str, lines: Sequence[str]) -> str:
    """ip's complaint, with the command line that it is about (it says only 'Command failed -:<number>')."""
    words = " ".join(stderr.split())
    _, _, number = words.rpartition("-:")
    if number.isdigit() and 0 < int(number) <= len(lines):
        return f"ip {lines[int(number) - 1]}: {words}"
    return words


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
