"""How thoroughly to measure: the whole figures, two minutes' worth, or just enough to see that all of it works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
Name = Literal["full", "quick", "tiny"]


@dataclass(frozen=True)
class Scale:
    """``pick`` chooses among what a measurement offers for the three."""

    name: Name

    def pick(self, full: T, quick: T, tiny: T) -> T:
        return {"full": full, "quick": quick, "tiny": tiny}[self.name]
