"""The table of flows that are alive, against a model of the kernel; the limit of the log."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.observer import ctnetlink
from gateway.observer.ctnetlink import DESTROY, NEW, UPDATE
from gateway.observer.flow import Counters, Flow
from gateway.observer.limit import TokenBucket
from gateway.observer.table import FlowTable, Series
from tests.observer_kit import UDP, flow


class Told:
    """A table and what it told of."""

    def __init__(self, capacity: int = 100) -> None:
        self.happened: list[tuple[str, Flow]] = []
        self.table = FlowTable(lambda event, one: self.happened.append((event, one)), capacity)

    @property
    def series(self) -> Series:
        (only,) = self.table.series.values()
        return only

    @property
    def sums(self) -> tuple[int, int, int]:
        return self.series.active, self.series.started, self.series.ended

    def dump(self, *flows: Flow) -> None:
        self.table.begin_dump()
        for one in flows:
            self.table.dumped(one)
        self.table.end_dump()


def test_a_life() -> None:
    told = Told()
    one, end = flow(1), flow(1, counters=Counters(5, 500, 4, 400))
    told.table.event(NEW, one)
    told.table.event(UPDATE, one)
    assert told.sums == (1, 1, 0)
    told.table.event(DESTROY, end)
    assert told.sums == (0, 1, 1)
    assert told.happened == [("start", one), ("end", end)]
    assert told.table.events == {"new": 1, "update": 1, "end": 1}
    assert (told.series.original, told.series.reply) == ([5, 500], [4, 400])
    assert told.table.accounting
    assert len(told.table) == 0


def test_without_accounting_nothing_is_counted() -> None:
    told = Told()
    told.table.event(NEW, flow(1))
    told.table.event(DESTROY, flow(1))
    assert not told.table.accounting
    assert not told.series.counted


def test_one_identifier_in_two_zones_is_two_flows() -> None:
    told = Told()
    told.table.event(NEW, flow(1, zone=1))
    told.table.event(NEW, flow(1, zone=2))
    assert told.sums == (2, 2, 0)


def test_two_flows_with_one_identifier_are_not_taken_for_each_other() -> None:
    """32 bits of a hash: among 65,536 flows such a pair is to be expected every other time."""
    told = Told()
    first = flow(1, source="10.0.0.2", counters=Counters(9, 900, 0, 0))
    other = flow(1, source="10.0.0.3", counters=Counters(1, 50, 0, 0))
    told.table.event(NEW, first)
    told.table.event(NEW, other)
    told.table.event(UPDATE, other)
    assert told.sums == (1, 2, 0)
    for _ in range(3):
        told.dump(first, other)
    assert told.series.original == [9, 900]
    told.table.event(DESTROY, other)
    assert told.sums == (1, 2, 1)
    assert told.series.original == [10, 950]
    told.dump(first)
    told.table.event(DESTROY, first)
    assert told.sums == (0, 2, 2)
    assert told.series.original == [10, 950]
    assert told.happened == [("start", first), ("start", other), ("end", other), ("end", first)]


def test_labels_tell_apart() -> None:
    told = Told()
    told.table.event(NEW, flow(1))
    told.table.event(NEW, flow(2, protocol=UDP))
    told.table.event(NEW, flow(3, protocol=47))
    told.table.event(NEW, flow(4, protocol=50))
    assert {labels: series.active for labels, series in told.table.series.items()} == {
        ("ipv4", "tcp", "snat"): 1,
        ("ipv4", "udp", "snat"): 1,
        ("ipv4", "other", "snat"): 2,
    }


def test_flows_from_before_are_alive_but_did_not_start() -> None:
    told = Told()
    told.dump(flow(1, counters=Counters(3, 300, 2, 200)), flow(2))
    assert told.sums == (2, 0, 0)
    assert (told.happened, told.series.original) == ([], [3, 300])
    told.table.event(DESTROY, flow(1, counters=Counters(4, 400, 2, 200)))
    assert told.sums == (1, 0, 1)
    assert (told.series.original, told.series.reply) == ([4, 400], [2, 200])


def test_an_event_that_waited_during_the_dump_still_is_a_start() -> None:
    told = Told()
    told.table.begin_dump()
    told.table.dumped(flow(1))
    told.table.event(NEW, flow(1))
    told.table.end_dump()
    assert told.sums == (1, 1, 0)
    assert told.happened == [("start", flow(1))]


def test_an_end_that_is_heard_of_before_the_dump_is_final() -> None:
    told = Told()
    told.table.event(NEW, flow(1))
    told.table.begin_dump()
    told.table.event(DESTROY, flow(1))
    told.table.dumped(flow(1))
    told.table.end_dump()
    assert told.sums == (0, 1, 1)


def test_an_identifier_that_is_used_again_during_a_dump() -> None:
    told = Told()
    told.table.begin_dump()
    told.table.event(DESTROY, flow(1))
    told.table.event(NEW, flow(1))
    told.table.event(DESTROY, flow(1))
    told.table.event(NEW, flow(1))
    told.table.dumped(flow(1))
    told.table.end_dump()
    assert told.sums == (1, 2, 2)


def test_a_flow_that_is_gone_from_the_dump_has_ended() -> None:
    told = Told()
    gone = flow(1, source="fd00::2", destination="2001:db8::1", snat="2001:db8::5", zone=3)
    told.table.event(NEW, gone)
    told.dump(gone._replace(counters=Counters(9, 90, 8, 80)))
    told.dump()
    assert told.happened == [("start", gone), ("end", gone._replace(counters=Counters(9, 90, 8, 80)))]
    assert told.sums == (0, 1, 1)
    assert told.table.events["end"] == 0, "there was no event"


def test_counters_that_went_back_began_anew() -> None:
    told = Told()
    told.dump(flow(1, counters=Counters(10, 1000, 10, 1000)))
    told.dump(flow(1, counters=Counters(3, 300, 11, 1100)))
    assert (told.series.original, told.series.reply) == ([13, 1300], [11, 1100])


def test_the_flow_that_changed_longest_ago_makes_room() -> None:
    told = Told(capacity=2)
    for identifier in (1, 2):
        told.table.event(NEW, flow(identifier))
    told.table.event(UPDATE, flow(1))
    told.table.event(NEW, flow(3))
    assert (len(told.table), told.table.evictions, told.sums) == (2, 1, (2, 3, 0))
    told.table.event(DESTROY, flow(2))
    assert told.sums == (2, 3, 1), "the end of a forgotten flow is counted, its life was not"
    told.table.event(DESTROY, flow(1))
    assert told.sums == (1, 3, 2)


def test_a_dump_makes_nobody_go() -> None:
    told = Told(capacity=2)
    told.dump(*(flow(identifier) for identifier in range(10)))
    assert (len(told.table), told.table.evictions) == (2, 0)
    told.dump(*(flow(identifier) for identifier in range(10)))
    assert (told.sums, told.happened) == ((2, 0, 0), [])


def test_cleared_flows_are_forgotten() -> None:
    told = Told()
    told.table.event(NEW, flow(1, counters=Counters(1, 1, 1, 1)))
    told.table.begin_dump()
    told.table.clear()
    assert (len(told.table), told.table.series, told.table.accounting) == (0, {}, False)
    assert told.table.events["new"] == 1
    told.table.event(NEW, flow(1))
    assert told.sums == (1, 1, 0)


class KernelAndTable(RuleBasedStateMachine):
    """Flows begin and end while dumps go on; events come late, and some not at all."""

    @initialize()
    def begin(self) -> None:
        self.table = FlowTable(lambda event, one: None, 1000)
        self.alive: set[int] = set()
        self.queue: list[tuple[str, int]] = []
        self.dump: list[int] | None = None

    @rule(identifier=st.integers(1, 8), lost=st.booleans())
    def happens(self, identifier: int, lost: bool) -> None:
        kind = DESTROY if identifier in self.alive else NEW
        self.alive ^= {identifier}
        if not lost:
            self.queue.append((kind, identifier))

    @rule(number=st.integers(1, 8))
    def read_events(self, number: int) -> None:
        for kind, identifier in self.queue[:number]:
            self.table.event(kind, flow(identifier))
        del self.queue[:number]

    @precondition(lambda self: self.dump is None)
    @rule()
    def begin_dump(self) -> None:
        self.table.begin_dump()
        self.dump = []

    @precondition(lambda self: self.dump is not None)
    @rule(data=st.data())
    def dump_some(self, data: st.DataObject) -> None:
        """What is read now was written a moment ago."""
        assert self.dump is not None
        for identifier in self.dump:
            self.table.dumped(flow(identifier))
        self.dump = data.draw(st.lists(st.sampled_from(sorted(self.alive)), unique=True)) if self.alive else []

    @precondition(lambda self: self.dump is not None)
    @rule()
    def a_quiet_dump_puts_everything_right(self) -> None:
        self.read_events(len(self.queue))
        self.table.end_dump()
        self.table.begin_dump()
        for identifier in self.alive:
            self.table.dumped(flow(identifier))
        self.table.end_dump()
        self.dump = None
        assert len(self.table) == len(self.alive)

    @invariant()
    def active_is_what_is_remembered(self) -> None:
        assert sum(series.active for series in self.table.series.values()) == len(self.table)


TestKernelAndTable = KernelAndTable.TestCase


def test_every_event_has_a_name() -> None:
    assert set(Told().table.events) == {"new", "update", "end"}
    assert len(ctnetlink.EVENTS) == 3


# The limit


def test_a_burst_and_then_the_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3)
    assert [bucket.take(0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(99_000)
    assert bucket.take(100_000)
    assert not bucket.take(100_000)


@pytest.mark.parametrize("rate", [1, 100, 99_999])
def test_the_long_run(rate: int) -> None:
    bucket = TokenBucket(rate, 1)
    step = 1_000_000 // rate // 3 or 1
    passed = sum(bucket.take(now) for now in range(0, 2_000_000, step))
    assert rate * 2 * 0.6 <= passed <= rate * 2 + 1


def test_rest_fills_no_more_than_the_burst() -> None:
    bucket = TokenBucket(1000, 5)
    assert bucket.take(0)
    assert [bucket.take(10**12) for _ in range(6)] == [True] * 5 + [False]
