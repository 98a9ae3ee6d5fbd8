"""Limits that change one after another: what is said of the change alone comes to the same as looking at everything."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from rules import qos, qos_held
from rules.entries import Entries
from rules.keyed import Keyed
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit
from rules.tc import (
    Classify,
    ClassKey,
    DeleteTc,
    FilterKey,
    Key,
    Matchall,
    Objects,
    Policer,
    PolicerKey,
    Rate,
    RootKey,
    Selector,
    TcStep,
    Value,
    apply_tc,
    steps_after,
    steps_before,
)
from tests import strategies as some

Limit = EipLimit | InterfaceLimit
Kernel = Entries[Key, Value]


def steps(said: qos_held.Statements, have: Objects) -> list[TcStep]:
    return [*steps_before(said, have), *steps_after(said, have)]


def changed(have: Kernel, now: Objects) -> Kernel:
    return have.changed({key: value for key, _, value in have.differences(Entries(now))})


def applied(have: Kernel, todo: Iterable[TcStep]) -> Kernel:
    now: Objects = have
    for step in todo:
        now = apply_tc(now, step)
    return changed(have, now)


def taken_away(have: Kernel, which: int) -> Kernel:
    """Somebody else took a filter away, or a class together with what leads to it."""
    there = sorted((k for k in have if isinstance(k, ClassKey | FilterKey)), key=repr)
    if not there:
        return have
    key, now = there[which % len(there)], dict(have)
    leads = [
        k for k, v in now.items() if isinstance(v, Classify) and isinstance(key, ClassKey) and v.minor == key.minor
    ]
    return changed(have, {k: v for k, v in now.items() if k != key and k not in leads})


def added(have: Kernel, which: int) -> Kernel:
    """Somebody else left a policer of an address, or a filter of another type."""
    if RootKey("net1") not in have:
        return have
    host = Selector(0xC0A80014, 0xFFFFFFFF, 12)
    policer = {PolicerKey("net1", False, which % 4, 0x900): Policer(host, Rate(1_250_000, 1000))}
    other = {FilterKey("net1", 77, 0, 0, 1): Matchall(0x8001)}
    return changed(have, {**have, **(policer if which % 2 else other)})


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, object]]:
    """What is asked for, one after the other, and what others do in between."""
    asked = st.one_of(
        st.tuples(st.just("put"), some.limits),
        st.tuples(st.just("put"), some.limits),
        st.tuples(st.just("drop"), st.integers(0, 20)),
        st.tuples(st.just("all"), st.lists(some.limits, max_size=4)),
        st.tuples(st.just("lost"), st.integers(0, 50)),
        st.tuples(st.just("left"), st.integers(0, 50)),
        st.tuples(st.just("refused"), some.limits),
        st.tuples(st.just("again"), st.none()),
    )
    return draw(st.lists(asked, min_size=3, max_size=12))


@some.quick
@given(stories())
def test_one_change_after_another_is_what_the_whole_would_be(story: list[tuple[str, object]]) -> None:
    statements = qos_held.Said()
    limits: Keyed[Limit] = Keyed()
    have: Kernel = Entries()
    sides = GatewaySpec().interfaces
    for what, value in story:
        before = limits
        match what, value:
            case (("put" | "refused"), (EipLimit() | InterfaceLimit()) as limit):
                limits = limits.put(limit)
            case "drop", int(which) if len(limits):
                limits = limits.drop(list(limits)[which % len(limits)].key)
            case "all", list(some_limits):
                by_key = {limit.key: limit for limit in some_limits}
                limits = Keyed(by_key.values()).like(limits)
            case "lost", int(which):
                have = taken_away(have, which)
            case "left", int(which):
                have = added(have, which)
        whole = steps(qos.everything(limits, sides, dict(have)), have)
        plan = steps(statements(limits, sides, have), have)
        assert set(plan) == set(whole)
        assert len(plan) == len(whole)
        if what == "refused":  # half of it, and back
            half = applied(have, plan[: len(plan) // 2])
            statements(limits, sides, half)
            limits = before
            plan = steps(statements(limits, sides, have), have)
            assert set(plan) == set(steps(qos.everything(limits, sides, dict(have)), have))
        have = applied(have, plan)
        assert not steps(statements(limits, sides, have), have)
        assert not steps(qos.everything(limits, sides, dict(have)), have)


def limit(number: int, rate: str = "10", direction: str = "egress") -> EipLimit:
    eip = f"172.18.{number // 250}.{number % 250 + 1}"
    return EipLimit.model_validate({"eip": eip, "direction": direction, "rateMax": rate, "burstMax": "1"})


def test_one_limit_among_many_is_all_that_is_spoken_of() -> None:
    statements = qos_held.Said()
    limits: Keyed[Limit] = Keyed([*map(limit, range(600)), *(limit(n, direction="ingress") for n in range(600))])
    sides = GatewaySpec().interfaces
    have = applied(Entries(), steps(statements(limits, sides, Entries()), Entries()))
    statements(limits, sides, have)
    new_prefix, same_prefix = limit(1000), limit(1001)
    changes = (limit(700), limit(5, "20"), limit(701, direction="ingress"), limit(700, "30"), new_prefix, same_prefix)
    for one in (*changes, *(limit(n).key for n in (5, 1000, 700))):
        limits = limits.put(one) if isinstance(one, EipLimit) else limits.drop(one)
        said = statements(limits, sides, have)
        assert 0 < len(said) < 12
        plan = steps(said, have)
        assert plan
        assert set(plan) == set(steps(qos.everything(limits, sides, dict(have)), have))
        have = applied(have, plan)
        assert statements(limits, sides, have) == {}
    gone = [step for step in plan if isinstance(step, DeleteTc)]
    assert len(gone) == 2
    assert not steps(qos.everything(limits, sides, dict(have)), have)
