"""(Desired, Actual) -> Plan: the fewest steps, in an order that never opens a gap; and the way back.

``undo`` needs no inverse of each step: the state before is itself a set of statements (about exactly what the
plan touched), so going back is the same operation as going forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher

from rules import fastpath, share, tc
from rules.maps import MapTable
from rules.nft import NftTable
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainEdit,
    ChainRef,
    DeleteChain,
    DeleteRule,
    Family,
    Goto,
    InsertRule,
    Jump,
    NewChain,
    ReplaceRules,
    Rule,
    Rules,
)
from rules.splice import apart, once, splice
from rules.state import (
    Actual,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    Desired,
    Device,
    DeviceStep,
    EditMaps,
    EditNft,
    EditTable,
    LinkStep,
    Plan,
    PolicyRule,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
    Step,
)

# Above this many differing rules, or this part of a chain's, it is written anew: matching them up would cost more than
# it saves.
REWRITE_ABOVE, REWRITE_PART = 500, 20


def delta(desired: Desired, actual: Actual) -> Plan:
    """What must happen for every statement of ``desired`` to hold; empty when all do.

    Order: the guard before ARP goes off and after it comes on; promote_secondaries before addresses go; a link up
    before what needs it; translation rules before the addresses that attract packets, and those before routes and
    announcements.
    """
    arp = list(_arp(desired, actual))
    guard_first = not any(step.on for step in arp)
    mangle, nft = [_table("mangle", desired, actual), _table("mangle", desired, actual, 6)], _nft(desired, actual)
    # Chains before maps: the reason is rules.fastpath's.
    nat = [_table("nat", desired, actual), _table("nat", desired, actual, 6), _maps(desired, actual)]
    links = [
        *_devices(desired, actual),
        *_promote(desired, actual),
        *_up(desired, actual),
        *_masters(desired, actual),
        *_addresses(desired, actual),
        *_routes(desired, actual),
        *_policy_rules(desired, actual),
        *_sysctls(desired, actual),
        *_devices_gone(desired, actual),
    ]
    ordered = [*mangle, *nat, nft, *links, *arp] if guard_first else [*nat, nft, *links, *arp, *mangle]
    middle = (step for step in ordered if step is not None)
    # A limit comes before the traffic that it is for, and goes after it.
    before, after = _limits(desired.tc, actual.tc)
    return Plan((*before, *middle, *after))


@once
def _limits(wanted: tc.Statements, have: tc.Objects) -> tuple[tuple[tc.TcStep, ...], tuple[tc.TcStep, ...]]:
    return tuple(tc.steps_before(wanted, have)), tuple(tc.steps_after(wanted, have))


def undo(plan: Plan, before: Actual, now: Actual) -> Plan:
    """What brings the kernel back to ``before`` in everything that ``plan`` touched, from wherever it is now."""
    return delta(snapshot(plan, before, now), now)


def touched_tables(plan: Plan, family: Family = 4) -> frozenset[str]:
    """The netfilter tables of a family that the plan edits."""
    return frozenset(step.table for step in plan.steps if isinstance(step, EditTable) and step.family == family)


def touches_links(plan: Plan) -> bool:
    """Whether the plan has steps about addresses, routes or flags of interfaces."""
    return any(isinstance(step, LinkStep) for step in plan.steps)


def touches_tc(plan: Plan) -> bool:
    """Whether the plan changes bandwidth limits."""
    return any(isinstance(step, tc.TcStep) for step in plan.steps)


def touches_nft(plan: Plan) -> bool:
    """Whether the plan changes the table of share-type DNAT."""
    return any(isinstance(step, EditNft) for step in plan.steps)


def touches_maps(plan: Plan) -> bool:
    """Whether the plan changes the table of maps."""
    return any(isinstance(step, EditMaps) for step in plan.steps)


def snapshot(plan: Plan, before: Actual, now: Actual) -> Desired:
    """``before`` as statements about everything that the plan touches.

    Once it touches a link, that is every address and route: the kernel takes some away of its own accord (the
    routes of a deleted address, the secondaries of a primary one), and these must come back too.
    """
    chains: dict[ChainRef, Rules | None] = {}
    hooks: dict[tuple[ChainRef, Rule], bool] = {}
    addresses: dict[AddressKey, bool] = dict.fromkeys(before.addresses, True) if touches_links(plan) else {}
    routes: dict[RouteKey, RouteEntry | None] = dict(before.routes) if touches_links(plan) else {}
    arp: dict[str, bool] = {}
    promote: dict[str, bool] = {}
    nft: NftTable | None = before.nft if touches_nft(plan) else None
    maps: MapTable | None = before.maps if touches_maps(plan) else None
    up: dict[str, bool] = {}
    policy_rules: dict[PolicyRule, bool] = {}
    sysctls: dict[str, int] = {}
    devices: dict[str, Device | None] = {}
    masters: dict[str, str | None] = {}
    for step in plan.steps:
        match step:
            case EditTable(_, edits):
                for edit in edits:
                    _snapshot_edit(edit, before.ruleset.chains, chains, hooks)
            case SetSysctl(name, _):
                sysctls[name] = before.sysctls[name]
            case AddDevice(interface) | DeleteDevice(interface):
                link = before.links.get(interface)
                devices[interface] = link.device if link else None
                # What it was a port of, and what were ports of it, goes with it.
                near = [name for name, other in before.links.items() if interface in (name, other.master)]
                masters |= {name: before.links[name].master for name in near}
                up |= {name: before.links[name].up for name in near}
            case SetMaster(interface, _) if interface in before.links:
                masters[interface] = before.links[interface].master
            case AddAddress(address) | DeleteAddress(address):
                addresses[address] = address in before.addresses
            case ReplaceRoute(route, _) | DeleteRoute(route, _):
                routes[route] = before.routes.get(route)
            case SetArp(interface, _):
                arp[interface] = before.links[interface].arp
            case SetPromoteSecondaries(interface, _):
                promote[interface] = before.links[interface].promote_secondaries
            case SetUp(interface, _) if interface in before.links:
                up[interface] = before.links[interface].up
            case AddPolicyRule(rule) | DeletePolicyRule(rule):
                policy_rules[rule] = rule.is_in(before.policy_rules)
    heads = _snapshot_heads(plan, before, now)
    limits = tc.snapshot((step for step in plan.steps if isinstance(step, tc.TcStep)), before.tc)
    return Desired(
        *(chains, hooks, addresses, routes, arp, promote, nft, up, policy_rules, limits, heads, sysctls, devices),
        masters=masters,
        maps=maps,
    )


def _snapshot_edit(
    edit: ChainEdit,
    before: Mapping[ChainRef, Rules],
    chains: dict[ChainRef, Rules | None],
    hooks: dict[tuple[ChainRef, Rule], bool],
) -> None:
    if edit.ref.chain in BUILTIN[edit.ref.table]:
        # Built-in chains belong to everybody: only our own rules in them are ours to put back.
        if isinstance(edit, InsertRule | DeleteRule) and isinstance(edit.rule, Rule):
            hooks[edit.ref, edit.rule] = edit.rule in before.get(edit.ref, ())
    else:
        chains[edit.ref] = before.get(edit.ref)


def _snapshot_heads(plan: Plan, before: Actual, now: Actual) -> dict[ChainRef, Rules]:
    """Where rules were taken out of a built-in chain: all that stood there down to the last of them.

    Its place decides what a rule means. What somebody else took out in the meantime is not brought back.
    """
    heads: dict[ChainRef, Rules] = {}
    edits = [edit for step in plan.steps if isinstance(step, EditTable) for edit in step.edits]
    taken = [edit for edit in edits if isinstance(edit, DeleteRule) and edit.ref.chain in BUILTIN[edit.ref.table]]
    for ref in {edit.ref for edit in taken}:
        rules = {edit.rule for edit in taken if edit.ref == ref}
        standing, left = before.ruleset.chains.get(ref, ()), now.ruleset.chains.get(ref, ())
        last = max((index for index, rule in enumerate(standing) if rule in rules), default=-1)
        heads[ref] = tuple(rule for rule in standing[: last + 1] if rule in rules or rule in left)
    return heads


def _nft(desired: Desired, actual: Actual) -> EditNft | None:
    return None if desired.nft is None else _edit_nft(desired.nft, actual.nft)


@once
def _edit_nft(wanted: NftTable, standing: NftTable) -> EditNft | None:
    commands = tuple(share.edits(wanted, standing))
    return EditNft(commands) if commands else None


def _maps(desired: Desired, actual: Actual) -> EditMaps | None:
    edits = () if desired.maps is None else tuple(fastpath.edits(desired.maps, actual.maps))
    return EditMaps(edits) if edits else None


def _table(table: str, desired: Desired, actual: Actual, family: Family = 4) -> EditTable | None:
    edits = tuple(_table_edits((table, family), desired, actual))
    return EditTable(table, edits, family) if edits else None


def _table_edits(table: tuple[str, Family], desired: Desired, actual: Actual) -> Iterator[ChainEdit]:
    """New chains, then their rules, then the built-in chains; on the way out: rules that jump, chains."""
    have = actual.ruleset.chains
    mine = {ref: rules for ref, rules in desired.chains.items() if (ref.table, ref.family) == table}
    yield from (NewChain(ref) for ref, rules in mine.items() if rules is not None and ref not in have)
    for ref, rules in mine.items():
        if rules is not None:
            yield from chain_edits(ref, have.get(ref, ()), rules)
    for ref in dict.fromkeys([*(ref for ref, _ in desired.hooks), *desired.heads]):
        if (ref.table, ref.family) == table:
            standing = have.get(ref, ())
            yield from _single_edits(ref, standing, _builtin(ref, standing, desired), 0)
    gone = [ref for ref, rules in mine.items() if rules is None and ref in have]
    yield from (ReplaceRules(ref, ()) for ref in gone if any(isinstance(_target(r), Jump | Goto) for r in have[ref]))
    yield from (DeleteChain(ref) for ref in gone)


def _target(rule: AnyRule) -> object:
    return rule.target if isinstance(rule, Rule) else None


def _builtin(ref: ChainRef, standing: Rules, desired: Desired) -> Rules:
    """A built-in chain as it shall be: its head, what stands there besides, and at its end the hooks that it lacks."""
    hooks = {rule: present for (where, rule), present in desired.hooks.items() if where == ref}
    head = desired.heads.get(ref, ())
    rest = [rule for rule in standing if not isinstance(rule, Rule) or hooks.get(rule, True)]
    for rule in head:
        if rule in rest:
            rest.remove(rule)
    return (*head, *rest, *(rule for rule, present in hooks.items() if present and rule not in (*head, *rest)))


def chain_edits(ref: ChainRef, have: Rules, want: Rules) -> Iterator[ChainEdit]:
    """Turn one chain's rules into another's by single inserts and deletes, or by one rewrite if most differ."""
    head, old, new = splice(have, want)
    if len(old) + len(new) <= REWRITE_ABOVE:
        yield from _single_edits(ref, old, new, head)
        return
    few = _scattered_edits(ref, old, new, head, max(REWRITE_ABOVE, len(have) // REWRITE_PART))
    yield from (ReplaceRules(ref, want),) if few is None else few


def singly(rewrite: ReplaceRules, have: Rules, most: int) -> list[ChainEdit] | None:
    """Single edits that come to the same as writing a chain anew; None if there would be more of them than that."""
    head, old, new = splice(have, rewrite.rules)
    return _scattered_edits(rewrite.ref, old, new, head, most)


def _scattered_edits(ref: ChainRef, old: Rules, new: Rules, position: int, most: int) -> list[ChainEdit] | None:
    """Few edits that lie far apart, told by which objects the two sequences share; None where that is not so."""
    places = apart(old, new)
    if places is None:
        return None
    gone, came = places
    if len(gone) + len(came) > most:
        return None
    deletions = [DeleteRule(ref, position + index, old[index]) for index in reversed(gone)]
    return [*deletions, *(InsertRule(ref, position + index, new[index]) for index in came)]


def _single_edits(ref: ChainRef, old: Rules, new: Rules, position: int) -> Iterator[ChainEdit]:
    """Inserts and deletes that make ``new`` of ``old``, which begins at ``position`` in the chain."""
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            position += i2 - i1
            continue
        # Insert before deleting: a packet in between sees both rules rather than neither.
        for rule in new[j1:j2]:
            yield InsertRule(ref, position, rule)
            position += 1
        for rule in old[i1:i2]:
            yield DeleteRule(ref, position, rule)


def _addresses(desired: Desired, actual: Actual) -> Iterator[LinkStep]:
    yield from _address_steps(desired.addresses, actual.addresses)


@once
def _address_steps(wanted: Mapping[AddressKey, bool], standing: Mapping[AddressKey, bool]) -> tuple[LinkStep, ...]:
    new = (AddAddress(key) for key, up in wanted.items() if up and key not in standing)
    gone = (DeleteAddress(key) for key, up in wanted.items() if not up and key in standing)
    return (*new, *gone)


def _routes(desired: Desired, actual: Actual) -> Iterator[LinkStep]:
    for key, entry in desired.routes.items():
        standing = actual.routes.get(key)
        if entry is None and standing is not None:
            yield DeleteRoute(key, standing)
        elif entry is not None and entry != standing:
            yield ReplaceRoute(key, entry)


def _arp(desired: Desired, actual: Actual) -> Iterator[SetArp]:
    for interface, on in desired.arp.items():
        link = actual.links.get(interface)  # one that has vanished is the kernel's to refuse
        if link is None or link.arp != on:
            yield SetArp(interface, on)


def _promote(desired: Desired, actual: Actual) -> Iterator[Step]:
    for interface, on in desired.promote_secondaries.items():
        link = actual.links.get(interface)
        if link is None or link.promote_secondaries != on:
            yield SetPromoteSecondaries(interface, on)


def _up(desired: Desired, actual: Actual) -> Iterator[SetUp]:
    for interface, on in desired.up.items():
        link = actual.links.get(interface)
        if link is None or link.up != on:
            yield SetUp(interface, on)


def _policy_rules(desired: Desired, actual: Actual) -> Iterator[LinkStep]:
    for rule, present in desired.policy_rules.items():
        if present != rule.is_in(actual.policy_rules):
            yield AddPolicyRule(rule) if present else DeletePolicyRule(rule)


def _devices(desired: Desired, actual: Actual) -> Iterator[DeviceStep]:
    """Make the devices that lack; one that has our name but is nothing of ours is the kernel's to refuse."""
    for interface, device in desired.devices.items():
        link = actual.links.get(interface)
        if device is None or (link is not None and link.device == device):
            continue
        if link is not None and link.device is not None:
            yield DeleteDevice(interface)
        yield AddDevice(interface, device)


def _devices_gone(desired: Desired, actual: Actual) -> Iterator[DeviceStep]:
    gone = (interface for interface, device in desired.devices.items() if device is None)
    yield from (DeleteDevice(interface) for interface in gone if interface in actual.links)


def _masters(desired: Desired, actual: Actual) -> Iterator[SetMaster]:
    for interface, master in desired.masters.items():
        link = actual.links.get(interface)
        if link is None or link.master != master:
            yield SetMaster(interface, master)


def _sysctls(desired: Desired, actual: Actual) -> Iterator[SetSysctl]:
    wanted = desired.sysctls.items()
    yield from (SetSysctl(name, value) for name, value in wanted if actual.sysctls.get(name) != value)
