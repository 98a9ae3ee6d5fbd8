"""Two of our gateways behind a real OVN router: traffic goes elsewhere when one of them cannot serve any more.

OVN writes some changes of BFD five seconds late, so the bounds here are the protocol's where OVN acts at once (an
expired detection time) and nothing tighter; bench/bfd_failover.py has the exact figures.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from ovn import Gateway, Ovn, wait_until
from ovn_failover import (
    Outcome,
    cut_outside,
    down_reasons,
    drop_everything_inside,
    drop_nothing,
    failover,
    mend_outside,
    streaming,
)

pytestmark = pytest.mark.alone

HEALTH = {"NATGW_BFD_HEALTH_INTERVAL": "200", "NATGW_BFD_HEALTH_FALL": "400", "NATGW_BFD_HEALTH_RISE": "1000"}
PROBE_TIME = 3 * 0.2 + 0.4
"""Within which these settings promise to notice that the external gateway is gone, seconds."""
DETECTION = 0.3
SLACK = 4.0
"""For a machine that does something else, too; what OVN writes late comes later than that."""


@pytest.fixture(scope="module")
def ovn() -> Iterator[Ovn]:
    made = Ovn((100, 3), HEALTH)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def serving(ovn: Ovn) -> tuple[Gateway, Gateway]:
    """Two gateways that OVN uses; whatever a test did to the speakers, the next finds them running."""
    for gateway in ovn.gateways:
        if gateway.process is None:
            gateway.start()
    first, second = ovn.gateways
    ovn.wait_serving(first, second)
    return first, second


def within(outcome: Outcome, seconds: float) -> None:
    assert outcome.moved is not None
    assert outcome.moved <= seconds + SLACK


def test_both_gateways_carry_traffic(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    with streaming(ovn) as streams:
        answers = [one.answered for one in streams.streams.values()]
        wait_until(lambda: all(len(each) > 150 for each in answers), "both streams are answered")
    assert {stream.via() for stream in streams.streams.values()} == {gateway.outer for gateway in serving}
    assert [stream.lost() for stream in streams.streams.values()] == [[], []]
    for gateway in serving:
        status = gateway.status()
        assert status["Ready"]
        assert status["Health"]["Healthy"]


def test_a_speaker_that_is_killed_costs_no_packet(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, _ = serving
    outcome = failover(ovn, first, lambda: first.end(signal.SIGKILL))
    assert outcome.lost == 0, "the kernel goes on forwarding"
    within(outcome, DETECTION)


def test_a_black_hole_is_noticed(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, _ = serving
    try:
        outcome = failover(ovn, first, lambda: drop_everything_inside(first))
    finally:
        drop_nothing(first)
    assert outcome.lost > 0
    assert outcome.hole <= DETECTION + SLACK


def test_a_drained_gateway_loses_no_packet_and_can_be_taken_back(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, second = serving
    outcome = failover(ovn, first, lambda: first.natgw("drain"))
    assert outcome.lost == 0
    within(outcome, 2 * DETECTION)
    assert "drain       done, traffic had moved after" in first.natgw("drain", "--wait")
    ovn.wait_serving(second)
    assert "natgw_bfd_draining 1" in first.natgw("metrics").splitlines()
    first.natgw("undrain")
    ovn.wait_serving(first, second)


def test_a_gateway_that_is_told_to_end_loses_no_packet(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    """As in a rolling update: it ends by itself, well before it would be killed."""
    first, _ = serving
    process = first.process
    assert process is not None
    outcome = failover(ovn, first, lambda: process.send_signal(signal.SIGTERM))
    assert outcome.lost == 0
    within(outcome, 2 * DETECTION)
    assert process.wait(29) == 0
    first.process = None
    assert any("drained: peers told after" in line for line in first.told())


def test_a_gateway_that_is_cut_off_outside_is_not_used(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, second = serving
    try:
        outcome = failover(ovn, first, lambda: cut_outside(ovn, first))
        within(outcome, PROBE_TIME + DETECTION)
        assert down_reasons(first)[-1] == "Concatenated Path Down"
        status = first.status()
        assert str(status["Health"]["Reason"]).startswith("gateway_ipv4: 172.30.0.100 ")
        assert 'natgw_bfd_health{probe="gateway_ipv4"} 0' in first.natgw("metrics").splitlines()
        assert status["Sessions"][0]["Attempts"] == 0, "what health holds down is not repaired"  # type: ignore[index]
    finally:
        mend_outside(ovn, first)
    ovn.wait_serving(first, second)


def test_a_lost_carrier_is_noticed_at_once(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, second = serving
    link = ("ip", "link", "set", f"x-{first.port}")
    try:
        outcome = failover(ovn, first, lambda: ovn.outside.run(*link, "down"))
    finally:
        ovn.outside.run(*link, "up")
    within(outcome, DETECTION)
    ovn.wait_serving(first, second)


def test_a_gateway_that_does_not_forward_is_not_used(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, second = serving
    try:
        first.netns.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
        ovn.wait_serving(second)
        assert down_reasons(first)[-1] == "Path Down"
    finally:
        first.netns.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    ovn.wait_serving(first, second)


def test_without_health_the_cut_is_never_noticed(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    """The switch works, and this is what it was like before: sessions Up, and half of the traffic lost."""
    first, second = serving
    first.end(signal.SIGKILL)
    ovn.wait_serving(second)
    first.start(NATGW_BFD_HEALTH="off")
    ovn.wait_serving(first, second)
    try:
        with streaming(ovn) as streams:
            cut_outside(ovn, first)
            cut = time.monotonic()
            time.sleep(3 * (PROBE_TIME + DETECTION))
            assert ovn.serving() == {first.inner, second.inner}
        half = streams.through(first)
        since = {number for number, at in enumerate(half.sent) if at > cut}
        assert since
        assert since <= set(half.lost())
    finally:
        mend_outside(ovn, first)
        first.end(signal.SIGKILL)


def test_the_last_gateway_alive_is_missed_too(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    """OVN's BFD thread sleeps when nobody speaks to it. A gateway that ends keeps it awake until it has noticed."""
    first, second = serving
    second.end(signal.SIGKILL)
    ovn.wait_serving(first)
    first.end(signal.SIGTERM)
    wait_until(lambda: not ovn.serving(), "OVN knows that nobody serves", DETECTION + SLACK)


