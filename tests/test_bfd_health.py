"""Health: the verdict and its hysteresis, what probes make of the kernel's answers, and what sessions do about it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.bfd import netlink
from gateway.bfd.beacon import Beacon
from gateway.bfd.health import Health, Hysteresis, Result, Verdict
from gateway.bfd.healthwatch import HealthWatch
from gateway.bfd.netlink import Egress, Link, Neighbour
from gateway.bfd.packet import Diag, State
from gateway.bfd.probes import (
    ForwardingProbe,
    GatewayProbe,
    LinkProbe,
    Outside,
    RulesProbe,
    failed,
    judge_neighbour,
    not_applicable,
    passed,
)
from gateway.bfd.quicken import is_quick
from gateway.bfd.session import SessionConfig
from gateway.bfd.settings import HealthSettings, drain_grace
from gateway.bfd.targets import Target, TargetsProbe
from gateway.bfd.udp import Datagram, Listener, Sender
from gateway.small.loop import Loop
from tests.bfd_kit import eventually
from tests.ports import free_port

SECOND = 1_000_000
GOOD, BAD, SURE, NONE = passed("well"), failed("ill"), failed("dead", certain=True), not_applicable("not here")
PROBES = {"gateway": Diag.CONCATENATED_PATH_DOWN, "forwarding": Diag.PATH_DOWN}


def health() -> Health:
    return Health(PROBES, Hysteresis(fall=2 * SECOND, rise=5 * SECOND), 0)


def good() -> Health:
    subject = health()
    subject.record("gateway", GOOD, 0)
    subject.record("forwarding", GOOD, 0)
    assert subject.healthy
    return subject


def course(subject: Health, name: str, *results: Result, begin: int = 1) -> list[bool]:
    """What the health is after each of the results, one a second."""
    said = []
    for second, result in enumerate(results, begin):
        subject.record(name, result, second * SECOND)
        said.append(subject.healthy)
    return said


def test_unhealthy_until_every_probe_has_reported() -> None:
    subject = health()
    assert (subject.healthy, subject.reason) == (False, "not probed yet")
    subject.record("gateway", GOOD, 0)
    assert not subject.healthy
    subject.record("forwarding", NONE, 0)
    assert subject.healthy


def test_a_first_report_that_is_bad_is_waited_out() -> None:
    subject = health()
    subject.record("gateway", BAD, 0)
    subject.record("forwarding", GOOD, 0)
    assert (subject.healthy, subject.reason) == (False, "gateway: ill")
    assert course(subject, "gateway", *[GOOD] * 6) == [False] * 5 + [True]


def test_one_failure_is_forgiven_and_failing_for_a_while_is_not() -> None:
    assert course(good(), "gateway", BAD, GOOD, BAD, BAD, GOOD) == [True] * 5
    subject = good()
    assert course(subject, "gateway", BAD, BAD, BAD) == [True, True, False]
    assert (subject.reason, subject.diag, subject.since) == (
        "gateway: ill",
        Diag.CONCATENATED_PATH_DOWN,
        3 * SECOND,
    )


def test_what_is_certain_is_not_waited_for() -> None:
    subject = good()
    assert course(subject, "forwarding", SURE) == [False]
    assert subject.diag is Diag.PATH_DOWN


def test_recovery_takes_a_while_without_any_failure() -> None:
    subject = good()
    course(subject, "gateway", SURE)
    assert course(subject, "gateway", *[GOOD] * 4, BAD, *[GOOD] * 6, begin=2) == [False] * 10 + [True]
    assert subject.reason == ""


def test_two_failures_end_when_both_have_ended() -> None:
    subject = good()
    subject.record("gateway", SURE, SECOND)
    subject.record("forwarding", SURE, SECOND)
    course(subject, "gateway", *[GOOD] * 20, begin=2)
    assert (subject.healthy, subject.reason) == (False, "forwarding: dead")
    assert course(subject, "forwarding", *[GOOD] * 6, begin=22) == [False] * 5 + [True]


# What probes make of the kernel's answers


@pytest.mark.parametrize(
    ("neighbour", "verdict"),
    [
        (None, Verdict.FAIL),
        (Neighbour(netlink.INCOMPLETE, 1), Verdict.FAIL),
        (Neighbour(netlink.FAILED, 3), Verdict.FAIL),
        (Neighbour(netlink.PROBE, 1), Verdict.FAIL),
        (Neighbour(netlink.PROBE, 0), Verdict.PASS),
        (Neighbour(netlink.REACHABLE, 0), Verdict.PASS),
        (Neighbour(netlink.STALE, 0), Verdict.PASS),
        (Neighbour(netlink.DELAY, 0), Verdict.PASS),
        (Neighbour(netlink.PERMANENT, 0), Verdict.NOT_APPLICABLE),
        (Neighbour(netlink.NOARP, 0), Verdict.NOT_APPLICABLE),
    ],
)
def test_neighbour_states(neighbour: Neighbour | None, verdict: Verdict) -> None:
    assert judge_neighbour("192.0.2.1", neighbour).verdict is verdict


class Kernel(netlink.Netlink):
    """Answers as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.way: Egress | None = Egress(7, "127.0.0.9")
        self.links = {7: Link("net1", netlink.IFF_UP | netlink.IFF_RUNNING)}
        self.state = Neighbour(netlink.REACHABLE, 0)
        self.priorities = {0, 32766}
        self.chains: dict[str, int] = {}

    def egress(self, destination: str) -> Egress | None:
        return self.way

    def link(self, interface: int) -> Link | None:
        return self.links.get(interface)

    def neighbour(self, interface: int, address: str) -> Neighbour | None:
        return self.state

    def rule_priorities(self, family: int) -> set[int]:
        return self.priorities


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


