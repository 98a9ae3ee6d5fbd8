"""The project's own nftables table, ``ip natgw``: what it holds, what changes it, and nft's language for that.

Two nat chains ask maps about a connection's first packet, a little ahead of iptables' own chains: a map answers at
once, however many entries it has. What the chains mean and where their entries come from is ``rules.fastpath``'s.

Every rule bears a comment, its ``label``: the words that it is made of and a digest of its text. Labels are read back
in place of expressions, which tools print and kernels report differently from release to release; a rule without
the label that belongs to its text is not ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple
from zlib import crc32

from rules.entries import Entries
from rules.nft import Endpoint

TABLE = "natgw"
PREROUTING, POSTROUTING = "prerouting", "postrouting"
# The first nat chain that translates a connection decides; iptables' stand at -100 and 100.
PRIORITIES: Mapping[str, int] = {PREROUTING: -110, POSTROUTING: 90}
# The mark of a packet that no map knew, for as long as it takes to reach our iptables chains, which take it off.
MISSED = 0x20000000

_TABLE_WORDS = f"ip {TABLE}"
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", re.ASCII).fullmatch
_ADDRESS = re.compile(r"\d{1,3}(\.\d{1,3}){3}", re.ASCII).fullmatch
_ENTRIES_A_LINE = 1000


class EntryKey(NamedTuple):
    """What a map is asked for, and in which map: an address, in some with a protocol and a port."""

    map: str
    address: str
    protocol: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class FipIn:
    """A destination address that is a floating IP becomes the internal one."""

    @property
    def map(self) -> str:
        return "fip-in"


@dataclass(frozen=True, slots=True)
class Ports:
    """A destination address and port that are mapped become the internal ones."""

    @property
    def map(self) -> str:
        return "ports"


@dataclass(frozen=True, slots=True)
class FipOut:
    """The source address of a floating IP's owner becomes the floating IP."""

    @property
    def map(self) -> str:
        return "fip-out"


@dataclass(frozen=True, slots=True)
class PrefixSnat:
    """What leaves by an interface from a source prefix of one length gets the prefix's address."""

    interface: str
    length: int
    random_fully: bool

    @property
    def map(self) -> str:
        return f"snat-{self.length}" + ("-random" if self.random_fully else "")


@dataclass(frozen=True, slots=True)
class Hairpin:
    """A tenant's packet that goes back to the tenants by an EIP comes from that EIP."""

    interface: str
    tenant_mark: int

    @property
    def map(self) -> str:
        return "hairpin"


@dataclass(frozen=True, slots=True)
class Missed:
    """No map knew the packet: mark it."""


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """A rule that bears no label of ours; it cannot be written back."""

    comment: str


_PORTS = Ports().map
Asking = FipIn | Ports | FipOut | PrefixSnat | Hairpin
MapRule = Asking | Missed | Unlabelled
MapRules = tuple[MapRule, ...]


@dataclass(frozen=True)
class MapTable:
    """The table's content; without any there is no table.

    ``damaged``: a chain or map of ours is not what its name says, and only a new table mends it.
    """

    chains: Mapping[str, MapRules] = field(default_factory=dict)
    maps: frozenset[str] = frozenset()
    entries: Entries[EntryKey, Endpoint] = field(default_factory=Entries)
    damaged: bool = False

    @property
    def stands(self) -> bool:
        """Whether there is a table."""
        return bool(self.chains or self.maps or self.damaged)


def alike_but_for_lengths(one: Mapping[str, MapRules], other: Mapping[str, MapRules]) -> bool:
    """Whether two tables' chains, which stand, ask the same but for prefixes of other lengths."""

    def rest(chains: Mapping[str, MapRules]) -> dict[str, list[MapRule]]:
        return {name: [rule for rule in rules if not isinstance(rule, PrefixSnat)] for name, rules in chains.items()}

    def outside(chains: Mapping[str, MapRules]) -> set[str]:
        return {rule.interface for rules in chains.values() for rule in rules if isinstance(rule, PrefixSnat)}

    return bool(one) and rest(one) == rest(other) and len(outside(one) | outside(other)) <= 1


