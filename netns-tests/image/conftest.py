"""Fixtures for tests on the built image; the world around a pod is that of the other tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helpers stand beside the tests; pytest's importlib mode puts neither directory on the path.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from world import World  # noqa: E402


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made
