"""``python -m bench``: measure, write build/bench/*.json and *.svg, print what was found. Root, in this directory."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import announce, bulk, flows, footprint, listening, observing, page, throughput, verbs
from bench.generator import BUILD
from bench.pictures import draw
from bench.report import Report, save
from bench.scale import Scale

QUESTIONS: dict[str, tuple[Callable[[Scale], Report], ...]] = {
    "flows": (flows.dnats, flows.kinds, listening.listening),
    "throughput": (throughput.packets, throughput.streams),
    "verbs": (partial(verbs.verbs, variant="legacy"), partial(verbs.verbs, variant="nft"), verbs.announcing),
    "bulk": (partial(bulk.puts, variant="legacy"), partial(bulk.puts, variant="nft")),
    "announce": (announce.announce,),
    "footprint": (footprint.memory, footprint.idle, footprint.recovery),
    "observe": (observing.scrapes, observing.followed),
}


def main() -> int:
    """Run the chosen measurements; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (all): {', '.join(QUESTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: a few minutes for all")
    parser.add_argument("--page", action="store_true", help="put the results in docs/performance.md")
    parser.add_argument("--only-page", action="store_true", help="measure nothing, use the results that there are")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    held = True
    if not chosen.only_page:
        held = run(chosen.names or list(QUESTIONS), Scale("quick" if chosen.quick else "full"))
    if chosen.page or chosen.only_page:
        page.write(page.load(BUILD))
    return 0 if held else 1


def run(names: list[str], scale: Scale, directory: Path = BUILD) -> bool:
    """Measure, save and print; whether all claims hold."""
    held = True
    for name in names:
        for measure in QUESTIONS[name]:
            if scale.name == "tiny" and getattr(measure, "keywords", {}).get("variant") == "nft":
                continue  # the same code once more
            begun = time.monotonic()
            report = measure(scale)
            save(report, directory, scale.name)
            draw(report, directory)
            show(report, time.monotonic() - begun)
            held &= all(claim.holds for claim in report.claims)
    return held


def show(report: Report, seconds: float) -> None:
    """Print a report."""
    print(f"\n{report.question} ({report.name}, {seconds:.0f} s)\n{report.unit}")
    for one in report.figures:
        size = "" if one.size is None else f"{one.size:,}"
        spread = f"{page.number(min(one.values)):>9} to {page.number(max(one.values))}"
        print(f"  {one.label:44}{size:>8}{page.number(one.median):>12} {spread}")
    for claim in report.claims:
        sense = "≥" if claim.sense == "at least" else "≤"
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        median = f"{page.number(claim.median)} {claim.unit}"
        print(f"  {claim.text:64}{median:>12}  {sense} {page.number(claim.bound)} {claim.unit}: {verdict}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
