"""Fixtures for tests on the real kernel; each test gets namespaces of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Helpers stand beside the tests; pytest's importlib mode puts neither on the path.
sys.path.insert(0, str(Path(__file__).parent))

from netns import Namespace, require


@pytest.fixture
def make_netns() -> Iterator[Callable[[], Namespace]]:
    """Makes namespaces; all are removed at the end of the test, however it ends."""
    require("ip")
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(Namespace())
        return made[-1]

    try:
        yield make
    finally:
        for namespace in made:
            namespace.remove()


@pytest.fixture
def netns(make_netns: Callable[[], Namespace]) -> Namespace:
    """One namespace."""
    return make_netns()
