"""Chains that may follow behind the maps: which, and when.

While the maps stand they alone decide (``rules.fastpath``), and one entry of theirs is changed in the same time at any
size. The kernel takes up to 0.1 s for each change of long chains, so they may follow a moment later, with all that
came in the meantime in one edit. Short chains, whatever else a change is about, and everything while the maps are off
or are being written is in place before an answer.
"""

from __future__ import annotations

from rules import nat
from rules.ruleset import ChainRef
from rules.state import Actual, Desired

FOLLOW_ABOVE = 2000
"""Rules of all of them: a legacy table is replaced whole; up to there that takes no more than 3 ms."""

_DECIDED_BY_MAPS = (nat.EXCLUSIVE_DNAT, nat.SHARED_DNAT, nat.EXCLUSIVE_SNAT, nat.SHARED_SNAT, nat.HAIRPIN_SNAT)


def may_follow(wanted: Desired, actual: Actual, above: int = FOLLOW_ABOVE) -> frozenset[ChainRef]:
    """The chains of which nothing need be true yet, because the maps say it and only their entries change."""
    maps = wanted.maps
    if maps is None or not maps.stands or maps.damaged or actual.maps.damaged:
        return frozenset()
    if (maps.chains, maps.maps) != (actual.maps.chains, actual.maps.maps):
        return frozenset()
    chains = actual.ruleset.chains
    standing = [ref for ref in _DECIDED_BY_MAPS if ref in chains]
    return frozenset(standing if sum(len(chains[ref]) for ref in standing) > above else ())


def lags(wanted: Desired, actual: Actual) -> bool:
    """Whether a chain is not yet what it shall be."""
    chains = actual.ruleset.chains
    return any(wanted.chains.get(ref) != chains.get(ref) for ref in _DECIDED_BY_MAPS if ref in wanted.chains)
