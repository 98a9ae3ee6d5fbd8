"""What the gateway counts of itself."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import meters
from gateway.meters import METERS, MOST_SERIES, Counter, Gauge, Histogram
from rules.edit import Conflict
from rules.spec import Eip, GatewaySpec
from tests.gateway_kit import example, gateway


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a meter of this test's own."""
    yield "natgw_test_total"
    METERS.pop("natgw_test_total", None)


def test_a_counter_sums_up_by_label_values(name: str) -> None:
    counter = Counter(name, "x", ("kind", "outcome"))
    counter.add("a", "ok")
    counter.add("a", "ok", amount=2.5)
    counter.add("b", "ok")
    assert counter.values() == {("a", "ok"): 3.5, ("b", "ok"): 1}
    with pytest.raises(ValueError, match="labels"):
        counter.add("a")
    with pytest.raises(ValueError, match="cannot go back"):
        counter.add("a", "ok", amount=-1)


def test_a_counter_without_labels_is_there_from_the_beginning(name: str) -> None:
    assert Counter(name, "x").values() == {(): 0}


def test_a_gauge_holds_the_last_value(name: str) -> None:
    gauge = Gauge(name, "x")
    assert gauge.values() == {}
    gauge.set(3)
    gauge.set(-1)
    assert gauge.values() == {(): -1}


def test_a_histogram_counts_up_to_and_including_each_bound(name: str) -> None:
    histogram = Histogram(name, "x", buckets=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    (held,) = histogram.values().values()
    assert list(held.cumulative()) == [2, 3, 4]
    assert (held.count, held.sum) == (4, 12.0)


def test_series_are_bounded(name: str) -> None:
    """Whatever callers put into labels, memory and scrapes stay bounded, and nothing goes uncounted."""
    counter = Counter(name, "x", ("who",))
    for number in range(MOST_SERIES + 50):
        counter.add(str(number))
    values = counter.values()
    assert len(values) == MOST_SERIES + 1
    assert values[meters.OTHER,] == 50
    counter.add("0")
    assert counter.values()["0",] == 2


def test_no_count_is_lost_between_threads(name: str) -> None:
    counter = Counter(name, "x")
    threads = [threading.Thread(target=lambda: [counter.add() for _ in range(20_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.values() == {(): 80_000}


def test_names_follow_the_conventions() -> None:
    for meter in METERS.values():
        assert re.fullmatch(r"natgw_[a-z_]+", meter.name)
        assert (meter.kind == "counter") == meter.name.endswith("_total"), meter.name
        assert (meter.kind == "histogram") == meter.name.endswith("_seconds"), meter.name
        assert meter.explanation.endswith("."), meter.name


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="already"):
        Counter(meters.STALE_FLOWS.name, "again")


def test_the_writer_times_its_changes(tmp_path: Path) -> None:
    made = gateway(tmp_path)
    told: list[str] = []
    made.service.tell(lambda old, new: told.append(f"changed from {old} to {new is made.service.spec}"))

    def count(outcome: str) -> int:
        held = meters.TRANSACTION_SECONDS.values().get((outcome,))
        return held.count if held else 0

    before = {outcome: count(outcome) for outcome in ("committed", "unchanged", "rejected")}
    steps = meters.TRANSACTION_STEPS.values()[()]
    made.service.change(lambda _: example(), by="test").result()
    made.service.change(lambda _: example(), by="test").result()

    def contradict(_: object) -> GatewaySpec:
        raise Conflict(Eip(address="192.168.0.10/24"), Eip(address="192.168.0.10/25"))

    with pytest.raises(Conflict):
        made.service.change(contradict, by="test").result()
    made.service.close()
    assert {outcome: count(outcome) - held for outcome, held in before.items()} == dict.fromkeys(before, 1)
    assert meters.TRANSACTION_STEPS.values()[()] > steps
    assert told == ["changed from None to True"]
