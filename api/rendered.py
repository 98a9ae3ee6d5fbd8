"""What the gateway writes into netfilter for a spec, as one ruleset: to read, and to trace packets through."""

from __future__ import annotations

from rules import share
from rules.appliance import Spec, desired
from rules.desired import Facts
from rules.iptables import render_save
from rules.nft import table_text
from rules.ruleset import AnyRule, ChainRef, Ruleset
from rules.spec import GatewaySpec
from rules.state import Actual


def rendered(spec: Spec, facts: Facts) -> Ruleset:
    """Our chains with all their rules, and of the built-in chains the jumps to ours."""
    wanted = desired(spec, facts, Actual())
    chains: dict[ChainRef, tuple[AnyRule, ...]] = {}
    for (ref, jump), present in wanted.hooks.items():
        if present:
            chains[ref] = (*chains.get(ref, ()), jump)
    chains |= {ref: rules for ref, rules in wanted.chains.items() if rules is not None}
    return Ruleset(chains)


def rendered_text(spec: Spec, facts: Facts) -> str:
    """The same as iptables-save prints it, and the table of share-type DNAT, where there is any, as nft does."""
    services = share.services(spec) if isinstance(spec, GatewaySpec) else None
    return render_save(rendered(spec, facts)) + (table_text(share.table_of(services)) if services else "")
