"""Whether this gateway can do its job, from what its probes report. Pure: results and the time in, a verdict out.

A probe passes, fails, or does not apply here and now. One failure proves little on a real network, so a healthy gateway
becomes unhealthy only when a probe has failed for ``fall`` without a pass in between; and one pass proves little about
a link that comes and goes, so an unhealthy one becomes healthy when for ``rise`` nothing failed. Some failures leave no
doubt (the interface has no carrier): these are ``certain`` and not waited for.

Before every probe has reported once, the gateway counts as unhealthy: traffic must not be attracted on trust. Then the
first reports decide at once.

Time is microseconds, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gateway.bfd.packet import Diag


class Verdict(Enum):
    """What a probe says; the value is what people read."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Result:
    """A verdict with its reason. ``certain`` makes a failure count without waiting for more of them."""

    verdict: Verdict
    detail: str
    certain: bool = False


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """How long a probe must fail, and how long nothing may fail, before the health changes; microseconds."""

    fall: int
    rise: int


class Health:
    """``probes`` maps the name of each probe to the diagnostic that its failure stands for; the first that fails
    names the reason."""

    def __init__(self, probes: Mapping[str, Diag], hysteresis: Hysteresis, now: int) -> None:
        self.healthy = False
        self.reason = "not probed yet"
        self.diag = next(iter(probes.values()), Diag.PATH_DOWN)
        """What a BFD session says that is kept down for the reason (RFC 5880 4.1)."""
        self.since = now
        self.results: dict[str, Result | None] = dict.fromkeys(probes)
        self._diags = dict(probes)
        self._hysteresis = hysteresis
        self._failing_since: dict[str, int] = {}
        self._good_since: int | None = None
        self._judged = False

    def record(self, name: str, result: Result, now: int) -> None:
        """Take what a probe says and judge anew."""
        self.results[name] = result
        if result.verdict is Verdict.FAIL:
            self._failing_since.setdefault(name, now)
        else:
            self._failing_since.pop(name, None)
        self._judge(now)

    def _judge(self, now: int) -> None:
        if None in self.results.values():
            return
        first, self._judged = not self._judged, True
        if self._failing_since:
            self._good_since = None
        elif self._good_since is None:
            self._good_since = now
        if self.healthy:
            self._perhaps_fall(now)
        elif self._good_since is not None and (first or now - self._good_since >= self._hysteresis.rise):
            self.healthy, self.reason, self.since = True, "", now
        elif self._failing_since:
            self._blame(next(name for name in self.results if name in self._failing_since))

    def _perhaps_fall(self, now: int) -> None:
        for name, result in self.results.items():
            since = self._failing_since.get(name)
            if result is None or since is None:
                continue
            if result.certain or now - since >= self._hysteresis.fall:
                self.healthy, self.since = False, now
                self._blame(name)
                return

    def _blame(self, name: str) -> None:
        result = self.results[name]
        self.reason = f"{name}: {result.detail}" if result is not None else name
        self.diag = self._diags[name]
