"""One picture per report, as SVG: lines where the number of rules varies, bars with their spread where it does not."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.report import Figure, Report

STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vpc-nat-gateway",  # the same figures give the same file
}


def draw(report: Report, directory: Path) -> Path:
    """Write the report's picture; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report.name}.svg"
    with mpl.rc_context(STYLE):
        figure = figure_of(report)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
        pyplot.close(figure)
    return path


def figure_of(report: Report) -> pyplot.Figure:
    """Lines where there are more than two sizes, else bars."""
    sizes: dict[str, set[int | None]] = {}
    for one in report.figures:
        sizes.setdefault(one.label, set()).add(one.size)
    return _lines(report) if max(map(len, sizes.values())) > 2 else _rows(report)


def short(value: float, _: object = None) -> str:
    """Three digits and a prefix of SI."""
    for limit, prefix in ((999_500, "M"), (9_995, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if prefix == 'M' else 1e3):.3g} {prefix}"
    return f"{float(f'{value:.3g}'):,g}"


def _lines(report: Report) -> pyplot.Figure:
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    labels = list(dict.fromkeys(one.label for one in report.figures))
    for number, label in enumerate(labels):
        points = sorted((one for one in report.figures if one.label == label), key=lambda one: one.size or 0)
        medians = [one.median for one in points]
        colour = f"C{number}"
        if points[0].size is None:
            axes.axhline(medians[0], color=colour, linestyle=":", label=label)
            continue
        spread = _spread(points)
        axes.errorbar([one.size for one in points], medians, spread, color=colour, marker="o", capsize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rules", ylabel=report.unit, title=report.question)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _rows(report: Report) -> pyplot.Figure:
    """Bars from zero; points on a logarithmic scale where the figures differ by more than fifty times."""
    rows = report.figures
    figure, axes = pyplot.subplots(figsize=(8, 1.1 + 0.32 * len(rows)))
    names = [one.label if one.size is None else f"{one.label}: {one.size:,}" for one in rows]
    medians = [one.median for one in rows]
    if min(medians) > 0 and max(medians) > 50 * min(medians):
        axes.errorbar(medians, names, xerr=_spread(rows), fmt="o", capsize=3)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.barh(names, medians, xerr=_spread(rows), capsize=3, height=0.7)
    for row, (one, median) in enumerate(zip(rows, medians, strict=True)):
        end = (max(one.values), row)
        axes.annotate(short(median), end, (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=report.unit, title=report.question)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(x=0.12)
    return figure


def _spread(points: list[Figure]) -> list[list[float]]:
    """Distances from the median to the least and to the most."""
    return [
        [one.median - min(one.values) for one in points],
        [max(one.values) - one.median for one in points],
    ]
