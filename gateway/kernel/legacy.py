"""The legacy variant of iptables: a table is read whole, changed in memory and put back whole, in this process.

Rules are read from the kernel's entries and written as such (``ipt_entries``), through libiptc. What is not spoken
there (rules of others) is read as the text of ``iptables-legacy-save``; a few such rules python-iptables builds, in
0.1 ms each, and many are written by one ``iptables-legacy-restore``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gateway.kernel import ipt_table, restore
from gateway.kernel.ipt_entries import entry
from gateway.kernel.libiptc import LegacyTable, TableError
from gateway.kernel.xtables import Info, Lock, Tables
from gateway.ports import Moved, Refused, Variant
from rules.iptables import render_restore
from rules.ruleset import (
    ChainEdit,
    ChainRef,
    DeleteChain,
    DeleteRule,
    Foreign,
    InsertRule,
    NewChain,
    ReplaceRules,
    Rules,
    Ruleset,
)

Chains = Mapping[ChainRef, Rules]
A_FEW_OF = 50  # of so many rules that stand, one more is written in this process
FEW_RULES = 20  # so many python-iptables builds in the time that it takes to start a program


class LegacyFirewall:
    """``gateway.ports.Firewall`` for the legacy variant, in the thread's network namespace.

    Also a ``gateway.remembered.EvidentFirewall``. Its evidence are a table's sizes and whether somebody opened the
    lock: it misses what leaves all sizes as they are and is done without iptables' lock.
    """

    variant: Variant = "legacy"

    def __init__(self) -> None:
        self._lock = Lock()
        self._tables = Tables()
        self._has_equals: dict[str, bool] = {}

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; reading one loads it."""
        chains: dict[ChainRef, Rules] = {}
        for table in tables:
            chains |= self._table(table)
        return Ruleset(chains)

    def _table(self, table: str) -> Chains:
        entries = self._tables.entries(table)
        found = ipt_table.parsed(table, *entries) if entries else None
        if found is None:  # a rule of somebody else's shape is kept as the text that people know
            chains = restore.read(self.variant, [table]).chains
            found = ipt_table.Found(dict(chains), any(len(set(rules)) != len(rules) for rules in chains.values()))
        self._has_equals[table] = found.equals
        return found.chains

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one change; raises Refused, and nothing has changed then.

        Refused is retryable if somebody held the xtables lock all the time, or changed the table in spite of it.
        """
        others = _others(edits)
        if _few(others):
            self._edit_in_process(table, edits, others, None)
        else:
            restore.edit(self.variant, table, edits)

    def evidence(self, table: str) -> Hashable | None:
        """The table's sizes, and how often others opened the lock."""
        opened, info = self._lock.opened(), self._tables.info(table)
        return None if opened is None or info is None else (opened, info)

    def edit_if(self, table: str, standing: Chains, edits: Sequence[ChainEdit], evidence: Hashable) -> Hashable | None:
        """``edit``, if the evidence holds; see ``gateway.remembered``."""
        expected = _Expected(evidence, standing, _entries(standing, edits))
        others = _others(edits)
        if _few(others, max(FEW_RULES, sum(map(len, standing.values())) // A_FEW_OF)):
            return self._edit_in_process(table, edits, others, expected)
        with self._expecting(table, f"edit table {table}", expected) as behind:
            # We have the lock that the tool would wait for: it gets another one.
            restore.edit(self.variant, table, edits, lock=self._lock.spare())
        return behind()

    def _edit_in_process(
        self, table: str, edits: Sequence[ChainEdit], others: Sequence[Rules], expected: _Expected | None
    ) -> Hashable | None:
        step = f"edit table {table}"
        try:  # what could not be written as text shall not be written at all: names, and rules that are no entries
            pairs = zip(edits, others, strict=True)
            render_restore(table, [edit for edit, rules in pairs if rules or isinstance(edit, NewChain | DeleteChain)])
        except ValueError as error:
            raise Refused(step, str(error), retryable=False) from error
        with self._expecting(table, step, expected) as behind:
            # By the rule, a rule is deleted or nothing is, whatever evidence did not tell; but of equals the first one.
            under_way: ChainEdit | None = None
            by_rule = expected is not None and not self._has_equals.get(table, True)
            try:
                with LegacyTable(table) as copy:
                    for edit in edits:
                        under_way = edit
                        copy.apply(edit, by_rule=by_rule)
                    under_way = None
                    copy.commit()
            except TableError as error:
                if under_way is not None:  # in the tool's words
                    step = f"{step}: {render_restore(table, [under_way]).splitlines()[1]}"
                if by_rule and not error.retryable:
                    raise Moved(table) from error  # unseen: the reading is to be taken anew before anybody is told
                raise Refused(step, str(error), retryable=error.retryable) from error
        return behind()

    @contextmanager
    def _expecting(self, table: str, step: str, expected: _Expected | None) -> Iterator[Callable[[], Hashable | None]]:
        """Hold the lock around an edit of what is expected, else raise Moved; gives the evidence behind it.

        Who opens the lock meanwhile will write when we are done: what they were counted with is no part of it.
        """
        after: list[Info | None] = []
        with self._lock.held(step, restore.LOCK_SECONDS):
            opened, before = self._lock.opened(), self._tables.info(table)
            if expected is not None and not self._still(table, expected):
                raise Moved(table)

            def behind() -> Hashable | None:
                (now,) = after
                if expected is None or opened is None or before is None or now is None:
                    return None
                return (opened, now) if now.entries == before.entries + expected.more else None

            yield behind
            after.append(self._tables.info(table))

    def _still(self, table: str, expected: _Expected) -> bool:
        """Whether the table is what an edit is for; the lock is held, so it stays that."""
        # Others may have had the lock for nothing that matters here.
        return self.evidence(table) == expected.evidence or self.read([table]).chains == expected.standing


class _Expected(NamedTuple):
    """What an edit was made for, and how many entries the table has more after it."""

    evidence: Hashable
    standing: Chains
    more: int


def _entries(standing: Chains, edits: Sequence[ChainEdit]) -> int:
    """How many entries a table gets more by these edits; a chain is two of them, besides its rules."""
    lengths = {ref: len(rules) for ref, rules in standing.items()}
    more = 0
    for edit in edits:
        ref, before = edit.ref, lengths.get(edit.ref, 0)
        match edit:
            case NewChain():
                more += 2
                lengths[ref] = 0
            case DeleteChain():
                more -= 2 + before
                lengths[ref] = 0
            case ReplaceRules(_, rules):
                more += len(rules) - before
                lengths[ref] = len(rules)
            case InsertRule():
                more, lengths[ref] = more + 1, before + 1
            case DeleteRule():
                more, lengths[ref] = more - 1, before - 1
    return more


def _others(edits: Sequence[ChainEdit]) -> list[Rules]:
    """Of each edit the rules that it writes and that are no entries."""
    return [tuple(rule for rule in _written(edit) if entry(rule) is None) for edit in edits]


def _few(others: Sequence[Rules], most: int = FEW_RULES) -> bool:
    """Whether this process writes edits with these rules that are no entries: python-iptables builds a few of them."""
    return sum(map(len, others)) <= most and not any(isinstance(rule, Foreign) for rules in others for rule in rules)


def _written(edit: ChainEdit) -> Rules:
    match edit:
        case InsertRule(_, _, rule):
            return (rule,)
        case ReplaceRules(_, rules):
            return rules
    return ()
