"""docs/releases.md, made from the transcript; in netns-tests, ``python -m replay.table`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from replay.script import RELEASES, Release, transcript

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "releases.md"

HEAD = """# Releases of Kube-OVN

The same image serves the controllers of all these releases. Each of them is replayed against it with both variants
of iptables, from the gateway's creation to its deletion: `netns-tests/replay/transcript.txt` has every call, what must
stand after each step, and the traffic that must pass. This page is made from it: in `netns-tests`, run
`python -m replay.table`.
"""
CALLS = """## How they call

`nat-gateway.sh` tells the releases apart by what they say, never by who they are.
"""
VERBS = """## What they call

The number of comma-separated fields in a rule of each verb (0: the verb alone); a dash where that release does not
send it. Longer forms of old releases are taken from all, shorter forms of new ones, too.
"""


def document() -> str:
    """The whole page."""
    calls = _table(
        ["release", "form", "`GATEWAY_V4`, `GATEWAY_V6`", "what on stderr is a failure", "calls in one pod"],
        [_manner(release) for release in RELEASES],
    )
    used = {release.name: _fields(release) for release in RELEASES}
    verbs = list(dict.fromkeys(verb for fields in used.values() for verb in fields))
    rows = [[f"`{verb}`", *(_counts(used[release.name].get(verb)) for release in RELEASES)] for verb in sorted(verbs)]
    return "\n".join([HEAD, CALLS, calls, VERBS, _table(["verb", *(release.name for release in RELEASES)], rows)])


def _manner(release: Release) -> list[str]:
    return [
        release.name,
        '`bash -c "… VERB RULES"`' if release.shell else "an argument for each rule",
        "set" if release.environment else "-",
        "all but lines that begin with `Warning:`" if release.warnings else "anything",
        "one at a time" if release.serial else "several at once",
    ]


def _fields(release: Release) -> dict[str, set[int]]:
    """The numbers of fields by verb."""
    found: dict[str, set[int]] = {}
    for step in transcript(release):
        for call in step.calls:
            verb, *rules = call.words
            found.setdefault(verb, set()).update([rule.count(",") + 1 for rule in rules] or [0])
    return found


def _counts(fields: set[int] | None) -> str:
    return "-" if fields is None else ", ".join(map(str, sorted(fields)))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
