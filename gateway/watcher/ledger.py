"""The connections that live, and the sums that their events change. Pure: a participant gives it events and dumps.

As ``gateway.observer.table`` it learns from both and heals what was lost; but it counts for the objects of a spec, and
a connection beyond its capacity takes nobody's place: it is counted when it ends.

A connection is counted as new when it is first heard of, be that by the event of its beginning, by a dump or, if it was
shorter than what lies between two dumps, by its end; so it makes no difference to the counts whether the kernel tells
of beginnings or not. Only what the first dump finds was there before, and is no new connection.
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
    """Keeps the sums. ``happened`` is told of starts and ends."""

    def __init__(self, happened: Callable[[str, Flow], None], capacity: int = CAPACITY) -> None:
        self.accounts = Accounts()
        self.sources, self.destinations = Talkers(), Talkers()
        """Addresses inside and outside."""
        self.events = {"new": 0, "end": 0}
        self.begun = 0
        """New connections, as many as have been counted."""
        self.accounting = False
        """Whether the kernel tells packets and bytes."""
        self.beyond = 0
        """Connections that were not remembered."""
        self.capacity = capacity
        self.moved = True
        """Whether anything has been counted since this was taken back."""
        self._happened = happened
        self._entries: dict[int, _Entry] = {}
        self._generation = 0
        self._settled = False
        """Whether all that was there before is known, so that what is not known yet is new."""
        self._ended_since: set[int] | None = None
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
        # Its identifier may be another living connection's: then it is counted when it ends, and not remembered.
        taken = entry is not None and not is_of(entry.packed, flow)
        if taken:
            entry = None
        if kind == ctnetlink.DESTROY:
            self.events["end"] += 1
            if entry is not None:
                del self._entries[key]
                self._closed(entry, flow)
            else:
                account = self.accounts.of(flow)
                if self._settled:
                    self._began(account, flow)
                self._moved(account, flow, _NOTHING)
            if self._ended_since is not None and not taken:
                self._ended_since.add(key)
            self._happened(END, flow)
            return
        self.events["new"] += 1
        if entry is None:
            if taken:
                self.beyond += 1
            else:
                entry = self._insert(key, flow)
            if entry is None:
                self._happened(START, flow)
                return
            if self._ended_since is not None:
                # A new connection may get the identifier of one that ended.
                self._ended_since.discard(key)
        # A dump may have told of it first.
        if not entry.started:
            self._starts(entry, flow)

    def begin_dump(self) -> None:
        """A dump has been asked for."""
        self._generation += 1
        self._ended_since = set()
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
            if self._settled:
                self._starts(entry, flow._replace(counters=None))
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
        self._settled = True

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

    def _starts(self, entry: _Entry, flow: Flow) -> None:
        """A connection that is remembered is counted as new."""
        entry.started = True
        self._began(entry.account, flow)
        self._happened(START, flow)

    def _began(self, account: Account, flow: Flow) -> None:
        self.begun += 1
        place = NEW_IN if account.inbound else NEW_OUT
        account.sums[place] += 1
        inside, outside = _ends(account, flow)
        self.sources.of(inside)[place] += 1
        self.destinations.of(outside)[place] += 1

    def _moved(self, account: Account, flow: Flow, before: bytes) -> None:
        """Count what came in between; a counter that went back began anew."""
        if flow.counters is None:
            return
        self.accounting = True
        sent, size, received, size_back = flow.counters
        if before is not _NOTHING:
            held = _COUNTERS.unpack(before)
            sent, size, received, size_back = (
                new - old if new >= old else new for new, old in zip(flow.counters, held, strict=True)
            )
        if not (sent or size or received or size_back):
            return
        forth, back = (BYTES_IN, BYTES_OUT) if account.inbound else (BYTES_OUT, BYTES_IN)
        inside, outside = _ends(account, flow)
        for sums in (account.sums, self.sources.of(inside), self.destinations.of(outside)):
            sums[forth + 1] += sent
            sums[forth] += size
            sums[back + 1] += received
            sums[back] += size_back

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
