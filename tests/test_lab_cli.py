"""The command line, as far as it goes without building anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.cli import FAILED, REFUSED, app

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
runner = CliRunner()


@pytest.fixture(autouse=True)
def _own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATGW_LAB_DIR", str(tmp_path))


def test_a_dry_run_shows_the_world_and_builds_nothing(tmp_path: Path) -> None:
    done = runner.invoke(app, ["up", "-f", str(EXAMPLES / "vpc-nat-gateway.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "dnat01: 192.168.0.13:8888/tcp -> 10.0.1.10:80" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json_is_the_world() -> None:
    files = ["-f", str(EXAMPLES / "seeds" / "002-15-switch-lb-rule.yaml"), "-f", str(EXAMPLES / "two-vpcs.yaml")]
    done = runner.invoke(app, ["up", *files, "--dry-run", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert [gw["name"] for gw in told["world"]["gateways"]] == ["gw1", "gw2"]
    assert "SwitchLBRule cjh-slr-nginx: this kind is not simulated." in told["notes"]
    assert "SwitchLBRule cjh-slr-nginx: this kind is not simulated." in done.stderr


def test_every_refusal_is_a_line_of_its_own() -> None:
    done = runner.invoke(app, ["up", "-f", str(EXAMPLES / "two-vpcs-wrong.yaml"), "--dry-run"])
    assert done.exit_code == REFUSED
    assert [line.split("  ", 1)[0] for line in done.stderr.splitlines()] == ["refused"] * 3


def test_standard_input_and_several_files_are_taken() -> None:
    text = (EXAMPLES / "seeds" / "003-vpc-and-subnet.yaml").read_text(encoding="utf-8")
    done = runner.invoke(app, ["up", "-f", "-", str(EXAMPLES / "two-vpcs.yaml"), "--dry-run"], input=text)
    assert done.exit_code == REFUSED
    assert "Subnet subnet-secondary: unknown field cidr; did you mean cidrBlock?" in done.stderr


@pytest.mark.parametrize("command", ["down", "status", "test"])
def test_without_a_lab_the_commands_say_so(command: str) -> None:
    done = runner.invoke(app, [command])
    assert done.exit_code == FAILED
    assert "There is no lab lab" in done.stderr


def test_a_missing_file_and_a_bad_name_are_refused() -> None:
    missing = runner.invoke(app, ["up", "-f", "/nonexistent.yaml", "--dry-run"])
    assert (missing.exit_code, missing.stderr) == (REFUSED, "/nonexistent.yaml: No such file or directory\n")
    named = runner.invoke(app, ["up", "-f", str(EXAMPLES / "two-vpcs.yaml"), "--dry-run", "--name", "a.b"])
    assert named.exit_code == REFUSED
    assert "is no name for a lab" in named.stderr
