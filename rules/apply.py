"""Edits and plans carried out on values, as strictly as the kernel carries them out.

The shipped fake kernel and the tests stand on this: what the kernel (or iptables, which speaks for it) would
refuse raises ``Rejected`` with words like theirs, and nothing has changed then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import TypeVar

from rules.entries import Entries
from rules.iptables import CHAIN_NAME_MAX, render_rule
from rules.maps import AddEntry, DropEntry, DropTable, EntryKey, MapEdit, MapTable, WriteChains, asked
from rules.maps import check as check_map_edit
from rules.nft import (
    AddChain,
    AddElement,
    AddSet,
    Complete,
    DeleteElement,
    DeleteSet,
    DeleteTable,
    DropChain,
    Endpoint,
    NftCommand,
    NftTable,
    SetRules,
    command_lines,
)
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainEdit,
    ChainRef,
    DeleteChain,
    DeleteRule,
    Destination,
    Dnat,
    Drop,
    Family,
    Foreign,
    Goto,
    InsertRule,
    Jump,
    Masquerade,
    NewChain,
    ReplaceRules,
    Rule,
    Rules,
    Ruleset,
    Snat,
    Source,
)
from rules.share import leads_to, remembers_in
from rules.state import (
    Actual,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    DeviceStep,
    EditMaps,
    EditNft,
    EditTable,
    LinkState,
    Plan,
    ReplaceRoute,
    RoutingStep,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
    Step,
    Switch,
)
from rules.tc import TcStep, apply_tc
from rules.tc_text import tc_text

Chains = Mapping[ChainRef, Rules]
K = TypeVar("K")
V = TypeVar("V")


class Rejected(Exception):
    """The kernel would refuse this; the message says what and why."""


def apply(plan: Plan, actual: Actual) -> Actual:
    """The kernel's state after all steps of the plan; raises Rejected at the first that it would refuse."""
    return reduce(apply_step, plan.steps, actual)


def apply_step(actual: Actual, step: Step) -> Actual:  # noqa: PLR0911 -- one a step
    """The state after one step: one table's edits, all or none, or one change of a link."""
    match step:
        case EditTable(table, edits, family):
            return replace(actual, ruleset=Ruleset(apply_edits(table, actual.ruleset.chains, edits, family)))
        case EditNft(commands):
            return replace(actual, nft=apply_commands(actual.nft, commands))
        case EditMaps(map_edits):
            return replace(actual, maps=apply_map_edits(actual.maps, map_edits))
        case AddDevice() | DeleteDevice() | SetMaster():
            return replace(actual, links=apply_device_step(actual.links, step))
        case SetSysctl(name, value):
            _need(name in actual.sysctls, step, "No such file or directory")
            return replace(actual, sysctls={**actual.sysctls, name: value})
    if isinstance(step, TcStep):
        try:
            return replace(actual, tc=apply_tc(actual.tc, step))
        except ValueError as error:
            raise Rejected(f"{tc_text(step)}: {error}") from error
    return _apply_link_step(actual, step)


def apply_device_step(links: Mapping[str, LinkState], step: DeviceStep) -> dict[str, LinkState]:
    """The links after an interface was made, deleted, or made a port of another."""
    match step:
        case AddDevice(name, device):
            _need(name not in links, step, "File exists")
            index = max((link.index for link in links.values()), default=0) + 1
            return {**links, name: LinkState(index, "", False, True, 1500, False, device=device)}
        case DeleteDevice(name):
            _need(name in links, step, "Cannot find device")
            freed = {other: replace(link, master=None) for other, link in links.items() if link.master == name}
            return _without({**links, **freed}, name)
        case SetMaster(name, master):
            _need(name in links and (master is None or master in links), step, "Cannot find device")
            return {**links, name: replace(links[name], master=master)}


AddressStep = AddAddress | DeleteAddress | RoutingStep | Switch


def _apply_link_step(actual: Actual, step: AddressStep) -> Actual:  # noqa: PLR0911 -- one a step
    match step:
        case AddAddress(address):
            _need(address.interface in actual.links, step, "Cannot find device")
            _need(address not in actual.addresses, step, "File exists")
            return replace(actual, addresses={**actual.addresses, address: True})
        case DeleteAddress(address):
            _need(address in actual.addresses, step, "Cannot assign requested address")
            return replace(actual, addresses=_without(actual.addresses, address))
        case ReplaceRoute(route, entry):
            _need(entry.interface in actual.links, step, "Cannot find device")
            return replace(actual, routes={**actual.routes, route: entry})
        case DeleteRoute(route, entry):
            _need(actual.routes.get(route) == entry, step, "No such process")
            return replace(actual, routes=_without(actual.routes, route))
        case AddPolicyRule(rule):
            _need(not rule.is_in(actual.policy_rules), step, "File exists")
            return replace(actual, policy_rules=actual.policy_rules | {rule})
        case DeletePolicyRule(rule):
            _need(rule.is_in(actual.policy_rules), step, "No such file or directory")
            left = (other for other in actual.policy_rules if not rule.matches(other))
            return replace(actual, policy_rules=frozenset(left))
        case SetArp(name) | SetPromoteSecondaries(name) | SetUp(name):
            _need(name in actual.links, step, "Cannot find device")
            return replace(actual, links={**actual.links, name: switched(actual.links[name], step)})


