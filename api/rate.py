"""How often callers may call over TCP: a token bucket for each caller, and no memory that callers could fill."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

from api.http_problems import problem

CALLERS = 1024
"""So many callers are remembered; who called longest ago is forgotten first."""


class Buckets:
    """``rate`` calls a second in the long run, ``burst`` at once, for each caller."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, and when that was so

    def take(self, caller: str, now: float) -> float:
        """0 if the caller may go on, else the seconds until it may."""
        left, then = self._callers.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._callers[caller] = (left if wait else left - 1, now)
        if len(self._callers) > CALLERS:
            self._callers.popitem(last=False)
        return wait


def network(address: str) -> str:
    """By what callers are told apart: an IPv4 address, or the /64 within which an IPv6 host takes any it likes."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped else str(ip_network((int(parsed) >> 64 << 64, 64)))


class RateLimit:
    """Answers 429 to callers that call more often than the buckets allow, before anything else is looked at."""

    def __init__(self, app: ASGIApp, buckets: Buckets, clock: Callable[[], float]) -> None:
        self._app, self._buckets, self._clock = app, buckets, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wait = self._buckets.take(network(str((scope.get("client") or ("",))[0])), self._clock())
        if not wait or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {"Retry-After": str(math.ceil(wait))}
        detail = f"more than {self._buckets.rate:g} requests a second"
        await problem(429, "too-many-requests", "Too many requests", detail, headers=headers)(scope, receive, send)
