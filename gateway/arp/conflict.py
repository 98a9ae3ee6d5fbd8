"""Other holders of our addresses, remembered and reported.

Replicas of a gateway hold the same EIPs on one link by design, so another holder is something to show
and never something to fight: RFC 5227, 2.4 (b) and (c) would defend the address, we only keep (a)'s
watch. Anybody on the link can forge holders; therefore what is remembered and what is reported is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from gateway.arp.pace import Bucket

REPORT_INTERVAL = 60.0
"""Seconds between two reports of the same holder."""
MAX_HOLDERS = 256
"""Holders remembered at a time; the one silent for longest makes room."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Another holder of one of our addresses; the times are in seconds, of whichever clock the caller uses."""

    address: IPv4Address
    mac: str
    first_seen: float
    last_seen: float
    count: int


@dataclass(slots=True)
class _Holder:
    first_seen: float
    last_seen: float
    reported: float
    count: int


class Conflicts:
    """What has been seen of other holders, and which sighting deserves a report."""

    def __init__(self) -> None:
        self._holders: dict[tuple[IPv4Address, str], _Holder] = {}
        # A flood of forged hardware addresses is a new holder each time: the log is kept to a line a second.
        self._reports = Bucket(rate=1.0, burst=20)

    def seen(self, address: IPv4Address, mac: str, now: float) -> Conflict | None:
        """Count one sighting; the conflict itself when it should be reported now, else None."""
        key = (address, mac)
        holder = self._holders.pop(key, None)
        if holder is None:
            if len(self._holders) >= MAX_HOLDERS:
                del self._holders[next(iter(self._holders))]
            holder = _Holder(first_seen=now, last_seen=now, reported=float("-inf"), count=0)
        self._holders[key] = holder  # re-inserted: the dict's order is the order of the last sightings
        holder.last_seen = now
        holder.count += 1
        if now - holder.reported < REPORT_INTERVAL or not self._reports.take(now):
            return None
        holder.reported = now
        return _conflict(key, holder)

    def forget(self, addresses: set[IPv4Address]) -> None:
        """Drop the holders of addresses that are ours no longer."""
        self._holders = {key: holder for key, holder in self._holders.items() if key[0] not in addresses}

    def all(self) -> tuple[Conflict, ...]:
        """Every holder remembered, the one seen last at the end."""
        return tuple(_conflict(key, holder) for key, holder in self._holders.items())


def _conflict(key: tuple[IPv4Address, str], holder: _Holder) -> Conflict:
    address, mac = key
    return Conflict(address, mac, holder.first_seen, holder.last_seen, holder.count)
