"""The measured part of docs/performance.md, made from the JSON of the last run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench.pictures import draw
from bench.report import Claim, Figure, Report

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PICTURES = PAGE.parent / "performance"


def write(documents: list[dict[str, Any]], page: Path = PAGE, pictures: Path = PICTURES) -> None:
    """Put tables and pictures of these reports between the page's markers."""
    shutil.rmtree(pictures, ignore_errors=True)
    parts = [_machine(documents[0])]
    for document in documents:
        report = Report.from_json(document)
        picture = draw(report, pictures)
        parts.append(_section(report, picture.relative_to(page.parent)))
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    _, marker, tail = rest.partition(END)
    if not marker:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}")


def load(directory: Path) -> list[dict[str, Any]]:
    """The reports of a directory, in the order in which they were made."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"), key=lambda p: p.stat().st_mtime)]


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return (
        f"Measured on a virtual machine with {machine['processors']} processors ({machine['architecture']}), "
        f"Linux {machine['kernel']}, Python {machine['python']}."
    )


def _section(report: Report, picture: Path) -> str:
    lines = [f"### {report.question}", "", f"![{report.question}]({picture})", "", report.notes, ""]
    if report.claims:
        lines += ["| compared | median | spread | wanted | |", "|---|---:|---:|---:|---|"]
        lines += [_claim(one) for one in report.claims]
        lines.append("")
    lines += [f"| {report.unit} | rules | median | spread |", "|---|---:|---:|---:|"]
    lines += [_figure(one) for one in report.figures]
    return "\n".join(lines)


def _claim(claim: Claim) -> str:
    sense = "≥" if claim.sense == "at least" else "≤"
    spread = f"{number(min(claim.values))} to {number(max(claim.values))}"
    bound = f"{sense} {number(claim.bound)} {claim.unit}"
    verdict = "yes" if claim.holds else "**no**"
    return f"| {claim.text} | {number(claim.median)} {claim.unit} | {spread} | {bound} | {verdict} |"


def _figure(figure: Figure) -> str:
    size = "" if figure.size is None else f"{figure.size:,}"
    spread = f"{number(min(figure.values))} to {number(max(figure.values))}"
    return f"| {figure.label} | {size} | {number(figure.median)} | {spread} |"


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
