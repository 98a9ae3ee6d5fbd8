"""The announcement schedule in virtual time: nothing here waits."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.arp.conflict import MAX_HOLDERS, REPORT_INTERVAL
from gateway.arp.frame import BROADCAST, REPLY, REQUEST, ZERO, ArpFrame, parse
from gateway.arp.pace import Bucket
from gateway.arp.schedule import Schedule, Timing

MAC = bytes.fromhex("02aabbccdd01")
NEW_MAC = bytes.fromhex("02aabbccdd02")
THEIRS = bytes.fromhex("02eeeeeeee01")
EIP = IPv4Address("192.168.0.10")
EIP2 = IPv4Address("192.168.0.11")
START = 12345.0  # monotonic clocks do not start at zero

Sent = list[tuple[float, IPv4Address, bytes]]  # time since START, address, announcing hardware address


def up(timing: Timing | None = None) -> Schedule:
    schedule = Schedule(timing or Timing())
    schedule.link_changed(MAC, START)
    return schedule


def many(count: int, first: str = "10.0.0.1") -> list[IPv4Address]:
    return [IPv4Address(first) + number for number in range(count)]


def seen(frames: list[bytes], now: float) -> Sent:
    arps = [parse(frame) for frame in frames]
    assert all(arp.is_announcement for arp in arps)
    return [(now - START, arp.sender_ip, arp.sender_mac) for arp in arps]


def announce(schedule: Schedule, addresses: list[IPv4Address], now: float) -> Sent:
    return seen(schedule.announce(addresses, now), now)


def run(schedule: Schedule, now: float, until: float) -> Sent:
    """Serve the schedule as the shell does: sleep to next_due, send what is due."""
    sent: Sent = []
    idle = 0
    while (at := schedule.next_due(now)) is not None and at <= until:
        now = max(now, at)
        frames = schedule.due(now)
        idle = 0 if frames else idle + 1
        assert idle < 3, "woken again and again with nothing to send"
        sent += seen(frames, now)
    return sent


def times(sent: Sent, address: IPv4Address = EIP) -> list[float]:
    return [round(at, 3) for at, who, _ in sent if who == address]


def test_a_new_address_is_announced_at_once_and_twice_more() -> None:
    schedule = up()
    sent = announce(schedule, [EIP], START) + run(schedule, START, START + 60)
    assert [(at, who) for at, who, _ in sent] == [(0.0, EIP), (1.0, EIP), (2.0, EIP)]
    assert schedule.next_due(START + 60) is None
    assert schedule.standing == {EIP}


def test_withdrawing_cancels_the_repeats_of_that_address_only() -> None:
    schedule = up()
    sent = announce(schedule, [EIP, EIP2], START) + run(schedule, START, START + 1.5)
    schedule.withdraw([EIP, IPv4Address("203.0.113.1")])
    sent += run(schedule, START + 1.5, START + 60)
    assert times(sent, EIP) == [0, 1]
    assert times(sent, EIP2) == [0, 1, 2]
    assert schedule.standing == {EIP2}


def test_an_address_withdrawn_and_added_again_is_new() -> None:
    schedule = up()
    announce(schedule, [EIP], START)
    schedule.withdraw([EIP])
    sent = announce(schedule, [EIP], START + 0.5) + run(schedule, START + 0.5, START + 60)
    assert times(sent) == [0.5, 1.5, 2.5]


def test_a_standing_address_asked_for_again_is_announced_once() -> None:
    schedule = up()
    announce(schedule, [EIP], START)
    run(schedule, START, START + 10)
    sent = announce(schedule, [EIP], START + 10) + run(schedule, START + 10, START + 60)
    assert times(sent) == [10]


def test_asked_for_again_and_again_it_is_announced_once_a_second() -> None:
    schedule = up()
    now, sent = START, announce(schedule, [EIP], START)
    for _ in range(100):
        sent += run(schedule, now, now + 0.05)
        now += 0.05
        sent += announce(schedule, [EIP], now)
    sent += run(schedule, now, START + 60)
    assert times(sent) == [0, 1, 2, 3, 4, 5, 6][: len(sent)]
    assert len(sent) in (6, 7)


def test_a_thousand_addresses_leave_paced_and_within_about_half_a_second() -> None:
    schedule = up(Timing(count=1))
    addresses = many(1000)
    at_once = announce(schedule, addresses, START)
    assert len(at_once) == 50
    sent = at_once + run(schedule, START, START + 60)
    assert Counter(who for _, who, _ in sent) == Counter(addresses)
    assert 0.475 <= sent[-1][0] <= 0.5


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(20, 5000),
    burst=st.integers(1, 100),
    count=st.integers(1, 4),
    addresses=st.integers(1, 300),
    calls=st.lists(st.floats(0, 3), max_size=8),
)
def test_no_window_holds_more_than_burst_and_rate_allow(
    rate: float, burst: int, count: int, addresses: int, calls: list[float]
) -> None:
    schedule = up(Timing(count=count, rate=rate, burst=burst))
    now, sent = START, announce(schedule, many(addresses), START)
    for call, at in enumerate(sorted(calls)):
        sent += run(schedule, now, START + at)
        now = START + at
        sent += announce(schedule, many(addresses // 2, f"10.{call + 1}.0.1") + many(3), now)
    sent += run(schedule, now, START + 100_000)
    for first in range(0, len(sent), 7):
        for last in (first + 1, first + burst, len(sent) - 1):
            if first < last < len(sent):
                allowed = burst + rate * (sent[last][0] - sent[first][0])
                assert last - first + 1 <= allowed + 0.1
    counts = Counter(who for _, who, _ in sent)
    assert set(counts) == schedule.standing
    # None is lost; what was asked for again may have gone out once more for each time it was asked for.
    assert all(count <= times <= count + len(calls) for times in counts.values())


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.777, 2.5])
def test_new_addresses_do_not_wait_behind_a_backlog(moment: float) -> None:
    schedule = up()
    announce(schedule, many(5000), START)
    run(schedule, START, START + moment)
    schedule.due(START + moment)
    new = many(20, "192.168.0.1")
    assert [who for _, who, _ in announce(schedule, new, START + moment)] == new


def test_asking_again_does_not_postpone_a_repeat() -> None:
    schedule = up(Timing(interval=0.1, spacing=1.0))
    sent = announce(schedule, [EIP], START) + announce(schedule, [EIP], START + 0.05)
    sent += run(schedule, START + 0.05, START + 60)
    assert times(sent) == [0, 0.1, 0.2]


def test_an_address_in_the_backlog_that_is_asked_for_goes_out_and_is_not_sent_twice_for_it() -> None:
    schedule = up(Timing(count=1))
    addresses = many(500)
    sent = announce(schedule, addresses, START) + run(schedule, START, START + 0.1)
    late = addresses[-1]
    sent += announce(schedule, [late], START + 0.1)
    assert times(sent, late) == [0.1]
    sent += run(schedule, START + 0.1, START + 60)
    assert times(sent, late) == [0.1]
    assert len(sent) == 500


def test_nothing_is_sent_until_the_link_is_known_then_everything() -> None:
    schedule = Schedule()
    assert schedule.announce([EIP, EIP2], START) == []
    assert schedule.announce([EIP], START + 1) == []
    assert schedule.next_due(START + 1) is None
    assert schedule.due(START + 1) == []
    schedule.link_changed(MAC, START + 7)
    sent = run(schedule, START + 7, START + 60)
    assert times(sent, EIP) == [7, 8, 9]
    assert times(sent, EIP2) == [7, 8, 9]


def test_a_link_that_comes_up_again_has_every_address_announced() -> None:
    schedule = up()
    announce(schedule, [EIP, EIP2], START)
    schedule.link_changed(None, START + 0.5)
    assert schedule.next_due(START + 0.5) is None
    assert schedule.due(START + 5) == []
    schedule.withdraw([EIP2])
    schedule.link_changed(MAC, START + 20)
    assert times(run(schedule, START + 20, START + 60)) == [20, 21, 22]


def test_a_flapping_link_does_not_announce_an_address_more_than_once_a_second() -> None:
    schedule = up()
    now, sent = START, announce(schedule, [EIP], START)
    for _ in range(50):
        schedule.link_changed(None, now)
        schedule.link_changed(MAC, now + 0.01)
        sent += run(schedule, now + 0.01, now + 0.1)
        now += 0.1
    assert times(sent) == [0, 1, 2, 3, 4, 5][: len(sent)]
    assert len(sent) >= 5


@pytest.mark.parametrize("down_between", [True, False])
def test_a_new_hardware_address_is_announced_at_once(down_between: bool) -> None:
    schedule = up()
    announce(schedule, [EIP], START)
    if down_between:
        schedule.link_changed(None, START + 0.1)
    schedule.link_changed(NEW_MAC, START + 0.2)
    sent = run(schedule, START + 0.2, START + 60)
    assert times(sent) == [0.2, 1.2, 2.2]
    assert {mac for _, _, mac in sent} == {NEW_MAC}


def test_the_same_link_reported_again_changes_nothing() -> None:
    schedule = up()
    announce(schedule, [EIP], START)
    run(schedule, START, START + 10)
    schedule.link_changed(MAC, START + 10)
    assert schedule.next_due(START + 10) is None


# --- other holders ------------------------------------------------------------------------------------------


def spoken(address: IPv4Address, mac: bytes, operation: int = REQUEST, target: IPv4Address | None = None) -> bytes:
    return ArpFrame(BROADCAST, mac, operation, mac, address, ZERO, target or address).encode() + bytes(18)


def standing() -> Schedule:
    schedule = up()
    schedule.announce([EIP], START)
    return schedule


@pytest.mark.parametrize(
    "frame",
    [
        spoken(EIP, THEIRS),
        spoken(EIP, THEIRS, REPLY),
        spoken(EIP, THEIRS, REPLY, target=IPv4Address("192.168.0.1")),
        spoken(EIP, THEIRS, REQUEST, target=IPv4Address("192.168.0.1")),
    ],
    ids=["announcement", "gratuitous reply", "reply to another", "request for another"],
)
def test_whoever_speaks_as_the_holder_of_our_address_is_reported(frame: bytes) -> None:
    schedule = standing()
    conflict = schedule.received(frame, START + 3)
    assert conflict is not None
    assert (conflict.address, conflict.mac, conflict.count) == (EIP, "02:ee:ee:ee:ee:01", 1)
    assert (conflict.first_seen, conflict.last_seen) == (START + 3, START + 3)
    assert schedule.conflicts == (conflict,)


@pytest.mark.parametrize(
    "frame",
    [
        spoken(EIP, MAC),
        spoken(EIP2, THEIRS),
        spoken(IPv4Address(0), THEIRS, target=EIP),
        spoken(IPv4Address("192.168.0.1"), THEIRS, target=EIP),
        b"",
        spoken(EIP, THEIRS)[:41],
    ],
    ids=["our own", "another address", "probe", "asks for ours", "empty", "cut short"],
)
def test_what_is_no_conflict(frame: bytes) -> None:
    schedule = standing()
    assert schedule.received(frame, START) is None
    assert schedule.conflicts == ()


def test_a_holder_is_counted_always_and_reported_once_a_minute() -> None:
    schedule = standing()
    reports = [schedule.received(spoken(EIP, THEIRS), START + second) for second in range(150)]
    assert [second for second, report in enumerate(reports) if report] == [0, REPORT_INTERVAL, 2 * REPORT_INTERVAL]
    (conflict,) = schedule.conflicts
    assert (conflict.first_seen, conflict.last_seen, conflict.count) == (START, START + 149, 150)


def test_each_holder_is_reported_for_itself() -> None:
    schedule = standing()
    schedule.announce([EIP2], START)
    pairs = [(EIP, THEIRS), (EIP, NEW_MAC), (EIP2, THEIRS)]
    assert all(schedule.received(spoken(address, mac), START) for address, mac in pairs)
    assert [(each.address, each.mac) for each in schedule.conflicts] == [(a, m.hex(":")) for a, m in pairs]


def test_a_conflict_is_never_answered() -> None:
    schedule = standing()
    run(schedule, START, START + 10)
    schedule.received(spoken(EIP, THEIRS), START + 10)
    assert schedule.next_due(START + 10) is None
    assert schedule.due(START + 11) == []


def test_holders_of_a_withdrawn_address_are_forgotten() -> None:
    schedule = standing()
    schedule.announce([EIP2], START)
    schedule.received(spoken(EIP, THEIRS), START)
    schedule.received(spoken(EIP2, THEIRS), START)
    schedule.withdraw([EIP])
    assert [each.address for each in schedule.conflicts] == [EIP2]
    assert schedule.received(spoken(EIP, THEIRS), START + 1) is None


def test_a_flood_of_forged_holders_is_bounded_in_memory_and_in_the_log() -> None:
    schedule = standing()
    schedule.received(spoken(EIP, THEIRS), START)
    reports = 0
    for number in range(10_000):
        now = START + number / 1000
        schedule.received(spoken(EIP, THEIRS), now)
        reports += schedule.received(spoken(EIP, number.to_bytes(6, "big")), now) is not None
    assert len(schedule.conflicts) == MAX_HOLDERS
    assert reports <= 20 + 10
    # The one that never fell silent is still there, with its whole count.
    assert [each.count for each in schedule.conflicts if each.mac == "02:ee:ee:ee:ee:01"] == [10_001]


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"count": 0}, {"interval": -1.0}, {"spacing": -0.1}])
def test_impossible_timing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Timing(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_impossible_pacing_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="positive rate"):
        Bucket(rate, burst)
