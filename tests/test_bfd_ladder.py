"""The repair ladder: which step, when, and what survives a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gateway.bfd.ladder import (
    BACKOFF,
    CIRCUIT_OPEN,
    GRACE,
    NONE,
    REBUILD,
    REPLAY,
    RESET,
    UP,
    ZERO_TIME,
    Episode,
    Ladder,
    Observed,
    Pair,
    Timing,
    rfc3339,
)
from gateway.bfd.session import SessionConfig

A: Pair = ("10.0.0.5", "10.0.0.1")
B: Pair = ("fd00::5", "fd00::1")
TIMING = Timing(grace=60, stable=60)
NOW = 1_800_000_000.0

ALIVE, DEAD = Observed("Up"), Observed("Down")


def ladder(*pairs: Pair) -> Ladder:
    return Ladder(list(pairs or (A,)), TIMING)


def climb(subject: Ladder, observed: dict[Pair, Observed], begin: float, seconds: float) -> list[tuple[float, str]]:
    """Every step taken while the sessions stay as they are, with a look every five seconds."""
    steps: list[tuple[float, str]] = []
    now = begin
    while now < begin + seconds:
        step = subject.plan(observed, now)
        if step is not None:
            subject.record(step, None)
            steps.append((now - begin, step.action))
        now += 5
    return steps


def test_timing_is_a_minute_or_more() -> None:
    assert Timing.of(SessionConfig(100_000, 100_000, 3)) == Timing(60, 60)
    assert Timing.of(SessionConfig(2_000_000, 10_000_000, 5)) == Timing(500, 100)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ({A: DEAD}, [REPLAY, RESET, REBUILD, REPLAY, REPLAY]),
        ({}, [REPLAY, REBUILD, REBUILD, REPLAY, REPLAY]),
        ({A: Observed("Init")}, [REPLAY, RESET, REBUILD, REPLAY, REPLAY]),
    ],
)
def test_a_single_session(observed: dict[Pair, Observed], expected: list[str]) -> None:
    steps = climb(ladder(), observed, NOW, 10_000)
    assert steps == list(zip((60.0, 120.0, 420.0, 2220.0, 5820.0, 9420.0), [*expected, REPLAY], strict=True))


@pytest.mark.parametrize(
    ("observed", "expected"),
    [({A: DEAD, B: ALIVE}, [REPLAY, RESET, RESET, REPLAY]), ({B: ALIVE}, [REPLAY, REPLAY, REPLAY, REPLAY])],
)
def test_a_session_beside_one_that_is_up(observed: dict[Pair, Observed], expected: list[str]) -> None:
    """Sockets that serve another session are left alone."""
    assert [action for _, action in climb(ladder(A, B), observed, NOW, 2500)] == expected


def test_one_step_at_a_time_and_the_first_pair_first() -> None:
    subject = ladder(A, B)
    subject.plan({}, NOW)
    first, second = subject.plan({}, NOW + 60), subject.plan({}, NOW + 65)
    assert first is not None
    assert second is not None
    assert (first.episode.local, second.episode.local) == (A[0], B[0])
    assert subject.plan({}, NOW + 70) is None


def test_phases() -> None:
    subject = ladder()
    seen: list[str] = []
    for now in range(0, 4000, 5):
        step = subject.plan({A: DEAD}, NOW + now)
        if step is not None:
            subject.record(step, None)
        if seen[-1:] != [subject.episodes[A].phase]:
            seen.append(subject.episodes[A].phase)
    subject.plan({A: ALIVE}, NOW + 4000)
    assert [*seen, subject.episodes[A].phase] == [GRACE, BACKOFF, CIRCUIT_OPEN, UP]


def test_ready_is_every_session_up() -> None:
    subject = ladder(A, B)
    subject.plan({A: ALIVE, B: DEAD}, NOW)
    assert not subject.ready
    subject.plan({A: ALIVE}, NOW)
    assert not subject.ready
    subject.plan({A: ALIVE, B: ALIVE}, NOW)
    assert subject.ready


def test_up_for_a_while_forgets_the_episode_and_up_for_less_does_not() -> None:
    subject = ladder()
    climb(subject, {A: DEAD}, NOW, 65)
    subject.plan({A: ALIVE}, NOW + 100)
    subject.plan({A: ALIVE}, NOW + 159)
    assert (subject.episodes[A].attempts, subject.episodes[A].last_action) == (1, REPLAY)
    subject.plan({A: ALIVE}, NOW + 160)
    assert (subject.episodes[A].attempts, subject.episodes[A].last_action) == (0, NONE)
    assert subject.plan({A: DEAD}, NOW + 170) is None
    assert subject.episodes[A].phase == GRACE


def test_a_flapping_session_goes_on_where_it_was() -> None:
    subject = ladder()
    climb(subject, {A: DEAD}, NOW, 65)
    subject.plan({A: ALIVE}, NOW + 70)
    step = subject.plan({A: DEAD}, NOW + 125)
    assert step is not None
    assert step.action == RESET


def test_what_is_held_down_on_purpose_is_left_alone() -> None:
    held = {A: Observed("Down", deliberate=True)}
    subject = ladder()
    assert climb(subject, held, NOW, 10_000) == []
    assert climb(subject, {A: DEAD}, NOW + 10_000, 65) == [(60.0, REPLAY)], "the grace begins afterwards"


def test_results_and_rebuilds_are_recorded() -> None:
    subject = ladder()
    subject.plan({}, NOW)
    step = subject.plan({}, NOW + 60)
    assert step is not None
    assert step.episode.last_result == "in_progress"
    subject.record(step, "Address already in use")
    assert subject.episodes[A].status()["LastResult"] == "Address already in use"
    step = subject.plan({}, NOW + 120)
    assert step is not None
    assert step.action == REBUILD
    subject.record(step, "no")
    assert subject.rebuilds == 0
    subject.record(step, None)
    assert subject.rebuilds == 1


def test_a_clock_that_was_set_back_stops_nothing_for_ever() -> None:
    subject = ladder()
    climb(subject, {A: DEAD}, NOW, 65)
    earlier = NOW - 1_000_000
    assert climb(subject, {A: DEAD}, earlier, 4000)


def test_status_has_the_words_of_the_supervisor() -> None:
    assert Episode(*A).status() == {
        "Pair": {"Local": A[0], "Remote": A[1]},
        "State": "",
        "Phase": "Grace",
        "Attempts": 0,
        "LastAction": "None",
        "LastResult": "",
        "NextRetry": ZERO_TIME,
    }
    assert Episode(*A, next_retry=1_800_000_000.25).status()["NextRetry"] == "2027-01-15T08:00:00.250Z"


def test_what_is_saved_is_taken_up_again() -> None:
    subject = ladder(A, B)
    climb(subject, {A: DEAD, B: ALIVE}, NOW, 3000)
    saved = json.loads(json.dumps(subject.dump()))
    fresh = ladder(A, B)
    fresh.load(saved)
    for pair in (A, B):
        kept, mine = fresh.episodes[pair], subject.episodes[pair]
        assert replace(kept, state=mine.state) == mine, "all but the state, which is looked at anew"
    assert fresh.plan({A: DEAD, B: ALIVE}, NOW + 3000) is None, "the circuit is still open"


@pytest.mark.parametrize(
    "saved",
    [
        {},
        [],
        7,
        {"episodes": {}},
        {"childRestarts": "many", "episodes": {}},
        {"childRestarts": 0, "episodes": {"|".join(A): {}}},
        {"childRestarts": 0, "episodes": {"|".join(A): {"status": {"Phase": "Up"}}}},
        {"childRestarts": 0, "episodes": []},
        {
            "childRestarts": 0,
            "episodes": {
                "|".join(A): {"status": {**Episode(*A).status(), "NextRetry": "yesterday"}},
            },
        },
    ],
)
def test_a_file_that_is_not_ours_is_refused_whole(saved: object) -> None:
    subject = ladder()
    before = subject.dump()
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        subject.load(saved)
    assert subject.dump() == before


def test_pairs_that_are_not_expected_any_more_are_dropped() -> None:
    subject = ladder(A)
    climb(subject, {}, NOW, 100)
    other = ladder(B)
    other.load(subject.dump())
    assert other.episodes[B].attempts == 0


def test_times_are_utc() -> None:
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(None) == ZERO_TIME
