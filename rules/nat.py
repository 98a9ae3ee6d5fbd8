"""GatewaySpec -> iptables chains: names, order and shapes that operators and Kube-OVN's tests read.

nat: PREROUTING -> DNAT_FILTER -> EXCLUSIVE_DNAT (floating IPs), SHARED_DNAT (port mappings);
POSTROUTING -> SNAT_FILTER -> EXCLUSIVE_SNAT (floating IPs), SHARED_SNAT (by descending prefix length),
HAIRPIN_SNAT (a tenant that reaches another one by an EIP is seen as that EIP, so that answers come back
through the gateway). mangle: PREROUTING -> VPC_MARK marks what came from the tenant's side for HAIRPIN_SNAT;
FORWARD -> ARP_GUARD keeps packets off the external interface while ARP is off there: the neighbour entry of
the external gateway is then our own MAC, and a packet sent out would re-enter until its TTL ends.
Where maps decide ahead of the chains (``rules.fastpath``), a packet that they did not know bears a mark here, and
passes over DNAT_FILTER and SNAT_FILTER by way of MAPS_MISSED, which takes the mark off.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import lru_cache

from rules import spec
from rules.keyed import Keyed
from rules.maps import MISSED
from rules.ruleset import (
    AnyRule,
    ChainRef,
    Conntrack,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Goto,
    InInterface,
    Jump,
    Mark,
    OutInterface,
    Rule,
    Rules,
    SetMark,
    Snat,
    Source,
)
from rules.spec import Eip, Fip, GatewaySpec
from rules.splice import Rendered, once

TENANT_MARK = 0x1

DNAT_FILTER = ChainRef("nat", "DNAT_FILTER")
EXCLUSIVE_DNAT = ChainRef("nat", "EXCLUSIVE_DNAT")
SHARED_DNAT = ChainRef("nat", "SHARED_DNAT")
SNAT_FILTER = ChainRef("nat", "SNAT_FILTER")
EXCLUSIVE_SNAT = ChainRef("nat", "EXCLUSIVE_SNAT")
SHARED_SNAT = ChainRef("nat", "SHARED_SNAT")
HAIRPIN_SNAT = ChainRef("nat", "HAIRPIN_SNAT")
MAPS_MISSED = ChainRef("nat", "MAPS_MISSED")
VPC_MARK = ChainRef("mangle", "VPC_MARK")
ARP_GUARD = ChainRef("mangle", "ARP_GUARD")

HOOKS: tuple[tuple[ChainRef, Rule], ...] = (
    (ChainRef("nat", "PREROUTING"), Rule((), Jump("DNAT_FILTER"))),
    (ChainRef("nat", "POSTROUTING"), Rule((), Jump("SNAT_FILTER"))),
    (ChainRef("mangle", "PREROUTING"), Rule((), Jump("VPC_MARK"))),
    (ChainRef("mangle", "FORWARD"), Rule((), Jump("ARP_GUARD"))),
)


_PASS_OVER = Rule((Mark(MISSED, MISSED),), Goto(MAPS_MISSED.chain))


def chains(
    gateway: GatewaySpec, *, guard: bool, maps: bool = False, without: Container[ChainRef] = ()
) -> dict[ChainRef, Rules | None]:
    """All our chains with their whole content (None: there is none), but for those in ``without``.

    ``guard`` while nothing may leave by the external interface; ``maps`` while maps decide ahead of the chains.
    """
    passed = (_PASS_OVER,) if maps else ()
    vpc, external = gateway.interfaces.vpc, gateway.interfaces.external
    made: dict[ChainRef, Callable[[], Rules | None]] = {
        MAPS_MISSED: lambda: (Rule((), SetMark(0, MISSED)),) if maps else None,
        DNAT_FILTER: lambda: (*passed, *map(_jump, ("EXCLUSIVE_DNAT", "SHARED_DNAT"))),
        EXCLUSIVE_DNAT: lambda: exclusive(gateway.fips)[0],
        SHARED_DNAT: lambda: shared_dnat(gateway.dnats),
        SNAT_FILTER: lambda: (*passed, *map(_jump, ("EXCLUSIVE_SNAT", "SHARED_SNAT", "HAIRPIN_SNAT"))),
        EXCLUSIVE_SNAT: lambda: exclusive(gateway.fips)[1],
        SHARED_SNAT: lambda: shared_snat(gateway.snats, external),
        HAIRPIN_SNAT: lambda: hairpin_snat(gateway.eips, vpc),
        VPC_MARK: lambda: (Rule((InInterface(vpc),), SetMark(TENANT_MARK, TENANT_MARK)),),
        ARP_GUARD: lambda: (Rule((OutInterface(external),), Drop()),) if guard else (),
    }
    return {ref: rules() for ref, rules in made.items() if ref not in without}


def _jump(chain: str) -> AnyRule:
    return Rule((), Jump(chain))


@once
def exclusive(fips: Keyed[Fip]) -> tuple[Rules, Rules]:
    """Floating IPs, in creation order: destinations, and sources."""
    return _fip_destinations(fips), _fip_sources(fips)


_fip_destinations = Rendered[Fip, AnyRule](lambda f: Rule((Destination(f"{f.eip}/32"),), Dnat(f.internal_ip)))
_fip_sources = Rendered[Fip, AnyRule](lambda f: Rule((Source(f"{f.internal_ip}/32"),), Snat(f.eip)))


@once
def shared_dnat(dnats: Keyed[spec.Dnat]) -> Rules:
    """Port mappings, in creation order: no two of them match one packet."""
    return _port_mappings(dnats)


def _port_mapping(d: spec.Dnat) -> AnyRule:
    matches = (_to(d.eip), DestinationPort(d.protocol, d.external_port))
    return Rule(matches, Dnat(d.internal_ip, d.internal_port))


@lru_cache(maxsize=4096)
def _to(eip: str) -> Destination:
    return Destination(f"{eip}/32")


_port_mappings = Rendered(_port_mapping)


@once
def shared_snat(snats: Keyed[spec.Snat], external: str) -> Rules:
    """Source translations, longest prefix first; among equals the older one decides."""
    return _source_translations(external)(sorted(snats, key=lambda snat: -snat.prefix_length))


@lru_cache(maxsize=4)
def _source_translations(external: str) -> Rendered[spec.Snat, AnyRule]:
    out = OutInterface(external)
    return Rendered(lambda s: Rule((*_source(s.internal_cidr), out), Snat(s.eip, s.random_fully)))


def _source(prefix: str) -> tuple[Source, ...]:
    # A match on 0.0.0.0/0 says nothing; the kernel's tools do not print it.
    return () if prefix == "0.0.0.0/0" else (Source(prefix),)


@once
def hairpin_snat(eips: Keyed[Eip], vpc: str) -> Rules:
    """One rule for each EIP: from the tenant's side, by that EIP, back to the tenant's side."""
    return _hairpins(vpc)(eips)


@lru_cache(maxsize=4)
def _hairpins(vpc: str) -> Rendered[Eip, AnyRule]:
    out, mark = OutInterface(vpc), Mark(TENANT_MARK, TENANT_MARK)
    return Rendered(lambda e: Rule((out, mark, Conntrack("DNAT", e.ip)), Snat(e.ip, random_fully=True)))
