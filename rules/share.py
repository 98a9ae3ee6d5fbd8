"""Share-type DNAT: one EIP, port and protocol spread over several backends, in nftables.

The table, the map and the chains bear the names that Kube-OVN's operators and tests look for: table
``ip kube-ovn``, verdict map ``service-ips``, and a chain ``dnat-<hash>`` for each identity. Without affinity
that chain is one rule that picks a backend at random for every new connection. With ClientIP affinity each
backend has a chain and a set of the clients that it serves: a client found in a set goes to that backend, any
other is dealt at random, and either is then remembered from anew. A backend that goes takes its set along, so
that its clients are dealt anew; connections that stand are not touched.

Chains that older hands left (Kube-OVN named them by the hash of ``TCP`` where the user wrote it so) lead
nowhere any more once the map points to ours, and go in the same transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rules.keyed import Keyed
from rules.nft import (
    CHAIN_PREFIX,
    AddChain,
    AddElement,
    AddSet,
    Complete,
    Deal,
    DeleteElement,
    DeleteSet,
    DeleteTable,
    DropChain,
    Endpoint,
    NftCommand,
    NftRule,
    NftRules,
    NftTable,
    Recall,
    Remember,
    ServiceKey,
    SetRules,
    Spread,
    ToBackend,
)
from rules.spec import GatewaySpec, SharedDnat
from rules.splice import Rendered, once


@dataclass(frozen=True, slots=True)
class Service:
    """One identity's backends, in order, and for how many seconds a client keeps its backend (None: no affinity)."""

    backends: tuple[Endpoint, ...]
    affinity: int | None = None


Services = Mapping[ServiceKey, Service]


def services(spec: GatewaySpec) -> dict[ServiceKey, Service]:
    """What the spec wants."""
    return _services(spec.shared_dnats)


@once
def _services(shared: Keyed[SharedDnat]) -> dict[ServiceKey, Service]:
    return dict(_each(shared))


def _service(dnat: SharedDnat) -> tuple[ServiceKey, Service]:
    affinity = dnat.session_affinity_timeout_seconds if dnat.session_affinity == "ClientIP" else None
    backends = tuple((b.internal_ip, b.internal_port) for b in dnat.backends)
    return ServiceKey(dnat.eip, dnat.protocol, dnat.external_port), Service(backends, affinity)


_each = Rendered(_service)


def chain_name(key: ServiceKey) -> str:
    """``dnat-`` and the first 12 hexadecimal digits of the MD5 of ``eip:port:protocol``."""
    text = f"{key.address}:{key.port}:{key.protocol}"
    return CHAIN_PREFIX + hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:12]


@once
def table_of(wanted: Services) -> NftTable:
    """The table that carries these services out."""
    parts = _parts(wanted.items())
    chains = {name: rules for made in parts for name, rules in made.items()}
    sets = frozenset(name for made in parts for name in list(made)[1:])
    return NftTable(True, chains, sets, {key: next(iter(made)) for key, made in zip(wanted, parts, strict=True)})


def _chains(named: tuple[ServiceKey, Service]) -> dict[str, NftRules]:
    """The service's chain and, with affinity, one for each backend, which has a set of the same name."""
    key, service = named
    chain = chain_name(key)
    if service.affinity is None:
        return {chain: (Spread(key.protocol, service.backends),)}
    names = [f"{chain}-{address}-{port}" for address, port in service.backends]
    chains: dict[str, NftRules] = {chain: (*(Recall(name, name) for name in names), Deal(tuple(names)))}
    for name, backend in zip(names, service.backends, strict=True):
        chains[name] = (Remember(name, service.affinity), ToBackend(key.protocol, backend))
    return chains


_parts = Rendered(_chains)


def services_of(table: NftTable) -> dict[ServiceKey, Service]:
    """The services that a table carries out; identities whose chains are of another shape are left out."""
    found = {key: _read(key, table.chains.get(chain, ()), table) for key, chain in table.elements.items()}
    return {key: service for key, service in found.items() if service is not None} if table.dispatch else {}


def _read(key: ServiceKey, rules: NftRules, table: NftTable) -> Service | None:
    match rules:
        case (Spread(key.protocol, backends),):
            return Service(backends)
        case (*recalls, Deal(chains)):
            pairs = [_backend(key, name, table) for name in chains]
            remembered = [pair for pair in pairs if pair is not None]
            times = {seconds for seconds, _ in remembered}
            whole = len(remembered) == len(pairs) and recalls == [Recall(name, name) for name in chains]
            return Service(tuple(backend for _, backend in remembered), times.pop()) if whole and times else None
    return None


def _backend(key: ServiceKey, name: str, table: NftTable) -> tuple[int, Endpoint] | None:
    match table.chains.get(name):
        case (Remember(clients, seconds), ToBackend(key.protocol, backend)) if clients == name:
            return seconds, backend
    return None


def edits(wanted: NftTable, standing: NftTable) -> Iterator[NftCommand]:
    """What turns one table into the other, in an order in which the kernel takes it as one transaction.

    Sets that stay keep the clients they hold.
    """
    if wanted == NftTable():
        if standing != NftTable():
            yield DeleteTable()
        return
    if wanted.dispatch and not standing.dispatch:
        yield Complete()
    yield from (AddSet(name) for name in sorted(wanted.sets - standing.sets))
    yield from (AddChain(name) for name in wanted.chains if name not in standing.chains)
    for name, rules in wanted.chains.items():
        if standing.chains.get(name, ()) != rules:
            yield SetRules(name, rules)
    for key, chain in standing.elements.items():
        if wanted.elements.get(key) != chain:
            yield DeleteElement(key)
    for key, chain in wanted.elements.items():
        if standing.elements.get(key) != chain:
            yield AddElement(key, chain)
    gone = [name for name in standing.chains if name not in wanted.chains]
    yield from (SetRules(name, ()) for name in gone if standing.chains[name])
    yield from (DropChain(name) for name in gone)
    yield from (DeleteSet(name) for name in sorted(standing.sets - wanted.sets))


def leads_to(rule: NftRule) -> tuple[str, ...]:
    """The chains that a rule may go on to."""
    match rule:
        case Recall(_, chain):
            return (chain,)
        case Deal(chains):
            return chains
    return ()


def remembers_in(rule: NftRule) -> str | None:
    """The set that a rule needs."""
    match rule:
        case Recall(clients, _) | Remember(clients, _):
            return clients
    return None