# Edits, carried out in order and committed as one.


@dataclass(frozen=True)
class WriteChains:
    """Make the table, the maps that the rules ask and the chains where they are missing; write all rules anew.

    Maps that no rule asks any more, ``unasked``, go with their entries.
    """

    chains: Mapping[str, MapRules]
    unasked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DropTable:
    """Take the table away with all that it holds."""


@dataclass(frozen=True, slots=True)
class AddEntry:
    key: EntryKey
    target: Endpoint


@dataclass(frozen=True, slots=True)
class DropEntry:
    key: EntryKey


MapEdit = WriteChains | DropTable | AddEntry | DropEntry


def only_entries(edits: Iterable[MapEdit]) -> bool:
    """Whether the edits leave maps and chains as they are."""
    return all(isinstance(edit, AddEntry | DropEntry) for edit in edits)


def asked(chains: Mapping[str, MapRules]) -> frozenset[str]:
    """The maps that the rules ask."""
    return frozenset(rule.map for rules in chains.values() for rule in rules if isinstance(rule, Asking))


def rule_text(rule: MapRule) -> str:
    """The rule in nft's language, without its label. Raises ValueError for one that is not ours."""
    match rule:
        case FipIn():
            return f"dnat ip to ip daddr map @{rule.map}"
        case Ports():
            return f"dnat ip to ip daddr . meta l4proto . th dport map @{rule.map}"
        case FipOut():
            return f"snat ip to ip saddr map @{rule.map}"
        case PrefixSnat(interface, length, random_fully):
            asking = f"snat ip to ip saddr & {_mask(length)} map @{rule.map}"
            return f"{_leaving(interface)} {asking}" + (" fully-random" if random_fully else "")
        case Hairpin(interface, mark):
            which = f"{_leaving(interface)} meta mark & {mark:#x} == {mark:#x} ct status dnat"
            return f"{which} snat ip to ct original ip daddr map @{rule.map} fully-random"
        case Missed():
            return f"meta mark set meta mark | {MISSED:#x}"
        case Unlabelled(comment):
            raise ValueError(f"a rule of another writer cannot be written back: {comment!r}")


def _leaving(interface: str) -> str:
    if not _INTERFACE(interface):
        raise ValueError(f"not the name of an interface: {interface!r}")
    return f'oifname "{interface}"'


