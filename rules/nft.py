"""The nftables table of share-type DNAT, ``ip kube-ovn``: what it holds, and its text, both ways.

Written is nft's own language, one script for one transaction; read is what ``nft -j`` prints. For every rule
that the gateway writes the two are inverses; another's rule in one of our chains becomes ``Unknown``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TABLE = "kube-ovn"
MAP = "service-ips"
DISPATCH = "prerouting"
CHAIN_PREFIX = "dnat-"
# Among nat chains the first that maps a connection wins; iptables' own stand at -100.
PRIORITY = -150
# Clients that one backend remembers. A full set forgets nobody: further clients are dealt anew each time.
SET_SIZE = 65535

Endpoint = tuple[str, int]
_NAME = re.compile(rf"{CHAIN_PREFIX}[A-Za-z0-9._/-]+", re.ASCII).fullmatch
_WORD = re.compile(r"[a-z0-9.-]+", re.ASCII).fullmatch
# nft prints numbers where the system has no /etc/protocols.
_PROTOCOLS: Mapping[object, str] = {6: "tcp", "6": "tcp", 17: "udp", "17": "udp"}


class ServiceKey(NamedTuple):
    """What the dispatch map is asked for: destination address, protocol and destination port."""

    address: str
    protocol: str
    port: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Every new connection goes to one of the backends, picked at random."""

    protocol: str
    backends: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Recall:
    """A client that is in the set goes on to the chain of its backend."""

    clients: str
    chain: str


@dataclass(frozen=True, slots=True)
class Deal:
    """Every other client goes on to one of the chains, picked at random."""

    chains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remember:
    """The client is in the set for so many seconds from now on."""

    clients: str
    seconds: int


@dataclass(frozen=True, slots=True)
class ToBackend:
    """The connection goes to this backend."""

    protocol: str
    backend: Endpoint


@dataclass(frozen=True, slots=True)
class Unknown:
    """A rule that somebody else wrote, as JSON; it cannot be written back."""

    expression: str


NftRule = Spread | Recall | Deal | Remember | ToBackend | Unknown
NftRules = tuple[NftRule, ...]


@dataclass(frozen=True)
class NftTable:
    """The table's content; without any where there is no table.

    ``dispatch``: map and base chain stand, and the chain asks the map. ``chains`` and ``sets`` are those whose
    names begin with ``dnat-``. ``elements`` are the map's: the chain that each identity goes to, empty where the
    verdict is no goto.
    """

    dispatch: bool = False
    chains: Mapping[str, NftRules] = field(default_factory=dict)
    sets: frozenset[str] = frozenset()
    elements: Mapping[ServiceKey, str] = field(default_factory=dict)


# Commands, carried out in order and committed as one.


@dataclass(frozen=True, slots=True)
class Complete:
    """Make table, map and dispatch chain where they are missing; the dispatch rule is written anew."""


@dataclass(frozen=True, slots=True)
class DeleteTable:
    """Take the table away with all that it holds."""


@dataclass(frozen=True, slots=True)
class AddSet:
    """Make an empty set of clients."""

    name: str


@dataclass(frozen=True, slots=True)
class DeleteSet:
    name: str


@dataclass(frozen=True, slots=True)
class AddChain:
    """Make an empty chain."""

    name: str


@dataclass(frozen=True, slots=True)
class SetRules:
    """Flush a chain and fill it anew."""

    chain: str
    rules: NftRules


@dataclass(frozen=True, slots=True)
class DropChain:
    """Delete an empty chain that nothing leads to any more."""

    name: str


@dataclass(frozen=True, slots=True)
class AddElement:
    """Let an identity lead to a chain."""

    key: ServiceKey
    chain: str


@dataclass(frozen=True, slots=True)
class DeleteElement:
    key: ServiceKey


NftCommand = Complete | DeleteTable | AddSet | DeleteSet | AddChain | SetRules | DropChain | AddElement | DeleteElement


def script(commands: Iterable[NftCommand]) -> str:
    """What to feed to ``nft -f -``. Raises ValueError for what cannot be said."""
    return "".join(line + "\n" for command in commands for line in command_lines(command))


