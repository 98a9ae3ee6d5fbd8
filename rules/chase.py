"""Chains that may follow behind the maps: which, and when.

While the maps stand they alone decide (``rules.fastpath``), and one entry of theirs is changed in the same time at any
size. The kernel takes up to 0.1 s for each change of long chains, so they may follow a moment later, with all that
came in the meantime in one edit. Short chains, whatever else a change is about, and everything while the maps are off
or are being written is in place before an answer.
"""

from __future__ import annotations

from rules import nat
from rules.maps import MapTable, alike_but_for_lengths, asked
from rules.ruleset import ChainRef
from rules.spec import Part
from rules.state import Actual

FOLLOW_ABOVE = 2000
"""Rules of all of them: a legacy table is replaced whole; up to there that takes no more than 3 ms."""

_DECIDED_BY_MAPS = (nat.EXCLUSIVE_DNAT, nat.SHARED_DNAT, nat.EXCLUSIVE_SNAT, nat.SHARED_SNAT, nat.HAIRPIN_SNAT)


def may_follow(wanted: MapTable, actual: Actual, above: int = FOLLOW_ABOVE) -> frozenset[ChainRef]:
    """The chains of which nothing need be true yet, because the maps say it and go on saying it.

    That is so where only entries change, and where prefix lengths come or go with their rules, in one transaction.
    """
    standing = actual.maps
    if not wanted.stands or wanted.damaged or standing.damaged:
        return frozenset()
    if standing.maps != asked(standing.chains) or not alike_but_for_lengths(wanted.chains, standing.chains):
        return frozenset()
    chains = actual.ruleset.chains
    long = [ref for ref in _DECIDED_BY_MAPS if ref in chains]
    return frozenset(long if sum(len(chains[ref]) for ref in long) > above else ())


def concerns(old: Part | None, new: Part) -> bool:
    """Whether a change is about what these chains say."""
    fields = ("eips", "fips", "dnats", "snats")
    return any(getattr(old, name, None) is not getattr(new, name, None) for name in fields)
