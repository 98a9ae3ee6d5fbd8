"""The lab's record on disk: who owns a name, and what is left of a lab whose builder died."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.manifests import read
from lab.plan import plan
from lab.record import Book, LabError, Record

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def record() -> Record:
    text = (EXAMPLES / "two-vpcs.yaml").read_text(encoding="utf-8")
    world, notes = plan(read([("w", text)]))
    return Record(phase="building", world=world, notes=notes)


def test_what_is_claimed_can_be_read_back(tmp_path: Path, record: Record) -> None:
    Book("lab", tmp_path).claim(record)
    assert Book("lab", tmp_path).read() == record


def test_a_name_is_claimed_once(tmp_path: Path, record: Record) -> None:
    Book("lab", tmp_path).claim(record)
    with pytest.raises(LabError, match="Lab lab exists already"):
        Book("lab", tmp_path).claim(record)
    Book("other", tmp_path).claim(record)


def test_one_process_at_a_time_builds_or_removes(tmp_path: Path, record: Record) -> None:
    book = Book("lab", tmp_path)
    book.claim(record)
    with book.locked(), pytest.raises(LabError, match="by another process"), Book("lab", tmp_path).locked():
        pass
    with book.locked():
        pass


def test_no_lab_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="There is no lab lab"):
        Book("lab", tmp_path).read()
    with pytest.raises(LabError, match="There is no lab lab"), Book("lab", tmp_path).locked():
        pass


def test_erasing_leaves_nothing_of_the_lab_and_all_of_others(tmp_path: Path, record: Record) -> None:
    one, other = Book("one", tmp_path), Book("other", tmp_path)
    for book in (one, other):
        book.claim(record)
        book.make_gateway_directories(record.world)
    one.erase()
    assert not one.exists()
    assert other.read() == record


def test_gateways_have_directories_of_their_own_short_enough_for_a_socket(tmp_path: Path, record: Record) -> None:
    book = Book("lab", tmp_path)
    assert book.gateway_directory("a" * 60) != book.gateway_directory("a" * 61)
    book.claim(record)
    with pytest.raises(LabError, match="too long a path"):
        Book("lab", tmp_path / ("x" * 90)).make_gateway_directories(record.world)


@pytest.mark.parametrize("name", ["", "Lab", "a.b", "a/b", "-a", "a-", "..", "x" * 25])
def test_names_that_could_not_be_namespaces_or_directories_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError, match="is no name for a lab"):
        Book(name, tmp_path)


def test_the_base_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATGW_LAB_DIR", str(tmp_path / "labs"))
    assert Book("lab").path == tmp_path / "labs" / "lab"
    monkeypatch.delenv("NATGW_LAB_DIR")
    assert Book("lab").path == Path("/run/natgw-lab/lab")
