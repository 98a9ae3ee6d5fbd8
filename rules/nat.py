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

from rules.maps import MISSED
from rules.ruleset import (
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
from rules.spec import GatewaySpec

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


def chains(spec: GatewaySpec, *, guard: bool, maps: bool = False) -> dict[ChainRef, Rules | None]:
    """All our chains with their whole content (None: there is none).

    ``guard`` while nothing may leave by the external interface; ``maps`` while maps decide ahead of the chains.
    """
    passed = (_PASS_OVER,) if maps else ()
    external = spec.interfaces.external
    return {
        MAPS_MISSED: (Rule((), SetMark(0, MISSED)),) if maps else None,
        DNAT_FILTER: (*passed, *(Rule((), Jump(c)) for c in ("EXCLUSIVE_DNAT", "SHARED_DNAT"))),
        EXCLUSIVE_DNAT: tuple(Rule((Destination(f"{f.eip}/32"),), Dnat(f.internal_ip)) for f in spec.fips),
        SHARED_DNAT: shared_dnat(spec),
        SNAT_FILTER: (*passed, *(Rule((), Jump(c)) for c in ("EXCLUSIVE_SNAT", "SHARED_SNAT", "HAIRPIN_SNAT"))),
        EXCLUSIVE_SNAT: tuple(Rule((Source(f"{f.internal_ip}/32"),), Snat(f.eip)) for f in spec.fips),
        SHARED_SNAT: shared_snat(spec),
        HAIRPIN_SNAT: hairpin_snat(spec),
        VPC_MARK: (Rule((InInterface(spec.interfaces.vpc),), SetMark(TENANT_MARK, TENANT_MARK)),),
        ARP_GUARD: (Rule((OutInterface(external),), Drop()),) if guard else (),
    }


def shared_dnat(spec: GatewaySpec) -> Rules:
    """Port mappings, in creation order: no two of them match one packet."""
    return tuple(
        Rule(
            (Destination(f"{d.eip}/32"), DestinationPort(d.protocol, d.external_port)),
            Dnat(d.internal_ip, d.internal_port),
        )
        for d in spec.dnats
    )


def shared_snat(spec: GatewaySpec) -> Rules:
    """Source translations, longest prefix first; among equals the older one decides."""
    ordered = sorted(spec.snats, key=lambda snat: -snat.prefix_length)
    out = OutInterface(spec.interfaces.external)
    return tuple(Rule((*_source(s.internal_cidr), out), Snat(s.eip, s.random_fully)) for s in ordered)


def _source(prefix: str) -> tuple[Source, ...]:
    # A match on 0.0.0.0/0 says nothing; the kernel's tools do not print it.
    return () if prefix == "0.0.0.0/0" else (Source(prefix),)


def hairpin_snat(spec: GatewaySpec) -> Rules:
    """One rule for each EIP: from the tenant's side, by that EIP, back to the tenant's side."""
    out = OutInterface(spec.interfaces.vpc)
    mark = Mark(TENANT_MARK, TENANT_MARK)
    return tuple(Rule((out, mark, Conntrack("DNAT", e.ip)), Snat(e.ip, random_fully=True)) for e in spec.eips)
