"""The documentation names what exists: commands, files, and the HTTP face as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"(?:^\$ |`)(?:\.venv/bin/)?natgw (?:--run-dir \S+ )?([a-z][a-z-]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def commands() -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "api.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Those of small containers, which load the standard library alone, are told of in the text.
    return set(re.findall(r"^│ ([a-z-]+) ", shown.stdout, re.MULTILINE)) | {"drain", "undrain"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path, commands: set[str]) -> None:
    assert set(COMMAND.findall(page.read_text())) <= commands


def test_the_api_reference_is_what_the_gateway_says() -> None:
    script = ROOT / "scripts/api_reference.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_walk_through_has_an_output_under_every_command() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    silent = [block for block in blocks if not [line for line in block.splitlines() if not line.startswith("$ ")]]
    assert len(silent) <= 2  # what changes something by hand prints nothing
