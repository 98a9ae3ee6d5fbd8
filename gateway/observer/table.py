"""The flows that are alive, and what is counted of flows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from gateway.observer import ctnetlink
from gateway.observer.flow import END, START, Counters, Flow, Labels, is_of, labels, pack, unpack

CAPACITY = 65536
"""Flows that are remembered; the one that changed longest ago makes room."""

_NOTHING = Counters(0, 0, 0, 0)
_EVENT_NAMES = {ctnetlink.NEW: "new", ctnetlink.UPDATE: "update", ctnetlink.DESTROY: "end"}


class Series:
    """What is counted of the flows that share their labels."""

    __slots__ = ("active", "counted", "ended", "original", "reply", "started")

    def __init__(self) -> None:
        self.active = self.started = self.ended = 0
        self.counted = False
        """Whether the kernel ever told packets and bytes."""
        self.original = [0, 0]
        """Packets and bytes in the direction of the first packet."""
        self.reply = [0, 0]

    def add(self, before: Counters, now: Counters) -> None:
        """Count what came in between; a counter that went back began anew."""
        self.counted = True
        for sums, first in ((self.original, 0), (self.reply, 2)):
            for i in (0, 1):
                old, new = before[first + i], now[first + i]
                sums[i] += new - old if new >= old else new


class _Entry:
    """A flow as it is remembered; many of these exist."""

    __slots__ = ("counters", "generation", "packed", "series", "started")

    def __init__(self, flow: Flow, series: Series, started: bool, generation: int) -> None:
        self.packed = pack(flow)
        self.series = series
        self.started = started
        self.generation = generation
        self.counters = flow.counters


class FlowTable:
    """Learns of flows from events and from dumps of the kernel's table, and tells ``happened`` of starts and ends.

    A dump takes a while and events go on meanwhile: ``begin_dump``, ``dumped`` for each of its flows, ``end_dump``.
    When ``end_dump`` is called, the events of the time before the end of the dump must have been given.

    A flow whose identifier is that of another living one (see ``is_of``) is not remembered, and counted when it ends.
    """

    def __init__(self, happened: Callable[[str, Flow], None], capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.events = dict.fromkeys(_EVENT_NAMES.values(), 0)
        self.evictions = 0
        self.accounting = False
        """Whether the kernel tells packets and bytes."""
        self.series: dict[Labels, Series] = {}
        self._happened = happened
        self._series: dict[int, Series] = {}
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._generation = 0
        self._ended_since: set[int] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget the flows and their sums, not how many events there have been."""
        self._entries.clear()
        self.series.clear()
        self._series.clear()
        self.accounting = False
        self._ended_since = None

    def event(self, kind: str, flow: Flow) -> None:
        """The kernel told of a change: NEW, UPDATE or DESTROY."""
        self.events[_EVENT_NAMES[kind]] += 1
        key = _key(flow)
        entry = self._entries.get(key)
        if entry is not None and not is_of(entry.packed, flow):
            self._unremembered(kind, flow)
            return
        if kind == ctnetlink.DESTROY:
            self._destroy(key, entry, flow)
            return
        if entry is None:
            entry = self._insert(key, flow)
            if self._ended_since is not None:
                # A new connection may get the identifier of one that ended.
                self._ended_since.discard(key)
        else:
            self._account(entry, flow)
            entry.generation = self._generation
            self._entries.move_to_end(key)
        # A dump may have told of it first.
        if kind == ctnetlink.NEW and not entry.started:
            entry.started = True
            entry.series.started += 1
            self._happened(START, flow)

    def _unremembered(self, kind: str, flow: Flow) -> None:
        """An event of a flow whose identifier stands for another."""
        series = self._series_of(flow)
        if kind == ctnetlink.NEW:
            series.started += 1
            self._happened(START, flow)
        elif kind == ctnetlink.DESTROY:
            series.ended += 1
            if flow.counters is not None:
                series.add(_NOTHING, flow.counters)
            self._happened(END, flow)

    def begin_dump(self) -> None:
        """A dump has been asked for."""
        self._generation += 1
        self._ended_since = set()

    def unchanged(self, identifier: int, counters: Counters) -> bool:
        """Whether the dump tells nothing new of this flow of zone 0: then that it lives is all there is to note."""
        entry = self._entries.get(identifier)
        if entry is None or entry.counters != counters:
            return False
        entry.generation = self._generation
        return True

    def dumped(self, flow: Flow) -> None:
        """The dump contains this flow."""
        key = _key(flow)
        entry = self._entries.get(key)
        if entry is not None:
            if is_of(entry.packed, flow):
                self._account(entry, flow)
                entry.generation = self._generation
        elif (self._ended_since is None or key not in self._ended_since) and len(self._entries) < self.capacity:
            # It is not worth more than the ones that are remembered, so none makes room for it.
            self._insert(key, flow)

    def end_dump(self) -> None:
        """The dump is complete: a flow that neither it nor an event has told of since it began has ended."""
        self._ended_since = None
        gone = [key for key, entry in self._entries.items() if entry.generation != self._generation]
        for key in gone:
            entry = self._entries[key]
            flow = unpack(entry.packed, key & 0xFFFFFFFF, key >> 32, entry.counters)
            self._destroy(key, entry, flow)

    def _destroy(self, key: int, entry: _Entry | None, flow: Flow) -> None:
        if entry is not None:
            self._account(entry, flow)
            entry.series.active -= 1
            del self._entries[key]
        if self._ended_since is not None:
            self._ended_since.add(key)
        self._series_of(flow).ended += 1
        self._happened(END, flow)

    def _insert(self, key: int, flow: Flow) -> _Entry:
        if len(self._entries) >= self.capacity:
            _, oldest = self._entries.popitem(last=False)
            oldest.series.active -= 1
            self.evictions += 1
        series = self._series_of(flow)
        entry = self._entries[key] = _Entry(flow, series, False, self._generation)
        series.active += 1
        if flow.counters is not None:
            self.accounting = True
            series.add(_NOTHING, flow.counters)
        return entry

    def _account(self, entry: _Entry, flow: Flow) -> None:
        if flow.counters is not None:
            self.accounting = True
            entry.series.add(entry.counters or _NOTHING, flow.counters)
            entry.counters = flow.counters

    def _series_of(self, flow: Flow) -> Series:
        """The series of a flow, found by a number: labels are made once."""
        code = flow.protocol << 3 | flow.ipv6 << 2 | flow.nat
        series = self._series.get(code)
        if series is None:
            series = self._series[code] = self.series.setdefault(labels(flow), Series())
        return series


def _key(flow: Flow) -> int:
    return flow.zone << 32 | flow.identifier