def verdicts(kernel: Kernel, required: bool = True) -> Iterator[tuple[Verdict, Verdict]]:
    """What the probes of the link and the gateway say, round by round; and whether the failure is certain."""
    outside = Outside(kernel, socket.AF_INET, required=required)
    link, gateway = LinkProbe(outside), GatewayProbe(outside, lambda family, interface, gateway: None)
    while True:
        link.start(0)
        gateway.start(0)
        results = link.finish(0), gateway.finish(0)
        assert results[0] is not None
        assert results[1] is not None
        yield results[0].verdict, results[1].verdict


def test_the_way_out(kernel: Kernel) -> None:
    rounds = verdicts(kernel)
    assert next(rounds) == (Verdict.PASS, Verdict.PASS)
    kernel.state = Neighbour(netlink.FAILED, 3)
    assert next(rounds) == (Verdict.PASS, Verdict.FAIL)
    kernel.links[7] = Link("net1", netlink.IFF_UP | netlink.IFF_RUNNING | netlink.IFF_NOARP)
    assert next(rounds) == (Verdict.PASS, Verdict.NOT_APPLICABLE)
    kernel.links[7] = Link("net1", netlink.IFF_UP)
    assert next(rounds)[0] is Verdict.FAIL
    kernel.links[7] = Link("net1", 0)
    kernel.way = None
    assert next(rounds) == (Verdict.FAIL, Verdict.FAIL), "its routes are gone with it, and the interface is remembered"
    del kernel.links[7]
    assert next(rounds)[0] is Verdict.FAIL
    kernel.way = Egress(7, None)
    kernel.links[7] = Link("tun0", netlink.IFF_UP | netlink.IFF_RUNNING)
    assert next(rounds) == (Verdict.PASS, Verdict.NOT_APPLICABLE)


@pytest.mark.parametrize(("required", "verdict"), [(True, Verdict.FAIL), (False, Verdict.NOT_APPLICABLE)])
def test_no_way_out_from_the_beginning(kernel: Kernel, required: bool, verdict: Verdict) -> None:
    kernel.way = None
    assert next(verdicts(kernel, required)) == (Verdict.NOT_APPLICABLE, verdict)


