"""An immutable collection of models that are told apart by their identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rules.splice import Splice, scattered, splice


class HasKey(Protocol):
    """Something with an identity: two objects with one key cannot both stand."""

    @property
    def key(self) -> Any: ...


T = TypeVar("T", bound=HasKey)


class Keyed(Generic[T]):
    """Objects in creation order, at most one per identity; a JSON list on the wire.

    Building one from a list that holds an object twice keeps one of it; two different objects with
    the same identity raise a pydantic error of type ``conflict`` whose message names both.
    """

    __slots__ = ("_items", "_known")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items: dict[Any, T] = {}
        self._known: tuple[Keyed[T], Splice[T]] | None = None
        for item in items:
            other = self._items.setdefault(item.key, item)
            if other != item:
                raise PydanticCustomError(
                    "conflict", "{wanted} conflicts with {standing}", {"wanted": str(item), "standing": str(other)}
                )

    def get(self, key: object) -> T | None:
        """The object with this identity, or None."""
        return self._items.get(key)

    def put(self, item: T) -> Self:
        """The collection with ``item`` in it; an object of the same identity is replaced in place."""
        key = item.key
        standing = self._items.get(key)
        if standing == item:
            return self
        items = self._items.copy()
        items[key] = item
        made = self._with(items)
        if standing is None:
            made._remember(self, Splice(len(self._items), (), (item,)))
        return made

    def drop(self, key: object) -> Self:
        """The collection without the object of this identity."""
        if key not in self._items:
            return self
        left = self._items.copy()
        del left[key]
        return self._with(left)

    def like(self, standing: Keyed[T]) -> Self:
        """An equal collection that shares with ``standing`` the objects that are in both."""
        if not standing._items:
            return self
        known = standing._items.get
        return self._with({key: other if (other := known(key)) == item else item for key, item in self._items.items()})

    def since(self, old: Keyed[T]) -> Splice[T]:
        """What turns ``old`` into this; asked again for the same one, it is not looked for again."""
        if self is old:
            return Splice(len(self._items), (), ())
        known = self._known
        if known is None or known[0] is not old:
            known = self._remember(old, splice(tuple(old), tuple(self)))
        return known[1]

    def changes(self, old: Keyed[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """What left since ``old``, and what came; what stayed is neither, unless it changed places."""
        return scattered(self.since(old))

    def _remember(self, old: Keyed[T], how: Splice[T]) -> tuple[Keyed[T], Splice[T]]:
        old._known = None  # else each version would keep all before it
        self._known = known = (old, how)
        return known

    def _with(self, items: dict[Any, T]) -> Self:
        other = type(self).__new__(type(self))
        other._items = items
        other._known = None
        return other

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __eq__(self, other: object) -> bool:
        """Equal objects in equal order: order of creation is part of what the collection says."""
        if not isinstance(other, Keyed) or len(self._items) != len(other._items):
            return False
        return self._items is other._items or list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self._items))

    def __repr__(self) -> str:
        return f"Keyed({list(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (item,) = get_args(source)
        listed = core_schema.list_schema(handler.generate_schema(item))

        def to_list(value: Any) -> Any:
            return list(value) if isinstance(value, Keyed) else value

        return core_schema.no_info_before_validator_function(
            to_list,
            core_schema.no_info_after_validator_function(cls, listed),
            serialization=core_schema.plain_serializer_function_ser_schema(list, return_schema=listed),
        )


class Draft(Keyed[T]):
    """A collection that is changed in place, for many changes at once: each takes as long as itself.

    Only whoever made it may know it. ``done`` gives the collection that came of it.
    """

    __slots__ = ("_came", "_of")

    def __init__(self, of: Keyed[T]) -> None:
        self._of = of
        self._items = of._items
        self._known = None
        self._came: list[T] | None = []  # as long as nothing else happened

    def put(self, item: T) -> Self:
        """See ``Keyed``."""
        key = item.key
        standing = self._items.get(key)
        if standing == item:
            return self
        self._own()[key] = item
        if standing is None and self._came is not None:
            self._came.append(item)
        else:
            self._came = None
        return self

    def drop(self, key: object) -> Self:
        """See ``Keyed``."""
        if key in self._items:
            del self._own()[key]
            self._came = None
        return self

    def done(self) -> Keyed[T]:
        """What the changes come to; this is of no more use then."""
        if self._items is self._of._items:
            return self._of
        made = self._of._with(self._items)
        if self._came is not None:
            made._remember(self._of, Splice(len(self._of), (), tuple(self._came)))
        return made

    def _own(self) -> dict[Any, T]:
        if self._items is self._of._items:
            self._items = self._items.copy()
        return self._items
