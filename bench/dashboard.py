"""``python -m bench.dashboard``: deploy's dashboard with what a gateway told a Prometheus, as a picture for docs/.

Grafana is not needed, and not what has drawn it: a gateway carries traffic for a minute while a real Prometheus
scrapes it; then every panel's queries are asked of that Prometheus, and what it answers is drawn here. Needs root and
the program prometheus.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from netns import require
from world import wait_for

from bench import scenes
from bench.bed import Gateway, gateway
from bench.generator import Line, Traffic

ROOT = Path(__file__).parent.parent
DASHBOARD, PICTURE = ROOT / "deploy/grafana-dashboard.json", ROOT / "docs/pictures/dashboard.svg"
METRICS, PROMETHEUS = "127.0.0.1:9912", "127.0.0.1:9913"
SECONDS = 60
SCRAPE = 2
RATE_INTERVAL = "10s"
"""What Grafana would make of the scrape interval: five of it."""

COLUMN, ROW, GAP = 50, 30, 6  # pixels of a unit of Grafana's grid
COLOURS = ("#3274d9", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#bcbd22", "#e377c2", "#7f7f7f")

Point = tuple[float, float]
Series = tuple[str, list[Point]]


def main() -> int:
    """Make the picture."""
    require("prometheus", "gcc")
    panels = json.loads(DASHBOARD.read_text())["panels"]
    with gateway(NATGW_METRICS_LISTEN=METRICS) as made, _prometheus(made):
        begun = time.time()
        _live(made)
        answers = {panel["id"]: list(_series(made, panel, begun)) for panel in panels if "targets" in panel}
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(panels, answers))
    empty = [panel["title"] for panel in panels if panel["id"] in answers and not answers[panel["id"]]]
    print(f"{PICTURE}: {len(answers)} panels; without data here: {', '.join(empty) or 'none'}")
    return 0


# A gateway that has something to tell.


def _live(made: Gateway) -> None:
    spec = scenes.spec(eips=12, fips=4, dnats=200, snats=6)
    spec["qos"] = [
        {"eip": scenes.eip(n), "direction": "ingress", "priority": 1, "rateMax": rate, "burstMax": "0.01"}
        for n, rate in ((0, "0.1"), (1, "1"))
    ]
    made.put(spec)
    until = time.monotonic() + SECONDS
    kinds = ((scenes.to_fips, 800.0), (scenes.to_dnats, 1500.0), (scenes.from_snats, 1200.0))
    changing = threading.Thread(target=_change, args=(made, until))
    changing.start()
    for turn in itertools.count():
        if time.monotonic() > until:
            break
        make, rate = kinds[turn % len(kinds)]
        _send(made, make(spec), rate * (1 + turn % 5 / 4))
    changing.join()


def _send(made: Gateway, traffic: Traffic, rate: float) -> None:
    line = Line(made.bed, traffic)
    try:
        line.send(3, rate)
    finally:
        line.close()


def _change(made: Gateway, until: float) -> None:
    """A controller at work, and once somebody who deletes one of our rules."""
    address = f"{scenes.eip(900)}/16"
    with made.host.entered():
        for turn in itertools.count():
            if time.monotonic() > until:
                return
            made.verb(("eip-add", "eip-del")[turn % 2], address)
            if turn == 20:
                made.host.run("iptables-legacy", "-t", "nat", "-F", "EXCLUSIVE_DNAT", check=False)
            time.sleep(0.5)


@contextmanager
def _prometheus(made: Gateway) -> Iterator[None]:
    """A Prometheus in the gateway's namespace that scrapes it."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "prometheus.yml")
        config.write_text(
            f"global: {{scrape_interval: {SCRAPE}s}}\n"
            f"scrape_configs: [{{job_name: natgw, static_configs: [{{targets: ['{METRICS}']}}]}}]\n"
        )
        words = (
            f"--config.file={config}",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address={PROMETHEUS}",
        )
        with Path(directory, "log").open("w") as log:
            command = ("ip", "netns", "exec", made.host.name, "prometheus", *words)
            running = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(
                lambda: "Ready" in made.host.run("curl", "-s", f"http://{PROMETHEUS}/-/ready", check=False),
                "Prometheus",
            )
            yield
        finally:
            running.terminate()
            running.wait()


def _series(made: Gateway, panel: dict[str, Any], begun: float) -> Iterator[Series]:
    """What the panel's queries give."""
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")
        asked = urllib.parse.urlencode({"query": query, "start": begun, "end": time.time(), "step": SCRAPE})
        said = json.loads(made.host.run("curl", "-s", f"http://{PROMETHEUS}/api/v1/query_range?{asked}"))
        if said["status"] != "success":
            raise RuntimeError(f"{panel['title']}: {said}")
        for one in said["data"]["result"]:
            labels = one["metric"]
            name = re.sub(
                r"\{\{(\w+)\}\}", lambda found, labels=labels: labels.get(found[1], ""), target["legendFormat"]
            )
            points = [(float(at), float(value)) for at, value in one["values"] if value != "NaN"]
            if points:
                yield name, points


