"""The driver of the maps ahead of the chains: entries through netlink in this process, all else through nft.

One entry is one message in one transaction, 0.1 ms however many there are, and so are the map and the rule of one more
prefix length (``gateway.kernel.maplengths``); nft, which takes 2.4 ms to start, writes tables, chains and all other
rules, and with these as many entries as there are. The whole is read only where somebody else has written to nf_tables
(``gateway.kernel.generation``); after our own transaction only what it touched is read again.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from gateway.kernel import maplengths
from gateway.kernel import mapwire as wire
from gateway.kernel.generation import Generation
from gateway.kernel.legacynat import occupied
from gateway.kernel.netlink import Message, Netlink
from gateway.kernel.nft_messages import NETLINK_NETFILTER, NFPROTO_INET, NFPROTO_IPV4, begin, end
from gateway.kernel.tool import run
from gateway.ports import MapsReading, Refused, Variant
from rules import fastpath
from rules.apply import Rejected, apply_map_edits
from rules.entries import Entries
from rules.maps import (
    POSTROUTING,
    PREROUTING,
    PRIORITIES,
    TABLE,
    AddEntry,
    DropEntry,
    DropTable,
    EntryKey,
    MapEdit,
    MapTable,
    WriteChains,
    kind_of,
    labelled,
    map_lines,
    only_entries,
    script,
)
from rules.nft import Endpoint
from rules.ruleset import HOOKS
from rules.spec import Interfaces

log = logging.getLogger(__name__)

_STEP = f"edit table ip {TABLE}"
_HOOKS = {chain: HOOKS.index(chain.upper()) for chain in (PREROUTING, POSTROUTING)}
_IPTABLES = {_HOOKS[PREROUTING]: -100, _HOOKS[POSTROUTING]: 100}  # the priorities of iptables' nat chains, by hook
_FEW = 200  # so many entries are read again one by one
_MANY = 1000
_TRIES = 5
_PASSING_WORDS = ("Cannot allocate memory", "Resource temporarily unavailable", "Interrupted system call")
_PASSING = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ENOBUFS)


class KernelMaps:
    """``gateway.ports.Maps`` in the network namespace of the thread that first uses it."""

    def __init__(self, variant: Variant, generation: Generation) -> None:
        self._variant = variant
        self._generation = generation
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._incapable: str | None = None
        self._read: tuple[int, MapsReading] | None = None

    def read(self) -> MapsReading:
        """The table, and what speaks against it."""
        for _ in range(_TRIES):
            others = self._generation.others()
            if others is None:
                return MapsReading(MapTable(), "the kernel has no nf_tables")
            if self._read is not None and self._read[0] == others:
                return self._with_legacy(self._read[1])
            # A reading that somebody's transaction fell into is one of neither state; the next turn notices.
            self._read = (others, self._list())
        raise Refused(f"list table ip {TABLE}", "the kernel's nf_tables never stood still", retryable=True)

    def commit(self, edits: Sequence[MapEdit]) -> None:
        """Carry the edits out as one transaction; raises Refused, and nothing has changed then."""
        before = self.read().table
        expected = _edited(before, edits)
        if only_entries(edits) or list(edits) == [DropTable()]:
            self._transact(edits)
        elif not self._change_lengths(edits, before):
            self._restructure(edits, before)
        if not self._verified(edits, expected):
            self._read = None

    def commit_by(self, edits: Sequence[MapEdit], carry: Callable[[Sequence[Message]], bool]) -> bool:
        """``commit`` of a few entries, but that ``carry`` makes their messages part of a transaction of its own.

        False, and nothing has changed, where it does not, or where more than a few entries change.
        """
        if len(edits) > _FEW or not only_entries(edits):
            return False
        expected = _edited(self.read().table, edits)
        if not carry(list(_messages(edits))):
            return False
        if not self._verified(edits, expected):
            self._read = None
        return True

    def _verified(self, edits: Sequence[MapEdit], expected: MapTable) -> bool:
        """Read again what a few edits touched; whether that and what was known is what was expected, and known now."""
        if len(edits) > _FEW or not self._read or self._read[0] != self._generation.others():
            return False
        if any(isinstance(edit, DropTable) for edit in edits):
            return False
        if any(isinstance(edit, WriteChains) for edit in edits) and not self._has_structure(expected):
            return False
        touched = (edit.key for edit in edits if isinstance(edit, AddEntry | DropEntry))
        if any(self._entry(key) != expected.entries.get(key) for key in touched):
            return False
        self._read = (self._read[0], replace(self._read[1], table=expected))
        return True

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._read = None

    def share(self, table: MapTable) -> None:
        """Keep the very objects of a table that equals the one that stands, so that they are compared at once."""
        if self._read is not None and self._read[1].table == table:
            self._read = (self._read[0], replace(self._read[1], table=table))

    # --- writing ------------------------------------------------------------------------------------------

    def _restructure(self, edits: Sequence[MapEdit], standing: MapTable) -> None:
        """What nft has to write; a refusal is kept as the reason why there are no maps, so that the next try does
        without: the chains are right alone."""
        try:
            if len(edits) > _MANY and not standing.stands:
                self._fill(edits)
            else:
                self._run(script(edits))
        except Refused as refused:
            if not refused.retryable:
                self._incapable = f"the kernel refused them: {refused.reason}"
                self.forget()
            raise

    def _change_lengths(self, edits: Sequence[MapEdit], standing: MapTable) -> bool:
        """Write what comes and goes with prefix lengths, if nothing else does; False, and nothing happened, if not."""
        structure = [edit for edit in edits if isinstance(edit, WriteChains)]
        if len(edits) > _FEW or len(structure) != 1 or not maplengths.is_all(structure[0], standing):
            return False
        generation = self._generation.number()
        try:
            listed = self._netlink.dump(wire.rules_of(NFPROTO_IPV4, TABLE, POSTROUTING))
            written = maplengths.messages(structure[0], standing, listed)
            if written is None:
                return False
            with self._generation.own():
                self._netlink.transact(begin(generation), list(_messages(edits, written)), end())
        except OSError:
            return False  # nft may know another way, and its words are those that people know
        return True

    def _fill(self, edits: Sequence[MapEdit]) -> None:
        """A new table with many entries, which nft takes ten times as long for: maps, entries, and last the chains.

        Until these stand no packet meets the table, so for packets it is one step.
        """
        structure = [edit for edit in edits if isinstance(edit, WriteChains)]
        try:
            self._run("".join(f"{line}\n" for edit in structure for line in map_lines(edit)))
            self._transact([edit for edit in edits if isinstance(edit, AddEntry)])
            self._run(script(structure))
        except Refused:
            self.forget()
            if self.read().table.stands:
                self._transact([DropTable()])
            self.forget()
            raise

    def _run(self, text: str) -> None:
        with self._generation.own():
            ended = run(["nft", "-f", "-"], stdin=text)
        if ended.code:
            reason = _words(ended.stderr) or f"exit code {ended.code}"
            raise Refused(_STEP, reason, retryable=any(word in reason for word in _PASSING_WORDS))

    def _transact(self, edits: Sequence[MapEdit]) -> None:
        try:
            with self._generation.own():
                self._netlink.transact(begin(), list(_messages(edits)), end())
        except OSError as error:
            words = error.strerror or str(error)
            raise Refused(_STEP, words, retryable=error.errno in _PASSING) from error

    # --- reading ------------------------------------------------------------------------------------------

    def _list(self) -> MapsReading:
        try:
            chains = self._nat_chains()
            table = self._table(chains)
            return MapsReading(table, self._against(chains) or self._capable())
        except OSError as error:
            raise Refused(f"list table ip {TABLE}", error.strerror or str(error), retryable=True) from error

    def _table(self, chains: list[wire.ChainSeen]) -> MapTable:
        table = self._structure(chains)
        if table.damaged or not table.stands:
            return table
        try:
            return replace(table, entries=Entries(dict(entry for name in table.maps for entry in self._entries(name))))
        except wire.Strange as strange:
            log.warning("the table ip %s is written anew: %s", TABLE, strange)
            return MapTable(damaged=True)

    def _has_structure(self, expected: MapTable) -> bool:
        """Whether there are the chains, rules and maps that there should be."""
        try:
            return self._structure(self._nat_chains()) == replace(expected, entries=Entries())
        except OSError:
            return False  # the whole is read next, and says what is the matter

    def _nat_chains(self) -> list[wire.ChainSeen]:
        return [chain for said in self._netlink.dump(wire.CHAINS) if (chain := wire.nat_chain(said))]

    def _structure(self, chains: list[wire.ChainSeen]) -> MapTable:
        """The table without its entries."""
        if not any(wire.table_name(said) == TABLE for said in self._netlink.dump(wire.TABLES)):
            return MapTable()
        ours = {chain.name: chain for chain in chains if (chain.family, chain.table) == (NFPROTO_IPV4, TABLE)}
        maps = dict(wire.map_name(said) for said in self._netlink.dump(wire.MAPS))
        right = all((c.hook, c.priority) == (_HOOKS.get(n), PRIORITIES.get(n)) for n, c in ours.items())
        if not right or not all(maps.values()):
            return MapTable(damaged=True)
        asked = {name: wire.rules_of(NFPROTO_IPV4, TABLE, name) for name in PRIORITIES if name in ours}
        rules = {name: self._netlink.dump(message) for name, message in asked.items()}
        labels = {name: tuple(labelled(wire.comment(said)) for said in listed) for name, listed in rules.items()}
        return MapTable(labels, frozenset(maps))

    def _entries(self, name: str) -> Iterator[tuple[EntryKey, Endpoint]]:
        for said in self._netlink.dump(wire.entries_of(name)):
            yield from wire.entries(name, said)

    def _entry(self, key: EntryKey) -> Endpoint | None:
        try:
            said = self._netlink.ask(wire.get_entry(key))
            return dict(entry for one in said for entry in wire.entries(key.map, one)).get(key)
        except wire.Strange:
            return None
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise Refused(f"read map {key.map}", error.strerror or str(error), retryable=True) from error

    # --- what speaks against maps -------------------------------------------------------------------------

    def _against(self, chains: list[wire.ChainSeen]) -> str:
        """Other people's nat chains that come between our priority and that of our iptables chains."""
        for chain in chains:
            last = _IPTABLES.get(chain.hook)
            mine = (NFPROTO_IPV4, "nat", last) if self._variant == "nft" else None
            if (
                last is None
                or chain.family not in (NFPROTO_IPV4, NFPROTO_INET)
                or not last - 10 <= chain.priority <= last
                or (chain.family, chain.table) == (NFPROTO_IPV4, TABLE)
                or (chain.family, chain.table, chain.priority) == mine
            ):
                continue
            if self._netlink.dump(wire.rules_of(chain.family, chain.table, chain.name)):
                family = "ip" if chain.family == NFPROTO_IPV4 else "inet"
                return f"another rule may come ahead of ours: nft table {family} {chain.table}, chain {chain.name}"
        return ""

    def _with_legacy(self, reading: MapsReading) -> MapsReading:
        """Legacy tables send no events and move no generation, so they are looked at each time."""
        if self._variant == "nft" and not reading.hindrance and (chain := occupied("nat")):
            return replace(reading, hindrance=f"another rule may come ahead of ours: iptables-legacy nat {chain}")
        return reading

    def _capable(self) -> str:
        """Why kernel and nft cannot do it; empty if they can. Asked once, with a table that is not committed."""
        if self._incapable is None:
            self._incapable = self._probed()
        return self._incapable

    @staticmethod
    def _probed() -> str:
        if shutil.which("nft") is None:
            return "nft is not installed"
        sample = fastpath.table_of(Interfaces(), _SAMPLE)
        ended = run(["nft", "-c", "-f", "-"], stdin=script(fastpath.edits(sample, MapTable())))
        return f"kernel or nft cannot: {_words(ended.stderr)}" if ended.code else ""


