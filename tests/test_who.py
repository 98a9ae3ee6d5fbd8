"""``natgw who``: who was behind an external address at a time, from the flow log."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api import who
from api.cli import app
from gateway.observer.flow import Flow, Identity, Recorder
from tests.watcher_kit import EIP, EIP2, left, mapped

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def record(event: str, flow: Flow, clock: str) -> str:
    at = datetime.fromisoformat(f"2026-03-01T{clock}+00:00").timestamp()
    return Recorder(Identity("", "", "", "")).line(event, flow, int(at * 1_000_000_000)).decode()


FIRST, SECOND = left(source="10.0.1.7", port=40211), left(source="10.0.1.8", port=40211)
ARRIVED = mapped(8888)
LOG = [
    record("start", FIRST, "10:00:00"),
    record("start", left(source="10.0.1.99", port=40212), "10:00:00"),
    record("start", ARRIVED, "10:00:30"),
    'not JSON at all "192.0.2.2"\n',
    record("end", FIRST, "10:01:59"),
    record("start", SECOND, "10:02:20"),
    record("end", ARRIVED, "10:05:00"),
    record("end", SECOND, "10:06:00")[:80],
]


@pytest.mark.parametrize(
    ("at", "inside"),
    [
        ("10:00", ["10.0.1.7:1234"]),
        ("10:01:58", ["10.0.1.7:1234"]),
        ("10:02", ["10.0.1.8:1234"]),
        ("10:02:10", []),
        ("2026-03-01T11:00", ["10.0.1.8:1234"]),
        ("2026-02-28 10:00", []),
        ("09:59", []),
    ],
)
def test_the_port_is_one_client_s_after_the_other(at: str, inside: list[str]) -> None:
    found = who.search(LOG, who.asked(f"{EIP2}:40211", at, NOW))
    assert [each.inside for each in found] == inside


def test_an_address_alone_is_any_port() -> None:
    found = who.search(LOG, who.asked(EIP2, "10:00", NOW))
    assert [each.inside for each in found] == ["10.0.1.7:1234", "10.0.1.99:1234"]


def test_who_served_what_came_in() -> None:
    (found,) = who.search(LOG, who.asked(f"{EIP}:8888", "10:03", NOW))
    assert (found.inside, found.peer, found.nat) == ("10.0.1.80:80", "203.0.113.9:4000", "dnat")
    assert (found.began, found.ended) == (
        datetime(2026, 3, 1, 10, 0, 30, tzinfo=UTC),
        datetime(2026, 3, 1, 10, 5, tzinfo=UTC),
    )


def test_a_connection_from_before_the_log() -> None:
    log = [record("end", FIRST, "10:01:59")]
    (found,) = who.search(log, who.asked(f"{EIP2}:40211", "09:00", NOW))
    assert found.began is None
    assert not who.search(log, who.asked(f"{EIP2}:40211", "10:02", NOW))


def test_the_same_identifier_again_is_another_connection() -> None:
    log = [
        record("start", FIRST, "10:00:00"),
        record("end", FIRST, "10:00:10"),
        record("start", FIRST, "10:00:20"),
        record("end", FIRST, "10:00:30"),
    ]
    found = who.search(log, who.asked(f"{EIP2}:40211", "10:00", NOW))
    assert [(each.began.second, each.ended.second) for each in found if each.began and each.ended] == [
        (0, 10),
        (20, 30),
    ]


@pytest.mark.parametrize(("address", "at"), [(":80", "10:00"), ("1.2.3.4:x", "10:00"), (EIP, "noon"), (EIP, "25:00")])
def test_what_cannot_be_understood(address: str, at: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        who.asked(address, at, NOW)


def test_files_are_read_the_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "flows.log"
    for name in ("flows.log", "flows.log.1", "flows.log.2", "flows.log.10", "flows.log.gz", "other.log.1"):
        (tmp_path / name).touch()
    assert [each.name for each in who.files(path)] == ["flows.log.10", "flows.log.2", "flows.log.1", "flows.log"]


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "flows.log"
    path.with_name("flows.log.1").write_text("".join(LOG[:4]))
    path.write_text("".join(LOG[4:]))
    runner = CliRunner(env={"NATGW_FLOW_LOG": str(path), "TZ": "UTC"})
    asked = ("who", f"{EIP2}:40211", "--at", "2026-03-01T10:02")
    done = runner.invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split() == [
        *("tcp", "10.0.1.8:1234", f"{EIP2}:40211", "203.0.113.9:443", "snat"),
        *("2026-03-01", "10:02:20", "(open)"),
    ]
    (found,) = json.loads(runner.invoke(app, (*asked, "--json")).stdout)
    assert (found["inside"], found["began"], found["ended"]) == ("10.0.1.8:1234", "2026-03-01T10:02:20+00:00", None)
    none = runner.invoke(app, ("who", f"{EIP2}:1", "--at", "2026-03-01T10:02"))
    assert (none.exit_code, none.stdout) == (1, "")
    path.unlink()
    path.with_name("flows.log.1").unlink()
    assert "there is no flow log" in runner.invoke(app, asked).output