# Drawing.


def picture(panels: list[dict[str, Any]], answers: dict[int, list[Series]]) -> str:
    """The dashboard as SVG, laid out as its grid says."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * ROW + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{24 * COLUMN}" height="{height}" '
        f'viewBox="0 0 {24 * COLUMN} {height}" font-family="sans-serif" font-size="11" fill="#24292f">',
        "<title>The dashboard of deploy/, drawn by bench/dashboard.py from a real Prometheus' answers</title>",
        f'<rect width="100%" height="{height}" fill="#f4f5f5"/>',
    ]
    for panel in panels:
        at = panel["gridPos"]
        x, y, width, high = at["x"] * COLUMN, at["y"] * ROW, at["w"] * COLUMN - GAP, at["h"] * ROW - GAP
        parts.append(f'<g transform="translate({x + GAP / 2},{y + GAP / 2})">')
        if panel["type"] == "row":
            parts.append(f'<text y="{ROW / 2}" font-size="14" font-weight="bold">{escape(panel["title"])}</text>')
        else:
            parts.append(f'<rect width="{width}" height="{high}" rx="3" fill="white" stroke="#d8d9da"/>')
            parts.append(f'<text x="8" y="17" font-size="12" font-weight="bold">{escape(panel["title"])}</text>')
            draw = _lines if panel["type"] == "timeseries" else _numbers
            parts += draw(answers[panel["id"]], panel["fieldConfig"]["defaults"]["unit"], width, high)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _lines(series: list[Series], unit: str, width: float, height: float) -> Iterator[str]:
    if not series:
        yield f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle" fill="#8e8e8e">no data here</text>'
        return
    left, right, top, bottom = 62, width - 10, 30, height - 52
    first, last = min(p[0] for _, s in series for p in s), max(p[0] for _, s in series for p in s)
    most = max(p[1] for _, s in series for p in s) or 1.0
    for part in (0, 0.5, 1):
        y = bottom - part * (bottom - top)
        yield f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="#e4e5e6"/>'
        yield f'<text x="{left - 5}" y="{y + 4}" text-anchor="end" fill="#6e7077">{_value(part * most, unit)}</text>'
    for seconds in range(0, int(last - first) + 1, 30):
        x = left + seconds * (right - left) / max(last - first, 1)
        yield f'<text x="{x}" y="{bottom + 14}" text-anchor="middle" fill="#6e7077">{seconds} s</text>'
    wide, high = (right - left) / max(last - first, 1), (bottom - top) / most
    for number, (_, points) in enumerate(series[: len(COLOURS)]):
        placed = " ".join(f"{left + (at - first) * wide:.1f},{bottom - value * high:.1f}" for at, value in points)
        yield f'<polyline points="{placed}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.5"/>'
    yield from _legend([name for name, _ in series], width, bottom + 22)


def _legend(names: list[str], width: float, top: float) -> Iterator[str]:
    """As many names as two lines hold."""
    x, y = 10.0, top + 8
    for number, name in enumerate(names[: len(COLOURS)]):
        needs = 18 + 6.2 * len(name)
        if x + needs > width and y == top + 8:
            x, y = 10.0, top + 22
        elif x + needs > width:
            return
        yield f'<rect x="{x}" y="{y - 7}" width="9" height="3" fill="{COLOURS[number]}"/>'
        yield f'<text x="{x + 13}" y="{y}">{escape(name)}</text>'
        x += needs + 8


def _numbers(series: list[Series], unit: str, width: float, height: float) -> Iterator[str]:
    shown = series[:8] or [("", [])]
    cell = (width - 16) / max(1, min(4, len(shown)))
    for number, (name, points) in enumerate(shown):
        x, y = 8 + number % 4 * cell + cell / 2, 30 + (number // 4 + 0.5) * (height - 36) / (1 + (len(shown) - 1) // 4)
        colour = "#24292f"
        if unit == "bool_yes_no" and points:
            colour = "#1a7f37" if points[-1][1] else "#cf222e"
        text = _value(points[-1][1], unit) if points else "no data here"
        yield f'<text x="{x}" y="{y}" font-size="22" text-anchor="middle" fill="{colour}">{text}</text>'
        yield f'<text x="{x}" y="{y + 16}" text-anchor="middle" fill="#6e7077">{escape(name)}</text>'


def _value(value: float, unit: str) -> str:
    if unit == "bool_yes_no":
        return "yes" if value else "no"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    shown = next(
        (f"{value / size:.3g} {sign}" for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= size), None
    )
    suffix = {"Bps": "B/s", "bps": "bit/s", "cps": "/s", "pps": "/s"}.get(unit, "")
    return f"{shown or f'{value:.3g} '}{suffix}".strip()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