def _mask(length: int) -> str:
    bits = (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF
    return ".".join(str(bits >> shift & 0xFF) for shift in (24, 16, 8, 0))


def label(rule: MapRule) -> str:
    """The comment by which the rule is known again."""
    match rule:
        case PrefixSnat(interface, length, random_fully):
            words = f"snat {interface} {length}" + (" random" if random_fully else "")
        case Hairpin(interface, mark):
            words = f"hairpin {interface} {mark}"
        case Unlabelled(comment):
            return comment
        case Missed():
            words = "missed"
        case _:
            words = rule.map
    return f"{words} {crc32(rule_text(rule).encode()):08x}"


def labelled(comment: str) -> MapRule:
    """The rule that bears this comment."""
    try:
        rule = _from_words(comment.split()[:-1])
        return rule if rule and label(rule) == comment else Unlabelled(comment)
    except ValueError:
        return Unlabelled(comment)


def _from_words(words: list[str]) -> MapRule | None:  # noqa: PLR0911 -- one a rule
    match words:
        case ["fip-in"]:
            return FipIn()
        case ["ports"]:
            return Ports()
        case ["fip-out"]:
            return FipOut()
        case ["snat", interface, length, *random_fully]:
            return PrefixSnat(interface, int(length), random_fully == ["random"])
        case ["hairpin", interface, mark]:
            return Hairpin(interface, int(mark))
        case ["missed"]:
            return Missed()
    return None


def check(edit: MapEdit) -> None:
    """Raises ValueError for what cannot be said."""
    match edit:
        case AddEntry(key, target):
            _key(key)
            _target(target)
        case DropEntry(key):
            _key(key)
        case _:
            script([edit])


def script(edits: Iterable[MapEdit]) -> str:
    """What to feed to ``nft -f -``. Raises ValueError for what cannot be said."""
    return "".join(line + "\n" for kind, some in groupby(edits, kind_of) for line in _lines(kind, list(some)))


def kind_of(edit: MapEdit) -> tuple[type[MapEdit], str]:
    """What edits that are written together have in common: what they do, and the map whose entries they are about."""
    return type(edit), edit.key.map if isinstance(edit, AddEntry | DropEntry) else ""


def _lines(kind: tuple[type[MapEdit], str], edits: list[MapEdit]) -> Iterator[str]:
    """Edits of one kind; entries of one map share lines, for nft reads few long lines quicker than many short ones."""
    _, name = kind
    for start in range(0, len(edits), _ENTRIES_A_LINE):
        some = edits[start : start + _ENTRIES_A_LINE]
        match some[0]:
            case AddEntry():
                added = (f"{_key(e.key)} : {_target(e.target)}" for e in some if isinstance(e, AddEntry))
                yield f"add element {_TABLE_WORDS} {name} {{ {', '.join(added)} }}"
            case DropEntry():
                dropped = (_key(e.key) for e in some if isinstance(e, DropEntry))
                yield f"delete element {_TABLE_WORDS} {name} {{ {', '.join(dropped)} }}"
            case _:
                for edit in some:
                    yield from _structure(edit)


def _structure(edit: MapEdit) -> Iterator[str]:
    match edit:
        case DropTable():
            yield f"delete table {_TABLE_WORDS}"
        case WriteChains(chains, unasked):
            yield from map_lines(edit)
            for chain in chains:
                yield f"add chain {_TABLE_WORDS} {chain} {{ {_hook(chain)} }}"
                yield f"flush chain {_TABLE_WORDS} {chain}"
            for chain, rules in chains.items():
                for rule in rules:
                    yield f'add rule {_TABLE_WORDS} {chain} {rule_text(rule)} comment "{label(rule)}"'
            yield from (f"delete map {_TABLE_WORDS} {name}" for name in unasked)


def map_lines(edit: WriteChains) -> Iterator[str]:
    """Table and maps alone, without the rules that ask."""
    yield f"add table {_TABLE_WORDS}"
    yield from (f"add map {_TABLE_WORDS} {name} {{ {map_type(name)}; }}" for name in sorted(asked(edit.chains)))


def _hook(chain: str) -> str:
    return f"type nat hook {chain} priority {PRIORITIES[chain]}; policy accept;"


def map_type(name: str) -> str:
    """Of what a map's keys and targets consist."""
    if name == _PORTS:
        return "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"
    return "type ipv4_addr : ipv4_addr"


def _key(key: EntryKey) -> str:
    address = _checked(key.address)
    if key.map != _PORTS:
        return address
    if key.protocol not in ("tcp", "udp"):
        raise ValueError(f"not a protocol: {key.protocol!r}")
    return f"{address} . {key.protocol} . {key.port}"


def _target(target: Endpoint) -> str:
    address, port = target
    return f"{_checked(address)} . {port}" if port else _checked(address)


def _checked(address: str) -> str:
    if not _ADDRESS(address):
        raise ValueError(f"not an IPv4 address: {address!r}")
    return address


def table_text(table: MapTable) -> str:
    """The table in the manner of ``nft list table``, to be read by people; empty where there is none."""
    if not table.stands:
        return ""
    blocks: list[tuple[str, list[str]]] = []
    for name in sorted(table.maps):
        entries = (f"{_key(key)} : {_target(to)}" for key, to in sorted(table.entries.items()) if key.map == name)
        listed = ",\n\t\t\t     ".join(entries)
        blocks.append((f"map {name}", [map_type(name), *([f"elements = {{ {listed} }}"] if listed else [])]))
    for chain, rules in table.chains.items():
        blocks.append((f"chain {chain}", [_hook(chain), *(f'{rule_text(r)} comment "{label(r)}"' for r in rules)]))
    body = "\n\n".join("\n\t\t".join((f"\t{head} {{", *lines)) + "\n\t}" for head, lines in blocks)
    return f"table {_TABLE_WORDS} {{\n{body}\n}}\n"
