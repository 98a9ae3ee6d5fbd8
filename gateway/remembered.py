"""The firewall without reading it before and after every change: the last reading, as long as evidence says it holds.

A reading is used again while the driver's evidence (a transaction counter, or sizes and who took the lock) is what it
was, and an edit is committed only if it still is, which the driver decides under the kernel's own lock or by a
compare-and-swap. So a plan made from a remembered reading is never carried out on another state: the driver raises
``Moved`` and the transaction reads again. After an edit of ours, and of ours alone, the reading goes on with that
edit in it: the kernel took the edit whole, and nothing else happened. Whatever does not fit this is forgotten and read
again.

What no evidence shows (a rule of a legacy table replaced by one of the same size, by a program that does not take
iptables' lock) is left to full comparisons: ``transaction.read`` with ``anew``.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.ports import Committing, Firewall, Variant
from rules.ruleset import (
    AnyRule,
    ChainEdit,
    ChainRef,
    DeleteChain,
    DeleteRule,
    InsertRule,
    NewChain,
    ReplaceRules,
    Rules,
    Ruleset,
)
from rules.splice import splice

_TRIES = 2


class EvidentFirewall(Firewall, Protocol):
    """A driver that can say cheaply whether a table is still as it was."""

    def evidence(self, table: str) -> Hashable | None:
        """A value that changes with every write to the table; None where there is no such thing."""
        ...

    def edit_if(
        self, table: str, standing: Rulesets, edits: Sequence[ChainEdit], evidence: Hashable
    ) -> Hashable | None:
        """``edit`` if ``evidence`` still holds, else raises Moved and changes nothing; None is no evidence.

        ``standing`` are the table's chains. Returns the evidence behind the edit if nothing but that happened since
        the one before, else None.
        """
        ...


Rulesets = Mapping[ChainRef, Rules]


@dataclass(frozen=True, slots=True)
class _Known:
    evidence: Hashable | None
    chains: Rulesets


class RememberedFirewall:
    """``gateway.ports.Firewall`` over a driver with evidence."""

    def __init__(self, driver: EvidentFirewall) -> None:
        self._driver = driver
        self._known: dict[str, _Known] = {}

    @property
    def variant(self) -> Variant:
        """The driver's."""
        return self._driver.variant

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._known.clear()

    def share(self, wanted: Mapping[ChainRef, Rules | None]) -> None:
        """Keep these tuples for chains that equal them: what is the same object later is compared without a look."""
        for table, known in self._known.items():
            same = {ref: rules for ref in known.chains if (rules := wanted.get(ref)) == known.chains[ref] and rules}
            self._known[table] = replace(known, chains={**known.chains, **same})

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; a table the kernel does not hold yet has empty built-in chains."""
        chains: dict[ChainRef, Rules] = {}
        for table in tables:
            chains |= self._table(table)
        return Ruleset(chains)

    def _table(self, table: str) -> Rulesets:
        known = self._known.pop(table, None)
        evidence = self._driver.evidence(table)
        if known is not None and None not in (known.evidence, evidence) and known.evidence == evidence:
            self._known[table] = known
            return known.chains
        for _ in range(_TRIES):
            chains = shared(known.chains if known else {}, self._driver.read([table]).chains)
            before, evidence = evidence, self._driver.evidence(table)
            if evidence is None or evidence == before:
                break
        else:
            # Evidence that never rests is no failure: one reading is whole in itself, and good for one edit. Legacy's
            # moves with every program that opens iptables' lock, in whatever namespace.
            evidence = None
        self._known[table] = _Known(evidence, chains)
        return chains

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one atomic change; raises Refused (Moved) and changes nothing."""
        known = self._known.pop(table, None)
        if known is None:
            self._driver.edit(table, edits)
            return
        evidence = self._driver.edit_if(table, known.chains, edits, known.evidence)
        # Without evidence it is what to expect of the next reading, no more.
        self._known[table] = _Known(evidence, edited(known.chains, edits))

    def edit_by(self, table: str, edits: Sequence[ChainEdit], commit: Committing) -> bool:
        """``edit``, but that ``commit`` does it; False, and nothing has changed, if that or what is known does not do.

        Raises Refused (Moved), and nothing has changed then, either.
        """
        known = self._known.get(table)
        if known is None or known.evidence is None:
            return False
        del self._known[table]
        if not commit(known.chains, known.evidence):
            self._known[table] = known
            return False
        evidence = self._driver.evidence(table)
        self._known[table] = _Known(evidence if evidence == known.evidence else None, edited(known.chains, edits))
        return True


class Forgetful(Protocol):
    """A driver that remembers by itself."""

    def forget(self) -> None: ...


@dataclass(frozen=True)
class Memories:
    """What the drivers of one kernel remember (``gateway.transaction.Memory``)."""

    firewall: RememberedFirewall
    others: tuple[Forgetful, ...] = ()

    def forget(self) -> None:
        """Read everything anew the next time."""
        for one in (self.firewall, *self.others):
            one.forget()

    def share(self, wanted: Mapping[ChainRef, Rules | None]) -> None:
        """See ``RememberedFirewall.share``."""
        self.firewall.share(wanted)


def shared(known: Rulesets, found: Rulesets) -> Rulesets:
    """What was found, made of the very rules that were known where nothing changed."""
    return {ref: _shared(known[ref], rules) if ref in known else rules for ref, rules in found.items()}


def _shared(known: Rules, found: Rules) -> Rules:
    head, gone, new = splice(known, found)
    return (*known[:head], *new, *known[head + len(gone) :]) if gone or new else known


def edited(chains: Rulesets, edits: Iterable[ChainEdit]) -> dict[ChainRef, Rules]:
    """The chains after edits that the kernel has taken."""
    result = dict(chains)
    open_: dict[ChainRef, list[AnyRule]] = {}
    for edit in edits:
        ref = edit.ref
        match edit:
            case NewChain():
                result[ref] = ()
            case DeleteChain():
                del result[ref]
                open_.pop(ref, None)
            case ReplaceRules(_, rules):
                open_[ref] = list(rules)
            case InsertRule(_, index, rule):
                open_.setdefault(ref, list(result[ref])).insert(index, rule)
            case DeleteRule(_, index, _):
                del open_.setdefault(ref, list(result[ref]))[index]
    return result | {ref: tuple(rules) for ref, rules in open_.items()}