@pytest.mark.parametrize(
    ("base", "delay", "quick"), [(666, 0, True), (667, 0, False), (666, 5, False), (30000, 5, False)]
)
def test_whether_the_kernel_asks_often_enough(tmp_path: Path, base: int, delay: int, quick: bool) -> None:
    assert not is_quick(socket.AF_INET, "net1", SECOND, tmp_path)
    timers = tmp_path / "ipv4" / "neigh" / "net1"
    timers.mkdir(parents=True)
    (timers / "base_reachable_time_ms").write_text(f"{base}\n")
    (timers / "delay_first_probe_time").write_text(f"{delay}\n")
    assert is_quick(socket.AF_INET, "net1", SECOND, tmp_path) is quick


def test_forwarding(tmp_path: Path) -> None:
    (tmp_path / "ipv4").mkdir()
    (tmp_path / "ipv6/conf/all").mkdir(parents=True)
    for first, second, verdict in (("1", "1", Verdict.PASS), ("0", "1", Verdict.FAIL), ("1", "0", Verdict.FAIL)):
        (tmp_path / "ipv4/ip_forward").write_text(first + "\n")
        (tmp_path / "ipv6/conf/all/forwarding").write_text(second + "\n")
        result = ForwardingProbe([socket.AF_INET, socket.AF_INET6], tmp_path).finish(0)
        assert result is not None
        assert result.verdict is verdict


def test_rules_that_stood_at_the_start_must_go_on_standing(kernel: Kernel) -> None:
    kernel.priorities |= {1001, 1002, 1003, 1004}
    probe = RulesProbe(kernel, [socket.AF_INET])
    first = probe.finish(0)
    assert first is not None
    assert first.verdict is Verdict.PASS
    kernel.priorities.remove(1002)
    second = probe.finish(0)
    assert second is not None
    assert (second.verdict, second.detail) == (Verdict.FAIL, "missing: ipv4 rule 1002")


def test_rules_that_never_were_are_not_missed(kernel: Kernel) -> None:
    result = RulesProbe(kernel, [socket.AF_INET]).finish(0)
    assert result is not None
    assert result.verdict is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize("text", ["icmp:10.0.0.1", "tcp:10.0.0.1:443", "icmp:fd00::1", "tcp:[fd00::1]:53"])
