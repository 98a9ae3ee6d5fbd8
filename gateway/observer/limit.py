"""A limit on how often something may happen."""

from __future__ import annotations


class TokenBucket:
    """Lets ``rate`` things a second pass on the long run, and ``burst`` of them at once. Full at the beginning."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._counted: int | None = None

    def take(self, now: int) -> bool:
        """Whether one more may pass at ``now``, microseconds of a clock that does not jump."""
        if self._counted is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._counted) * self._rate / 1_000_000)
        self._counted = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
