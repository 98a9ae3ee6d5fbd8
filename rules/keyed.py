"""An immutable collection of models that are told apart by their identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


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

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items: dict[Any, T] = {}
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
        return self._with({**self._items, item.key: item})

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

    def _with(self, items: dict[Any, T]) -> Self:
        other = type(self).__new__(type(self))
        other._items = items
        return other

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __eq__(self, other: object) -> bool:
        """Equal objects in equal order: order of creation is part of what the collection says."""
        return isinstance(other, Keyed) and (self._items is other._items or list(self) == list(other))

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