def switched(link: LinkState, step: Switch) -> LinkState:
    """The link with one of its flags set."""
    match step:
        case SetArp(_, on):
            return replace(link, arp=on)
        case SetPromoteSecondaries(_, on):
            return replace(link, promote_secondaries=on)
        case SetUp(_, on):
            return replace(link, up=on)


def apply_edits(table: str, chains: Chains, edits: Iterable[ChainEdit], family: Family = 4) -> dict[ChainRef, Rules]:
    """The chains after all edits of one table; raises Rejected, and then none of them happened."""
    changed = dict(chains)
    for edit in edits:
        _need((edit.ref.table, edit.ref.family) == (table, family), edit, f"not an edit of the table {table}")
        changed = apply_edit(changed, edit)
    return changed


def apply_edit(chains: Chains, edit: ChainEdit) -> dict[ChainRef, Rules]:
    """The chains after one edit; raises Rejected for what iptables or the kernel refuses.

    Loops of jumps are refused anywhere; the kernel looks for them only in what a built-in chain reaches.
    """
    ref = edit.ref
    if isinstance(edit, NewChain):
        _need(ref.table in BUILTIN, edit, f"can't initialize iptables table `{ref.table}': Table does not exist")
        _need(len(ref.chain) <= CHAIN_NAME_MAX, edit, f"chain name too long (must be under {CHAIN_NAME_MAX + 1} chars)")
        _need(ref not in chains, edit, "Chain already exists.")
        return {**chains, ref: ()}
    _need(ref in chains, edit, "No chain/target/match by that name.")
    standing = chains[ref]
    match edit:
        case DeleteChain():
            _need(ref.chain not in BUILTIN[ref.table], edit, "Cannot delete a built-in chain.")
            user = next(_references(chains, ref), None)
            _need(user is None, edit, f"CHAIN_DEL failed (Device or resource busy): {user} jumps to it")
            return _without(chains, ref)
        case InsertRule(_, index, rule):
            _need(0 <= index <= len(standing), edit, "Index of insertion too big.")
            return _with_rules(chains, edit, (rule,), (*standing[:index], rule, *standing[index:]))
        case DeleteRule(_, index, rule):
            _need(0 <= index < len(standing), edit, "Index of deletion too big.")
            _need(standing[index] == rule, edit, f"that rule is not there but {standing[index]}")
            return {**chains, ref: (*standing[:index], *standing[index + 1 :])}
        case ReplaceRules(_, rules):
            return _with_rules(chains, edit, rules, rules)


def _need(condition: bool, what: object, reason: str) -> None:
    if not condition:
        raise Rejected(f"{what}: {reason}")


def _without(mapping: Mapping[K, V], key: K) -> dict[K, V]:
    return {k: v for k, v in mapping.items() if k != key}


def _with_rules(chains: Chains, edit: ChainEdit, fresh: Iterable[AnyRule], rules: Rules) -> dict[ChainRef, Rules]:
    for rule in fresh:
        _check_rule(chains, edit.ref, rule)
        if isinstance(rule, Rule) and isinstance(rule.target, Jump | Goto):
            loop = _reaches(chains, edit.ref._replace(chain=rule.target.chain), edit.ref)
            _need(not loop, edit, "Too many levels of symbolic links")
    return {**chains, edit.ref: rules}


def _check_rule(chains: Chains, ref: ChainRef, rule: AnyRule) -> None:
    """Which tables a target may stand in (xt_DNAT, xt_SNAT: nat; iptables inhibits DROP in nat)."""
    try:
        render_rule(rule)
    except ValueError as error:
        raise Rejected(f"{rule}: {error}") from error
    if isinstance(rule, Foreign):
        return
    for match in rule.matches:
        if isinstance(match, Source | Destination):
            _need((":" in match.prefix) == (ref.family == 6), rule, f"host/network `{match.prefix}' not found")
    match rule.target:
        case Jump(chain) | Goto(chain):
            known = ref._replace(chain=chain) in chains and chain not in BUILTIN[ref.table]
            _need(known, rule, "No chain/target/match by that name.")
        case Dnat() | Snat() | Masquerade():
            _need(ref.table == "nat", rule, "only valid in the nat table")
        case Drop():
            _need(ref.table != "nat", rule, "The nat table is not intended for filtering")


