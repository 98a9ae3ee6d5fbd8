"""Where two sequences differ, and rendering only what does.

A spec and a reading of the kernel hold sequences of up to 50,000 values, and one change touches one of them. What two
versions share is the same object in both, so comparing them takes C's time for comparing pointers (0.4 ms for
50,000); values that are equal but not the same are compared as such.

``Rendered`` and ``once`` remember their last call. Their results are those of the pure functions within them, whatever
was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Generic, NamedTuple, ParamSpec, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class Splice(NamedTuple, Generic[T]):
    """``old`` at position ``head`` became ``new``; before and behind it nothing changed."""

    head: int
    old: tuple[T, ...]
    new: tuple[T, ...]


def splice(old: tuple[T, ...], new: tuple[T, ...]) -> Splice[T]:
    """What turns one sequence into the other as one replacement of neighbouring elements."""
    if old is new:
        return Splice(len(old), (), ())
    most = min(len(old), len(new))
    head = _longest(lambda a, b: old[a:b] == new[a:b], most)
    n, m = len(old), len(new)
    tail = _longest(lambda a, b: old[n - b : n - a] == new[m - b : m - a], most - head)
    return Splice(head, old[head : n - tail], new[head : m - tail])


def apart(old: tuple[T, ...], new: tuple[T, ...]) -> tuple[list[int], list[int]] | None:
    """Where in ``old`` stands what went, and where in ``new`` what came; None where what stayed changed places.

    Told by which objects the two share.
    """
    before, after = set(map(id, old)), set(map(id, new))
    if [id(item) for item in old if id(item) in after] != [id(item) for item in new if id(item) in before]:
        return None
    gone = [index for index, item in enumerate(old) if id(item) not in after]
    return gone, [index for index, item in enumerate(new) if id(item) not in before]


def scattered(how: Splice[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """What went and what came, without the objects that stayed between; all of them if these changed places."""
    _, old, new = how
    if not old or not new:
        return old, new
    places = apart(old, new)
    if places is None:
        return old, new
    gone, came = places
    return tuple(old[index] for index in gone), tuple(new[index] for index in came)


def _longest(equal: Callable[[int, int], bool], most: int) -> int:
    """How many elements from the start on are equal; ``equal`` says so of those from one position to another."""
    if equal(0, most):
        return most
    same, differs = 0, most  # the first ``same`` are equal, the first ``differs`` are not
    while differs - same > 1:
        middle = (same + differs) // 2
        if equal(same, middle):
            same = middle
        else:
            differs = middle
    return same


class Rendered(Generic[T, R]):
    """A sequence of values as a sequence of results; what it has in common with the last one is not rendered anew."""

    def __init__(self, render: Callable[[T], R]) -> None:
        self._render = render
        self._last: tuple[tuple[T, ...], tuple[R, ...]] = ((), ())

    def __call__(self, items: Iterable[T]) -> tuple[R, ...]:
        """``render`` of each item, in order."""
        wanted = tuple(items)
        known, results = self._last
        head, gone, fresh = splice(known, wanted)
        if gone or fresh:
            # Far apart changes have what stayed between them: its results stay the same objects, too.
            stayed = {id(item): result for item, result in zip(gone, results[head:], strict=False)}
            made = (stayed[id(item)] if id(item) in stayed else self._render(item) for item in fresh)
            results = (*results[:head], *made, *results[head + len(gone) :])
        self._last = (wanted, results)  # both at once: threads may call
        return results


def once(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which is not called twice in a row for the same (not only equal) immutable arguments."""
    last: tuple[tuple[object, ...], R] | None = None

    @wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal last
        if kwargs:
            return function(*args, **kwargs)
        if last is None or len(last[0]) != len(args) or any(a is not b for a, b in zip(last[0], args, strict=True)):
            last = (args, function(*args, **kwargs))
        return last[1]

    return remembering
