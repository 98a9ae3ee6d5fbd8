"""The asynchronous mode of RFC 5880 section 6, line by line, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from gateway.bfd.packet import ControlPacket, Diag, Discard, State
from gateway.bfd.session import SLOW_INTERVAL, Output, Session, SessionConfig
from gateway.bfd.transitions import TRANSITIONS, Stimulus

MS = 1000
FAST = SessionConfig(desired_min_tx=100 * MS, required_min_rx=50 * MS, detect_mult=3)
OURS, THEIRS = 0xAAAA, 0xBBBB
START = 1_000_000_000

ADMIN_DOWN, DOWN, INIT, UP = State.ADMIN_DOWN, State.DOWN, State.INIT, State.UP


def no_jitter() -> float:
    return 0.0


def packet(state: State, **fields: Any) -> ControlPacket:
    """What a peer with 100 ms x 3 says; it knows our discriminator unless told otherwise."""
    plain: dict[str, Any] = {
        "state": state,
        "detect_mult": 3,
        "my_discriminator": THEIRS,
        "your_discriminator": OURS,
        "desired_min_tx": 100 * MS,
        "required_min_rx": 100 * MS,
    }
    return ControlPacket(**plain | fields)


class Bench:
    """A session, the time, and everything that it sent."""

    def __init__(self, config: SessionConfig = FAST, random: Callable[[], float] = no_jitter) -> None:
        self.now = START
        self.session = Session(config, OURS, self.now, random)
        self.sent: list[tuple[int, ControlPacket]] = []

    def did(self, output: Output) -> Output:
        if output.packet is not None:
            self.sent.append((self.now, output.packet))
        return output

    def hear(self, state: State, **fields: Any) -> Output:
        return self.did(self.session.receive(packet(state, **fields), self.now))

    def run(self, microseconds: int) -> list[tuple[int, ControlPacket]]:
        """Let time pass, with every timer served on time; the packets sent meanwhile, by time since the start."""
        before, begin, end = len(self.sent), self.now, self.now + microseconds
        while (timer := self.session.next_timer()) is not None and timer <= end:
            assert timer >= self.now, "a timer lies in the past"
            self.now = timer
            served = self.did(self.session.tick(self.now))
            later = self.session.next_timer()
            assert later is None or later > self.now or served.packet is not None, "a timer was not served"
        self.now = end
        return [(at - begin, sent) for at, sent in self.sent[before:]]

    @property
    def last(self) -> ControlPacket:
        return self.sent[-1][1]


def up(config: SessionConfig = FAST, random: Callable[[], float] = no_jitter, **fields: Any) -> Bench:
    """A session that just came Up and whose Poll Sequence for its fast intervals is answered."""
    bench = Bench(config, random)
    bench.run(0)
    bench.hear(DOWN, **fields)
    bench.hear(UP, **fields)
    assert bench.session.state is UP
    bench.hear(UP, **fields, final=True)
    bench.run(0)
    return bench


def in_state(state: State) -> Bench:
    bench = Bench()
    bench.run(0)
    if state is INIT:
        bench.hear(DOWN)
    elif state is UP:
        bench = up()
    elif state is ADMIN_DOWN:
        bench.did(bench.session.disable(bench.now))
    assert bench.session.state is state
    return bench


# 6.8.1 State variables


def test_initial_values() -> None:
    session = Session(FAST, OURS, START, no_jitter)
    assert (session.state, session.remote.state, session.diag) == (DOWN, DOWN, Diag.NONE)
    assert (session.remote.discriminator, session.remote.min_rx, session.remote.demand) == (0, 1, False)
    assert session.intervals.desired_min_tx == SLOW_INTERVAL


@pytest.mark.parametrize(
    "fields",
    [
        {"desired_min_tx": 0},
        {"required_min_rx": 0},
        {"detect_mult": 0},
        {"detect_mult": 256},
        {"desired_min_tx": 2**32},
    ],
)
def test_configuration_out_of_bounds_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        SessionConfig(**fields)


@pytest.mark.parametrize("state", [DOWN, INIT, ADMIN_DOWN, UP])
def test_what_we_know_of_the_remote_is_forgotten_after_a_detection_time(state: State) -> None:
    bench = in_state(state)
    if state in (DOWN, ADMIN_DOWN):
        bench.hear(ADMIN_DOWN, required_min_rx=7)
    assert bench.session.remote.discriminator == THEIRS
    silence = bench.session.detection_time
    bench.run(silence - 1)
    assert bench.session.remote.discriminator == THEIRS
    bench.run(1)
    assert (bench.session.remote.discriminator, bench.session.remote.min_rx) == (0, 1)
    assert bench.last.your_discriminator == 0


# The state machine


def test_the_table_has_a_row_for_every_state_and_stimulus() -> None:
    assert set(TRANSITIONS) == {(state, stimulus) for state in State for stimulus in Stimulus}


RECEIVED = [
    # state, received, new state, bfd.LocalDiag (None: as it was)
    (DOWN, ADMIN_DOWN, DOWN, None),
    (DOWN, DOWN, INIT, None),
    (DOWN, INIT, UP, Diag.NONE),
    (DOWN, UP, DOWN, None),
    (INIT, ADMIN_DOWN, DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    (INIT, DOWN, INIT, None),
    (INIT, INIT, UP, Diag.NONE),
    (INIT, UP, UP, Diag.NONE),
    (UP, ADMIN_DOWN, DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    (UP, DOWN, DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    (UP, INIT, UP, None),
    (UP, UP, UP, None),
    (ADMIN_DOWN, ADMIN_DOWN, ADMIN_DOWN, None),
    (ADMIN_DOWN, DOWN, ADMIN_DOWN, None),
    (ADMIN_DOWN, INIT, ADMIN_DOWN, None),
    (ADMIN_DOWN, UP, ADMIN_DOWN, None),
]


@pytest.mark.parametrize(("state", "received", "new", "diag"), RECEIVED)
def test_received_state(state: State, received: State, new: State, diag: Diag | None) -> None:
    bench = in_state(state)
    before = bench.session.diag
    output = bench.hear(received)
    assert bench.session.state is new
    assert bench.session.diag == (before if diag is None else diag)
    if new is state:
        assert output.change is None
    else:
        assert output.change is not None
        assert (output.change.old, output.change.new, output.change.diag) == (state, new, bench.session.diag)
        assert output.packet is not None
        assert output.packet.state is new


@pytest.mark.parametrize(
    ("state", "new", "diag"),
    [
        (INIT, DOWN, Diag.DETECTION_TIME_EXPIRED),
        (UP, DOWN, Diag.DETECTION_TIME_EXPIRED),
        (DOWN, DOWN, Diag.NONE),
        (ADMIN_DOWN, ADMIN_DOWN, Diag.ADMINISTRATIVELY_DOWN),
    ],
)
def test_silence(state: State, new: State, diag: Diag) -> None:
    bench = in_state(state)
    bench.run(10_000 * MS)
    assert (bench.session.state, bench.session.diag) == (new, diag)
    assert (bench.last.state, bench.last.diag) == (new, diag)


def test_coming_up_clears_the_diagnostic_and_the_way_there_keeps_it() -> None:
    bench = up()
    bench.run(1000 * MS)
    assert bench.last.diag == Diag.DETECTION_TIME_EXPIRED
    bench.hear(DOWN, your_discriminator=0)
    assert (bench.last.state, bench.last.diag) == (INIT, Diag.DETECTION_TIME_EXPIRED)
    bench.hear(INIT)
    assert (bench.last.state, bench.last.diag) == (UP, Diag.NONE)


# 6.8.6 Reception


def test_authenticated_packet_is_discarded_before_anything_is_learned() -> None:
    bench = in_state(DOWN)
    output = bench.hear(DOWN, auth=b"\x01\x04\x01x")
    assert output == Output(discard=Discard.AUTHENTICATION)
    assert bench.session.remote.discriminator == 0


def test_authenticated_packet_does_not_keep_a_session_up() -> None:
    bench = up()
    for _ in range(20):
        bench.run(50 * MS)
        bench.hear(UP, auth=b"\x01\x04\x01x")
    assert (bench.session.state, bench.session.diag) == (DOWN, Diag.DETECTION_TIME_EXPIRED)


def test_remote_values_are_taken_from_every_packet() -> None:
    bench = in_state(DOWN)
    bench.hear(ADMIN_DOWN, my_discriminator=7, diag=Diag.PATH_DOWN, required_min_rx=9, desired_min_tx=8, detect_mult=6)
    remote = bench.session.remote
    assert (remote.discriminator, remote.state, remote.diag, remote.min_rx) == (7, ADMIN_DOWN, Diag.PATH_DOWN, 9)
    assert (remote.min_tx, remote.detect_mult) == (8, 6)
    assert bench.last.your_discriminator == 7


def test_remote_values_are_taken_in_admin_down_too_and_then_the_packet_is_discarded() -> None:
    bench = in_state(ADMIN_DOWN)
    sent = len(bench.sent)
    assert bench.hear(UP, poll=True).discard is Discard.ADMIN_DOWN
    assert bench.session.remote.discriminator == THEIRS
    assert len(bench.sent) == sent, "a discarded Poll is not answered"


def test_poll_is_answered_at_once_by_final_without_poll() -> None:
    bench = up()
    planned = bench.session.next_timer()
    bench.now += 1
    answer = bench.hear(UP, poll=True).packet
    assert answer is not None
    assert (answer.poll, answer.final, answer.state) == (False, True, UP)
    assert bench.session.next_timer() == planned, "independent of the periodic packets"


@pytest.mark.parametrize("state", [DOWN, INIT, UP])
def test_poll_is_answered_in_every_state_that_listens(state: State) -> None:
    bench = in_state(state)
    answer = bench.hear(ADMIN_DOWN, poll=True).packet
    assert answer is not None
    assert answer.final


def test_final_answer_carries_the_new_state_and_our_own_poll_waits_for_the_next_packet() -> None:
    bench = in_state(INIT)
    answer = bench.hear(UP, poll=True).packet
    assert answer is not None
    assert (answer.state, answer.final, answer.poll) == (UP, True, False)
    (_, following) = bench.run(1000 * MS)[0]
    assert (following.final, following.poll) == (False, True)


def test_poll_and_final_are_never_sent_together() -> None:
    bench = in_state(UP)
    bench.session.configure(replace(FAST, desired_min_tx=200 * MS), bench.now)
    for step in range(200):
        bench.hear((UP, DOWN, INIT, ADMIN_DOWN)[step % 4], poll=step % 3 == 0, final=step % 5 == 0)
        bench.run(40 * MS)
    for _, sent in bench.sent:
        sent.encode()


# 6.8.7 Transmission


def test_we_are_active_and_never_fall_silent() -> None:
    times = [at for at, _ in Bench().run(5000 * MS)]
    assert times == [second * SLOW_INTERVAL for second in range(6)]


@pytest.mark.parametrize("state", [DOWN, ADMIN_DOWN])
def test_down_means_slow(state: State) -> None:
    bench = in_state(state)
    bench.hear(ADMIN_DOWN)
    sent = bench.run(2500 * MS)
    assert {packet.desired_min_tx for _, packet in sent} == {SLOW_INTERVAL}
    assert len(sent) <= 4
    assert bench.session.transmit_interval == SLOW_INTERVAL


def test_init_is_not_slow_because_ovn_sleeps_beside_a_slow_neighbor() -> None:
    bench = in_state(INIT)
    assert bench.last.desired_min_tx == FAST.desired_min_tx
    times = [at for at, packet in bench.run(299 * MS) if packet.state is INIT]
    assert times == [100 * MS, 200 * MS]
    assert bench.run(1 * MS)[-1][1].desired_min_tx == SLOW_INTERVAL, "and it ends with the detection time"


@pytest.mark.parametrize("state", list(State))
def test_required_min_rx_stays_as_configured_in_every_state(state: State) -> None:
    bench = in_state(state)
    bench.run(2500 * MS)
    assert {packet.required_min_rx for _, packet in bench.sent} == {FAST.required_min_rx}


def test_an_interval_slower_than_a_second_stays_as_configured() -> None:
    bench = Bench(replace(FAST, desired_min_tx=5000 * MS))
    bench.run(0)
    assert bench.last.desired_min_tx == 5000 * MS
    assert [at for at, _ in bench.run(10_000 * MS)] == [5000 * MS, 10_000 * MS]


def test_the_slower_side_decides_the_rate() -> None:
    for theirs, expected in ((10 * MS, 100 * MS), (400 * MS, 400 * MS)):
        bench = up(required_min_rx=theirs, desired_min_tx=10_000 * MS)
        times = [at for at, _ in bench.run(2000 * MS)]
        assert {later - earlier for earlier, later in pairwise(times)} == {expected}


def test_the_contents_of_a_packet() -> None:
    sent = up().last
    assert (sent.state, sent.diag, sent.detect_mult) == (UP, Diag.NONE, 3)
    assert (sent.my_discriminator, sent.your_discriminator) == (OURS, THEIRS)
    assert (sent.desired_min_tx, sent.required_min_rx, sent.required_min_echo_rx) == (100 * MS, 50 * MS, 0)
    assert (sent.demand, sent.auth, sent.control_plane_independent) == (False, b"", False)


def gaps(multiplier: int, random: Callable[[], float]) -> set[int]:
    bench = up(replace(FAST, detect_mult=multiplier), random, desired_min_tx=60_000 * MS)
    bench.run(1000 * MS)
    times = [at for at, _ in bench.run(1000 * MS)]
    return {later - earlier for earlier, later in pairwise(times)}


@pytest.mark.parametrize(("multiplier", "longest", "shortest"), [(3, 100, 75), (2, 100, 75), (1, 90, 75)])
def test_jitter_bounds(multiplier: int, longest: int, shortest: int) -> None:
    almost_one = 1 - 2**-53
    assert gaps(multiplier, lambda: 0.0) == {longest * MS}
    assert all(abs(gap - shortest * MS) <= 1 for gap in gaps(multiplier, lambda: almost_one))


def test_jitter_is_drawn_for_every_packet() -> None:
    values = iter(range(10_000))
    assert len(gaps(3, lambda: (next(values) * 0.37) % 1.0)) > 5


def test_remote_min_rx_of_zero_stops_the_periodic_packets_only() -> None:
    bench = up(required_min_rx=0, desired_min_tx=10_000 * MS)
    assert bench.run(5000 * MS) == []
    answer = bench.hear(UP, required_min_rx=0, desired_min_tx=10_000 * MS, poll=True).packet
    assert answer is not None
    assert bench.did(bench.session.hold(bench.now)).packet is not None, "a change of state is told at once"
    bench.hear(DOWN, required_min_rx=100 * MS, desired_min_tx=10_000 * MS)
    assert len(bench.run(5000 * MS)) >= 4, "and they begin again"


def test_a_changed_state_is_told_at_once_and_the_next_packet_counts_from_there() -> None:
    bench = in_state(INIT)
    bench.now += 30 * MS
    answer = bench.hear(INIT, required_min_rx=1).packet
    assert answer is not None
    assert answer.state is UP
    assert bench.session.next_timer() == bench.now + FAST.desired_min_tx


def test_a_late_timer_sends_one_packet_and_does_not_catch_up() -> None:
    bench = Bench()
    bench.now += 10_000 * MS
    assert bench.session.tick(bench.now).packet is not None
    assert bench.session.tick(bench.now).packet is None
    assert bench.session.next_timer() == bench.now + SLOW_INTERVAL


# 6.8.4 Detection Time


@pytest.mark.parametrize(
    ("their_tx", "their_mult", "expected"),
    [(100 * MS, 3, 300 * MS), (10 * MS, 3, 150 * MS), (20 * MS, 5, 250 * MS), (200 * MS, 1, 200 * MS)],
)
def test_detection_time(their_tx: int, their_mult: int, expected: int) -> None:
    bench = up(desired_min_tx=their_tx, detect_mult=their_mult)
    assert bench.session.detection_time == expected
    bench.run(expected - 1)
    assert bench.session.state is UP
    bench.run(1)
    assert bench.session.state is DOWN


def test_every_packet_restarts_the_detection_time() -> None:
    bench = up()
    for _ in range(20):
        bench.run(299 * MS)
        bench.hear(UP)
    assert bench.session.state is UP


def test_detection_follows_what_the_remote_says_now() -> None:
    bench = up()
    bench.hear(UP, desired_min_tx=1000 * MS, poll=True)
    bench.run(2999 * MS)
    assert bench.session.state is UP
    bench.hear(UP, desired_min_tx=100 * MS)
    bench.run(300 * MS)
    assert bench.session.state is DOWN


# 6.8.3 Timer manipulation, 6.5 the Poll Sequence


def test_coming_up_polls_with_the_fast_intervals_until_a_final() -> None:
    bench = in_state(INIT)
    bench.hear(UP)
    assert bench.last.poll
    assert bench.last.desired_min_tx == FAST.desired_min_tx
    polls = bench.run(200 * MS)
    assert len(polls) == 2, "a decreased interval is used at once, and no additional packets are sent"
    assert all(sent.poll for _, sent in polls)
    bench.hear(UP, final=True)
    assert not any(sent.poll for _, sent in bench.run(250 * MS))


def test_a_packet_without_final_does_not_end_the_poll() -> None:
    bench = in_state(INIT)
    for _ in range(5):
        bench.hear(UP)
        assert all(sent.poll for _, sent in bench.run(100 * MS))


def test_increased_desired_min_tx_waits_for_the_final() -> None:
    bench = up()
    bench.run(100 * MS)
    bench.hear(UP)
    bench.did(bench.session.configure(replace(FAST, desired_min_tx=400 * MS), bench.now))
    assert bench.last.desired_min_tx == 400 * MS
    assert bench.last.poll
    assert [at for at, _ in bench.run(250 * MS)] == [100 * MS, 200 * MS]
    bench.hear(UP, final=True)
    bench.hear(UP, desired_min_tx=10_000 * MS)
    times = [at for at, _ in bench.run(2000 * MS)]
    assert {later - earlier for earlier, later in pairwise(times)} == {400 * MS}


def test_decreased_desired_min_tx_is_used_at_once() -> None:
    bench = up(replace(FAST, desired_min_tx=800 * MS), required_min_rx=10 * MS, desired_min_tx=10_000 * MS)
    bench.run(900 * MS)
    bench.did(bench.session.configure(replace(FAST, desired_min_tx=60 * MS), bench.now))
    assert [at for at, _ in bench.run(120 * MS)] == [60 * MS, 120 * MS]


def test_reduced_required_min_rx_waits_for_the_final() -> None:
    bench = up(replace(FAST, required_min_rx=500 * MS), desired_min_tx=10 * MS)
    bench.did(bench.session.configure(replace(FAST, required_min_rx=50 * MS), bench.now))
    assert bench.last.required_min_rx == 50 * MS
    assert bench.session.detection_time == 1500 * MS
    bench.hear(UP, desired_min_tx=10 * MS)
    assert bench.session.detection_time == 1500 * MS
    bench.hear(UP, desired_min_tx=10 * MS, final=True)
    assert bench.session.detection_time == 150 * MS


def test_increased_required_min_rx_is_used_at_once() -> None:
    bench = up(desired_min_tx=10 * MS)
    bench.did(bench.session.configure(replace(FAST, required_min_rx=500 * MS), bench.now))
    assert bench.session.detection_time == 1500 * MS


def test_a_reduced_remote_min_rx_is_honored_at_once() -> None:
    bench = up(required_min_rx=1000 * MS, desired_min_tx=10_000 * MS)
    bench.run(1000 * MS)
    bench.run(500 * MS)
    late = bench.hear(UP, required_min_rx=100 * MS, desired_min_tx=10_000 * MS)
    assert late.packet is not None, "more than the new interval has passed since the previous packet"
    assert [at for at, _ in bench.run(200 * MS)] == [100 * MS, 200 * MS]


def test_an_increased_remote_min_rx_moves_the_packet_that_is_planned() -> None:
    bench = up(desired_min_tx=10_000 * MS)
    bench.run(150 * MS)
    bench.hear(UP, required_min_rx=1000 * MS, desired_min_tx=10_000 * MS)
    assert [at for at, _ in bench.run(1000 * MS)] == [950 * MS]


def test_changed_again_during_a_poll_gets_a_poll_of_its_own() -> None:
    bench = up()
    bench.run(100 * MS)
    bench.did(bench.session.configure(replace(FAST, desired_min_tx=400 * MS), bench.now))
    bench.did(bench.session.configure(replace(FAST, desired_min_tx=300 * MS), bench.now))
    assert bench.last.desired_min_tx == 300 * MS
    assert bench.session.transmit_interval == 100 * MS
    bench.hear(UP, final=True)
    assert bench.session.transmit_interval == 300 * MS, "the peer has taken 400 ms, so 300 ms is safe"
    bench.hear(UP, desired_min_tx=10_000 * MS)
    assert any(sent.poll for _, sent in bench.run(1000 * MS)), "and is told by a second Poll"
    bench.hear(UP, desired_min_tx=10_000 * MS, final=True)
    assert not any(sent.poll for _, sent in bench.run(1000 * MS))


def test_a_second_poll_waits_until_no_final_of_the_first_can_be_under_way() -> None:
    bench = up(desired_min_tx=10_000 * MS)
    bench.run(100 * MS)
    bench.did(bench.session.configure(replace(FAST, required_min_rx=60 * MS), bench.now))
    bench.run(200 * MS)  # the Poll bit went out at 0, 100 and 200 ms of this sequence
    bench.run(50 * MS)
    bench.hear(UP, final=True, desired_min_tx=10_000 * MS)  # so a round trip may take 250 ms: unclear until 450 ms
    bench.did(bench.session.configure(replace(FAST, required_min_rx=70 * MS), bench.now))
    assert not bench.last.poll
    bench.hear(UP, final=True, desired_min_tx=10_000 * MS)  # the answer to the second packet of the first Poll
    early, late = bench.run(199 * MS), bench.run(200 * MS)
    assert early
    assert not any(sent.poll for _, sent in early)
    assert any(sent.poll for _, sent in late)


def test_a_new_multiplier_needs_no_poll() -> None:
    bench = up()
    bench.did(bench.session.configure(replace(FAST, detect_mult=7), bench.now))
    assert (bench.last.detect_mult, bench.last.poll) == (7, False)


def test_unchanged_intervals_need_no_poll() -> None:
    bench = up()
    assert bench.did(bench.session.configure(FAST, bench.now)).packet is None
    assert not any(sent.poll for _, sent in bench.run(250 * MS))


def test_going_down_polls_for_the_slow_interval_while_the_peer_is_known() -> None:
    bench = up()
    bench.hear(DOWN)
    assert (bench.last.state, bench.last.poll, bench.last.desired_min_tx) == (DOWN, True, SLOW_INTERVAL)
    bench.hear(DOWN, final=True)
    bench.run(2000 * MS)
    assert not bench.last.poll


def test_a_peer_that_is_gone_is_not_polled() -> None:
    bench = up()
    bench.run(300 * MS)
    assert bench.session.state is DOWN
    assert not any(sent.poll for at, sent in bench.sent if sent.state is DOWN)


def test_a_poll_dies_with_its_peer() -> None:
    bench = in_state(INIT)
    bench.hear(UP)
    assert bench.last.poll
    bench.run(300 * MS)
    assert (bench.session.state, bench.last.poll) == (DOWN, False)


def test_required_min_rx_reduced_in_two_steps_follows_the_finals() -> None:
    bench = up(replace(FAST, required_min_rx=500 * MS), desired_min_tx=10 * MS)
    bench.did(bench.session.configure(replace(FAST, required_min_rx=200 * MS), bench.now))
    bench.did(bench.session.configure(replace(FAST, required_min_rx=50 * MS), bench.now))
    bench.hear(UP, desired_min_tx=10 * MS, final=True)
    assert bench.session.detection_time == 600 * MS, "only the first step is known to have arrived"
    bench.run(100 * MS)
    bench.hear(UP, desired_min_tx=10 * MS, final=True)
    assert bench.session.detection_time == 150 * MS


def test_final_without_a_poll_under_way_changes_nothing() -> None:
    bench = up()
    before = bench.session.transmit_interval
    bench.hear(UP, final=True)
    assert bench.session.transmit_interval == before


# 6.6 Demand mode of the remote system


def in_demand() -> Bench:
    bench = up(desired_min_tx=60_000 * MS)
    bench.hear(UP, demand=True, desired_min_tx=60_000 * MS)
    return bench


def test_remote_demand_stops_our_periodic_packets() -> None:
    bench = in_demand()
    assert bench.run(5000 * MS) == []


def test_we_never_ask_for_demand_mode() -> None:
    assert not any(sent.demand for _, sent in in_demand().sent)


def test_remote_demand_is_ignored_until_both_sides_are_up() -> None:
    bench = in_state(DOWN)
    bench.hear(DOWN, demand=True, desired_min_tx=60_000 * MS)
    assert len(bench.run(5000 * MS)) >= 5


def test_the_end_of_remote_demand_starts_them_again() -> None:
    bench = in_demand()
    bench.run(5000 * MS)
    bench.hear(UP, desired_min_tx=60_000 * MS)
    assert len(bench.run(1000 * MS)) >= 10


def test_in_demand_mode_changed_contents_are_polled_until_answered() -> None:
    bench = in_demand()
    bench.run(1000 * MS)
    assert bench.did(bench.session.signal(bench.now, Diag.CONCATENATED_PATH_DOWN)).packet is not None
    assert (bench.last.state, bench.last.diag, bench.last.poll) == (UP, Diag.CONCATENATED_PATH_DOWN, True)
    assert all(sent.poll for _, sent in bench.run(300 * MS))
    bench.hear(UP, demand=True, final=True, desired_min_tx=60_000 * MS)
    assert bench.run(5000 * MS) == []


def test_in_demand_mode_a_second_change_is_polled_when_the_first_is_out_of_the_way() -> None:
    bench = in_demand()
    bench.did(bench.session.signal(bench.now, Diag.CONCATENATED_PATH_DOWN))
    bench.run(100 * MS)
    bench.hear(UP, demand=True, final=True, desired_min_tx=60_000 * MS)
    bench.did(bench.session.signal(bench.now, Diag.NONE))
    assert any(sent.poll and sent.diag == Diag.NONE for _, sent in bench.run(1000 * MS))


# 6.8.15 to 6.8.18 Administrative control, held sessions, concatenated paths


@pytest.mark.parametrize("state", [DOWN, INIT, UP])
def test_disable_and_enable(state: State) -> None:
    bench = in_state(state)
    change = bench.did(bench.session.disable(bench.now)).change
    assert change is not None
    assert (change.new, bench.last.state, bench.last.diag) == (ADMIN_DOWN, ADMIN_DOWN, Diag.ADMINISTRATIVELY_DOWN)
    assert len([sent for _, sent in bench.run(5000 * MS) if sent.state is ADMIN_DOWN]) >= 4, "we go on telling"
    assert bench.did(bench.session.enable(bench.now)).change is not None
    assert bench.session.state is DOWN


def test_enable_does_not_disturb_a_session_that_is_up() -> None:
    bench = up()
    assert bench.session.enable(bench.now).change is None
    assert bench.session.state is UP


@pytest.mark.parametrize("state", [DOWN, INIT, UP])
def test_a_held_session_stays_down_whatever_the_peer_says(state: State) -> None:
    bench = in_state(state)
    bench.did(bench.session.hold(bench.now, Diag.CONCATENATED_PATH_DOWN))
    for received in (DOWN, INIT, UP, ADMIN_DOWN, DOWN):
        bench.hear(received)
        bench.run(20 * MS)
        assert (bench.session.state, bench.session.diag) == (DOWN, Diag.CONCATENATED_PATH_DOWN)
    assert (bench.last.state, bench.last.diag) == (DOWN, Diag.CONCATENATED_PATH_DOWN)
    bench.did(bench.session.release(bench.now))
    bench.hear(DOWN)
    assert bench.session.state is INIT


def test_hold_and_disable_do_not_undo_each_other() -> None:
    bench = up()
    bench.did(bench.session.disable(bench.now))
    bench.did(bench.session.hold(bench.now, Diag.PATH_DOWN))
    assert (bench.session.state, bench.session.diag) == (ADMIN_DOWN, Diag.ADMINISTRATIVELY_DOWN)
    bench.did(bench.session.enable(bench.now))
    assert (bench.session.state, bench.session.diag) == (DOWN, Diag.PATH_DOWN)
    bench.hear(DOWN)
    assert bench.session.state is DOWN


def test_forwarding_plane_reset_takes_the_session_down_once() -> None:
    bench = up()
    bench.did(bench.session.forwarding_plane_reset(bench.now))
    assert (bench.last.state, bench.last.diag) == (DOWN, Diag.FORWARDING_PLANE_RESET)
    bench.hear(DOWN)
    assert bench.session.state is INIT


def test_a_concatenated_failure_is_told_without_going_down() -> None:
    bench = up()
    bench.did(bench.session.signal(bench.now, Diag.REVERSE_CONCATENATED_PATH_DOWN))
    assert (bench.last.state, bench.last.diag) == (UP, Diag.REVERSE_CONCATENATED_PATH_DOWN)


def test_a_suspended_session_sends_nothing_at_all_and_still_listens() -> None:
    bench = up()
    bench.session.suspend()
    sent = len(bench.sent)
    for received in (UP, UP, DOWN, DOWN, INIT):
        bench.hear(received, poll=True)
        bench.run(200 * MS)
    assert len(bench.sent) == sent
    assert bench.session.remote.discriminator == THEIRS
    bench.did(bench.session.resume(bench.now))
    bench.run(2000 * MS)
    assert len(bench.sent) > sent


# After our restart: packets for the session that we were


@pytest.mark.parametrize("received", list(State))
def test_a_stale_packet_teaches_the_discriminator_and_nothing_of_the_state(received: State) -> None:
    bench = in_state(DOWN)
    stale = packet(received, your_discriminator=0xDEAD)
    output = bench.did(bench.session.receive_stale(stale, bench.now))
    assert output.discard is Discard.STALE_DISCRIMINATOR
    assert output.change is None
    assert output.packet is not None
    assert (output.packet.state, output.packet.your_discriminator) == (DOWN, THEIRS)
    bench.run(10_000 * MS)
    assert bench.last.your_discriminator == 0, "and it is forgotten like any other"


@pytest.mark.parametrize("state", [INIT, UP, ADMIN_DOWN])
def test_a_stale_packet_is_discarded_in_any_other_state(state: State) -> None:
    bench = in_state(state)
    before = bench.session.remote
    output = bench.session.receive_stale(packet(UP, my_discriminator=0xBAD, your_discriminator=0xDEAD), bench.now)
    assert output == Output(discard=Discard.STALE_DISCRIMINATOR)
    assert bench.session.remote == before


def test_an_authenticated_stale_packet_teaches_nothing() -> None:
    bench = in_state(DOWN)
    stale = packet(UP, your_discriminator=0xDEAD, auth=b"\x01\x04\x01x")
    assert bench.session.receive_stale(stale, bench.now) == Output(discard=Discard.AUTHENTICATION)
