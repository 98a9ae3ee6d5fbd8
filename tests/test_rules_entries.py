"""The mapping of entries is a mapping, and versions of it share what they have in common."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rules.entries import Entries
from tests import strategies as some

mappings = st.dictionaries(st.integers(0, 30) | st.integers(1020, 1030), st.integers(0, 3), max_size=20)
changes = st.dictionaries(st.integers(0, 30) | st.integers(1020, 1030), st.none() | st.integers(0, 3), max_size=8)


@some.quick
@given(mappings, changes)
def test_a_changed_version_is_what_a_dictionary_would_be(
    before: dict[int, int], changed: dict[int, int | None]
) -> None:
    old = Entries(before)
    new = old.changed(changed)
    expected = {key: value for key, value in {**before, **changed}.items() if value is not None}
    assert dict(new) == expected
    assert new == Entries(expected) == expected
    assert len(new) == len(expected)
    assert (dict(old), len(old)) == (before, len(before))
    assert all(new.get(key) == expected.get(key) for key in range(1031))


@some.quick
@given(mappings, mappings)
def test_differences_lead_from_one_to_the_other(one: dict[int, int], other: dict[int, int]) -> None:
    listed = list(Entries(one).differences(Entries(other)))
    assert all(here != there for _, here, there in listed)
    assert Entries(one).changed({key: there for key, _, there in listed}) == Entries(other)
    assert Entries(other).changed({key: here for key, here, _ in listed}) == Entries(one)
    assert (Entries(one) == Entries(other)) == (one == other) == (not listed)


def test_versions_share_what_did_not_change() -> None:
    old = Entries({n: n for n in range(5000)})
    new = old.changed({7: 8, 9: None, 5000: 1})
    assert sum(a is not b for a, b in zip(old._buckets, new._buckets, strict=True)) == 3
    assert old.changed({7: 7, 6000: None}) is old
