"""The store keeps the last good spec, and says so when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given

from gateway.store import JOURNAL_LEAST, Store, Stored
from rules.keyed import Keyed
from rules.patch import patch, patched
from rules.spec import Eip, GatewaySpec
from rules.state import AddressKey
from tests.gateway_kit import example
from tests.strategies import quick, specs


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    assert store.load() is None
    store.save(Stored(example()))
    assert Store(tmp_path / "state").load() == Stored(example())


def test_claimed_addresses_are_kept(tmp_path: Path) -> None:
    stored = Stored(example(), frozenset({AddressKey("net1", "192.168.0.10/24")}))
    Store(tmp_path).save(stored)
    assert Store(tmp_path).load() == stored


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.save(Stored(example()))
    assert (tmp_path / "state/spec.json").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_the_generation_before_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(Stored(example()))
    store.save(Stored(GatewaySpec()))
    (tmp_path / "spec.json.1").replace(tmp_path / "spec.json")
    assert store.load() == Stored(example())


@pytest.mark.parametrize("damage", ["truncate", "flip", "claim", "format", "shape", "empty"])
def test_a_damaged_file_is_set_aside_and_reported(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.save(Stored(example()))
    text = (tmp_path / "spec.json").read_text()
    document = json.loads(text)
    damaged = {
        "truncate": text[: len(text) // 2],
        "flip": text.replace("10.0.1.5", "10.0.1.6"),
        "claim": json.dumps(document | {"claimed": [["net1", "192.168.0.99/24"]]}),
        "format": json.dumps(document | {"format": 99}),
        "shape": json.dumps([1, 2]),
        "empty": "",
    }[damage]
    (tmp_path / "spec.json").write_text(damaged)
    assert store.load() is None
    assert (tmp_path / "spec.json.corrupt").read_text() == damaged
    assert not (tmp_path / "spec.json").exists()
    assert "set aside" in caplog.text


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(Stored(example()))
    (tmp_path / "spec.json.new").mkdir()
    with pytest.raises(OSError, match="directory"):
        store.save(Stored(GatewaySpec()))
    assert store.load() == Stored(example())


def test_the_generation_before_is_offered_only_in_place_of_one_that_was_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(Stored(example()))
    store.save(Stored(GatewaySpec()))
    assert store.previous() is None
    (tmp_path / "spec.json").write_text("")
    assert store.load() is None
    assert store.previous() == Stored(example())
    store.save(Stored(GatewaySpec()))
    assert store.previous() is None
    (tmp_path / "spec.json").write_text("")
    (tmp_path / "spec.json.1").write_text("half")
    assert store.load() is None
    assert store.previous() is None


def test_what_is_forgotten_does_not_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        store.save(Stored(example()))
    store.forget()
    assert store.load() is None
    assert store.previous() is None
    assert list(tmp_path.iterdir()) == []


def test_a_large_gateway_is_edited_not_written_anew(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    store.save(Stored(example()))
    written = (tmp_path / "spec.json").read_bytes()
    changes = versions()
    for spec in changes:
        store.save(Stored(spec))
        assert Store(tmp_path, journal_above=0).load() == Stored(spec)
    assert (tmp_path / "spec.json").read_bytes() == written
    # A daemon that comes later goes on where this one ended.
    later = Store(tmp_path, journal_above=0)
    assert later.load() == Stored(changes[-1])
    later.save(Stored(changes[0]))
    assert Store(tmp_path).load() == Stored(changes[0])
    assert (tmp_path / "spec.json").read_bytes() == written


def test_a_journal_that_has_grown_goes_into_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    store.save(Stored(example()))
    most = JOURNAL_LEAST + 500
    for number in range(100):
        spec = example().model_copy(update={"eips": Keyed([Eip(address=f"192.168.1.{number + 1}/24")])})
        store.save(Stored(spec))
        journal = tmp_path / "spec.journal"
        assert not journal.exists() or journal.stat().st_size < most
        assert Store(tmp_path).load() == Stored(spec)
    assert (tmp_path / "spec.json.1").exists()


def test_a_journal_torn_anywhere_gives_the_state_before_or_after(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    store.save(Stored(example()))
    states = [example(), *versions()[:2]]
    journal, ends = tmp_path / "spec.journal", [0]
    for spec in states[1:]:
        store.save(Stored(spec))
        ends.append(journal.stat().st_size)
    whole = journal.read_bytes()
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        expected = states[max(number for number, end in enumerate(ends) if end <= length)]
        again = Store(tmp_path, journal_above=0)
        assert again.load() == Stored(expected)
    journal.write_bytes(whole[:-1] + bytes(100))
    again = Store(tmp_path, journal_above=0)
    assert again.load() == Stored(states[1])
    again.save(Stored(states[2]))  # over the torn end
    assert Store(tmp_path).load() == Stored(states[2])
    assert journal.read_bytes() == whole


def test_a_journal_damaged_in_its_midst_is_set_aside_with_its_file(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    store.save(Stored(example()))
    for spec in versions():
        store.save(Stored(spec))
    journal, file = tmp_path / "spec.journal", tmp_path / "spec.json"
    whole, document = journal.read_bytes(), file.read_bytes()
    for position in range(0, whole.rindex(b"\n", 0, -1), 29):
        damaged = bytearray(whole)
        damaged[position] ^= 0x11
        journal.write_bytes(damaged)
        file.write_bytes(document)
        assert Store(tmp_path).load() is None, position
        assert (tmp_path / "spec.journal.corrupt").read_bytes() == damaged
        assert not file.exists()


def test_the_journal_of_a_file_before_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    store.save(Stored(example()))
    store.save(Stored(versions()[0]))
    old = (tmp_path / "spec.journal").read_bytes()
    (tmp_path / "spec.journal").unlink()
    whole = Store(tmp_path, journal_above=0)
    whole.save(Stored(GatewaySpec()))
    (tmp_path / "spec.journal").write_bytes(old)  # a crash came before it was removed
    again = Store(tmp_path, journal_above=0)
    assert again.load() == Stored(GatewaySpec())
    again.save(Stored(versions()[1]))
    assert Store(tmp_path).load() == Stored(versions()[1])


def test_forgetting_forgets_the_journal(tmp_path: Path) -> None:
    store = Store(tmp_path, journal_above=0)
    for spec in (example(), *versions()):
        store.save(Stored(spec))
    store.forget()
    assert Store(tmp_path).load() is None
    assert not list(tmp_path.glob("spec.j*[ln]"))
    store.save(Stored(example()))
    assert Store(tmp_path).load() == Stored(example())


def test_a_small_gateway_has_a_file_that_every_release_reads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for spec in (example(), *versions()):
        store.save(Stored(spec))
    assert json.loads((tmp_path / "spec.json").read_text())["format"] == 1
    assert not (tmp_path / "spec.journal").exists()


@quick
@given(specs, specs)
def test_a_patch_makes_one_document_of_the_other(old: GatewaySpec, new: GatewaySpec) -> None:
    said = json.loads(json.dumps(patch(old, new)))
    assert patched(old.model_dump(mode="json"), said) == new.model_dump(mode="json")
    assert not patch(new, new)


def versions() -> list[GatewaySpec]:
    """The example with one thing changed after another, of every kind."""
    one = example()
    two = one.model_copy(update={"dnats": one.dnats.drop(("192.168.0.10", 8888, "tcp"))})
    three = two.model_copy(update={"eips": two.eips.put(Eip(address="192.168.0.13/24")), "gateway_v4": None})
    four = three.model_copy(update={"qos": Keyed(), "initialized": False})
    five = four.model_copy(update={"initialized": True, "shared_dnats": Keyed(), "fips": one.fips})
    return [two, three, four, five]
