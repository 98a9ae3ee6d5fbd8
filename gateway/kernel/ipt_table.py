"""A table of the legacy variant of iptables, read from the kernel's own entries.

``iptables-legacy-save`` and its text take 0.8 s for 50,000 rules, this a quarter. Layout: ip_tables.h and
libiptc: the built-in chains come first, each with its policy behind it; before a chain of users' stands an entry with
the target ERROR that bears its name, behind its last rule one that returns; the last entry of all is an ERROR, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gateway.kernel.ipt_entries import content, heading, offsets, rule
from gateway.kernel.xtables import Info
from rules.ruleset import BUILTIN, AnyRule, ChainRef, Return, Rule, Rules

_HEAD = 176
"""Bytes of an entry with the target ERROR, which has a name of 32."""
_LAST = "ERROR"
_BACK = Rule((), Return())


class Found(NamedTuple):
    """A table's chains, and whether any of them holds two equal rules."""

    chains: dict[ChainRef, Rules]
    equals: bool


def parsed(table: str, info: Info, raw: bytes) -> Found | None:
    """What the table holds; None where something in it is not of our vocabulary, or not laid out so."""
    begins = {begin: name for name, (begin, _) in info.builtin.items()}
    policies = {policy for _, policy in info.builtin.values()}
    entries = list(_entries(raw))
    named = {at + _HEAD: name for at, target_at, length in entries if (name := _heading(raw, at, target_at, length))}
    found: dict[str, list[AnyRule]] = {}
    chain: list[AnyRule] = []
    seen: set[int] = set()  # in the chain: hashes, for the entries themselves would be 13 MiB of 50,000
    equals = False
    for at, target_at, length in entries:
        if at in begins:
            chain, seen = found.setdefault(begins[at], []), set()
        if at in policies:
            continue
        if at + _HEAD in named and length == _HEAD:
            chain, seen = found.setdefault(named[at + _HEAD], []), set()
            continue
        entry = raw[at : at + length]
        read = rule(entry, target_at, named.get)
        if read is None:
            return None
        said = hash(content(entry))
        equals = equals or said in seen
        seen.add(said)
        chain.append(read)
    if found.pop(_LAST, None) != [] or not set(BUILTIN[table]) <= found.keys():
        return None
    for name in found.keys() - set(BUILTIN[table]):
        if not found[name] or found[name].pop() != _BACK:
            return None
    return Found({ChainRef(table, name): tuple(rules) for name, rules in found.items()}, equals)


def _entries(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Of each entry where it begins, where in it the target does, and how long it is; fewer if they are no entries."""
    at = 0
    while at < len(raw):
        target_at, length = offsets(raw, at)
        if not target_at < length <= len(raw) - at:
            return
        yield at, target_at, length
        at += length


def _heading(raw: bytes, at: int, target_at: int, length: int) -> str | None:
    return heading(raw[at + target_at : at + length]) if length == _HEAD else None
