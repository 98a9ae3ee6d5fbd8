"""Delta, apply and undo: whatever the states are, the plan leads from one to the other and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.apply import Rejected, apply, apply_edit
from rules.delta import REWRITE_ABOVE, chain_edits, delta, singly, undo
from rules.desired import ArpPolicy, Facts, desired
from rules.ruleset import (
    AnyRule,
    ChainEdit,
    ChainRef,
    DeleteChain,
    DeleteRule,
    Drop,
    Foreign,
    InsertRule,
    Jump,
    NewChain,
    OutInterface,
    ReplaceRules,
    Rule,
    Rules,
    Ruleset,
    Snat,
    Source,
)
from rules.ruleset import Dnat as ToDestination
from rules.spec import GatewaySpec
from rules.state import (
    Actual,
    AddAddress,
    AddressKey,
    DeleteAddress,
    DeleteRoute,
    Desired,
    LinkStep,
    Plan,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetPromoteSecondaries,
)
from tests import strategies as some

arp_policies = st.sampled_from(["auto", "on"])


# Plans


@some.quick
@given(some.specs, some.specs, arp_policies)
def test_the_plan_reaches_what_is_desired_and_the_second_one_is_empty(
    old: GatewaySpec, new: GatewaySpec, arp: ArpPolicy
) -> None:
    before = some.settled(old)
    wanted = desired(new, Facts(arp), before)
    after = apply(delta(wanted, before), before)
    assert_holds(wanted, after)
    assert not delta(wanted, after)
    assert not delta(desired(new, Facts(arp), after), after)


def assert_holds(wanted: Desired, actual: Actual) -> None:
    """Every statement of ``wanted`` is true of ``actual``."""
    chains = actual.ruleset.chains
    assert {ref: chains.get(ref) for ref in wanted.chains} == wanted.chains
    assert {hook: hook[1] in chains[hook[0]] for hook in wanted.hooks} == wanted.hooks
    assert {key: key in actual.addresses for key in wanted.addresses} == wanted.addresses
    assert {key: actual.routes.get(key) for key in wanted.routes} == wanted.routes
    assert {name: actual.links[name].arp for name in wanted.arp} == wanted.arp
    assert {name: actual.links[name].promote_secondaries for name in wanted.promote_secondaries} == (
        wanted.promote_secondaries
    )


@some.quick
@given(some.specs, some.specs, st.booleans())
def test_delta_then_undo_returns(old: GatewaySpec, new: GatewaySpec, fresh: bool) -> None:
    before = some.both_pods() if fresh else some.settled(old)
    plan = delta(desired(new, Facts(), before), before)
    after = apply(plan, before)
    assert some.bare(apply(undo(plan, before, after), after)) == some.bare(before)


@some.quick
@given(some.specs, some.specs, st.data())
def test_a_plan_that_was_cut_short_is_undone_too(old: GatewaySpec, new: GatewaySpec, data: st.DataObject) -> None:
    before = some.settled(old)
    plan = delta(desired(new, Facts(), before), before)
    done = data.draw(st.integers(0, len(plan.steps)))
    midway = apply(replace(plan, steps=plan.steps[:done]), before)
    assert some.bare(apply(undo(plan, before, midway), midway)) == some.bare(before)


@some.quick
@given(some.specs, some.specs)
def test_what_is_foreign_is_left_alone(old: GatewaySpec, new: GatewaySpec) -> None:
    foreign = Foreign("-s 172.30.0.0/16 -j MASQUERADE")
    ref, user = ChainRef("nat", "POSTROUTING"), ChainRef("nat", "SOMEBODY_ELSES")
    pod = some.both_pods()
    pod = replace(pod, ruleset=Ruleset({**pod.ruleset.chains, ref: (foreign,), user: (foreign,)}))
    pod = replace(pod, addresses={**pod.addresses, AddressKey("net1", "192.168.0.99/24"): False})
    pod = replace(pod, routes={**pod.routes, RouteKey("10.9.0.0/16"): RouteEntry("eth0", "10.0.1.1", protocol=4)})
    after = some.settled(new, some.settled(old, pod))
    assert after.ruleset.chains[ref] == (foreign, Rule((), Jump("SNAT_FILTER")))
    assert after.ruleset.chains[user] == (foreign,)
    assert pod.addresses.items() <= after.addresses.items()
    assert after.routes[RouteKey("10.9.0.0/16")] == pod.routes[RouteKey("10.9.0.0/16")]


@some.quick
@given(some.specs, st.lists(some.any_rules, max_size=3), st.data())
def test_whatever_somebody_did_to_our_chains_is_repaired(
    spec: GatewaySpec, strange: list[AnyRule], data: st.DataObject
) -> None:
    settled = some.settled(spec)
    ours = sorted(ref for ref, rules in settled.ruleset.chains.items() if rules)
    ref = data.draw(st.sampled_from(ours))
    rules = data.draw(st.permutations([*settled.ruleset.chains[ref][1:], *strange]))
    drifted = replace(settled, ruleset=Ruleset({**settled.ruleset.chains, ref: tuple(rules)}))
    assert_holds(desired(spec, Facts(), drifted), some.settled(spec, drifted))


REF = ChainRef("nat", "SHARED_SNAT")


def _rules(numbers: Iterable[int]) -> tuple[Rule, ...]:
    return tuple(
        Rule((Source(f"10.{n >> 8}.{n & 255}.0/24"), OutInterface("net1")), Snat("192.168.0.20")) for n in numbers
    )


@some.quick
@given(st.lists(st.integers(0, 9), unique=True), st.lists(st.integers(0, 9), unique=True))
def test_single_edits_turn_one_chain_into_another(old: list[int], new: list[int]) -> None:
    have, want = _rules(old), _rules(new)
    chains: dict[ChainRef, tuple[AnyRule, ...]] = {REF: have}
    for step in chain_edits(REF, have, want):
        assert isinstance(step, InsertRule | DeleteRule)
        chains = apply_edit(chains, step)
    assert chains[REF] == want


def test_one_rule_more_in_a_long_chain_is_one_edit_and_a_new_chain_is_one_rewrite() -> None:
    have = _rules(range(1000))
    extra = Rule((Source("172.16.0.0/12"), OutInterface("net1")), Snat("192.168.0.20"))
    assert list(chain_edits(REF, have, (*have[:500], extra, *have[500:]))) == [InsertRule(REF, 500, extra)]
    assert list(chain_edits(REF, have, have[1:])) == [DeleteRule(REF, 0, have[0])]
    assert list(chain_edits(REF, (), have[: REWRITE_ABOVE + 1])) == [ReplaceRules(REF, have[: REWRITE_ABOVE + 1])]


@some.quick
@given(st.sets(st.integers(0, 79)), st.lists(st.tuples(st.integers(0, 79), st.integers(100, 200)), max_size=20))
def test_a_rewrite_is_told_as_single_edits_if_they_are_few(gone: set[int], came: list[tuple[int, int]]) -> None:
    have = _rules(range(80))
    kept = [rule for index, rule in enumerate(have) if index not in gone]
    for place, number in came:
        kept.insert(place % (len(kept) + 1), *_rules([number]))
    want = tuple(kept)
    edits = singly(ReplaceRules(REF, want), have, len(gone) + len(came))
    assert edits is not None
    assert len(edits) == len(gone) + len(came)
    chains: dict[ChainRef, Rules] = {REF: have}
    for step in edits:
        chains = apply_edit(chains, step)
    assert chains[REF] == want
    if edits:
        assert singly(ReplaceRules(REF, want), have, len(edits) - 1) is None


def test_hooks_are_appended_in_their_order_and_taken_out_wherever_they_stand() -> None:
    ref = ChainRef("nat", "POSTROUTING")
    foreign = Foreign("-j MASQUERADE")
    one, other = Rule((), Jump("ONE")), Rule((), Jump("OTHER"))
    chains: dict[ChainRef, Rules] = {ref: (foreign,), ChainRef("nat", "ONE"): (), ChainRef("nat", "OTHER"): ()}
    wanted = Desired(hooks={(ref, one): True, (ref, other): True})
    hooked = apply(delta(wanted, Actual(Ruleset(chains))), Actual(Ruleset(chains)))
    assert hooked.ruleset.chains[ref] == (foreign, one, other)
    chains[ref] = (one, foreign, other, one)
    unhooked = apply(delta(Desired(hooks={(ref, one): False}), Actual(Ruleset(chains))), Actual(Ruleset(chains)))
    assert unhooked.ruleset.chains[ref] == (foreign, other)


# What the kernel refuses

BUILTIN = ChainRef("nat", "PREROUTING")
STANDING: dict[ChainRef, tuple[AnyRule, ...]] = {
    BUILTIN: (Rule((), Jump("SHARED_SNAT")),),
    REF: _rules([1]),
    ChainRef("nat", "OTHER"): (Foreign("-p tcp -g THIRD"), Rule((), Jump("FOURTH"))),
    ChainRef("nat", "THIRD"): (),
    ChainRef("nat", "FOURTH"): (),
    ChainRef("mangle", "FORWARD"): (),
    ChainRef("mangle", "OTHER_TABLE"): (),
}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (NewChain(REF), "already exists"),
        (NewChain(ChainRef("nat", "A" * 29)), "too long"),
        (NewChain(ChainRef("raw", "A")), "Table does not exist"),
        (DeleteChain(ChainRef("nat", "MISSING")), "No chain"),
        (DeleteChain(BUILTIN), "built-in"),
        (DeleteChain(REF), "busy"),
        (DeleteChain(ChainRef("nat", "THIRD")), "busy"),
        (InsertRule(ChainRef("nat", "MISSING"), 0, _rules([2])[0]), "No chain"),
        (InsertRule(REF, 2, _rules([2])[0]), "too big"),
        (InsertRule(REF, -1, _rules([2])[0]), "too big"),
        (InsertRule(REF, 0, Rule((), Jump("MISSING"))), "No chain"),
        (InsertRule(REF, 0, Rule((), Jump("OTHER_TABLE"))), "No chain"),
        (InsertRule(REF, 0, Rule((), Jump("POSTROUTING"))), "No chain"),
        (InsertRule(REF, 0, Rule((), Jump("SHARED_SNAT"))), "Too many levels"),
        (InsertRule(ChainRef("nat", "FOURTH"), 0, Rule((), Jump("OTHER"))), "Too many levels"),
        (InsertRule(REF, 0, Rule((), Drop())), "not intended for filtering"),
        (InsertRule(REF, 0, Rule((Source("10.0.0.1"),), Snat("1.2.3.4"))), "not a rule"),
        (InsertRule(ChainRef("mangle", "FORWARD"), 0, Rule((), ToDestination("10.0.0.1"))), "only valid in the nat"),
        (DeleteRule(REF, 1, _rules([1])[0]), "too big"),
        (DeleteRule(REF, 0, _rules([2])[0]), "not there"),
        (ReplaceRules(ChainRef("nat", "MISSING"), ()), "No chain"),
        (ReplaceRules(REF, (Rule((), Jump("MISSING")),)), "No chain"),
    ],
)
def test_the_kernel_refuses(edit: ChainEdit, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        apply_edit(STANDING, edit)


NET1_LINKS: list[tuple[LinkStep, str]] = [
    (AddAddress(AddressKey("net9", "192.168.0.20/24")), "device"),
    (AddAddress(AddressKey("net1", "192.168.0.11/24")), "exists"),
    (DeleteAddress(AddressKey("net1", "192.168.0.20/24")), "address"),
    (ReplaceRoute(RouteKey("10.9.0.0/16"), RouteEntry("net9", "10.0.1.1")), "device"),
    (DeleteRoute(RouteKey("10.9.0.0/16"), RouteEntry("eth0", "10.0.1.1")), "No such process"),
    (SetArp("net9", on=True), "device"),
    (SetPromoteSecondaries("net9", on=True), "device"),
]


@pytest.mark.parametrize(("step", "reason"), NET1_LINKS)
def test_the_kernel_refuses_about_links(step: LinkStep, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        apply(Plan((step,)), some.pod())
