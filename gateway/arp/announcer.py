"""The announcer: one ``Schedule`` per interface, driven by the writer thread and by the daemon's event loop.

The writer thread calls ``announce`` and has the first frames on the wire when it returns. Everything that
follows lives in the loop: repeats and backlog (one timer), link messages (link up, another hardware
address, an interface that appears late or goes away), and ARP frames of other holders. Nothing is retried
by polling: what a missing link kept back is sent when the kernel reports the link.

Sockets are opened when first needed, never by the constructor. Listening sockets belong to the loop
thread alone (a descriptor must leave the loop's selector before it is closed); the lock guards the rest.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from threading import Lock
from typing import Protocol

from gateway import meters
from gateway.arp import link as links
from gateway.arp.conflict import Conflict
from gateway.arp.link import Link, LinksLost, Monitor
from gateway.arp.schedule import Schedule, Timing
from gateway.arp.wire import ArpListener, ArpSender
from gateway.ports import Clock, Sender

log = logging.getLogger(__name__)

_LINK_LOST = {errno.ENETDOWN, errno.ENODEV, errno.ENXIO}
_FRAMES_PER_WAKEUP = 64
"""Frames read before the loop serves others again; the rest keeps the descriptor readable."""


class ClosableSender(Sender, Protocol):
    """A ``Sender`` that holds a descriptor."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Port:
    interface: str
    schedule: Schedule
    link: Link | None = None
    sender: ClosableSender | None = None
    listener: ArpListener | None = None
    listening_on: int = field(default=0)
    """Index of the link the listener was opened for."""


