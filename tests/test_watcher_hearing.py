"""When the flow watcher has the kernel tell of beginnings."""

from __future__ import annotations

from gateway.watcher.hearing import BURST, MOST, SOON, Hearing

SECOND = 1_000_000


def test_where_dumps_come_often_they_will_do() -> None:
    hearing = Hearing()
    assert not hearing.on
    hearing.dumped(0, SOON, SECOND)
    assert not hearing.on
    hearing.dumped(1000, SOON + 1, 3 * SECOND)
    assert (hearing.on, hearing.flooded) == (True, False)
    hearing.dumped(2000, SOON, 9 * SECOND)
    assert not hearing.on


def test_they_are_heard_as_soon_as_a_dump_takes_long() -> None:
    hearing = Hearing()
    hearing.dumping(SOON)
    assert not hearing.on
    hearing.dumping(SOON + 1)
    assert hearing.on
    hearing.dumped(MOST * 2, 2 * SOON, SECOND)
    hearing.dumping(2 * SOON)
    assert (hearing.on, hearing.flooded) == (False, True)


def test_of_too_many_none_are_heard() -> None:
    """Whether a dump has found that they began, or their events come."""
    hearing = Hearing()
    hearing.dumped(0, 10 * SOON, SECOND)
    hearing.dumped(MOST * 10, 10 * SOON, 11 * SECOND)
    assert (hearing.on, hearing.flooded) == (True, False)
    hearing.dumped(MOST * 21, 10 * SOON, 21 * SECOND)
    assert (hearing.on, hearing.flooded) == (False, True)
    hearing.dumped(MOST * 22, 10 * SOON, 31 * SECOND)
    assert (hearing.on, hearing.flooded) == (True, False)
    hearing.heard(BURST, 31 * SECOND)
    assert hearing.on
    hearing.heard(BURST + 2, 31 * SECOND)
    assert (hearing.on, hearing.flooded) == (False, True)


def test_what_comes_no_faster_than_it_is_heard_is_no_flood() -> None:
    hearing = Hearing()
    hearing.dumped(0, 2 * SOON, 0)
    for second in range(100):
        hearing.heard(second * MOST, second * SECOND)
    assert hearing.on
    for tenth in range(1, 11):
        hearing.heard(99 * MOST + tenth * MOST // 2, 99 * SECOND + tenth * SECOND // 10)
    assert not hearing.on, "five times as many as are heard, for a second"
