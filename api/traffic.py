"""What flows through the gateway: the flow watcher's figures, and the kernel's own of its connection tracking."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from gateway.traffic import Conntrack, Traffic
from rules.spec import GatewaySpec

log = logging.getLogger(__name__)

PROC = Path("/proc")
PATIENCE = 5.0
"""Seconds for the flow watcher's answer: it may be in the midst of other work."""
NO_WATCHER = "no flow watcher runs"


class TrafficReader:
    """Reads the traffic of this network namespace; may be used from any thread.

    ``spec`` gives the spec that stands, ``watcher`` is the flow watcher's socket (None: there is none).
    """

    def __init__(self, spec: Callable[[], GatewaySpec | None], watcher: Path | None = None, proc: Path = PROC) -> None:
        self._spec = spec
        self._watcher = watcher
        self._proc = proc

    def __call__(self) -> Traffic:
        """The traffic now; never fails: what cannot be had is said in it."""
        found = self._watched()
        age = max(0.0, time.time() - found.at) if found.at else 0.0
        return found.model_copy(update={"age_seconds": round(age, 3), "conntrack": conntrack(self._proc)})

    def _watched(self) -> Traffic:
        if self._watcher is None:
            return Traffic.unwatched(self._spec(), NO_WATCHER)
        try:
            return Traffic.model_validate_json(asked(self._watcher, b"report\n"))
        except (FileNotFoundError, ConnectionRefusedError):
            return Traffic.unwatched(self._spec(), NO_WATCHER)
        except (OSError, ValidationError) as error:
            log.warning("the flow watcher does not answer as it should: %s", error)
            return Traffic.unwatched(self._spec(), f"the flow watcher does not answer: {error}")


def asked(path: Path, question: bytes) -> bytes:
    """The flow watcher's answer to a line; raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        connection.sendall(question)
        parts = iter(lambda: connection.recv(1 << 18), b"")
        return b"".join(parts)


def conntrack(proc: Path = PROC) -> Conntrack:
    """Entries, greatest number and losses of the table, from procfs; None for what is not there."""
    stat = _statistics(proc / "net/stat/nf_conntrack")
    return Conntrack(
        count=_figure(proc / "sys/net/netfilter/nf_conntrack_count"),
        maximum=_figure(proc / "sys/net/netfilter/nf_conntrack_max"),
        **{name: stat.get(name) for name in ("insert_failed", "drop", "early_drop", "invalid")},
    )


def warnings(table: Conntrack) -> list[str]:
    """What people should know of the table: that it is full."""
    if table.count is None or not table.maximum or table.count < table.maximum:
        return []
    so_far = f" ({table.drop:,} packets so far)" if table.drop else ""
    return [f"the connection tracking table is full ({table.maximum:,} entries): new connections are dropped{so_far}"]


def _figure(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistics(path: Path) -> dict[str, int]:
    """The columns of a table with a line of hexadecimal numbers for each CPU, summed up."""
    try:
        head, *lines = path.read_text().splitlines()
        rows = [[int(word, 16) for word in line.split()] for line in lines]
    except (OSError, ValueError):
        return {}
    return {name: sum(column) for name, column in zip(head.split(), zip(*rows, strict=True), strict=False)}
