"""What the gateway writes into netfilter for a spec, as one ruleset: to read, and to trace packets through."""

from __future__ import annotations

from rules import fastpath, share
from rules.appliance import Spec, desired
from rules.desired import Facts
from rules.iptables import render_save
from rules.maps import table_text as maps_text
from rules.nft import table_text
from rules.ruleset import AnyRule, ChainRef, Ruleset
from rules.spec import GatewaySpec
from rules.state import Actual


def rendered(spec: Spec, facts: Facts, *, maps: bool = False) -> Ruleset:
    """Our chains with all their rules, and of the built-in chains the jumps to ours.

    ``maps``: as they are where maps decide ahead of them.
    """
    wanted = desired(spec, facts, Actual(no_maps="" if maps else "the chains alone"))
    chains: dict[ChainRef, tuple[AnyRule, ...]] = {}
    for (ref, jump), present in wanted.hooks.items():
        if present:
            chains[ref] = (*chains.get(ref, ()), jump)
    chains |= {ref: rules for ref, rules in wanted.chains.items() if rules is not None}
    return Ruleset(chains)


def rendered_text(spec: Spec, facts: Facts, *, maps: bool = False) -> str:
    """The same as iptables-save prints it, and as nft does the tables of share-type DNAT and of maps, where any are."""
    services = share.services(spec) if isinstance(spec, GatewaySpec) else None
    chains = render_save(rendered(spec, facts, maps=maps))
    shared = table_text(share.table_of(services)) if services else ""
    return chains + shared + (maps_text(fastpath.table(spec)) if maps and isinstance(spec, GatewaySpec) else "")
