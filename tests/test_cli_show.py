"""What people read of a gateway that is not well: conflicts, missing interfaces, work left to do, failures."""

from __future__ import annotations

import pytest

from api.http_models import Problem
from api.overview import status
from api.show import console, problem_lines
from gateway.status import (
    ArpStatus,
    ConflictStatus,
    Counts,
    ErrorStatus,
    LinkStatus,
    Status,
    TransactionCounts,
)
from rules.spec import Interfaces

ILL = Status(
    ready=False,
    initialized=True,
    version="1.2.3",
    variant="nft",
    interfaces=Interfaces(),
    links={"eth0": LinkStatus(up=False, arp=True, mac="02:00:00:00:00:02", mtu=1400)},
    arp=ArpStatus(policy="auto", on=False),
    counts=Counts(eips=1),
    conflicts=[
        ConflictStatus(
            interface="net1",
            address="192.168.0.10",
            mac="02:00:00:00:00:99",
            first_seen=1_700_000_000.0,
            last_seen=1_700_000_060.0,
            count=3,
        )
    ],
    last_error=ErrorStatus(at=1_700_000_000.0, by="[bold]exec[/]", message="interface net1: gone", retryable=True),
    pending=["kernel does not equal the spec", "spec is not on disk"],
    generation=7,
    transactions=TransactionCounts(failed=2),
    uptime_seconds=90061.5,
)


def test_all_that_is_wrong_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    console().print(status({**ILL.model_dump(mode="json"), "spec": None, "traffic": None, "surroundings": None}))
    shown = capsys.readouterr().out
    assert "vpc-nat-gateway 1.2.3  not ready: kernel does not equal the spec; spec is not on disk" in shown
    assert "iptables-nft, fastpath off, up 1 day, 1:01:01" in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert lines["eth0"] == ["eth0", "vpc", "down", "on", "02:00:00:00:00:02", "1400"]
    assert lines["net1"] == ["net1", "external", "missing"]
    assert "192.168.0.10 on net1 is also held by 02:00:00:00:00:99, seen 3 times, last 2023-11-14 22:14:20 UTC" in shown
    assert "last error 2023-11-14 22:13:20 UTC, [bold]exec[/]: interface net1: gone" in shown
    assert "generation 7; transactions: 0 committed, 0 unchanged, 2 failed" in shown


@pytest.mark.parametrize(
    ("restored", "retryable", "rest"),
    [
        (True, True, "(everything is as it was before; a retry may succeed)"),
        (True, False, "(everything is as it was before)"),
        (False, True, "(it could not be undone; a retry may succeed)"),
    ],
)
def test_a_refusal_says_what_stands_now(restored: bool, retryable: bool, rest: str) -> None:
    refusal = Problem(
        type="urn:natgw:problem:refused",
        title="The kernel refused",
        status=500,
        detail="edit table nat: no",
        restored=restored,
        retryable=retryable,
    )
    said = refusal.model_dump(by_alias=True, exclude_none=True)
    assert list(problem_lines(said)) == [f"edit table nat: no {rest}"]
