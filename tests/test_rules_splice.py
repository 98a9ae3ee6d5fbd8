"""Finding what differs between two sequences, and remembering what was rendered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rules.keyed import Keyed
from rules.spec import Eip
from rules.splice import Rendered, once, splice
from tests.strategies import quick

SEQUENCES = st.lists(st.integers(0, 3), max_size=12).map(tuple)


@quick
@given(SEQUENCES, SEQUENCES)
def test_a_splice_leads_from_one_to_the_other_and_is_short(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    head, gone, fresh = splice(old, new)
    assert old[head : head + len(gone)] == gone
    assert (*old[:head], *fresh, *old[head + len(gone) :]) == new
    if gone and fresh:
        assert gone[0] != fresh[0]
        assert gone[-1] != fresh[-1]
    if old == new:
        assert not gone
        assert not fresh


@quick
@given(st.lists(SEQUENCES, max_size=6))
def test_rendering_forgets_nothing_and_keeps_nothing(versions: list[tuple[int, ...]]) -> None:
    rendered = Rendered[int, str](str)
    for version in versions:
        assert rendered(version) == tuple(map(str, version))


def test_only_what_is_new_is_rendered() -> None:
    asked: list[int] = []
    rendered = Rendered[int, int](lambda item: asked.append(item) or item)
    rendered(range(1000))
    asked.clear()
    rendered([*range(500), 7777, *range(501, 1000), 8888])
    assert set(asked) <= {7777, *range(501, 1000), 8888}
    asked.clear()
    rendered([*range(500), 7777, *range(501, 1000)])
    assert asked == []


def test_what_stays_between_two_changes_stays_the_same_object() -> None:
    rendered = Rendered[Eip, object](lambda _: object())
    eips = [Eip(address=f"192.168.{i // 250}.{i % 250 + 1}/16") for i in range(1000)]
    first = rendered(eips[:-1])
    after = rendered([*eips[:5], *eips[6:]])
    assert after[:-1] == (*first[:5], *first[6:])


def test_once_asks_again_for_equal_arguments_that_are_not_the_same() -> None:
    asked: list[object] = []

    @once
    def length(items: list[int]) -> int:
        asked.append(items)
        return len(items)

    one, other = [1], [1]
    assert (length(one), length(one), length(other), length(one)) == (1, 1, 1, 1)
    assert asked == [[1], [1], [1]]


def test_a_collection_shares_what_it_has_in_common() -> None:
    standing = Keyed([Eip(address="192.168.0.10/24"), Eip(address="192.168.0.11/24")])
    wanted = Keyed([Eip(address="192.168.0.11/24"), Eip(address="192.168.0.10/25")])
    shared = wanted.like(standing)
    assert shared == wanted
    assert next(iter(shared)) is standing.get("192.168.0.11")
    assert shared.get("192.168.0.10") == Eip(address="192.168.0.10/25")


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(8, 30)), max_size=10), st.data())
def test_a_collection_knows_how_it_became_what_it_is(steps: list[tuple[bool, int, int]], data: st.DataObject) -> None:
    versions: list[Keyed[Eip]] = [Keyed()]
    for put, number, length in steps:
        eip = Eip(address=f"192.168.0.{number}/{length}")
        versions.append(versions[-1].put(eip) if put else versions[-1].drop(eip.key))
    for _ in range(4):
        old, new = data.draw(st.sampled_from(versions)), data.draw(st.sampled_from(versions))
        head, gone, fresh = new.since(old)
        was = tuple(old)
        assert was[head : head + len(gone)] == gone
        assert (*was[:head], *fresh, *was[head + len(gone) :]) == tuple(new)
        left, came = new.changes(old)
        stayed = [eip for eip in old if eip not in left]
        assert stayed == [eip for eip in new if eip not in came]
        assert len(stayed) + len(came) == len(new)
        assert len(stayed) + len(left) == len(old)