def test_targets_are_written_as_they_are_read(text: str) -> None:
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize("text", ["", "10.0.0.1", "icmp:host", "tcp:10.0.0.1", "tcp:10.0.0.1:0", "udp:10.0.0.1:1"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(ValueError, match="icmp:ADDRESS"):
        Target.parse(text)


def test_a_target_answers_by_accepting_or_by_refusing() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        probe = TargetsProbe([Target("127.0.0.1", port)], lambda line: None)
        probe.start(0)
        eventually(lambda: probe.finish(0) == passed("1 of 1 answer"), "it is accepted")
    probe.start(0)
    eventually(lambda: probe.finish(0) == passed("1 of 1 answer"), "it is refused")


# Settings


def test_settings() -> None:
    plain = HealthSettings.read({})
    assert (plain.enabled, plain.interval) == (True, SECOND)
    assert plain.hysteresis == Hysteresis(2 * SECOND, 5 * SECOND)
    assert (plain.gateways, plain.targets) == ({}, ())
    chosen = HealthSettings.read(
        {
            "NATGW_BFD_HEALTH": "off",
            "NATGW_BFD_HEALTH_INTERVAL": "200",
            "NATGW_BFD_HEALTH_FALL": "400",
            "NATGW_BFD_HEALTH_RISE": "600",
            "NATGW_BFD_HEALTH_GATEWAYS": "10.0.0.1,FD00::1",
            "NATGW_BFD_HEALTH_TARGETS": "icmp:10.0.0.9, tcp:10.0.0.8:80",
        }
    )
    assert (chosen.enabled, chosen.interval, chosen.hysteresis) == (False, 200_000, Hysteresis(400_000, 600_000))
    assert chosen.gateways == {socket.AF_INET: "10.0.0.1", socket.AF_INET6: "fd00::1"}
    assert chosen.targets == (Target("10.0.0.9", None), Target("10.0.0.8", 80))
    assert (drain_grace({}), drain_grace({"NATGW_BFD_DRAIN": "0"})) == (25 * SECOND, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATGW_BFD_HEALTH", "yes"),
        ("NATGW_BFD_HEALTH_INTERVAL", "99"),
        ("NATGW_BFD_HEALTH_FALL", "999"),
        ("NATGW_BFD_HEALTH_RISE", "0"),
        ("NATGW_BFD_HEALTH_GATEWAYS", "router"),
        ("NATGW_BFD_HEALTH_TARGETS", "10.0.0.1"),
        ("NATGW_BFD_HEALTH_TARGETS", "icmp:10.0.0.1,"),
    ],
)
def test_settings_that_cannot_work_are_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        HealthSettings.read({name: value})


# Sessions


class Switch:
    """A probe that says what it was told to say."""

    name = "gateway"

    def __init__(self) -> None:
        self.result = GOOD

    def start(self, now: int) -> None:
        return

    def finish(self, now: int) -> Result:
        return self.result


class Cable:
    """Between two speakers: what one sends the other has at once. The kernel may put that off, and time is ours."""

    port = 3784

    def __init__(self, local: str, under_way: dict[str, deque[Datagram]]) -> None:
        self._local = local
        self._under_way = under_way

    def listeners(self) -> list[Listener]:
        return [Ear(self._under_way[self._local])]

    def sender(self, local: str, remote: str) -> Sender:
        return Mouth(local, remote, self._under_way[remote])

    def locals_for(self, remote: str) -> list[str]:
        return [self._local]


class Ear:
    def __init__(self, waiting: deque[Datagram]) -> None:
        self._waiting = waiting
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # for the loop, which never turns here

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> Datagram | None:
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        self._socket.close()


class Mouth:
    def __init__(self, local: str, remote: str, target: deque[Datagram]) -> None:
        self._local, self._remote, self._target = local, remote, target

    def send(self, payload: bytes) -> None:
        self._target.append(Datagram(payload, self._remote, self._local, 255))

    def close(self) -> None:
        pass


OURS, THEIRS = "127.88.1.1", "127.88.1.2"


class World:
    """Two speakers with a cable between them, the health of one of them in our hand; time is ours, too."""

    def __init__(self) -> None:
        self.now = 0
        self.loop = Loop(lambda: self.now)
        fast = SessionConfig(100_000, 100_000, 3)
        under_way: dict[str, deque[Datagram]] = {OURS: deque(), THEIRS: deque()}
        self.ours = Beacon(self.loop, Cable(OURS, under_way), fast, ["ours"], grace=5 * SECOND)
        self.theirs = Beacon(self.loop, Cable(THEIRS, under_way), fast, ["theirs"])
        self.switch = Switch()
        self.log: list[str] = []
        health = Health({"gateway": Diag.CONCATENATED_PATH_DOWN}, Hysteresis(2 * SECOND, 5 * SECOND), 0)
        self.watch = HealthWatch(
            self.loop,
            self.ours.table,
            self.ours.withdrawal,
            health=health,
            probes=[self.switch],
            interval=SECOND,
            log=self.log.append,
        )
        self.ours.table.allow(THEIRS, 0)
        self.theirs.table.allow(OURS, 0)

    def run(self, seconds: float) -> None:
        """Let this much time pass, each turn up to the next timer."""
        end = self.now + int(seconds * SECOND)
        while self.now < end:
            due = [at for one in self.loop._participants if (at := one.next_timer()) is not None]
            self.now = max(self.now, min([*due, end]))
            # What was sent in one turn is there in the next, before any time passes. The loop itself would wait.
            for _ in range(3):
                for participant in self.loop._participants:
                    participant.tick(self.now)

    def states(self) -> list[State]:
        return [entry.session.state for side in (self.ours, self.theirs) for entry in side.table.entries]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("NATGW_RUN_DIR", str(tmp_path))
    made = World()
    yield made
    made.close()


UP = [State.UP, State.UP]


def test_sessions_are_up_only_while_healthy(world: World) -> None:
    world.run(4)
    assert world.states() == UP
    world.switch.result = BAD
    world.run(2)
    assert world.states() == UP, "the failure is not old enough"
    world.run(2)
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    (entry,) = world.theirs.table.entries
    assert (entry.session.diag, entry.session.remote.diag) == (
        Diag.DETECTION_TIME_EXPIRED,
        Diag.CONCATENATED_PATH_DOWN,
    ), "the peer noticed by our silence, and heard the reason afterwards"
    world.switch.result = GOOD
    world.run(5)
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    world.run(4)
    assert world.states() == UP
    assert world.log == ["unhealthy: not probed yet", "healthy", "unhealthy: gateway: ill", "healthy"]


def test_a_gateway_that_never_was_healthy_never_says_up(world: World) -> None:
    world.switch.result = BAD
    world.run(10)
    assert State.UP not in world.states()


def test_a_session_made_meanwhile_is_held_too(world: World) -> None:
    world.run(4)
    world.switch.result = SURE
    world.run(2)
    world.ours.commands.execute("session all reset", world.now)
    world.run(5)
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]


