"""The legacy variant of iptables: a table is read whole, changed in memory and put back whole.

A few edits go through libiptc in this process, in a fraction of a millisecond where the table is small; many go
through one ``iptables-legacy-restore``: python-iptables takes 0.1 ms for each rule that it builds. Reading goes
through ``iptables-legacy-save``, which takes 10 ms for 10,000 rules where python-iptables takes 0.8 s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gateway.kernel import restore
from gateway.kernel.libiptc import LegacyTable, TableError
from gateway.kernel.xtables import Info, Lock, Tables
from gateway.ports import Moved, Refused, Variant
from rules.delta import singly
from rules.iptables import parse_save, render_restore
from rules.ruleset import (
    BUILTIN,
    AnyRule,
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
SINGLY_PART = 4  # up to this part of a chain, edits take less time than writing it anew
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
            text = restore.save(self.variant, table)
            rules = [line for line in text.splitlines() if line.startswith("-A")]
            self._has_equals[table] = len(set(rules)) != len(rules)
            chains |= {ChainRef(table, chain): () for chain in BUILTIN[table]} | dict(parse_save(text).chains)
        return Ruleset(chains)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one change; raises Refused, and nothing has changed then.

        Refused is retryable if somebody held the xtables lock all the time, or changed the table in spite of it.
        """
        if _few(edits):
            self._edit_in_process(table, edits, None)
        else:
            restore.edit(self.variant, table, edits)

    def evidence(self, table: str) -> Hashable | None:
        """The table's sizes, and how often others opened the lock."""
        opened, info = self._lock.opened(), self._tables.info(table)
        return None if opened is None or info is None else (opened, info)

    def edit_if(self, table: str, standing: Chains, edits: Sequence[ChainEdit], evidence: Hashable) -> Hashable | None:
        """``edit``, if the evidence holds; see ``gateway.remembered``."""
        expected = _Expected(evidence, standing, _entries(standing, edits))
        rewritten, edits = edits, _cheaper(edits, standing)
        if len(edits) == len(rewritten) and _few(edits, max(FEW_RULES, sum(map(len, standing.values())) // A_FEW_OF)):
            return self._edit_in_process(table, edits, expected)
        with self._expecting(table, f"edit table {table}", expected) as behind:
            # We have the lock that the tool would wait for: it gets another one.
            restore.edit(self.variant, table, edits, lock=self._lock.spare())
        return behind()

    def _edit_in_process(self, table: str, edits: Sequence[ChainEdit], expected: _Expected | None) -> Hashable | None:
        step = f"edit table {table}"
        try:
            # What could not be written as text shall not be written at all; and errors are told in the tool's words.
            lines = [render_restore(table, [edit]).splitlines()[1] for edit in edits]
        except ValueError as error:
            raise Refused(step, str(error), retryable=False) from error
        with self._expecting(table, step, expected) as behind:
            # By the rule, a rule is deleted or nothing is, whatever evidence did not tell; but of equals the first one.
            by_rule = expected is not None and not self._has_equals.get(table, True)
            try:
                with LegacyTable(table) as copy:
                    for edit, line in zip(edits, lines, strict=True):
                        step = f"edit table {table}: {line}"
                        copy.apply(edit, by_rule=by_rule)
                    step = f"edit table {table}"
                    copy.commit()
            except TableError as error:
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


def _cheaper(edits: Sequence[ChainEdit], standing: Chains) -> Sequence[ChainEdit]:
    """The edits, with single ones instead of a rewrite where these take less time.

    The tool takes 0.2 ms for each rule that it writes where 1,000 addresses stand, and hardly any for one that goes.
    """
    if len({edit.ref for edit in edits}) < len(edits):
        return edits  # what stands is known of the first edit of a chain alone
    found: list[ChainEdit] = []
    for edit in edits:
        have = standing.get(edit.ref, ())
        single = singly(edit, have, len(have) // SINGLY_PART) if isinstance(edit, ReplaceRules) and have else None
        found += single or [edit]
    return found


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


def _few(edits: Sequence[ChainEdit], most: int = FEW_RULES) -> bool:
    """Whether the edits write few rules, and only such as python-iptables can build."""
    rules: list[AnyRule] = []
    for edit in edits:
        match edit:
            case InsertRule(_, _, rule):
                rules.append(rule)
            case ReplaceRules():
                rules += edit.rules
    return len(rules) <= most and not any(isinstance(rule, Foreign) for rule in rules)
