"""The store keeps the last good spec, and says so when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.store import Store, Stored
from rules.spec import GatewaySpec
from rules.state import AddressKey
from tests.gateway_kit import example


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
