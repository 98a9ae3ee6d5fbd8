"""Who talks most: the busiest addresses of an interval. Pure; memory is bounded whatever addresses come."""

from __future__ import annotations

import heapq
import socket
from collections.abc import Iterable
from typing import NamedTuple

from gateway.watcher.accounts import ACTIVE_IN, ACTIVE_OUT, BYTES_IN, BYTES_OUT, NEW_IN, NEW_OUT, SUMS

TOP = 20
"""Addresses that are told."""
MOST = 8192
"""Addresses whose traffic of an interval is kept apart; at more, the lesser half is forgotten."""


class Talker(NamedTuple):
    """An address, what it did in the interval, and its connections that live."""

    address: str
    sums: list[int]


class Talkers:
    """The addresses of one side."""

    def __init__(self) -> None:
        self._living: dict[bool, dict[bytes, int]] = {True: {}, False: {}}
        """Living connections, opened from outside (True) and from inside, by address."""
        self._sums: dict[bytes, list[int]] = {}
        self.top: tuple[Talker, ...] = ()
        """Those of the last interval."""

    def opened(self, address: bytes, inbound: bool) -> None:
        """A connection lives."""
        living = self._living[inbound]
        living[address] = living.get(address, 0) + 1

    def closed(self, address: bytes, inbound: bool) -> None:
        """It has ended."""
        living = self._living[inbound]
        left = living[address] - 1
        if left:
            living[address] = left
        else:
            del living[address]

    def of(self, address: bytes) -> list[int]:
        """The sums of the interval, to add to."""
        sums = self._sums.get(address)
        if sums is None:
            if len(self._sums) >= MOST:
                self._prune()
            sums = self._sums[address] = [0] * SUMS
        return sums

    def _prune(self) -> None:
        kept = heapq.nlargest(MOST // 2, self._sums.items(), key=lambda item: _weight(item[1]))
        self._sums = dict(kept)

    def tick(self) -> None:
        """The interval has ended, another one begins."""
        for address in self._holders():
            self.of(address)
        found = heapq.nlargest(TOP, self._sums.items(), key=lambda item: (*_weight(item[1]), self._held(item[0])))
        for address, sums in found:
            sums[ACTIVE_IN] = self._living[True].get(address, 0)
            sums[ACTIVE_OUT] = self._living[False].get(address, 0)
        self.top = tuple(Talker(_text(address), sums) for address, sums in found)
        self._sums = {}

    def _holders(self) -> Iterable[bytes]:
        """Those with most connections, busy or not."""
        return [a for living in self._living.values() for a in heapq.nlargest(TOP, living, key=living.__getitem__)]

    def _held(self, address: bytes) -> int:
        return sum(living.get(address, 0) for living in self._living.values())


def _weight(sums: list[int]) -> tuple[int, int]:
    return sums[BYTES_IN] + sums[BYTES_OUT], sums[NEW_IN] + sums[NEW_OUT]


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