def test_what_is_held_by_hand_stays_held(world: World) -> None:
    world.run(4)
    world.ours.commands.execute("session all state down 5", world.now)
    world.switch.result = SURE
    world.run(2)
    world.switch.result = GOOD
    world.run(10)
    assert world.states()[0] is State.DOWN
    world.ours.commands.execute("session all state up", world.now)
    world.run(4)
    assert world.states() == UP


def test_health_and_drain_do_not_undo_each_other(world: World) -> None:
    world.run(4)
    world.switch.result = SURE
    world.run(2)
    world.ours.drain.begin()
    world.switch.result = GOOD
    world.run(10)
    assert world.watch.health.healthy
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    world.switch.result = SURE
    world.run(2)
    world.ours.drain.cancel()
    world.run(5)
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    world.switch.result = GOOD
    world.run(10)
    assert world.states() == UP


# Draining


def test_a_drain_waits_for_the_traffic(world: World) -> None:
    world.run(4)
    drain = world.ours.drain
    count = 0
    drain._count = lambda: count
    drain.begin()
    begun = world.now
    while drain.phase.value != "done":
        if world.now < begun + 2 * SECOND:
            count += 1
        world.run(0.1)
    assert drain.told is not None
    assert 0.2 * SECOND <= drain.told <= 0.6 * SECOND
    assert drain.moved is not None
    assert 2 * SECOND <= drain.moved <= 2.3 * SECOND
    assert world.now - begun <= 3.5 * SECOND
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    world.run(60)
    assert world.states() == [State.ADMIN_DOWN, State.DOWN]
    drain.cancel()
    world.run(4)
    assert world.states() == UP


def test_a_drain_ends_with_the_grace_while_traffic_stays(world: World) -> None:
    world.run(4)
    drain = world.ours.drain
    drain._count = lambda: world.now
    drain.begin()
    world.run(4.9)
    assert drain.phase.value == "traffic is moving"
    world.run(0.3)
    assert (drain.phase.value, drain.moved) == ("done", None)


def test_a_drain_without_sessions_that_are_up_is_over_at_once(world: World) -> None:
    world.ours.drain.begin()
    assert world.ours.drain.phase.value == "done"


def test_a_peer_that_hears_nothing_of_us_is_kept_awake(world: World) -> None:
    world.run(4)
    before = dict(world.theirs.table.discarded)
    world.ours.drain.begin()
    world.run(0.19)
    grown = {reason.value: times - before[reason] for reason, times in world.theirs.table.discarded.items()}
    assert 9 <= grown["length"] <= 10, "an empty datagram every 20 ms"
    assert world.states()[1] is State.UP, "and none of them changed anything"
