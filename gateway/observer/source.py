"""Connections as the kernel tells of them, over netlink, fed into the flow table.

Two sockets, because a dump and events on the same one could not be told to overflow apart. Both need CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

from gateway.observer import ctnetlink
from gateway.observer.flow import Counters, Flow
from gateway.observer.metrics import CONNTRACK, Tally
from gateway.observer.output import Complaints
from gateway.small.loop import Loop

RETRY = 2_000_000
"""Microseconds until it is tried again when the kernel refused."""


class Pace(NamedTuple):
    """How often the kernel's table is dumped: microseconds from one dump to the next, or so many times (``share``) the
    CPU time of the last one, if that is more; and the same after events were lost."""

    every: int = 60_000_000
    share: int = 100
    overrun_every: int = 1_000_000
    overrun_share: int = 10


class Table(Protocol):
    """What is fed: ``gateway.observer.table.FlowTable`` says what each means."""

    def event(self, kind: str, flow: Flow) -> None: ...

    def begin_dump(self) -> None: ...

    def unchanged(self, identifier: int, counters: Counters) -> bool: ...

    def dumped(self, flow: Flow) -> None: ...

    def end_dump(self) -> None: ...


_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_RECEIVE_BUFFER = 16 << 20  # bytes, which the kernel doubles; a sweep of its table ends 10,000 connections in 10 ms
_BUFFERED = 2 * _RECEIVE_BUFFER >> 9  # events that fit at most
_EVENTS_PER_TURN = 512  # then others are served
_DATAGRAMS_PER_TURN = 4  # of a dump: up to 700 connections
_DATAGRAM = 1 << 16
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NETLINK_DROP_MEMBERSHIP = 270, 1, 2  # linux/netlink.h
_REST = 20_000
"""Microseconds for which events gather once all have been read: a turn of the loop and the kernel's waking of a sleeper
take longer than to read an event."""


def cpu_us() -> int:
    """Microseconds of CPU time of this thread."""
    return time.thread_time_ns() // 1000


class ConntrackSource:
    """Keeps a flow table up to date while it is open, as a participant of ``loop``; hears the events of ``groups``.

    ``count`` says how many connections the kernel tracks, if that can be known. Where it is none there is nothing to
    be dumped: the kernel would walk its whole hash table, which all namespaces share, for 6 ms.
    """

    def __init__(
        self,
        loop: Loop,
        table: Table,
        tally: Tally,
        complaints: Complaints,
        *,
        groups: int = ctnetlink.EVENT_GROUPS,
        pace: Pace | None = None,
        count: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._groups = groups
        self._count = count
        self._pace = pace or Pace()
        self._loop = loop
        self._table = table
        self._tally = tally
        self._complaints = complaints
        self._buffer = memoryview(bytearray(_DATAGRAM))
        self._events: socket.socket | None = None
        self._dump: socket.socket | None = None
        self._sequence = 0
        self._reader = ctnetlink.FlowReader()
        self._glance = ctnetlink.Glance()
        self._dump_ended = 0
        self.dumps = 0
        """Dumps that came to their end."""
        self.dump_took = 0
        """Microseconds of CPU that the last one took, without the events in between."""
        self.dump_takes = 0
        """And the one under way so far."""
        self._behind = 0
        """After the end of a dump: how many events may have happened before it and are not read yet."""
        self._lost = False
        """Whether events were lost that no dump has made good for."""
        self._next_try: int | None = None
        """When the next dump begins, or the sockets are opened; None while a dump is under way, or when closed."""
        self._rests_until: int | None = None
        """When events are looked at again; None while they are."""
        loop.add(self)

    def open(self) -> None:
        """Begin, or go on, to watch connections."""
        if self._events is None and self._next_try is None:
            self._next_try = self._loop.clock()

    def close(self) -> None:
        """Stop watching."""
        self._give_up()
        self._next_try = None

    def next_timer(self) -> int | None:
        """When the next dump, the next attempt, or the end of a rest is due."""
        return min((at for at in (self._next_try, self._rests_until) if at is not None), default=None)

    def hear(self, groups: int, pace: Pace) -> None:
        """Hear the events of these groups from now on, and dump at this pace.

        What was not heard until now counts as lost: the next dump is soon.
        """
        changed, before = self._groups ^ groups, self._pace
        self._groups, self._pace = groups, pace
        if self._events is None:
            return
        try:
            for number in range(changed.bit_length()):
                if changed >> number & 1:
                    option = _NETLINK_ADD_MEMBERSHIP if groups >> number & 1 else _NETLINK_DROP_MEMBERSHIP
                    self._events.setsockopt(_SOL_NETLINK, option, number + 1)
        except OSError as error:
            self._failed(error)
            return
        self._lost = self._lost or bool(changed & groups)
        if (changed or pace != before) and self._next_try is not None:
            self._plan_dump()

    def tick(self, now: int) -> None:
        """Do what is due."""
        if self._rests_until is not None and now >= self._rests_until:
            self._rests_until = None
            self._watch_events()
        if self._next_try is None or now < self._next_try:
            return
        self._next_try = None
        try:
            if self._events is None:
                self._listen()
            self._begin_dump()
        except OSError as error:
            self._failed(error)

    def _listen(self) -> None:
        self._events = self._socket(self._groups)
        try:
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except OSError as error:
            # Bursts overrun a smaller one earlier, that is all.
            self._tally.errors[CONNTRACK, "set_read_buffer"] += 1
            self._complaints.say("conntrack buffer", f"cannot enlarge it: {error.strerror}")
        self._watch_events()

    def _watch_events(self) -> None:
        assert self._events is not None
        self._loop.watch(self._events.fileno(), self._guarded(self._read_events))

    def _rest(self) -> None:
        """All events are read: nobody waits for the next ones for a while."""
        assert self._events is not None
        if self._rests_until is None:
            self._loop.forget(self._events.fileno())
        self._rests_until = self._loop.clock() + _REST

    def _begin_dump(self) -> None:
        self._sequence += 1
        self.dump_takes = 0
        self._lost = False
        if self._count() == 0:
            self._table.begin_dump()
            self._dumped()
            return
        self._dump = self._socket(0)
        self._dump.send(ctnetlink.dump_request(self._sequence))
        self._table.begin_dump()
        self._loop.watch(self._dump.fileno(), self._guarded(self._timed_dump))

    @staticmethod
    def _socket(groups: int) -> socket.socket:
        opened = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            opened.bind((0, groups))
        except OSError:
            opened.close()
            raise
        return opened

    def _guarded(self, read: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                read()
            except OSError as error:
                self._failed(error)

        return guarded

    def _read_events(self) -> None:
        table, buffer, events, reader = self._table, self._buffer, self._events, self._reader
        assert events is not None
        for _ in range(_EVENTS_PER_TURN):
            try:
                size = events.recv_into(buffer)
            except BlockingIOError:
                self._rest()
                if self._behind:
                    self._end_dump()
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun()
                continue
            try:
                for kind, start, end, _ in ctnetlink.messages(buffer, size):
                    if kind in ctnetlink.EVENTS and (flow := reader.read(buffer, start, end)):
                        table.event(kind, flow)
            except ctnetlink.Malformed as error:
                self._malformed(error)
            if self._behind:
                self._behind -= 1
                if not self._behind:
                    self._end_dump()

    def _timed_dump(self) -> None:
        begun = cpu_us()
        done = self._read_dump()
        self.dump_takes += cpu_us() - begun
        if done:
            self._dumped()

    def _dumped(self) -> None:
        """All has been told; what happened until then may wait to be read."""
        self._behind = _BUFFERED
        self._read_events()

    def _read_dump(self) -> bool:
        """Read some of it; whether that was its end."""
        table, buffer, dump = self._table, self._buffer, self._dump
        for _ in range(_DATAGRAMS_PER_TURN):
            assert dump is not None
            try:
                size = dump.recv_into(buffer)
            except BlockingIOError:
                return False
            try:
                for kind, start, end, code in ctnetlink.messages(buffer, size, self._sequence):
                    if kind == ctnetlink.DUMPED:
                        seen = self._glance.at(buffer, start, end)
                        if seen is not None and table.unchanged(*seen):
                            continue
                        if flow := self._reader.read(buffer, start, end):
                            table.dumped(flow)
                            self._glance.learn(buffer, start, end)
                    elif kind == ctnetlink.FAILED:
                        raise OSError(code, os.strerror(code))
                    elif kind == ctnetlink.DONE:
                        self._close_dump()
                        return True
            except ctnetlink.Malformed as error:
                self._malformed(error)
        return False

    def _end_dump(self) -> None:
        begun = cpu_us()
        self._behind = 0
        self._table.end_dump()
        self._tally.up[CONNTRACK] = True
        self._complaints.well(CONNTRACK)
        self._dump_ended = self._loop.clock()
        self.dump_takes += cpu_us() - begun
        self.dumps += 1
        self.dump_took = self.dump_takes
        self._plan_dump()

    def _plan_dump(self) -> None:
        _, _, least, share = self._pace if self._lost else (0, 0, *self._pace[:2])
        self._next_try = self._dump_ended + max(least, share * self.dump_took)

    def _overrun(self) -> None:
        """The kernel had to drop events. Its table still tells which connections live."""
        self._tally.errors[CONNTRACK, "overrun"] += 1
        self._lost = True
        if self._next_try is not None:
            self._plan_dump()

    def _malformed(self, error: ctnetlink.Malformed) -> None:
        self._tally.errors[CONNTRACK, "decode"] += 1
        self._complaints.say("conntrack message", str(error))

    def _failed(self, error: OSError) -> None:
        self._give_up()
        self._tally.errors[CONNTRACK, "session"] += 1
        self._complaints.say(CONNTRACK, error.strerror or str(error))
        self._next_try = self._loop.clock() + RETRY

    def _give_up(self) -> None:
        self._tally.up[CONNTRACK] = False
        self._close_dump()
        self._behind = 0
        if self._events is not None:
            if self._rests_until is None:
                self._loop.forget(self._events.fileno())
            self._rests_until = None
            self._events.close()
            self._events = None

    def _close_dump(self) -> None:
        if self._dump is not None:
            with suppress(KeyError):
                # It is not watched yet when asking for the dump failed.
                self._loop.forget(self._dump.fileno())
            self._dump.close()
            self._dump = None
