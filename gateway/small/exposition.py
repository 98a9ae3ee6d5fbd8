"""Prometheus' text exposition format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Labels = Mapping[str, str]
Family = tuple[str, str, str, Iterable[tuple[Labels, float]]]
"""Name, kind, help and samples of a metric. Kind and help are written also where there is no sample yet."""

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def text(families: Iterable[Family]) -> str:
    """The families in their order, their labels in the order given."""
    lines: list[str] = []
    for name, kind, explanation, samples in families:
        lines += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(int(value))


def _labels(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""
