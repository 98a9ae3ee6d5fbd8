"""The connections that live, and the sums that their events change. Pure: a participant gives it events and dumps.

As ``gateway.observer.table`` it learns from both and heals what was lost; but it counts for the objects of a spec, and
a connection beyond its capacity takes nobody's place: it is counted when it begins and when it ends.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from gateway.observer import ctnetlink
from gateway.observer.flow import END, START, Counters, Flow, is_of, pack, unpack
from gateway.watcher.accounts import (
    ACTIVE_IN,
    ACTIVE_OUT,
    BYTES_IN,
    BYTES_OUT,
    NEW_IN,
    NEW_OUT,
    Account,
    Accounts,
    Objects,
)
from gateway.watcher.talkers import Talkers

CAPACITY = 262_144
"""Connections that are remembered: as many as the kernel's table holds by default."""

_COUNTERS = struct.Struct("=QQQQ")
_NOTHING = bytes(_COUNTERS.size)


class _Entry:
    """A connection as it is remembered; hundreds of thousands of these exist."""

    __slots__ = ("account", "counters", "generation", "packed", "started")

    def __init__(self, flow: Flow, account: Account, generation: int) -> None:
        self.packed = pack(flow)
        self.account = account
        self.generation = generation
        self.started = False
        self.counters = _NOTHING


