"""What flows through the gateway: the flow watcher's figures, and the kernel's own of its connection tracking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gateway.traffic import Conntrack, Traffic
from rules.spec import GatewaySpec

PROC = Path("/proc")
NO_WATCHER = "no flow watcher runs"


class TrafficReader:
    """Reads the traffic of this network namespace; may be used from any thread. ``spec`` gives the spec that stands."""

    def __init__(self, spec: Callable[[], GatewaySpec | None], proc: Path = PROC) -> None:
        self._spec = spec
        self._proc = proc

    def __call__(self) -> Traffic:
        """The traffic now; never fails: what cannot be had is said in it."""
        return Traffic.unwatched(self._spec(), NO_WATCHER).model_copy(update={"conntrack": conntrack(self._proc)})


def conntrack(proc: Path = PROC) -> Conntrack:
    """Entries, greatest number and losses of the table, from procfs; None for what is not there."""
    stat = _statistics(proc / "net/stat/nf_conntrack")
    return Conntrack(
        count=_figure(proc / "sys/net/netfilter/nf_conntrack_count"),
        maximum=_figure(proc / "sys/net/netfilter/nf_conntrack_max"),
        **{name: stat.get(name) for name in ("insert_failed", "drop", "early_drop", "invalid")},
    )


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
