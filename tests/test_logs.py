"""The log's lines are there at once where the disk works, and nobody waits for them where it does not."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import logs
from api.logs import Unhurried


class Disk(logging.Handler):
    """Keeps the lines; while it is stuck, whoever writes one waits."""

    def __init__(self) -> None:
        super().__init__()
        self.works = threading.Event()
        self.works.set()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.works.wait(60)
        self.lines.append(self.format(record))


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.works.set()


@pytest.fixture
def log(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Who logs waits long for a disk that works; the tests say when it does not."""
    monkeypatch.setattr(logs, "LAST_SECONDS", 60.0)
    made = logging.Logger("test")
    made.addHandler(Unhurried(disk, patience=60.0))
    return made


def stick(disk: Disk, log: logging.Logger) -> None:
    """From now on no line is written, and nobody waits for one any longer than usual."""
    disk.works.clear()
    log.handlers[0]._patience = logs.PATIENCE  # type: ignore[attr-defined]


def work(disk: Disk, log: logging.Logger) -> None:
    """The disk works again; returns when all is written."""
    log.handlers[0]._patience = 60.0  # type: ignore[attr-defined]
    disk.works.set()
    log.handlers[0].flush()


def test_a_line_is_written_when_the_call_returns(disk: Disk, log: logging.Logger) -> None:
    for number in range(100):
        log.info("line %d", number)
        assert disk.lines[-1] == f"line {number}"


def test_a_disk_that_does_not_answer_holds_up_nobody_and_loses_nothing(disk: Disk, log: logging.Logger) -> None:
    stick(disk, log)
    changing = ["first"]
    for number in range(1000):
        log.info("%d %s", number, changing)
        changing[0] = "later"  # what was logged is what was so then
    assert disk.lines == []
    work(disk, log)
    assert disk.lines == ["0 ['first']", *(f"{number} ['later']" for number in range(1, 1000))]
    log.info("at once again")
    assert disk.lines[-1] == "at once again"


def test_what_waits_is_bounded_and_what_is_lost_is_told(
    disk: Disk, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    stick(disk, log)
    for number in range(20):
        log.info("line %d", number)
    work(disk, log)
    log.info("the next")
    log.handlers[0].flush()
    kept = [line for line in disk.lines if line.startswith("line")]
    assert kept == [f"line {number}" for number in range(len(kept))]
    assert f"{20 - len(kept)} lines were lost here: the log could not be written in time" in disk.lines
    assert disk.lines[-1] == "the next"


def test_lines_go_to_the_file_in_the_form_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATGW_READY_FD", "3")  # detached
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    path = tmp_path / "natgw.log"
    try:
        logs.log_to(path)
        logging.getLogger("natgw").info("for people")
        logs.log_to(path, "json")
        logging.getLogger("natgw").info("for programs")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    plain, program = path.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [0-9:,]+ INFO natgw: for people", plain)
    assert json.loads(program)["message"] == "for programs"
