"""What a measurement hands back: figures with their spread, and claims that compare figures of the same run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """One thing, measured several times. ``size`` is the number of rules where that is what is varied."""

    label: str
    values: tuple[float, ...]
    size: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Claim:
    """A bound on a median: of ratios (unit x), or of what was measured, in its unit."""

    text: str
    values: tuple[float, ...]
    bound: float
    sense: Literal["at least", "at most"]
    unit: str = "x"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        return self.median >= self.bound if self.sense == "at least" else self.median <= self.bound


@dataclass
class Report:
    """The answer to one question. ``notes`` says what a reader must know to repeat it by hand."""

    name: str
    question: str
    unit: str
    notes: str
    figures: list[Figure] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def figure(self, label: str, size: int | None = None) -> Figure:
        """The figure of that label and size; KeyError if it was not measured."""
        for one in self.figures:
            if (one.label, one.size) == (label, size):
                return one
        raise KeyError(f"{label} {size}")

    def ratio(self, text: str, what: Figure, to: Figure, *, at_least: float) -> None:
        """Claim that one figure is at least so many times another, round by round."""
        self.claims.append(Claim(text, ratios(what.values, to.values), at_least, "at least"))

    def limit(self, text: str, values: Sequence[float], *, at_most: float, unit: str = "x") -> None:
        self.claims.append(Claim(text, tuple(values), at_most, "at most", unit))

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        for listed, kept in ((document["figures"], self.figures), (document["claims"], self.claims)):
            for one, known in zip(listed, kept, strict=True):
                one["median"] = known.median
                if isinstance(known, Claim):
                    one["holds"] = known.holds
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Report:
        def rows(key: str, kind: Any, drop: tuple[str, ...]) -> list[Any]:
            return [
                kind(**{name: tuple(v) if name == "values" else v for name, v in row.items() if name not in drop})
                for row in document[key]
            ]

        texts = {name: document[name] for name in ("name", "question", "unit", "notes")}
        figures, claims = rows("figures", Figure, ("median",)), rows("claims", Claim, ("median", "holds"))
        return cls(**texts, figures=figures, claims=claims)


def ratios(what: Sequence[float], to: Sequence[float]) -> tuple[float, ...]:
    """Round by round: what was measured side by side is compared."""
    return tuple(one / other for one, other in zip(what, to, strict=True))


def machine() -> dict[str, Any]:
    """What a reader must know of the machine."""
    return {
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


def save(report: Report, directory: Path, scale: str) -> Path:
    """Write the report as JSON; returns the file's path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report.name}.json"
    path.write_text(json.dumps({"machine": machine(), "scale": scale, **report.to_json()}, indent=1) + "\n")
    return path
