"""No shell stands between us and a program, and no dependency is taken that was not pinned."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.audit_verdict import verdict

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("api", "gateway", "rules", "lab", "image") for path in (ROOT / room).rglob("*.py"))
SHELLS = re.compile(r"(?:/bin/|/usr/bin/)?(?:ba|da|z|k|a)?sh")
CALLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
# The lab calls gateways as Kube-OVN's controllers up to release 1.16 do: by `/bin/bash -c` inside of the pod.
CONTROLLERS = {"lab/controller.py": 1}


def shells(tree: ast.AST) -> Iterator[ast.AST]:
    """Where a shell would be given a command line."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="shell", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield node
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in CALLS:
                yield node
            case ast.List(elts=words) | ast.Tuple(elts=words) | ast.Call(args=words):
                said = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
                if "-c" in said and any(map(SHELLS.fullmatch, said)):
                    yield node


@pytest.mark.parametrize(
    "text",
    [
        'run("a b", shell=True)',
        "run(x, shell=y)",
        'os.system("a")',
        'popen("a")',
        'run(["sh", "-c", x])',
        'run("/bin/bash", "-c", x)',
        'asyncio.create_subprocess_shell("a")',
    ],
)
def test_a_shell_would_be_seen(text: str) -> None:
    assert list(shells(ast.parse(text)))


def test_no_shell_runs_our_commands() -> None:
    found = {str(path.relative_to(ROOT)): len(list(shells(ast.parse(path.read_text())))) for path in SOURCES}
    assert {path: count for path, count in found.items() if count} == CONTROLLERS
    assert len(found) > 100


@pytest.mark.parametrize("path", ["scripts/setup.sh", "image/Dockerfile"])
def test_what_is_installed_is_checked_against_its_hashes_or_was_made_here(path: str) -> None:
    text = (ROOT / path).read_text().replace("\\\n", " ")
    installs = re.findall(r'(?:bin/pip"?|"\$\{pip\[@\]\}")((?: [^&;\n]*)?)', text)
    said = [
        words for words in installs if "install" in words or "wheel" in words or "-r " in words or "--editable" in words
    ]
    assert len(said) >= 3
    assert [words for words in said if "--require-hashes" not in words and "--no-index" not in words] == []


@pytest.mark.parametrize(
    ("found", "status", "last"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 dependencies checked; known vulnerabilities: 0"),
        (
            [{"name": "a", "skip_reason": "none"}] * 2,
            2,
            "NOTHING CHECKED: no vulnerability data is to be had here for any of 2",
        ),
        (
            [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "none"}],
            2,
            "1 of 2 dependencies checked; NOT CHECKED, for want of data: b",
        ),
        (
            [
                {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]},
                {"name": "b", "skip_reason": ""},
            ],
            1,
            "known vulnerabilities: 1",
        ),
    ],
)
def test_the_audit_says_what_it_could_not_check(found: list[dict[str, object]], status: int, last: str) -> None:
    code, lines = verdict(found)
    assert code == status
    assert last in lines[-1]
    assert len(lines) == 1 + (status == 1)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock", "requirements-build.lock"])
def test_every_dependency_is_pinned_with_its_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text().replace("\\\n", " ")
    entries = [line for line in text.splitlines() if line and not line.lstrip().startswith(("#", "--"))]
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry
