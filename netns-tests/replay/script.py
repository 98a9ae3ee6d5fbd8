"""The transcript: what happens in the life of a gateway, and as which calls each release of Kube-OVN makes it happen.

The transcript itself is ``transcript.txt``, whose head explains it. This module only reads; nothing here acts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["call", "+", "-", ">", "$", "@"]
TRANSCRIPT = Path(__file__).with_name("transcript.txt")
_GUARDED = re.compile(r"(?:\[(?P<range>[^]]+)\] )?(?P<text>.*)")


@dataclass(frozen=True)
class Release:
    """How the controller of one release calls the script and reads what comes back.

    ``shell``: its rules are joined by spaces and parsed by a shell, else each is an argument of its own.
    ``environment``: the pod has GATEWAY_V4 and GATEWAY_V6. ``warnings``: lines on stderr that begin with
    ``Warning:`` do no harm, else any byte there is a failure. ``serial``: at most one call at a time in a pod.
    """

    name: str
    shell: bool = True
    environment: bool = True
    warnings: bool = False
    serial: bool = True

    @property
    def number(self) -> int:
        """1.12 is 12."""
        return int(self.name.partition(".")[2])


RELEASES = (
    Release("1.12", environment=False, serial=False),
    Release("1.13", environment=False, serial=False),
    Release("1.14", environment=False, serial=False),
    Release("1.15"),
    Release("1.16", warnings=True),
    Release("1.17", warnings=True, shell=False),
)


@dataclass(frozen=True)
class Line:
    """One line of a step; ``fails`` only of calls."""

    kind: Kind
    text: str
    fails: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.text.split(" "))


@dataclass
class Step:
    """What happens between two looks at the kernel."""

    title: str
    lines: list[Line] = field(default_factory=list)

    def flagged(self, flag: str) -> bool:
        """Whether the step bears that ``@`` line."""
        return Line("@", flag) in self.lines

    @property
    def calls(self) -> list[Line]:
        return [line for line in self.lines if line.kind == "call"]


def transcript(release: Release) -> list[Step]:
    """The steps of one release."""
    steps: list[Step] = []
    for text in _lines_for(release, TRANSCRIPT.read_text().splitlines()):
        if text.startswith("== "):
            steps.append(Step(text[3:]))
        elif steps:
            steps[-1].lines.append(_line(text))
        else:
            raise ValueError(f"{text!r} belongs to no step")
    return steps


def _lines_for(release: Release, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        match = _GUARDED.fullmatch(line)
        if not line or line.startswith("#") or match is None:
            continue
        if match["range"] is None or _covers(match["range"], release.number):
            yield match["text"]


def _covers(span: str, number: int) -> bool:
    if span.startswith("<="):
        return number <= _minor(span[2:])
    if span.startswith(">="):
        return number >= _minor(span[2:])
    first, _, last = span.partition("-")
    return _minor(first) <= number <= _minor(last or first)


def _minor(version: str) -> int:
    major, _, minor = version.partition(".")
    if major != "1":
        raise ValueError(f"{version!r} is no release of Kube-OVN")
    return int(minor)


def _line(text: str) -> Line:
    marks: dict[str, Kind] = {"+ ": "+", "- ": "-", "> ": ">", "$ ": "$", "@ ": "@"}
    if kind := marks.get(text[:2]):
        return Line(kind, text[2:])
    return Line("call", text.removeprefix("! "), fails=text.startswith("! "))
