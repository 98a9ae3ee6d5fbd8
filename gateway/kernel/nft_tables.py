"""A table of the nft variant of iptables, listed over netlink: its chains, their rules and the kernel's names of them.

``iptables-nft-save`` takes 2 s for 50,000 rules, and its text is yet to be read; this takes one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from gateway.kernel.netlink import Message, Netlink, attributes, text
from gateway.kernel.nft_messages import (
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_TABLE,
    GETCHAIN,
    GETRULE,
    HOOK_HOOKNUM,
    NFGENMSG,
    RULE_CHAIN,
    RULE_EXPRESSIONS,
    RULE_HANDLE,
    RULE_TABLE,
    RULE_USERDATA,
    named,
)
from gateway.kernel.nft_reading import rule
from rules.ruleset import BUILTIN, HOOKS, ChainRef, Rule, Rules

_ATTRIBUTE = struct.Struct("=HH")  # length, type


@dataclass(frozen=True)
class Listing:
    """A table's chains with their rules, and the handles of these in the same order."""

    chains: dict[ChainRef, Rules]
    handles: dict[ChainRef, list[int]]
    unread: frozenset[ChainRef]
    """Chains that hold a rule which is not of our vocabulary; their rules are left out, their handles are not."""


class _Listed(NamedTuple):
    table: bytes
    chain: bytes
    handle: int
    rule: Rule | None


def listing(netlink: Netlink, table: str) -> Listing | None:
    """The table; empty where there is none, None where it is not as iptables makes it.

    Raises OSError. Somebody's transaction may fall between the two requests; the generation tells.
    """
    heads = [attributes(said, len(NFGENMSG)) for said in netlink.dump(Message(GETCHAIN, 0, NFGENMSG))]
    ours = {text(head[CHAIN_NAME]): head for head in heads if text(head[CHAIN_TABLE]) == table}
    if not all(_is_iptables(table, name, head.get(CHAIN_HOOK)) for name, head in ours.items()):
        return None
    rules: dict[bytes, list[Rule | None]] = {name.encode() + b"\0": [] for name in ours}
    handles: dict[bytes, list[int]] = {name: [] for name in rules}
    name = table.encode() + b"\0"
    for of, chain, handle, found in netlink.listed(Message(GETRULE, 0, NFGENMSG + named(RULE_TABLE, table)), _listed):
        if of == name:
            if chain not in rules:
                return None  # it came with the transaction in between
            rules[chain].append(found)
            handles[chain].append(handle)
    refs = {chain: ChainRef(table, chain[:-1].decode()) for chain in rules}
    return Listing(
        {refs[chain]: tuple(filter(None, listed)) for chain, listed in rules.items()},
        {refs[chain]: listed for chain, listed in handles.items()},
        frozenset(refs[chain] for chain, listed in rules.items() if None in listed),
    )


def _is_iptables(table: str, name: str, hook: memoryview | None) -> bool:
    """Whether a chain hangs in the hook whose name it bears; one of users' hangs in none."""
    if hook is None:
        return name not in BUILTIN[table]
    number = int.from_bytes(attributes(hook)[HOOK_HOOKNUM], "big")
    return name in BUILTIN[table] and HOOKS.index(name) == number


def _listed(said: memoryview) -> _Listed:
    table = chain = expressions = b""
    handle, at, end = 0, len(NFGENMSG), len(said)
    plain = True
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(said, at)
        if kind == RULE_EXPRESSIONS:
            expressions = bytes(said[at + 4 : at + length])
        elif kind == RULE_HANDLE:
            handle = int.from_bytes(said[at + 4 : at + length], "big")
        elif kind == RULE_TABLE:
            table = bytes(said[at + 4 : at + length])
        elif kind == RULE_CHAIN:
            chain = bytes(said[at + 4 : at + length])
        elif kind == RULE_USERDATA:
            plain = False  # a comment, say
        at += max(4, length + 3 & ~3)
    return _Listed(table, chain, handle, rule(expressions) if plain else None)


def handle_of(said: memoryview) -> int:
    """The handle of a rule that the kernel tells of; 0 where it tells none."""
    at = len(NFGENMSG)
    while at + 4 <= len(said):  # it comes early, and 50,000 rules are long
        length, kind = _ATTRIBUTE.unpack_from(said, at)
        if kind & 0x3FFF == RULE_HANDLE:
            return int.from_bytes(said[at + 4 : at + length], "big")
        at += max(4, length + 3 & ~3)
    return 0