def test_the_last_gateway_alive_is_missed_when_its_speaker_dies(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    """Nobody speaks to OVN then, but the process above the speaker keeps it awake, and starts another speaker.

    Killed again and again, because the first time another one speaks within OVN's detection time.
    """
    first, second = serving
    second.end(signal.SIGKILL)
    ovn.wait_serving(first)

    def missed() -> bool:
        first.kill_speaker()
        return not ovn.serving()

    wait_until(missed, "OVN knows that nobody serves")
    ovn.wait_serving(first)


def test_our_side_misses_its_only_peer(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    first, second = serving
    second.end(signal.SIGKILL)
    ovn.wait_serving(first)
    ovn.silence()
    try:
        wait_until(lambda: not first.ready(), "the gateway knows that its router is gone", DETECTION + SLACK)
        assert down_reasons(first)[-1] == "Control Detection Time Expired"
    finally:
        ovn.speak()
    ovn.wait_serving(first)


def test_sessions_over_ipv6() -> None:
    ovn = Ovn((100, 3), {"NATGW_BFD_HEALTH": "off"})
    try:
        ovn.add_ipv6()
        for gateway in ovn.gateways:
            gateway.start()
        wait_until(lambda: list(ovn.bfd().values()) == ["up"] * 4, "both sessions of both gateways are Up")
        ovn.gateways[0].end(signal.SIGKILL)
        wait_until(lambda: ovn.bfd()["fd00:1::11"] == "down", "OVN notices the death over IPv6", DETECTION + SLACK)
        assert ovn.bfd()["fd00:1::12"] == "up"
    finally:
        ovn.close()


def test_a_restart_is_over_before_anyone_notices_or_is_noticed(ovn: Ovn, serving: tuple[Gateway, Gateway]) -> None:
    """OVN may still believe in the session of before; it comes up again whatever it sends."""
    first, second = serving
    first.end(signal.SIGKILL)
    first.start()
    wait_until(first.ready, "it is ready again")
    ovn.wait_serving(first, second)