class Ledger:
    """Keeps the sums. ``happened`` is told of starts and ends; ``lost`` says how often events were lost so far."""

    def __init__(
        self, happened: Callable[[str, Flow], None], lost: Callable[[], int], capacity: int = CAPACITY
    ) -> None:
        self.accounts = Accounts()
        self.sources, self.destinations = Talkers(), Talkers()
        """Addresses inside and outside."""
        self.events = {"new": 0, "end": 0}
        self.accounting = False
        """Whether the kernel tells packets and bytes."""
        self.beyond = 0
        """Connections that were not remembered."""
        self.capacity = capacity
        self.moved = True
        """Whether anything has been counted since this was taken back."""
        self._happened = happened
        self._lost = lost
        self._lost_before = 0
        self._entries: dict[int, _Entry] = {}
        self._generation = 0
        self._ended_since: set[int] | None = None
        self._discovered: list[int] = []
        self._spec_changed = self._attributing = False
        """Whether the spec has changed since the last dump began, and before it."""

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, objects: Objects) -> None:
        """The spec has changed. Whose the known connections are is looked at again when the next dump tells of them."""
        self.accounts.set(objects)
        self._spec_changed = self.moved = True

    def change(self, gone: Objects, fresh: Objects) -> None:
        """As ``set``, where only so much has changed."""
        self.accounts.change(gone, fresh)
        self._spec_changed = self.moved = True

    # What gateway.observer.source feeds

    def event(self, kind: str, flow: Flow) -> None:
        """The kernel told of a connection: NEW or DESTROY."""
        self.moved = True
        key = flow.zone << 32 | flow.identifier
        entry = self._entries.get(key)
        taken = entry is not None and not is_of(entry.packed, flow)
        if kind == ctnetlink.DESTROY:
            self.events["end"] += 1
            if entry is None or taken:
                account = self.accounts.of(flow)
                self._moved(account, flow, _NOTHING)
            else:
                del self._entries[key]
                self._closed(entry, flow)
            if self._ended_since is not None and not taken:
                self._ended_since.add(key)
            self._happened(END, flow)
            return
        self.events["new"] += 1
        if taken:
            # Its identifier is another living connection's: it is counted, and not remembered.
            self.beyond += 1
            entry = None
        elif entry is None:
            entry = self._insert(key, flow)
            if self._ended_since is not None:
                # A new connection may get the identifier of one that ended.
                self._ended_since.discard(key)
        if entry is None:
            self._began(self.accounts.of(flow), flow)
        elif not entry.started:
            # A dump may have told of it first.
            entry.started = True
            self._began(entry.account, flow)

    def begin_dump(self) -> None:
        """A dump has been asked for."""
        self._generation += 1
        self._ended_since = set()
        self._discovered = []
        self._attributing, self._spec_changed = self._spec_changed, False

    def unchanged(self, identifier: int, counters: Counters) -> bool:
        """Whether the dump tells nothing new of a connection of zone 0; that it lives is then all there is to note."""
        entry = self._entries.get(identifier)
        if entry is None or self._attributing or _COUNTERS.pack(*counters) != entry.counters:
            return False
        entry.generation = self._generation
        return True

    def dumped(self, flow: Flow) -> None:
        """The dump contains this connection."""
        self.moved = True
        key = flow.zone << 32 | flow.identifier
        entry = self._entries.get(key)
        if entry is None:
            if self._ended_since is not None and key in self._ended_since:
                return
            entry = self._insert(key, flow)
            if entry is None:
                return
            self._discovered.append(key)
        elif not is_of(entry.packed, flow):
            return
        elif self._attributing:
            self._reattribute(entry, flow)
        entry.generation = self._generation
        if flow.counters is not None:
            counted = _COUNTERS.pack(*flow.counters)
            if counted != entry.counters:
                self._moved(entry.account, flow, entry.counters)
                entry.counters = counted

    def end_dump(self) -> None:
        """The dump is complete: a connection that neither it nor an event has told of since it began has ended."""
        self._ended_since = None
        for key in [key for key, entry in self._entries.items() if entry.generation != self._generation]:
            entry = self._entries.pop(key)
            self.moved = True
            counters = Counters(*_COUNTERS.unpack(entry.counters)) if self.accounting else None
            flow = unpack(entry.packed, key & 0xFFFFFFFF, key >> 32, counters)
            self._closed(entry, flow)
            self._happened(END, flow)
        if self._lost() != self._lost_before:
            self._lost_before = self._lost()
            # Nobody told, or will tell, of the beginning of these.
            for key in self._discovered:
                entry_ = self._entries.get(key)
                if entry_ is not None and not entry_.started:
                    entry_.started = True
                    self._began(entry_.account, unpack(entry_.packed, key & 0xFFFFFFFF, key >> 32, None))
        self._discovered = []

    # Sums

    def _insert(self, key: int, flow: Flow) -> _Entry | None:
        """Remember a connection that lives; None where there is no room."""
        if len(self._entries) >= self.capacity:
            self.beyond += 1
            return None
        account = self.accounts.of(flow)
        entry = self._entries[key] = _Entry(flow, account, self._generation)
        account.sums[ACTIVE_IN if account.inbound else ACTIVE_OUT] += 1
        if account.ports is not None:
            account.ports.take(flow)
        inside, outside = _ends(account, flow)
        self.sources.opened(inside, account.inbound)
        self.destinations.opened(outside, account.inbound)
        return entry

    def _closed(self, entry: _Entry, flow: Flow) -> None:
        account = entry.account
        account.sums[ACTIVE_IN if account.inbound else ACTIVE_OUT] -= 1
        if account.ports is not None:
            account.ports.release(flow)
        inside, outside = _ends(account, flow)
        self.sources.closed(inside, account.inbound)
        self.destinations.closed(outside, account.inbound)
        self._moved(account, flow, entry.counters)

    def _began(self, account: Account, flow: Flow) -> None:
        place = NEW_IN if account.inbound else NEW_OUT
        account.sums[place] += 1
        inside, outside = _ends(account, flow)
        self.sources.of(inside)[place] += 1
        self.destinations.of(outside)[place] += 1
        self._happened(START, flow)

    def _moved(self, account: Account, flow: Flow, before: bytes) -> None:
        """Count what came in between; a counter that went back began anew."""
        if flow.counters is None:
            return
        self.accounting = True
        old = _COUNTERS.unpack(before)
        grown = [new - held if new >= held else new for new, held in zip(flow.counters, old, strict=True)]
        if not any(grown):
            return
        forth, back = (BYTES_IN, BYTES_OUT) if account.inbound else (BYTES_OUT, BYTES_IN)
        inside, outside = _ends(account, flow)
        for sums in (account.sums, self.sources.of(inside), self.destinations.of(outside)):
            sums[forth + 1] += grown[0]
            sums[forth] += grown[1]
            sums[back + 1] += grown[2]
            sums[back] += grown[3]

    def _reattribute(self, entry: _Entry, flow: Flow) -> None:
        """Whose connection it is may have changed with the spec.

        What it has carried stays where it was counted, for counters do not go back; but one that began before we heard
        of its rule takes everything along: it was counted for no rule, and its EIP's sum stays the same.
        """
        account = self.accounts.of(flow)
        old = entry.account
        if account is old:
            return
        for before, now in zip(_share(entry, old), _share(entry, account), strict=True):
            old.sums[before.place] -= before.value
            account.sums[now.place] += now.value
        if old.inbound != account.inbound:
            # Which end is inside has changed with it.
            inside, outside = _ends(old, flow)
            self.sources.closed(inside, old.inbound)
            self.destinations.closed(outside, old.inbound)
            inside, outside = _ends(account, flow)
            self.sources.opened(inside, account.inbound)
            self.destinations.opened(outside, account.inbound)
        if old.ports is not account.ports:
            if old.ports is not None:
                old.ports.release(flow)
            if account.ports is not None:
                account.ports.take(flow)
        entry.account = account


class _Sum(NamedTuple):
    place: int
    value: int


def _share(entry: _Entry, account: Account) -> list[_Sum]:
    """What goes along when a connection changes its account, as ``account`` counts it."""
    way = 0 if account.inbound else 1
    share = [_Sum(ACTIVE_IN + way, 1)]
    if not entry.account.explained:
        forth, back = (BYTES_IN, BYTES_OUT) if account.inbound else (BYTES_OUT, BYTES_IN)
        packets, size, packets_back, size_back = _COUNTERS.unpack(entry.counters)
        share += [_Sum(NEW_IN + way, int(entry.started)), _Sum(forth + 1, packets), _Sum(forth, size)]
        share += [_Sum(back + 1, packets_back), _Sum(back, size_back)]
    return share


def _ends(account: Account, flow: Flow) -> tuple[bytes, bytes]:
    """The address inside and the one outside."""
    if account.inbound:
        return flow.translated.destination, flow.original.source
    return flow.original.source, flow.original.destination