class Announcer:
    """Announces IPv4 addresses by ARP on any number of interfaces and watches for their other holders.

    ``on_conflict(interface, conflict)`` is called in the loop thread, at most once a minute for each holder, with times
    in Unix seconds, to tell people of the holder.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        timing: Timing | None = None,
        on_conflict: Callable[[str, Conflict], None] | None = None,
        open_sender: Callable[[str], ClosableSender] = ArpSender,
    ) -> None:
        self._clock = clock
        self._timing = timing or Timing()
        self._on_conflict = on_conflict
        self._open_sender = open_sender
        self._lock = Lock()
        self._ports: dict[str, _Port] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._monitor: Monitor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.sent = 0
        """Frames handed to the kernel so far."""
        self.failed = 0
        """Frames the kernel did not take."""

    # --- any thread ---------------------------------------------------------------------------------------

    def announce(self, interface: str, addresses: Iterable[IPv4Address]) -> int:
        """Make the addresses stand on the interface; returns how many frames went out before returning.

        A new address is announced now and twice more, one that stands once more (not sooner than a second
        after its last announcement). Fewer frames than addresses: the rest follows in the background, paced,
        or, if the link is missing, down or has ARP off, once it is ready. Never raises for the link's sake.
        """
        with self._lock:
            port = self._port(interface)
            self._look(port)
            sent = self._transmit(port, port.schedule.announce(addresses, self._clock.monotonic()))
            self._wake()
        return sent

    def withdraw(self, interface: str, addresses: Iterable[IPv4Address]) -> None:
        """Stop announcing the addresses and forget their other holders; unknown ones are no error."""
        with self._lock:
            self._port(interface).schedule.withdraw(addresses)
            self._wake()

    def standing(self, interface: str) -> frozenset[IPv4Address]:
        """The addresses announced on the interface and not withdrawn."""
        with self._lock:
            return self._port(interface).schedule.standing

    def conflicts(self) -> Mapping[str, tuple[Conflict, ...]]:
        """By interface: the other holders seen of standing addresses, times in Unix seconds."""
        with self._lock:
            return {
                name: tuple(self._dated(conflict) for conflict in port.schedule.conflicts)
                for name, port in self._ports.items()
            }

    # --- the loop thread ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up background work in the running event loop; what was announced before is then repeated.

        Raises OSError if the kernel gives no netlink socket, RuntimeError outside of a loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not None:
            raise RuntimeError("the announcer has been started already")
        monitor = Monitor()
        loop.add_reader(monitor.fileno(), self._on_links)
        with self._lock:
            self._loop, self._monitor = loop, monitor
            for port in self._ports.values():
                self._look(port)
        self._work()

    def close(self) -> None:
        """End all work and give every descriptor back; twice is once. Only in the loop that was started in."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            for port in self._ports.values():
                self._stop_listening(port)
                if port.sender is not None:
                    port.sender.close()
            if self._loop is not None and self._monitor is not None:
                self._loop.remove_reader(self._monitor.fileno())
                self._monitor.close()
            self._ports.clear()
            self._loop = self._monitor = self._timer = None

    def _work(self) -> None:
        """Open and close listeners, send what is due, set the timer for what will be."""
        with self._lock:
            if self._loop is None:
                return
            for port in self._ports.values():
                self._listen(port)
                self._transmit(port, port.schedule.due(self._clock.monotonic()))
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            now = self._clock.monotonic()
            times = [at for port in self._ports.values() if (at := port.schedule.next_due(now)) is not None]
            if times:
                self._timer = self._loop.call_later(max(0.0, min(times) - now), self._work)

    def _on_links(self) -> None:
        with self._lock:
            if self._monitor is None:
                return
            try:
                for link in self._monitor.receive():
                    self._link_reported(link)
            except LinksLost:
                log.warning("link messages were lost: looking at every link again")
                for port in self._ports.values():
                    self._link_is(port, None)
                    self._look(port)
        self._work()

    def _on_frames(self, port: _Port) -> None:
        conflicts = []
        with self._lock:
            try:
                for _ in range(_FRAMES_PER_WAKEUP):
                    if port.listener is None or (frame := port.listener.receive()) is None:
                        break
                    conflict = port.schedule.received(frame, self._clock.monotonic())
                    if conflict is not None:
                        conflicts.append(self._dated(conflict))
            except OSError as error:
                # Reported once by the kernel (the link went down); the link message decides what follows.
                log.debug("listening for ARP on %s: %s", port.interface, error.strerror)
        for conflict in conflicts:
            meters.CONFLICTS.add(port.interface)
            if self._on_conflict is not None:
                self._on_conflict(port.interface, conflict)

    # --- with the lock held -------------------------------------------------------------------------------

    def _port(self, interface: str) -> _Port:
        return self._ports.setdefault(interface, _Port(interface, Schedule(self._timing)))

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._work)

    def _look(self, port: _Port) -> None:
        """Ask the kernel what the link is now: the last message about it may still be waiting in the loop."""
        try:
            self._link_is(port, links.read(port.interface))
        except OSError as error:
            log.warning("asking for link %s: %s", port.interface, error)

    def _link_reported(self, link: Link) -> None:
        for port in self._ports.values():
            if link.name == port.interface:
                self._link_is(port, None if link.gone else link)
            elif port.link is not None and port.link.index == link.index:
                self._link_is(port, None)  # it has been renamed

    def _link_is(self, port: _Port, link: Link | None) -> None:
        mac = link.mac if link is not None and link.can_announce else None
        port.link = link
        port.schedule.link_changed(mac, self._clock.monotonic())

    def _sender(self, port: _Port) -> Sender:
        if port.sender is None:
            port.sender = self._open_sender(port.interface)
        return port.sender

    def _transmit(self, port: _Port, frames: list[bytes]) -> int:
        """Send the frames; those the kernel refuses are counted, and their repeats are what makes up for them."""
        sent = 0
        try:
            for frame in frames:
                self._sender(port).send(frame)
                sent += 1
        except OSError as error:
            log.warning("announcing on %s: %s", port.interface, error.strerror)
            if error.errno in _LINK_LOST:
                # The link changed under us; the message that it is back has every address announced anew.
                self._link_is(port, None)
        self.sent += sent
        self.failed += len(frames) - sent
        meters.ANNOUNCEMENTS.add(port.interface, "sent", amount=sent)
        meters.ANNOUNCEMENTS.add(port.interface, "failed", amount=len(frames) - sent)
        return sent

    def _listen(self, port: _Port) -> None:
        """Have a listener exactly while addresses stand on a link that exists, and on that very link."""
        index = port.link.index if port.link is not None and port.schedule.standing else 0
        if port.listening_on != index:
            self._stop_listening(port)
        if index == 0 or port.listener is not None or self._loop is None:
            return
        try:
            port.listener = ArpListener(port.interface)
        except OSError as error:
            log.warning("listening for ARP on %s: %s", port.interface, error.strerror)
            return
        port.listening_on = index
        self._loop.add_reader(port.listener.fileno(), self._on_frames, port)

    def _stop_listening(self, port: _Port) -> None:
        if port.listener is not None and self._loop is not None:
            self._loop.remove_reader(port.listener.fileno())
            port.listener.close()
        port.listener, port.listening_on = None, 0

    def _dated(self, conflict: Conflict) -> Conflict:
        offset = self._clock.time() - self._clock.monotonic()
        return replace(conflict, first_seen=conflict.first_seen + offset, last_seen=conflict.last_seen + offset)
