"""A token bucket: how much may happen now, and when the next may. Time is an argument, in seconds."""

from __future__ import annotations

_ROUNDING = 1e-3
"""Tokens that floating point may lose between ``holds`` and the ``take`` it was asked for."""


class Bucket:
    """Holds at most ``burst`` tokens, starts full, gains ``rate`` tokens a second."""

    def __init__(self, rate: float, burst: int) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"a bucket needs a positive rate and a burst of at least 1, not {rate} and {burst}")
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at = float("-inf")

    def take(self, now: float, leave: int = 0) -> bool:
        """Take one token if at least ``leave`` remain afterwards."""
        self._refill(now)
        if self._tokens < 1 + leave - _ROUNDING:
            return False
        self._tokens -= 1
        return True

    def holds(self, tokens: int, now: float) -> float:
        """The time, now or later, at which the bucket holds that many tokens (no more than ``burst``)."""
        self._refill(now)
        return now + max(0.0, tokens - self._tokens) / self._rate

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._tokens = min(float(self._burst), self._tokens + (now - self._at) * self._rate)
            self._at = now
