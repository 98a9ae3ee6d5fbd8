"""``natgw who``: which inside address was behind an external one, from the flow log's files. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """An external address and port (None: any), and the time: from ``since`` up to ``until``."""

    address: str
    port: int | None
    since: datetime
    until: datetime


@dataclass(frozen=True)
class Found:
    """One connection; ``began`` is None if that was before the log, ``ended`` if it lived when the log ended."""

    protocol: str
    nat: str
    inside: str
    external: str
    peer: str
    began: datetime | None
    ended: datetime | None


def asked(address: str, at: str, now: datetime) -> Asked:
    """What ``192.0.2.7:40211`` at ``10:02`` means: that whole minute of today, in the time zone of ``now``.

    Also 10:02:30 (that second), and with a date before (2026-03-01T10:02). Raises ValueError.
    """
    found = re.fullmatch(r"(?:\[(.+)\]|([^:]+))(?::(\d{1,5}))?", address)
    if found is None:
        raise ValueError(f"{address!r} is not an address with a port (192.0.2.7:40211), or an address alone")
    time = re.fullmatch(r"(?:(\d{4}-\d\d-\d\d)[T ])?(\d\d:\d\d)(:\d\d)?", at)
    if time is None:
        raise ValueError(f"{at!r} is not a time (10:02, 10:02:30, 2026-03-01T10:02)")
    day = time[1] or now.date().isoformat()
    since = datetime.fromisoformat(f"{day}T{time[2]}{time[3] or ':00'}").replace(tzinfo=now.tzinfo)
    until = since + (timedelta(seconds=1) if time[3] else timedelta(minutes=1))
    return Asked(found[1] or found[2], int(found[3]) if found[3] else None, since, until)


def files(path: Path) -> list[Path]:
    """The log's files, the oldest first."""
    older = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdecimal()]
    return [*sorted(older, key=lambda p: -int(p.suffix[1:])), *([path] if path.exists() else [])]


def search(lines: Iterable[str], wanted: Asked) -> list[Found]:
    """The connections that had the address in that time, in the order in which they began (or are first heard of)."""
    needle = f'"{wanted.address}"'
    flows: dict[tuple[Any, ...], Found] = {}
    for line in lines:
        # Nearly every line is another's; looking for the text costs a tenth of reading it.
        if needle in line and (record := _record(line)) and (found := _connection(record, wanted)):
            at = datetime.fromisoformat(record["timestamp"])
            key = (record.get("conntrackID"), found.inside, found.external, found.peer)
            if record["event"] == "start":
                flows[(*key, at)] = replace(found, began=at)
                continue
            begun = next((each for each in reversed(flows) if each[:-1] == key and flows[each].ended is None), None)
            if begun is None:
                flows[(*key, None)] = replace(found, ended=at)
            else:
                flows[begun] = replace(flows[begun], ended=at)
    return [
        each
        for each in flows.values()
        if (each.began is None or each.began < wanted.until) and (each.ended is None or each.ended >= wanted.since)
    ]


def read(paths: Iterable[Path]) -> Iterator[str]:
    """All lines. Raises OSError."""
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _record(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        return found if found["event"] in ("start", "end") and found["original"] and found["translated"] else None
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a log that is being written, or another program's


def _connection(record: dict[str, Any], wanted: Asked) -> Found | None:
    """The connection of a record if the address is its external one."""
    before, after = record["original"], record["translated"]
    if "snat" in record["natType"] and _is(wanted, after, "source"):
        inside, external, peer = _end(before, "source"), _end(after, "source"), _end(after, "destination")
    elif "dnat" in record["natType"] and _is(wanted, before, "destination"):
        inside, external, peer = _end(after, "destination"), _end(before, "destination"), _end(before, "source")
    else:
        return None
    return Found(record["protocol"], "+".join(record["natType"]), inside, external, peer, None, None)


def _is(wanted: Asked, ends: dict[str, Any], side: str) -> bool:
    return ends.get(f"{side}IP") == wanted.address and wanted.port in (None, ends.get(f"{side}Port", 0))


def _end(ends: dict[str, Any], side: str) -> str:
    address, port = ends[f"{side}IP"], ends.get(f"{side}Port")
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}" if port else host


def document(one: Found) -> dict[str, Any]:
    """A connection as JSON."""
    times = {"began": one.began and one.began.isoformat(), "ended": one.ended and one.ended.isoformat()}
    return {**asdict(one), **times}


def table(found: Iterable[Found]) -> list[str]:
    """The connections for people, a line each under a heading."""
    rows = [("PROTOCOL", "INSIDE", "EXTERNAL", "PEER", "NAT", "FROM", "TO")]
    for one in found:
        began = _clock(one.began) if one.began else "before the log"
        ended = _clock(one.ended) if one.ended else "(open)"
        rows.append((one.protocol, one.inside, one.external, one.peer, one.nat, began, ended))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _clock(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