_SAMPLE: dict[EntryKey, Endpoint] = {
    EntryKey("ports", "192.0.2.1", "tcp", 80): ("192.0.2.2", 80),
    EntryKey("snat-24", "192.0.2.0"): ("192.0.2.1", 0),
    EntryKey("snat-24-random", "192.0.2.0"): ("192.0.2.1", 0),
}


def _edited(table: MapTable, edits: Sequence[MapEdit]) -> MapTable:
    """What the table is to be; raises Refused where it cannot be that."""
    try:
        return apply_map_edits(table, edits)
    except Rejected as error:
        raise Refused(_STEP, str(error), retryable=False) from error


def _messages(edits: Sequence[MapEdit], structure: Iterable[Message] = ()) -> Iterator[Message]:
    """Edits in order; ``structure`` is what writes the chains."""
    for (_, name), some in groupby(edits, kind_of):
        listed = list(some)
        yield from wire.add_entries(name, ((e.key, e.target) for e in listed if isinstance(e, AddEntry)))
        yield from wire.drop_entries(name, (e.key for e in listed if isinstance(e, DropEntry)))
        if isinstance(listed[0], DropTable):
            yield wire.drop_table()
        if isinstance(listed[0], WriteChains):
            yield from structure


def _words(stderr: str) -> str:
    """nft's first complaint in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" \t^~")]
    complaint = "; ".join(lines[:2])
    return complaint.partition("Error: ")[2] or complaint
