"""Demultiplexing (RFC 5880 6.8.6, RFC 5881), and two speakers on a bad link in virtual time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from gateway.bfd.packet import ControlPacket, Diag, Discard, State
from gateway.bfd.session import SessionConfig, StateChange
from gateway.bfd.table import Entry, Happened, SessionTable

MS = 1000
LEFT, RIGHT, STRANGER = "10.0.1.5", "10.0.1.1", "10.0.1.66"
FAST = SessionConfig(desired_min_tx=50 * MS, required_min_rx=50 * MS, detect_mult=3)


def table(local: str = LEFT, seed: int = 1, config: SessionConfig = FAST) -> SessionTable:
    return SessionTable(config, lambda remote: [local], random.Random(seed).random)


def payload(state: State = State.DOWN, **fields: Any) -> bytes:
    plain: dict[str, Any] = {
        "state": state,
        "detect_mult": 3,
        "my_discriminator": 77,
        "your_discriminator": 0,
        "desired_min_tx": 100 * MS,
        "required_min_rx": 100 * MS,
    }
    return ControlPacket(**plain | fields).encode()


def allowed() -> tuple[SessionTable, Entry]:
    sessions = table()
    sessions.allow(RIGHT, 0)
    (entry,) = sessions.entries
    return sessions, entry


def discarded(sessions: SessionTable) -> dict[Discard, int]:
    return {reason: times for reason, times in sessions.discarded.items() if times}


def test_an_allowed_peer_is_spoken_to_at_once() -> None:
    sessions, entry = allowed()
    assert (entry.local, entry.remote) == (LEFT, RIGHT)
    (happened,) = sessions.tick(0)
    assert happened.output.packet is not None
    assert happened.output.packet.state is State.DOWN


def test_allowing_twice_makes_one_session() -> None:
    sessions, entry = allowed()
    sessions.allow(RIGHT, 1)
    assert sessions.entries == [entry]


@pytest.mark.parametrize("ttl", [254, 255])
def test_ttl_accepted(ttl: int) -> None:
    sessions, entry = allowed()
    assert sessions.receive(payload(), LEFT, RIGHT, ttl, 0) is not None
    assert entry.session.state is State.INIT


@pytest.mark.parametrize("ttl", [0, 1, 64, 253])
def test_ttl_refused(ttl: int) -> None:
    sessions, entry = allowed()
    assert sessions.receive(payload(), LEFT, RIGHT, ttl, 0) is None
    assert discarded(sessions) == {Discard.TTL: 1}
    assert entry.session.state is State.DOWN


def test_multihop_takes_any_ttl() -> None:
    sessions = SessionTable(FAST, lambda remote: [LEFT], random.Random(1).random, minimum_ttl=0)
    sessions.allow(RIGHT, 0)
    assert sessions.receive(payload(), LEFT, RIGHT, 3, 0) is not None
    assert sessions.entries[0].session.state is State.INIT


def test_malformed_is_counted_by_reason() -> None:
    sessions, _ = allowed()
    assert sessions.receive(b"short", LEFT, RIGHT, 255, 0) is None
    assert discarded(sessions) == {Discard.LENGTH: 1}


def test_your_discriminator_selects_the_session_whatever_the_addresses() -> None:
    sessions, entry = allowed()
    happened = sessions.receive(
        payload(State.INIT, your_discriminator=entry.session.discriminator), LEFT, STRANGER, 255, 0
    )
    assert happened is not None
    assert happened.entry is entry
    assert entry.session.state is State.UP


def test_unknown_discriminator_of_a_stranger_is_discarded() -> None:
    sessions, _ = allowed()
    assert sessions.receive(payload(State.UP, your_discriminator=12345), LEFT, STRANGER, 255, 0) is None
    assert discarded(sessions) == {Discard.NO_SESSION: 1}


@pytest.mark.parametrize("state", [State.INIT, State.UP])
def test_zero_discriminator_needs_down_or_admin_down(state: State) -> None:
    sessions, entry = allowed()
    assert sessions.receive(payload(state), LEFT, RIGHT, 255, 0) is None
    assert discarded(sessions) == {Discard.STATE_WITHOUT_DISCRIMINATOR: 1}
    assert entry.session.state is State.DOWN


@pytest.mark.parametrize("state", [State.DOWN, State.ADMIN_DOWN])
def test_zero_discriminator_selects_by_address(state: State) -> None:
    sessions, entry = allowed()
    happened = sessions.receive(payload(state), LEFT, RIGHT, 255, 0)
    assert happened is not None
    assert happened.entry is entry


def test_a_stranger_gets_no_session() -> None:
    sessions, _ = allowed()
    assert sessions.receive(payload(), LEFT, STRANGER, 255, 0) is None
    assert discarded(sessions) == {Discard.NO_SESSION: 1}
    assert len(sessions) == 1


def test_a_removed_session_comes_back_with_its_peer_unless_blocked() -> None:
    sessions, entry = allowed()
    sessions.remove(entry)
    assert sessions.tick(0) == []
    sessions.receive(payload(), LEFT, RIGHT, 255, 0)
    (again,) = sessions.entries
    assert again.id != entry.id
    sessions.block(RIGHT)
    assert sessions.entries == [again], "blocking ends nothing"
    sessions.remove(again)
    sessions.receive(payload(), LEFT, RIGHT, 255, 0)
    assert sessions.entries == []


def test_a_reset_session_is_another_one() -> None:
    sessions, entry = allowed()
    fresh = sessions.reset(entry, 5)
    assert sessions.entries == [fresh]
    assert fresh.id != entry.id
    assert fresh.session.discriminator != entry.session.discriminator


def test_discriminators_are_nonzero_and_unique() -> None:
    values = iter([0.0, 0.5, 0.5, 0.0, 0.25])
    sessions = SessionTable(FAST, lambda remote: [LEFT], lambda: next(values))
    sessions.allow("10.0.1.1", 0)
    sessions.allow("10.0.1.2", 0)
    assert [entry.session.discriminator for entry in sessions.entries] == [2**31, 2**30]


def test_authenticated_packets_make_no_session() -> None:
    sessions, entry = allowed()
    sessions.remove(entry)
    assert sessions.receive(payload(auth=b"\x01\x04\x01x"), LEFT, RIGHT, 255, 0) is None
    assert sessions.entries == []


def test_what_a_session_discards_is_counted() -> None:
    sessions, entry = allowed()
    entry.session.disable(0)
    sessions.receive(payload(), LEFT, RIGHT, 255, 0)
    sessions.receive(payload(auth=b"\x01\x04\x01x"), LEFT, RIGHT, 255, 0)
    assert discarded(sessions) == {Discard.ADMIN_DOWN: 1, Discard.AUTHENTICATION: 1}


def test_fuzzed_datagrams_never_crash_and_never_bring_a_session_up() -> None:
    """No packet here carries our discriminator, so whatever the peer says, nothing is proven about the way to it."""
    sessions, entry = allowed()
    rng = random.Random(6)
    for now in range(0, 8000 * MS, MS):
        raw = bytearray(payload(State(rng.randrange(4)), poll=rng.random() < 0.2, my_discriminator=rng.randrange(1, 9)))
        for _ in range(rng.randrange(4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        if raw[8:12] == entry.session.discriminator.to_bytes(4, "big"):
            continue
        for happened in (sessions.receive(bytes(raw), LEFT, RIGHT, 255, now), *sessions.tick(now)):
            if happened is not None and happened.output.packet is not None:
                happened.output.packet.encode()
        assert entry.session.state in (State.DOWN, State.INIT)
    assert sessions.discarded[Discard.STALE_DISCRIMINATOR] > 0
    assert sessions.discarded[Discard.VERSION] > 0


# Two speakers on a simulated link


class Link:
    """Two tables, virtual time, and a link that loses and delays, and reorders if it is told to.

    An old packet that arrives after a Poll takes back what the Poll announced; RFC 5880 knows no remedy, so intervals
    are changed on links that keep the order.
    """

    def __init__(
        self, seed: int, loss: float = 0.0, delay: tuple[int, int] = (100, 100), reorders: bool = False
    ) -> None:
        self.now = 0
        self.loss, self.delay, self.reorders = loss, delay, reorders
        self._latest: dict[str, int] = {}
        self.rng = random.Random(seed)
        self.cut_from: set[str] = set()
        self.tables: dict[str, SessionTable] = {}
        self.changes: list[tuple[str, StateChange]] = []
        self._flying: list[tuple[int, int, str, str, bytes]] = []
        self._order = count()
        self.start(LEFT)
        self.start(RIGHT)

    def start(self, address: str, config: SessionConfig = FAST) -> None:
        """A speaker begins with an empty memory, for the first time or again."""
        peer = RIGHT if address == LEFT else LEFT
        self.tables[address] = table(address, self.rng.randrange(2**32), config)
        self.tables[address].allow(peer, self.now)

    def stop(self, address: str) -> None:
        del self.tables[address]

    def states(self) -> set[State]:
        return {entry.session.state for sessions in self.tables.values() for entry in sessions.entries}

    def did(self, happened: Happened) -> None:
        entry, output = happened.entry, happened.output
        if output.change is not None:
            self.changes.append((entry.local, output.change))
        if output.packet is not None and entry.local not in self.cut_from and self.rng.random() >= self.loss:
            arrival = self.now + self.rng.randint(*self.delay)
            if not self.reorders:
                arrival = self._latest[entry.local] = max(arrival, self._latest.get(entry.local, 0))
            flight = (arrival, next(self._order), entry.local, entry.remote, output.packet.encode())
            heapq.heappush(self._flying, flight)

    def run(self, microseconds: int, until: Callable[[], bool] = lambda: False) -> int:
        """Let time pass; the microseconds that it took for ``until`` to come true, or all of them."""
        begin, end = self.now, self.now + microseconds
        while not until():
            due = [sessions.next_timer() for sessions in self.tables.values()]
            due += [flight[0] for flight in self._flying[:1]]
            at = min((at for at in due if at is not None), default=end)
            self.now = min(max(self.now, at), end)
            if self.now == end:
                break
            while self._flying and self._flying[0][0] <= self.now:
                _, _, source, target, data = heapq.heappop(self._flying)
                sessions = self.tables.get(target)
                happened = sessions and sessions.receive(data, target, source, 255, self.now)
                if happened:
                    self.did(happened)
            for sessions in self.tables.values():
                for happened in sessions.tick(self.now):
                    self.did(happened)
        return self.now - begin


def both_up(link: Link) -> Callable[[], bool]:
    return lambda: link.states() == {State.UP}


def test_two_speakers_come_up_within_milliseconds_and_stay() -> None:
    link = Link(seed=1)
    assert link.run(1000 * MS, both_up(link)) < 5 * MS
    link.changes.clear()
    link.run(600_000 * MS)
    assert link.changes == []


@pytest.mark.parametrize("seed", range(10))
def test_they_come_up_over_a_link_that_loses_half_of_everything(seed: int) -> None:
    link = Link(seed, loss=0.5, delay=(100, 20 * MS), reorders=True)
    assert link.run(120_000 * MS, both_up(link)) < 120_000 * MS


@pytest.mark.parametrize("seed", range(5))
def test_three_percent_of_loss_is_no_reason_to_flap(seed: int) -> None:
    """Three packets in a row are lost once in 37,000; with jitter a detection time holds three or four."""
    link = Link(seed, loss=0.03, delay=(100, 3 * MS))
    link.run(10_000 * MS, both_up(link))
    link.changes.clear()
    link.run(60_000 * MS)
    assert link.changes == []


def test_silence_is_noticed_within_the_detection_time_on_both_sides() -> None:
    link = Link(seed=3)
    link.run(5000 * MS)
    link.cut_from = {LEFT, RIGHT}
    begin = link.now
    link.changes.clear()
    link.run(1000 * MS)
    assert {(who, change.new, change.diag) for who, change in link.changes} == {
        (LEFT, State.DOWN, Diag.DETECTION_TIME_EXPIRED),
        (RIGHT, State.DOWN, Diag.DETECTION_TIME_EXPIRED),
    }
    for _, change in link.changes:
        assert 100 * MS - 200 <= change.at - begin <= 150 * MS
    link.cut_from = set()
    assert link.run(5000 * MS, both_up(link)) <= 1100 * MS


def test_a_one_way_cut_takes_both_sides_down() -> None:
    link = Link(seed=4)
    link.run(5000 * MS)
    link.cut_from = {LEFT}
    link.changes.clear()
    link.run(200 * MS)
    first, second = link.changes
    assert (first[0], first[1].diag) == (RIGHT, Diag.DETECTION_TIME_EXPIRED)
    assert (second[0], second[1].diag) == (LEFT, Diag.NEIGHBOR_SIGNALED_DOWN)
    link.run(10_000 * MS)
    assert State.UP not in link.states()


@pytest.mark.parametrize("seed", range(10))
def test_a_restart_is_over_within_milliseconds(seed: int) -> None:
    """The peer still carries the old discriminator; neither side waits for a detection time."""
    link = Link(seed)
    link.run(5000 * MS)
    link.start(LEFT)
    link.changes.clear()
    assert link.run(2000 * MS, lambda: State.UP not in link.states()) < MS
    assert link.run(2000 * MS, both_up(link)) < 5 * MS
    link.changes.clear()
    link.run(5000 * MS)
    assert link.changes == []


@pytest.mark.parametrize("seed", range(10))
def test_intervals_change_in_both_directions_without_a_flap(seed: int) -> None:
    link = Link(seed, loss=0.02, delay=(100, 2 * MS))
    link.run(5000 * MS, both_up(link))
    link.run(500 * MS)
    link.changes.clear()
    for tx, rx, multiplier in ((400, 400, 3), (50, 50, 3), (50, 700, 3), (700, 50, 5), (60, 60, 4)):
        config = SessionConfig(desired_min_tx=tx * MS, required_min_rx=rx * MS, detect_mult=multiplier)
        (entry,) = link.tables[LEFT].entries
        link.did(Happened(entry, entry.session.configure(config, link.now)))
        link.run(4000 * MS)
        assert entry.session.intervals.tx_in_use == tx * MS
        assert entry.session.intervals.rx_in_use == rx * MS
    assert link.changes == []


def test_a_dead_speaker_is_noticed_and_welcomed_back() -> None:
    link = Link(seed=8)
    link.run(5000 * MS)
    link.stop(LEFT)
    assert link.run(1000 * MS, lambda: link.states() == {State.DOWN}) <= 150 * MS
    link.run(10_000 * MS)
    link.start(LEFT, replace(FAST, desired_min_tx=200 * MS))
    assert link.run(5000 * MS, both_up(link)) <= 1100 * MS