def command_lines(command: NftCommand) -> list[str]:  # noqa: PLR0911 -- one a command
    """One command in nft's language. Raises ValueError for what cannot be said."""
    match command:
        case Complete():
            return [
                f"add table ip {TABLE}",
                f"add map ip {TABLE} {MAP} {{ {_MAP_TYPE}; }}",
                f"add chain ip {TABLE} {DISPATCH} {{ {_HOOK} }}",
                f"flush chain ip {TABLE} {DISPATCH}",
                f"add rule ip {TABLE} {DISPATCH} {_ASK}",
            ]
        case DeleteTable():
            return [f"delete table ip {TABLE}"]
        case AddSet(name):
            return [f"add set ip {TABLE} {_name(name)} {{ {'; '.join(_SET)}; }}"]
        case DeleteSet(name):
            return [f"delete set ip {TABLE} {_name(name)}"]
        case AddChain(name):
            return [f"add chain ip {TABLE} {_name(name)}"]
        case SetRules(chain, rules):
            added = (f"add rule ip {TABLE} {chain} {rule_text(rule)}" for rule in rules)
            return [f"flush chain ip {TABLE} {_name(chain)}", *added]
        case DropChain(name):
            return [f"delete chain ip {TABLE} {_name(name)}"]
        case AddElement(key, chain):
            return [f"add element ip {TABLE} {MAP} {{ {_key(key)} : goto {_name(chain)} }}"]
        case DeleteElement(key):
            return [f"delete element ip {TABLE} {MAP} {{ {_key(key)} }}"]


_MAP_TYPE = "type ipv4_addr . inet_proto . inet_service : verdict"
_HOOK = f"type nat hook prerouting priority {PRIORITY}; policy accept;"
_ASK = f"ip daddr . meta l4proto . th dport vmap @{MAP}"
_SET = ("type ipv4_addr", f"size {SET_SIZE}", "flags dynamic,timeout")


def rule_text(rule: NftRule) -> str:
    """The rule in nft's language. Raises ValueError for one that somebody else wrote."""
    match rule:
        case Spread(protocol, backends):
            listed = ", ".join(f"{i} : {address} . {port}" for i, (address, port) in enumerate(backends))
            return f"meta l4proto {protocol} dnat ip to numgen random mod {len(backends)} map {{ {listed} }}"
        case Recall(clients, chain):
            return f"ip saddr @{_name(clients)} goto {_name(chain)}"
        case Deal(chains):
            listed = ", ".join(f"{i} : goto {_name(chain)}" for i, chain in enumerate(chains))
            return f"numgen random mod {len(chains)} vmap {{ {listed} }}"
        case Remember(clients, seconds):
            return f"update @{_name(clients)} {{ ip saddr timeout {seconds}s }}"
        case ToBackend(protocol, (address, port)):
            return f"meta l4proto {protocol} dnat ip to {address}:{port}"
        case Unknown(expression):
            raise ValueError(f"a rule of another writer cannot be written back: {expression}")


def _name(name: str) -> str:
    if not _NAME(name):
        raise ValueError(f"not a name of a chain or set of ours: {name!r}")
    return name


def _key(key: ServiceKey) -> str:
    if not _WORD(key.protocol):
        raise ValueError(f"not a protocol: {key.protocol!r}")
    return f"{key.address} . {key.protocol} . {key.port}"


def table_text(table: NftTable) -> str:
    """The table in the manner of ``nft list table``, to be read by people; empty where there is none."""
    if not table.dispatch:
        return ""
    elements = ",\n\t\t\t     ".join(f"{_key(key)} : goto {chain}" for key, chain in table.elements.items())
    blocks = [(f"map {MAP}", [_MAP_TYPE, *([f"elements = {{ {elements} }}"] if elements else [])])]
    blocks += [(f"set {name}", list(_SET)) for name in sorted(table.sets)]
    blocks += [(f"chain {DISPATCH}", [_HOOK, _ASK])]
    blocks += [(f"chain {name}", [rule_text(rule) for rule in rules]) for name, rules in table.chains.items()]
    body = "\n\n".join("\n\t\t".join((f"\t{head} {{", *lines)) + "\n\t}" for head, lines in blocks)
    return f"table ip {TABLE} {{\n{body}\n}}\n"