def _references(chains: Chains, ref: ChainRef) -> Iterator[ChainRef]:
    for other, rules in chains.items():
        if (other.table, other.family) == (ref.table, ref.family) and any(_jumps_to(rule, ref.chain) for rule in rules):
            yield other


def _jumps_to(rule: AnyRule, chain: str) -> bool:
    if isinstance(rule, Rule):
        return rule.target in (Jump(chain), Goto(chain))
    return rule.text.endswith((f"-j {chain}", f"-g {chain}"))


def _reaches(chains: Chains, start: ChainRef, goal: ChainRef) -> bool:
    if start == goal:
        return True
    targets = (rule.target for rule in chains[start] if isinstance(rule, Rule))
    further = {target.chain for target in targets if isinstance(target, Jump | Goto)}
    return any(_reaches(chains, start._replace(chain=chain), goal) for chain in further)


def apply_commands(table: NftTable, commands: Iterable[NftCommand]) -> NftTable:
    """The table after all commands of one transaction; raises Rejected, and then none of them happened."""
    return reduce(apply_command, commands, table)


def apply_command(table: NftTable, command: NftCommand) -> NftTable:  # noqa: PLR0911 -- one a command
    """The table after one command; raises Rejected for what nft or the kernel refuses."""
    chains, sets, elements = table.chains, table.sets, table.elements
    try:
        command_lines(command)
    except ValueError as error:
        raise Rejected(f"{command}: {error}") from error
    _need(isinstance(command, Complete) or table != NftTable(), command, "No such file or directory")
    match command:
        case Complete():
            return replace(table, dispatch=True)
        case DeleteTable():
            return NftTable()
        case AddSet(name):
            return replace(table, sets=sets | {name})
        case DeleteSet(name):
            _need(name in sets, command, "No such file or directory")
            used = any(remembers_in(rule) == name for rules in chains.values() for rule in rules)
            _need(not used, command, "Device or resource busy")
            return replace(table, sets=sets - {name})
        case AddChain(name):
            return replace(table, chains={**chains, name: chains.get(name, ())})
        case SetRules(name, rules):
            _need(name in chains, command, "No such file or directory")
            needed = {chain for rule in rules for chain in leads_to(rule)} - chains.keys()
            missing = {remembers_in(rule) for rule in rules} - sets - {None}
            _need(not needed and not missing, command, "No such file or directory")
            return replace(table, chains={**chains, name: rules})
        case DropChain(name):
            _need(name in chains, command, "No such file or directory")
            led = {chain for rules in chains.values() for rule in rules for chain in leads_to(rule)}
            _need(name not in led and name not in elements.values(), command, "Device or resource busy")
            _need(not chains[name], command, "Device or resource busy")
            return replace(table, chains=_without(chains, name))
        case AddElement(key, name):
            _need(name in chains, command, "No such file or directory")
            _need(elements.get(key, name) == name, command, "File exists")
            return replace(table, elements={**elements, key: name})
        case DeleteElement(key):
            _need(key in elements, command, "No such file or directory")
            return replace(table, elements=_without(elements, key))


def apply_map_edits(table: MapTable, edits: Iterable[MapEdit]) -> MapTable:
    """The table of maps after all edits of one transaction; raises Rejected, and then none of them happened."""
    chains, maps, entries = table.chains, table.maps, table.entries
    changes: dict[EntryKey, Endpoint | None] = {}
    for edit in edits:
        try:
            check_map_edit(edit)
        except ValueError as error:
            raise Rejected(f"{edit}: {error}") from error
        match edit:
            case WriteChains(written, unasked):
                _need(asked(written).isdisjoint(unasked), edit, "Device or resource busy")
                _need(maps >= set(unasked), edit, "No such file or directory")
                chains, maps = {**chains, **written}, (maps | asked(written)) - set(unasked)
                if unasked:
                    changes |= {key: None for key in (*entries, *changes) if key.map in unasked}
            case DropTable():
                _need(bool(chains or maps or table.damaged), edit, "No such file or directory")
                chains, maps, entries = {}, frozenset(), Entries()
                changes.clear()
            case AddEntry(key, target):
                _need(key.map in maps, edit, "No such file or directory")
                _need(changes.get(key, entries.get(key)) is None, edit, "File exists")
                changes[key] = target
            case DropEntry(key):
                _need(changes.get(key, entries.get(key)) is not None, edit, "No such file or directory")
                changes[key] = None
    return MapTable(chains, maps, entries.changed(changes))
