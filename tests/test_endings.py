"""Connections that a change made stale: many are ended bit by bit, and nobody waits for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from gateway.endings import ANSWER_SECONDS, Endings
from gateway.fake import FakeFlows, FakeKernel
from gateway.ports import Refused
from rules.flows import Flow, FlowFilter
from rules.spec import Eip, GatewaySpec
from tests.gateway_kit import ManualClock

NOTHING = GatewaySpec()
ONE, BOTH = (GatewaySpec(eips=[Eip(address=f"192.168.0.{n}/24") for n in range(10, last)]) for last in (11, 12))
"""One address goes with the change from BOTH to ONE, the other with that to NOTHING."""


class SlowFlows(FakeFlows):
    """Each connection takes a second to end."""

    def __init__(self, kernel: FakeKernel, clock: ManualClock) -> None:
        super().__init__(kernel)
        self._clock = clock

    def end(self, filters: Iterable[FlowFilter], stale: Callable[[Flow], bool]) -> Iterator[int]:
        for gone in super().end(filters, stale):
            self._clock.now += 1
            yield gone


def flow(number: int, eip: str) -> Flow:
    return Flow(17, "10.0.1.5", "203.0.113.9", number, 53, "203.0.113.9", eip, 53, number)


class Bench:
    def __init__(self, **many: int) -> None:
        self.kernel = FakeKernel()
        flows = [flow(n, f"192.168.0.{name.removeprefix('eip')}") for name, count in many.items() for n in range(count)]
        self.kernel.conntrack = [*flows, flow(1, "192.168.0.99")]
        self.endings = Endings(SlowFlows(self.kernel, clock := ManualClock()), clock)

    @property
    def left(self) -> int:
        """Connections but for the one that no change concerns."""
        assert flow(1, "192.168.0.99") in self.kernel.conntrack
        return len(self.kernel.conntrack) - 1


def test_few_are_gone_with_the_answer() -> None:
    bench = Bench(eip11=1)
    bench.endings.owe(BOTH)
    assert bench.endings.begin(ONE) == 1
    assert (bench.left, bench.endings.pending(), bench.endings.under_way) == (0, [], False)


def test_many_are_ended_behind_the_answer_and_counted_as_pending() -> None:
    bench = Bench(eip11=10)
    bench.endings.owe(BOTH)
    assert bench.endings.begin(ONE) == ANSWER_SECONDS
    rounds = 0
    while bench.endings.under_way:
        assert bench.endings.pending() == ["stale connections are being deleted"]
        bench.endings.go_on(ONE)
        rounds += 1
    assert rounds == 10 - ANSWER_SECONDS + 1  # one a round, and the look that finds no more
    assert (bench.left, bench.endings.pending()) == (0, [])


def test_the_next_change_does_not_wait_for_the_last_ones_connections() -> None:
    bench = Bench(eip11=10, eip10=1)
    bench.endings.owe(BOTH)
    bench.endings.begin(ONE)
    bench.endings.owe(ONE)
    assert bench.endings.begin(NOTHING) == 1
    assert not [each for each in bench.kernel.conntrack if each.reply_dst == "192.168.0.10"]
    bench.endings.finish(NOTHING)
    assert (bench.left, bench.endings.pending()) == (0, [])


def test_what_stands_again_in_the_meantime_is_let_live() -> None:
    bench = Bench(eip11=10)
    bench.endings.owe(BOTH)
    bench.endings.begin(ONE)
    bench.endings.owe(ONE)
    assert bench.endings.begin(BOTH) == 0
    bench.endings.finish(BOTH)
    assert bench.left == 10 - ANSWER_SECONDS
    assert not bench.endings.pending()


def test_a_refusal_in_the_midst_begins_anew_and_forgets_nothing() -> None:
    bench = Bench(eip11=5, eip10=5)
    bench.endings.owe(BOTH)
    bench.endings.begin(ONE)

    def refuse(step: str) -> None:
        raise Refused(step, "No buffer space available", retryable=True)

    bench.kernel.faults = refuse
    bench.endings.owe(ONE)
    assert bench.endings.begin(NOTHING) == 0
    assert bench.endings.pending() == ["stale connections are not deleted"]
    assert not bench.endings.under_way  # it is tried again when the writer says so
    bench.kernel.faults = None
    bench.endings.begin(NOTHING)
    bench.endings.finish(NOTHING)
    assert (bench.left, bench.endings.pending()) == (0, [])
