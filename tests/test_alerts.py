"""The alert rules and the dashboard of deploy/: they are right, and name only metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.metric_docs import BFD, OBSERVER
from api.metric_names import DAEMON
from gateway.meters import METERS
from gateway.observer.metrics import PREFIX
from gateway.watcher.exposition import METRICS

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT_TESTS = Path(__file__).with_name("alerts.yaml")


def rules() -> dict[str, Any]:
    """What a Prometheus without the operator reads."""
    spec: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["spec"]
    return spec


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return document


def expressions() -> Iterator[tuple[str, str]]:
    """Who asks, and for what."""
    for group in rules()["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    for panel in dashboard()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))


def labels_by_name() -> dict[str, set[str] | None]:
    """Every metric that there is and its labels; None where those are Kube-OVN's or prometheus_client's."""
    known: dict[str, set[str] | None] = {metric.name: set(metric.labels) for metric in (*DAEMON, *METRICS)}
    for meter in METERS.values():
        known[meter.name] = set(meter.labels)
        if meter.kind == "histogram":
            known |= {f"{meter.name}{part}": {*meter.labels, "le"} for part in ("_bucket", "_count", "_sum")}
    known |= dict.fromkeys((name for name, _ in BFD), None)
    known |= {f"{PREFIX}{name}": None for name in re.findall(r"`(\w+_\w+)`", OBSERVER)}
    known |= dict.fromkeys(("natgw_process_cpu_seconds_total", "natgw_process_resident_memory_bytes"), None)
    return known


@pytest.mark.parametrize(("who", "expression"), list(expressions()))
def test_every_metric_that_is_asked_for_exists(who: str, expression: str) -> None:
    known = labels_by_name()
    asked = re.findall(r"\b(?:natgw|kube_ovn)_\w+", expression)
    assert asked, who
    assert set(asked) <= known.keys(), who


@pytest.mark.parametrize(("who", "expression"), list(expressions()))
def test_every_label_that_is_asked_for_exists(who: str, expression: str) -> None:
    known = labels_by_name()
    labels: set[str] = {"instance"}
    for name in re.findall(r"\b(?:natgw|kube_ovn)_\w+", expression):
        labels |= known[name] or set()
    for clause in re.findall(r"(?:by|without|ignoring|on) \(([^)]*)\)", expression):
        assert {word.strip() for word in clause.split(",")} <= labels, who
    for matchers in re.findall(r"\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)[=!]", matchers)) <= labels, who


def test_legends_name_labels_that_the_series_have() -> None:
    known = labels_by_name()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            names = re.findall(r"\b(?:natgw|kube_ovn)_\w+", target["expr"])
            if any(known[name] is None for name in names):
                continue
            labels = {"instance"}.union(*(known[name] or set() for name in names))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        ids.add(panel["id"])
    assert len(ids) == len(dashboard()["panels"])


def test_promtool_finds_the_rules_right_and_they_fire_when_they_should(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: it comes with Debian's package prometheus (scripts/setup.sh test)"
    (tmp_path / "alerts.rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(UNIT_TESTS, tmp_path)
    for command in (("check", "rules", "alerts.rules.yaml"), ("test", "rules", "alerts.yaml")):
        done = subprocess.run((promtool, *command), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_it_means_and_how_bad_it_is() -> None:
    for group in rules()["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("info", "warning", "critical"), rule
            assert rule["annotations"]["summary"].endswith("."), rule
            assert "{{ $labels.instance }}" in rule["annotations"]["description"], rule