def parse(table: str, elements: str) -> NftTable:
    """What ``nft -j --terse list table`` and ``nft -j list map`` printed.

    Two listings, because the whole one would also name every client that a backend remembers; where there are few
    of these it may stand for both. Raises ValueError for what nft does not print.
    """
    chains: dict[str, list[NftRule]] = {}
    sets: list[str] = []
    asks: list[bool] = []
    hooked = mapped = False
    for kind, said in _objects(table):
        match kind, said:
            case "map", {"name": str(name), "type": ["ipv4_addr", "inet_proto", "inet_service"], "map": "verdict"}:
                mapped |= name == MAP
            case "set", {"name": str(name), "type": "ipv4_addr"} if _NAME(name):
                sets.append(name)
            case "chain", {"name": str(name), "type": "nat", "hook": "prerouting", "prio": prio}:
                hooked |= name == DISPATCH and prio == PRIORITY
            case "chain", {"name": str(name)} if _NAME(name):
                chains[name] = []
            case "rule", {"chain": str(name), "expr": expression} if name == DISPATCH:
                asks.append(_asks(expression))
            case "rule", {"chain": str(name), "expr": expression} if name in chains:
                chains[name].append(_rule(expression))
    ours = {name: tuple(rules) for name, rules in chains.items()}
    return NftTable(mapped and hooked and asks == [True], ours, frozenset(sets), dict(_elements(elements)))


def _objects(text: str) -> Iterator[tuple[str, Any]]:
    """Kind and description of each object of a listing."""
    try:
        listed = [pair for item in json.loads(text)["nftables"] for pair in item.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a listing of nft: {text[:100]!r}") from error
    yield from ((kind, said) for kind, said in listed if isinstance(said, dict))


def _elements(text: str) -> Iterator[tuple[ServiceKey, str]]:
    for kind, said in _objects(text):
        elements = said.get("elem", ()) if (kind, said.get("name")) == ("map", MAP) else ()
        for element in elements if isinstance(elements, list) else ():
            match element:
                case [{"concat": [str(address), protocol, int(port)]}, verdict]:
                    yield ServiceKey(address, _protocol(protocol), port), _goto(verdict)


def _protocol(said: object) -> str:
    return _PROTOCOLS.get(said, str(said)) if isinstance(said, str | int) else str(said)


def _asks(expression: Any) -> bool:
    """Whether this is the dispatch rule."""
    match expression:
        case [{"vmap": {"key": {"concat": [to, {"meta": {"key": "l4proto"}}, port]}, "data": data}}]:
            address = to == {"payload": {"protocol": "ip", "field": "daddr"}}
            return address and port == {"payload": {"protocol": "th", "field": "dport"}} and bool(data == f"@{MAP}")
    return False


_SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}


def _rule(expression: Any) -> NftRule:
    """The rule that nft printed so."""
    return _ours(expression) or Unknown(json.dumps(expression, sort_keys=True))


def _ours(expression: Any) -> NftRule | None:
    match expression:
        case [{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": protocol}}, {"dnat": target}]:
            return _translation(_protocol(protocol), target)
        case [{"match": {"op": "==", "left": left, "right": str(clients)}}, {"goto": {"target": chain}}]:
            return Recall(clients[1:], chain) if left == _SADDR and _NAME(clients[1:]) and _NAME(chain) else None
        case [{"vmap": {"key": {"numgen": numgen}, "data": {"set": pairs}}}]:
            chains = tuple(_goto(verdict) for verdict in _dealt(numgen, pairs))
            return Deal(chains) if chains and all(chains) else None
        case [{"set": {"op": "update", "elem": {"elem": {"val": value, "timeout": int(seconds)}}, "set": clients}}]:
            return Remember(clients[1:], seconds) if value == _SADDR and _NAME(clients[1:]) else None
    return None


def _goto(verdict: Any) -> str:
    """The chain of ours that a verdict leads to, or an empty text."""
    match verdict:
        case {"goto": {"target": str(chain)}} if _NAME(chain):
            return chain
    return ""


def _translation(protocol: str, target: Any) -> NftRule | None:
    if not isinstance(target, dict) or not target.keys() <= {"family", "addr", "port"}:
        return None
    match target:
        case {"addr": {"map": {"key": {"numgen": numgen}, "data": {"set": pairs}}}}:
            picked = [_endpoint(value) for value in _dealt(numgen, pairs)]
            backends = tuple(backend for backend in picked if backend)
            return Spread(protocol, backends) if backends and len(backends) == len(picked) else None
        case {"addr": str(address), "port": int(port)}:
            return ToBackend(protocol, (address, port))
    return None


def _endpoint(value: Any) -> Endpoint | None:
    match value:
        case {"concat": [str(address), int(port)]}:
            return address, port
    return None


def _dealt(numgen: Any, pairs: Any) -> list[Any]:
    """What a random number picks from, in order; nothing where it is not one of all with equal chance."""
    if not isinstance(pairs, list) or numgen != {"mode": "random", "mod": len(pairs), "offset": 0}:
        return []
    values = dict(map(tuple, pairs))
    return [values[index] for index in range(len(pairs))] if values.keys() == set(range(len(pairs))) else []
