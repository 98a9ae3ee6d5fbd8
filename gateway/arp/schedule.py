"""When which address is announced on one link: a pure scheduler, told the time in monotonic seconds.

An address that is new to us is announced ``count`` times, ``interval`` apart; an address asked for again
once. Everything passes one token bucket, so that a thousand addresses leave as a stream that switches and
their ARP policers accept, not as a burst that they drop. Two kinds of sending share it:

* what a caller waits for (``announce``) may empty the bucket: the first frames are out when it returns;
* what falls due later (``due``: repeats, and what did not fit) leaves half of it untouched. So an address
  added while thousands are being re-announced still goes out at once.

Rejected: one timer per address (nothing would bound the sum), and sleeping between frames (nobody else
could use the thread).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from gateway.arp.conflict import Conflict, Conflicts
from gateway.arp.frame import MalformedFrame, announcement, format_mac, parse
from gateway.arp.pace import Bucket


@dataclass(frozen=True, slots=True)
class Timing:
    """How often and how fast; seconds, frames and frames a second.

    RFC 5227 has ANNOUNCE_NUM 2 and ANNOUNCE_INTERVAL 2 s; three at 0, 1, 2 s is what Kube-OVN's own
    image puts on the wire (``arping -c 3``), and what survives one lost frame.
    """

    count: int = 3
    interval: float = 1.0
    spacing: float = 1.0
    """Shortest time from an announcement of an address to one more for the asking, or for a link that flaps."""
    rate: float = 2000.0
    """A thousand addresses leave in half a second; on the wire that is 1.3 Mbit/s."""
    burst: int = 50

    def __post_init__(self) -> None:
        if self.count < 1 or self.interval < 0 or self.spacing < 0:
            raise ValueError(f"{self}: count must be at least 1, interval and spacing not negative")


@dataclass(slots=True)
class _Entry:
    remaining: int
    sent: float = float("-inf")
    due: float = float("inf")
    ticket: int = 0


class Schedule:
    """The standing addresses of one link, the announcements they still owe, and their other holders.

    Not thread-safe. While ``mac`` is unknown (``link_changed(None, …)``, the state it starts in) addresses
    may come and go, but nothing falls due and no frame is a conflict.
    """

    def __init__(self, timing: Timing = Timing()) -> None:
        self._timing = timing
        self._bucket = Bucket(timing.rate, timing.burst)
        self._reserve = timing.burst // 2
        self._entries: dict[IPv4Address, _Entry] = {}
        # (due, ticket, address); an item whose ticket is not its entry's any more is void.
        self._queue: list[tuple[float, int, IPv4Address]] = []
        self._tickets = 0
        self._mac: bytes | None = None
        self._last_mac: bytes | None = None
        self._conflicts = Conflicts()

    @property
    def standing(self) -> frozenset[IPv4Address]:
        """The addresses that are ours."""
        return frozenset(self._entries)

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Other holders seen of standing addresses, in the time given to ``received``."""
        return self._conflicts.all()

    def announce(self, addresses: Iterable[IPv4Address], now: float) -> list[bytes]:
        """Make the addresses stand; returns the frames to send before the caller answers.

        Missing among them are addresses announced less than ``spacing`` ago, and those beyond the burst:
        these follow through ``due``.
        """
        frames = []
        for address in addresses:
            entry = self._entries.get(address)
            if entry is None:
                entry = self._entries[address] = _Entry(self._timing.count)
            elif entry.remaining == 0:
                entry.remaining = 1
            if self._mac is None:
                continue
            at = max(now, entry.sent + self._timing.spacing)
            if at <= now and self._bucket.take(now):
                frames.append(self._emit(self._mac, address, entry, now))
            elif at < entry.due:
                self._enqueue(address, entry, at)
        return frames

    def withdraw(self, addresses: Iterable[IPv4Address]) -> None:
        """The addresses are not ours any more: nothing more is sent for them. Unknown ones are no error."""
        gone = {address for address in addresses if self._entries.pop(address, None) is not None}
        if gone:
            self._conflicts.forget(gone)

    def link_changed(self, mac: bytes | None, now: float) -> None:
        """The link can carry announcements from ``mac`` from now on, or (None) cannot carry any.

        When it can again, or from another hardware address, every standing address is announced anew;
        not sooner than ``spacing`` allows, except for a new hardware address, which nobody knows yet.
        """
        if mac == self._mac:
            return
        self._mac = mac
        self._queue.clear()
        if mac is None:
            return
        moved = mac != self._last_mac
        self._last_mac = mac
        for address, entry in self._entries.items():
            entry.remaining = self._timing.count
            self._enqueue(address, entry, now if moved else max(now, entry.sent + self._timing.spacing))

    def due(self, now: float) -> list[bytes]:
        """The frames to send now; ``next_due`` then says when to ask again."""
        frames = []
        while self._mac is not None and self._head() <= now and self._bucket.take(now, leave=self._reserve):
            _, _, address = heapq.heappop(self._queue)
            frames.append(self._emit(self._mac, address, self._entries[address], now))
        return frames

    def next_due(self, now: float) -> float | None:
        """When ``due`` will next have frames: ``now`` or earlier means at once, None never (as things stand).

        A backlog is worth waking for when several frames have become affordable, not for each one.
        """
        head = self._head()
        if head == float("inf"):
            return None
        if head > now:
            return head
        batch = max(1, (self._timing.burst - self._reserve) // 2)
        return self._bucket.holds(self._reserve + batch, now)

    def received(self, frame: bytes, now: float) -> Conflict | None:
        """Look at a frame from the link; a conflict is returned when it should be reported.

        RFC 5227, 2.4: any ARP packet, request or reply, whose sender IP address is ours and whose sender
        hardware address is not. A probe for our address has no sender address; the kernel answers it, and
        the prober is not a holder.
        """
        try:
            arp = parse(frame)
        except MalformedFrame:
            return None
        if self._mac is None or arp.sender_mac == self._mac or arp.sender_ip not in self._entries:
            return None
        return self._conflicts.seen(arp.sender_ip, format_mac(arp.sender_mac), now)

    def _emit(self, mac: bytes, address: IPv4Address, entry: _Entry, now: float) -> bytes:
        entry.sent = now
        entry.remaining -= 1
        entry.due, entry.ticket = float("inf"), 0
        if entry.remaining:
            self._enqueue(address, entry, now + self._timing.interval)
        return announcement(mac, address)

    def _enqueue(self, address: IPv4Address, entry: _Entry, at: float) -> None:
        self._tickets += 1
        entry.due, entry.ticket = at, self._tickets
        heapq.heappush(self._queue, (at, self._tickets, address))

    def _head(self) -> float:
        """When the first item that still counts is due; void ones before it are dropped."""
        while self._queue:
            at, ticket, address = self._queue[0]
            entry = self._entries.get(address)
            if entry is not None and entry.ticket == ticket:
                return at
            heapq.heappop(self._queue)
        return float("inf")
