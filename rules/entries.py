"""An immutable mapping of up to 50,000 entries, of which a version with few changes costs little.

The entries are dealt into buckets by their hash. A changed version shares all buckets but those of the changed keys
with the one before it, so making it and telling the two apart take the same short time whatever their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, Self, TypeVar, overload

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

BUCKETS = 1024


class Entries(Mapping[K, V], Generic[K, V]):
    """A mapping whose values are never None."""

    __slots__ = ("_buckets", "_size")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        empty: dict[K, V] = {}
        buckets = [empty] * BUCKETS
        for key, value in (items or {}).items():
            index = hash(key) % BUCKETS
            if buckets[index] is empty:
                buckets[index] = {}
            buckets[index][key] = value
        self._buckets = tuple(buckets)
        self._size = len(items or ())

    def changed(self, changes: Mapping[K, V | None]) -> Self:
        """The mapping with these entries in it; where the value is None there is none."""
        fresh: dict[int, dict[K, V]] = {}
        for key, value in changes.items():
            if self.get(key) == value:
                continue
            index = hash(key) % BUCKETS
            bucket = fresh.setdefault(index, self._buckets[index])
            if bucket is self._buckets[index]:
                bucket = fresh[index] = bucket.copy()
            if value is None:
                del bucket[key]
            else:
                bucket[key] = value
        if not fresh:
            return self
        other = type(self).__new__(type(self))
        other._buckets = tuple(fresh.get(index, bucket) for index, bucket in enumerate(self._buckets))
        other._size = self._size + sum(len(bucket) - len(self._buckets[index]) for index, bucket in fresh.items())
        return other

    def differences(self, other: Entries[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
        """What this and the other one do not have alike: the key, what it is here, and what there."""
        for here, there in zip(self._buckets, other._buckets, strict=True):
            if here is there:
                continue
            yield from ((key, value, there.get(key)) for key, value in here.items() if there.get(key) != value)
            yield from ((key, None, value) for key, value in there.items() if key not in here)

    @overload
    def get(self, key: K, default: None = None, /) -> V | None: ...

    @overload
    def get(self, key: K, default: V | T, /) -> V | T: ...

    def get(self, key: K, default: V | T | None = None, /) -> V | T | None:
        """As a dictionary's; the base class would raise and catch for each that is not there."""
        return self._buckets[hash(key) % BUCKETS].get(key, default)

    def __getitem__(self, key: K) -> V:
        return self._buckets[hash(key) % BUCKETS][key]

    def __iter__(self) -> Iterator[K]:
        return (key for bucket in self._buckets for key in bucket)

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Entries):
            return self._buckets == other._buckets
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Entries({dict(self)!r})"
