"""The spec read back from the kernel's own rules: Actual -> GatewaySpec.

This is how a gateway whose files are gone (a container restarted in a network namespace that outlived it, or
an image of another release put in its place) goes on where it was. Rules, marked addresses and marked routes say
what the spec was; only the order among source translations of different prefix lengths is lost, and it means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from rules import nat, qos, share
from rules.desired import DEFAULT_V4, DEFAULT_V6
from rules.keyed import HasKey, Keyed
from rules.ruleset import (
    ChainRef,
    Conntrack,
    Destination,
    DestinationPort,
    InInterface,
    Jump,
    OutInterface,
    Rule,
    Source,
)
from rules.ruleset import Dnat as ToDestination
from rules.ruleset import Snat as ToSource
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Interfaces, Part, Route, SharedDnat, Snat
from rules.state import MAIN_TABLE, ROUTE_PROTOCOL, Actual, RouteKey

P = TypeVar("P", bound=Part)
H = TypeVar("H", bound=HasKey)


def adopt(actual: Actual, interfaces: Interfaces | None = None) -> GatewaySpec | None:
    """The spec that the kernel carries out, or None where our chains do not stand (SNAT_FILTER -> SHARED_SNAT).

    Without ``interfaces`` these too are taken from the rules. Rules of other shapes in our chains are passed over.
    """
    if Rule((), Jump(nat.SHARED_SNAT.chain)) not in actual.ruleset.chains.get(nat.SNAT_FILTER, ()):
        limits = qos.recovered(actual.tc, interfaces or Interfaces())
        return GatewaySpec(qos=Keyed(limits), initialized=False) if limits else None
    sides = interfaces or _interfaces(actual)
    fips, dnats, snats = _first(_fips(actual)), _first(_dnats(actual)), _first(_snats(actual))
    shared = _first(_shared_dnats(actual))
    dnats = Keyed(dnat for dnat in dnats if dnat.key not in shared)  # the shared one decides before
    named = {rule.eip for part in (fips, dnats, snats, shared) for rule in part}
    eips = _first(_eips(actual, sides.external, named))
    return GatewaySpec(
        interfaces=sides,
        gateway_v4=_gateway(actual, DEFAULT_V4, sides.external),
        gateway_v6=_gateway(actual, DEFAULT_V6, sides.external),
        eips=eips,
        fips=fips,
        dnats=dnats,
        snats=snats,
        routes=_first(_routes(actual, sides.vpc)),
        shared_dnats=shared,
        qos=Keyed(qos.recovered(actual.tc, sides, {_ip(eip.address) for eip in eips})),
    )


def _first(items: Iterable[H | None]) -> Keyed[H]:
    """Of several rules with one identity the first decides, as it does for packets."""
    standing: dict[Any, H] = {}
    for item in items:
        if item is not None:
            standing.setdefault(item.key, item)
    return Keyed(standing.values())


def _part(kind: type[P], **fields: object) -> P | None:
    """The part, or None where a foreign hand wrote values that no spec can have."""
    try:
        return kind.model_validate(fields)
    except ValidationError:
        return None


def _rules(actual: Actual, ref: ChainRef) -> Iterator[Rule]:
    return (rule for rule in actual.ruleset.chains.get(ref, ()) if isinstance(rule, Rule))


def _interfaces(actual: Actual) -> Interfaces:
    rules = [rule for ref in (nat.VPC_MARK, nat.HAIRPIN_SNAT) for rule in _rules(actual, ref)]
    inside = [m.name for r in rules for m in r.matches if isinstance(m, InInterface | OutInterface)]
    rules = [rule for ref in (nat.ARP_GUARD, nat.SHARED_SNAT) for rule in _rules(actual, ref)]
    outside = [m.name for r in rules for m in r.matches if isinstance(m, OutInterface)]
    eips = set(_hairpin_eips(actual))
    outside += [key.interface for key, ours in actual.addresses.items() if ours or _ip(key.address) in eips]
    usual = Interfaces()
    vpc, external = next(iter(inside), usual.vpc), next(iter(outside), usual.external)
    return _part(Interfaces, vpc=vpc, external=external) or usual


def _hairpin_eips(actual: Actual) -> Iterator[str]:
    for rule in _rules(actual, nat.HAIRPIN_SNAT):
        yield from (match.orig_dst for match in rule.matches if isinstance(match, Conntrack))


def _ip(address: str) -> str:
    return address.partition("/")[0]


def _eips(actual: Actual, external: str, named: set[str]) -> Iterator[Eip | None]:
    """Addresses of the external interface that a hairpin rule names, then those that bear our mark.

    Releases of Kube-OVN before 1.16 made no hairpin rules and nobody's addresses bear a mark: there an address that
    a translation names is an EIP, and so is every one but the first, which is the interface's own.
    """
    mine = {key.address: ours for key, ours in actual.addresses.items() if key.interface == external}
    up = {_ip(address): address for address in sorted(mine, key=lambda a: mine[a])}  # a marked one counts first
    hairpin = nat.HAIRPIN_SNAT in actual.ruleset.chains
    candidates = [up[ip] for ip in _hairpin_eips(actual) if ip in up]
    others = [] if hairpin else [address for n, address in enumerate(mine) if n or _ip(address) in named]
    candidates += [address for address, ours in mine.items() if ours or address in others]
    return (_part(Eip, address=address) for address in candidates)


def _fips(actual: Actual) -> Iterator[Fip | None]:
    for rule in _rules(actual, nat.EXCLUSIVE_DNAT):
        match rule:
            case Rule((Destination(eip),), ToDestination(internal_ip, None)):
                yield _part(Fip, eip=_host(eip), internal_ip=internal_ip)


def _dnats(actual: Actual) -> Iterator[Dnat | None]:
    for rule in _rules(actual, nat.SHARED_DNAT):
        match rule:
            case Rule((Destination(eip), DestinationPort(protocol, port)), ToDestination(ip, int(internal_port))):
                fields = {"external_port": port, "protocol": protocol, "internal_ip": ip}
                yield _part(Dnat, eip=_host(eip), internal_port=internal_port, **fields)


def _shared_dnats(actual: Actual) -> Iterator[SharedDnat | None]:
    for key, service in share.services_of(actual.nft).items():
        affinity = {"session_affinity": "ClientIP", "session_affinity_timeout_seconds": service.affinity}
        yield _part(
            SharedDnat,
            eip=key.address,
            external_port=key.port,
            protocol=key.protocol,
            backends=[{"internal_ip": address, "internal_port": port} for address, port in service.backends],
            **(affinity if service.affinity is not None else {}),
        )


def _snats(actual: Actual) -> Iterator[Snat | None]:
    for rule in _rules(actual, nat.SHARED_SNAT):
        match rule:
            case Rule((Source(prefix), OutInterface(_)), ToSource(eip, random_fully)):
                yield _part(Snat, eip=eip, internal_cidr=prefix, random_fully=random_fully)
            case Rule((OutInterface(_),), ToSource(eip, random_fully)):
                yield _part(Snat, eip=eip, internal_cidr="0.0.0.0/0", random_fully=random_fully)


def _host(prefix: str) -> str:
    """The address of a /32; any other prefix stays as it is, and no spec takes it."""
    return prefix.removesuffix("/32")


def _gateway(actual: Actual, default: RouteKey, external: str) -> str | None:
    """The next hop of our default route out of the external interface; somebody else's is not ours before a call
    names its gateway."""
    entry = actual.routes.get(default)
    ours = entry is not None and entry.protocol == ROUTE_PROTOCOL
    return entry.via if entry and ours and entry.onlink and entry.interface == external else None


def _routes(actual: Actual, vpc: str) -> Iterator[Route | None]:
    for key, entry in actual.routes.items():
        ours = (
            key.table == MAIN_TABLE
            and entry.protocol == ROUTE_PROTOCOL
            and entry.interface == vpc
            and entry.via is not None
        )
        if ours and key not in (DEFAULT_V4, DEFAULT_V6):
            yield _part(Route, cidr=key.prefix, next_hop_ip=entry.via)
