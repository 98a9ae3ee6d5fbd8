"""What follows a committed change: announcing, storing, ending stale connections.

The change stands already, so nothing here undoes it: what fails is kept, named by ``pending`` (readiness is false
meanwhile) and tried again. All of it is for the writer's thread but ``pending``. That thread waits for the disk, since
nothing may be answered or changed before what stands is stored; but as the disk is written to in another thread, it can
look after what stands while it waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from ipaddress import IPv4Address
from typing import Protocol

from gateway.arp.conflict import Conflict
from gateway.endings import Endings
from gateway.store import Store, Stored
from rules.appliance import Spec
from rules.state import Actual, AddressKey

log = logging.getLogger(__name__)

GLANCE_SECONDS = 0.1
"""So often whoever waits for the disk looks after what stands."""


class Announcing(Protocol):
    """What is asked of the ARP announcer (``gateway.arp.announcer.Announcer``)."""

    def announce(self, interface: str, addresses: Iterable[IPv4Address]) -> int: ...

    def withdraw(self, interface: str, addresses: Iterable[IPv4Address]) -> None: ...

    def standing(self, interface: str) -> frozenset[IPv4Address]: ...

    def conflicts(self) -> Mapping[str, tuple[Conflict, ...]]: ...


class Followers:
    """The announcer, the store and the connections that end, and what each of them is still owed."""

    def __init__(self, announcer: Announcing, store: Store, endings: Endings, meanwhile: Callable[[], object]) -> None:
        self._announcer = announcer
        self._store = store
        self.endings = endings
        self._meanwhile = meanwhile
        self._disk = ThreadPoolExecutor(1, "disk")
        self._unsaved = False
        self._saving = False
        self._announced_on: str | None = None
        self._announced: Mapping[AddressKey, bool] = {}

    def pending(self) -> list[str]:
        """What is outstanding, in words; any thread."""
        return ["spec is not on disk"] * self._unsaved + self.endings.pending()

    def changed(self, old: Spec | None, new: Spec) -> None:
        """Owe what a change from ``old`` to ``new`` brings: a file, and connections that no longer fit."""
        self.endings.owe(old or type(new)())
        self._unsaved = True

    def unsaved(self) -> None:
        """Owe the file alone: the spec was not read from it."""
        self._unsaved = True

    def announce(self, spec: Spec, actual: Actual, asked: Collection[str]) -> tuple[str, ...]:
        """Announce what is new on the external interface, and what was asked for; forget what is gone."""
        if not spec.initialized:
            return ()  # limits alone make no address ours
        external = spec.interfaces.external
        link = actual.links.get(external)
        if self._announced_on is not None and (self._announced_on != external or link is None or not link.arp):
            self._announcer.withdraw(self._announced_on, self._announcer.standing(self._announced_on))
            self._announced_on, self._announced = None, {}
        if link is None or not link.arp:
            return ()
        # Compared with what was announced for the last reading: all of 1,000 addresses would take 5 ms each time.
        came, went = actual.addresses.keys() - self._announced.keys(), self._announced.keys() - actual.addresses.keys()
        self._announced_on, self._announced = external, actual.addresses
        due = _addresses(came, external)
        if gone := _addresses(went, external) - due:
            self._announcer.withdraw(external, gone)
        if asked:
            due |= self._announcer.standing(external) & {IPv4Address(a) for a in asked}
        if due:
            self._announcer.announce(external, sorted(due))
        return tuple(str(a) for a in sorted(due))

    def save(self, stored: Stored) -> None:
        """Store what stands, if that is owed; calls ``meanwhile`` now and then while the disk does not answer."""
        if not self._unsaved or self._saving:  # what is called meanwhile has nothing else to store
            return
        self._saving = True
        try:
            saved = self._disk.submit(self._saved, stored)
            while not wait([saved], GLANCE_SECONDS).done:
                self._meanwhile()
            self._unsaved = not saved.result()
        finally:
            self._saving = False

    def close(self) -> None:
        """Nothing will be stored any more."""
        self._disk.shutdown()

    def _saved(self, stored: Stored) -> bool:
        """Whether it could be stored; what is outdated is removed where not. In the disk's thread."""
        try:
            self._store.save(stored)
        except OSError as error:
            log.error("the spec cannot be stored: %s; after a restart it will be read from the kernel", error)
            self._discard_stored()
            return False
        return True

    def _discard_stored(self) -> None:
        try:
            self._store.forget()
        except OSError as error:
            log.error("the outdated stored spec cannot be removed: %s", error)


def _addresses(keys: Iterable[AddressKey], interface: str) -> set[IPv4Address]:
    return {IPv4Address(key.address.partition("/")[0]) for key in keys if key.interface == interface}
