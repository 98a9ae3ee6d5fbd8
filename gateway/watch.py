"""Who else writes to the kernel: cheap evidence that a reading no longer holds.

For each domain of the kernel there is a value that changes whenever somebody writes to it: a count of events, the
number of the last transaction, the size of a table. The value is taken right before each reading, so whatever was
written before a reading is no news once what was read has been dealt with, whoever wrote it: the gateway's own commits
are read back by its transaction and therefore never look like another's. Nothing has to be told apart by its author.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gateway.ports import Firewall, Joint, Links, LinksReading, Maps, MapsReading, Nft, Shaper, Variant
from rules.maps import MapEdit, MapTable
from rules.nft import NftCommand, NftTable
from rules.ruleset import ChainEdit, Ruleset
from rules.state import LinkStep
from rules.tc import Objects, TcStep

log = logging.getLogger(__name__)

Domain = Literal["chains", "links", "maps", "nft", "tc"]
Evidence = Callable[[], Hashable]


class Watch:
    """Compares the evidence of each domain with what it was before the last reading that was dealt with.

    For the writer's thread.
    """

    def __init__(self, evidence: Mapping[Domain, Evidence]) -> None:
        self._evidence = evidence
        self._read: dict[Domain, Hashable] = {}
        self._seen: dict[Domain, Hashable] = {}
        self._mute: set[Domain] = set()

    def reading(self, domain: Domain) -> None:
        """The domain is about to be read whole."""
        self._read[domain] = self._ask(domain)

    @contextmanager
    def writing(self, domain: Domain) -> Iterator[None]:
        """One own transaction on the domain; its reading afterwards is not the concern of this.

        Both variants of nftables' tables have one counter: where it moved by one, nobody else wrote to the other.
        """
        evidence = self._evidence[domain]
        beside = [other for other, its in self._evidence.items() if its is evidence and other != domain]
        before = self._ask(domain) if beside else None
        yield
        if isinstance(before, int) and self._ask(domain) == before + 1:
            for known in (self._read, self._seen):
                known.update({other: before + 1 for other in beside if known.get(other) == before})

    def settle(self) -> None:
        """What was read last is as wanted, or else is known not to be."""
        self._seen.update(self._read)

    def changed(self) -> frozenset[Domain]:
        """Domains that were written to since the reading that was settled; one that never was is no news."""
        said: dict[Evidence, Hashable] = {}
        for domain, its in self._evidence.items():
            if its not in said and domain in self._seen:  # what is shared is asked once
                said[its] = self._ask(domain)
        return frozenset(domain for domain, seen in self._seen.items() if said[self._evidence[domain]] != seen)

    def _ask(self, domain: Domain) -> Hashable:
        """Without its evidence a domain is left to full comparisons; no transaction fails for want of it."""
        try:
            return self._evidence[domain]()
        except OSError as error:
            if domain not in self._mute:
                log.error("writes of others to %s are noticed late: %s", domain, error)
                self._mute.add(domain)
            return None


@dataclass(frozen=True)
class WatchedFirewall:
    """A ``Firewall`` that says when it is read."""

    port: Firewall
    watch: Watch

    @property
    def variant(self) -> Variant:
        return self.port.variant

    def read(self, tables: Collection[str]) -> Ruleset:
        self.watch.reading("chains")
        return self.port.read(tables)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        with self.watch.writing("chains"):
            self.port.edit(table, edits)


@dataclass(frozen=True)
class WatchedLinks:
    """``Links`` that say when they are read."""

    port: Links
    watch: Watch

    def read(self) -> LinksReading:
        self.watch.reading("links")
        return self.port.read()

    def commit(self, steps: Sequence[LinkStep]) -> None:
        self.port.commit(steps)


@dataclass(frozen=True)
class WatchedNft:
    """``Nft`` that says when it is read."""

    port: Nft
    watch: Watch

    def read(self) -> NftTable:
        self.watch.reading("nft")
        return self.port.read()

    def commit(self, commands: Sequence[NftCommand]) -> None:
        with self.watch.writing("nft"):
            self.port.commit(commands)


@dataclass(frozen=True)
class WatchedMaps:
    """``Maps`` that say when they are read."""

    port: Maps
    watch: Watch

    def read(self) -> MapsReading:
        self.watch.reading("maps")
        return self.port.read()

    def commit(self, edits: Sequence[MapEdit]) -> None:
        with self.watch.writing("maps"):
            self.port.commit(edits)

    def share(self, table: MapTable) -> None:
        self.port.share(table)


@dataclass(frozen=True)
class WatchedJoint:
    """``Joint`` whose transactions are known as our own; what it wrote is read through the other ports."""

    port: Joint
    watch: Watch

    def commit(self, table: str, chains: Sequence[ChainEdit], maps: Sequence[MapEdit]) -> bool:
        with self.watch.writing("chains"):
            return self.port.commit(table, chains, maps)


@dataclass(frozen=True)
class WatchedShaper:
    """A ``Shaper`` that says when it is read."""

    port: Shaper
    watch: Watch

    def read(self) -> Objects:
        self.watch.reading("tc")
        return self.port.read()

    def commit(self, steps: Sequence[TcStep]) -> None:
        self.port.commit(steps)
