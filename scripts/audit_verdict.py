"""The verdict on a report of pip-audit: a line for each known vulnerability, and one that says what was checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def verdict(dependencies: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit status and lines: 0, nothing is known; 1, something is; 2, not everything could be checked."""
    known = list(_known(dependencies))
    skipped = [one for one in dependencies if "skip_reason" in one]
    checked = len(dependencies) - len(skipped)
    if skipped and not checked:
        return 2, [
            f"audit: NOTHING CHECKED: no vulnerability data is to be had here for any of {len(skipped)} dependencies"
        ]
    if skipped:
        names = ", ".join(str(one["name"]) for one in skipped)
        said = f"{checked} of {len(dependencies)} dependencies checked; NOT CHECKED, for want of data: {names}"
    else:
        said = f"{checked} of {checked} dependencies checked"
    return 1 if known else 2 if skipped else 0, [*known, f"audit: {said}; known vulnerabilities: {len(known)}"]


def _known(dependencies: Sequence[dict[str, Any]]) -> Iterator[str]:
    for one in dependencies:
        for bad in one.get("vulns", ()):
            mended = ", ".join(bad["fix_versions"]) or "no version yet"
            yield f"{one['name']} {one['version']}: {bad['id']}, mended in {mended}"


if __name__ == "__main__":
    status, lines = verdict(json.loads(Path(sys.argv[1]).read_text())["dependencies"])
    print(*lines, sep="\n")
    sys.exit(status)
