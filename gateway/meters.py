"""What the gateway counts of itself, for whoever reads it (Prometheus, ``natgw status``): all of it is declared here.

    from gateway import meters
    meters.DRIFT_REPAIRS.add("rules")
    meters.VERB_SECONDS.observe(0.012, "eip-add", "ok")

Counting is cheap (about a microsecond) and safe from any thread. Names follow Prometheus' conventions: base units
(seconds, bytes), ``_total`` on what only grows. A meter keeps at most MOST_SERIES combinations of label values; what
comes after those is counted under the value ``other``, so that no caller can make it grow without a bound.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Literal

MOST_SERIES = 200
"""Combinations of label values that one meter keeps apart."""
OTHER = "other"

BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds in seconds: an answered verb takes some milliseconds, and a controller gives up after ten seconds."""

Kind = Literal["counter", "gauge", "histogram"]
Series = tuple[str, ...]
"""The values of a meter's labels, in their order."""

METERS: dict[str, Meter] = {}
"""Every meter by its name, in the order of declaration."""

_lock = threading.Lock()


class Meter:
    """A named measurement with labels; every use gives as many label values as there are labels."""

    kind: Kind

    def __init__(self, name: str, explanation: str, labels: tuple[str, ...] = ()) -> None:
        if name in METERS:
            raise ValueError(f"there is a meter {name} already")
        self.name = name
        self.explanation = explanation
        self.labels = labels
        METERS[name] = self

    def _bounded(self, known: Mapping[Series, object], series: Series) -> Series:
        if len(series) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not values {series}")
        if series in known or len(known) < MOST_SERIES or not series:
            return series
        return (OTHER,) * len(series)


class Counter(Meter):
    """Something that only grows while the daemon lives."""

    kind: Kind = "counter"

    def __init__(self, name: str, explanation: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, explanation, labels)
        self._values: dict[Series, float] = {} if labels else {(): 0}

    def add(self, *series: str, amount: float = 1) -> None:
        """Count ``amount`` more; raises ValueError for a negative one."""
        if amount < 0:
            raise ValueError(f"{self.name} cannot go back by {amount}")
        with _lock:
            series = self._bounded(self._values, series)
            self._values[series] = self._values.get(series, 0) + amount

    def values(self) -> dict[Series, float]:
        """All sums by their label values."""
        with _lock:
            return dict(self._values)


class Gauge(Meter):
    """Something that goes up and down."""

    kind: Kind = "gauge"

    def __init__(self, name: str, explanation: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, explanation, labels)
        self._values: dict[Series, float] = {}

    def set(self, value: float, *series: str) -> None:
        """It is ``value`` now."""
        with _lock:
            self._values[self._bounded(self._values, series)] = value

    def values(self) -> dict[Series, float]:
        """All values by their label values; empty until something was set."""
        with _lock:
            return dict(self._values)


class Distribution:
    """What a histogram holds of one combination of label values: counts per bucket (not summed up), and the sum."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)

    def cumulative(self) -> Iterator[int]:
        """For each bucket, how many values were no greater than its bound; the last is all of them."""
        seen = 0
        for count in self.counts:
            seen += count
            yield seen


class Histogram(Meter):
    """How values (seconds, if nothing else is said) are spread over fixed buckets, with one more beyond the last."""

    kind: Kind = "histogram"

    def __init__(
        self, name: str, explanation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = BUCKETS
    ) -> None:
        super().__init__(name, explanation, labels)
        self.buckets = buckets
        self._values: dict[Series, Distribution] = {}

    def observe(self, value: float, *series: str) -> None:
        """One more value; it belongs to the first bucket whose bound it does not exceed."""
        with _lock:
            series = self._bounded(self._values, series)
            held = self._values.get(series)
            if held is None:
                held = self._values[series] = Distribution(len(self.buckets) + 1)
            held.counts[bisect_left(self.buckets, value)] += 1
            held.sum += value

    def values(self) -> dict[Series, Distribution]:
        """Copies of what was observed, by label values."""
        with _lock:
            found = {}
            for series, held in self._values.items():
                copy = found[series] = Distribution(len(held.counts))
                copy.counts, copy.sum = list(held.counts), held.sum
            return found


# Every meter of the gateway. A new one is a line here, a line where it happens, and its place in docs/metrics.md.

VERB_SECONDS = Histogram(
    "natgw_verb_duration_seconds",
    "Calls of nat-gateway.sh and lb-svc.sh, from the last byte of the question to the answer; "
    "outcome: ok, or failed, which is what the controller takes for an error.",
    ("verb", "outcome"),
)
TRANSACTION_SECONDS = Histogram(
    "natgw_transaction_duration_seconds",
    "Changes in the writer, from its start to the answer; outcome: committed, unchanged, rejected (a contradiction in "
    "the request), failed (the kernel refused).",
    ("outcome",),
)
TRANSACTION_STEPS = Counter("natgw_transaction_steps_total", "Steps that transactions carried out in the kernel.")
WRITER_WAIT_SECONDS = Histogram(
    "natgw_writer_wait_seconds", "How long changes waited for the one writer before theirs was begun."
)
STALE_FLOWS = Counter("natgw_stale_flows_deleted_total", "Connections deleted because their rule had gone or changed.")
DRIFT_FOUND = Counter("natgw_drift_found_total", "Differences found that somebody else made to the kernel.", ("kind",))
DRIFT_REPAIRS = Counter("natgw_drift_repairs_total", "Such differences put right.", ("kind",))
ANNOUNCEMENTS = Counter(
    "natgw_arp_announcements_total", "ARP announcements; outcome: sent, or failed.", ("interface", "outcome")
)
CONFLICTS = Counter(
    "natgw_arp_conflicts_total",
    "Reports of another holder of one of our addresses, at most one a minute for each holder.",
    ("interface",),
)
REFUSED_CONNECTIONS = Counter(
    "natgw_refused_connections_total",
    "Connections and requests that a face of the daemon turned away.",
    ("face", "reason"),
)
HTTP_REQUESTS = Counter("natgw_http_requests_total", "Answered HTTP requests.", ("method", "status"))
WATCHER_STARTS = Counter(
    "natgw_watcher_starts_total", "Starts of the flow watcher; all but the first are because it ended unasked."
)
