"""What Prometheus reads of the supervisor: the names and labels of Kube-OVN's alerts, and a few of our own."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.bfd.health import Health, Verdict
from gateway.bfd.ladder import CIRCUIT_OPEN, UP, Ladder, Step
from gateway.bfd.speaker import Speaker
from gateway.small import exposition
from gateway.small.exposition import Family


class Counters:
    """What has to be counted as it happens. Times are seconds of any clock that does not jump."""

    def __init__(self) -> None:
        self.attempts: dict[tuple[str, str], int] = {}
        self._none_up_since: float | None = None

    def step(self, step: Step) -> None:
        """A step was tried, and its result recorded."""
        key = (step.action, "success" if step.episode.last_result == "success" else "error")
        self.attempts[key] = self.attempts.get(key, 0) + 1

    def observe(self, up: int, now: float) -> None:
        """So many sessions are Up."""
        if up:
            self._none_up_since = None
        elif self._none_up_since is None:
            self._none_up_since = now

    def none_up_seconds(self, now: float) -> float:
        """For how long no session has been Up."""
        return 0.0 if self._none_up_since is None else now - self._none_up_since


def render(
    ladder: Ladder, counters: Counters, speaker: Speaker, *, health: Health | None, draining: bool, now: float
) -> str:
    """All metrics in the text exposition format; those of the health only where it is watched."""
    episodes = list(ladder.episodes.values())
    pairs = [({"local": episode.local, "remote": episode.remote}, episode) for episode in episodes]
    sessions = [({"local": entry.local, "remote": entry.remote}, entry.session) for entry in speaker.table.entries]
    attempts = [
        ({"action": action, "result": result}, times) for (action, result), times in sorted(counters.attempts.items())
    ]
    families: list[Family] = [
        (
            "kube_ovn_bfdd_expected_sessions",
            "gauge",
            "Number of BFD sessions that should exist.",
            [({}, len(episodes))],
        ),
        (
            "kube_ovn_bfdd_up_sessions",
            "gauge",
            "Number of expected BFD sessions that are Up.",
            [({}, sum(episode.state == UP for episode in episodes))],
        ),
        ("kube_ovn_bfdd_recovery_attempts_total", "counter", "Number of recovery steps taken.", attempts),
        (
            "kube_ovn_bfdd_recovery_phase",
            "gauge",
            "1 for the phase that the recovery of a session is in.",
            [({**labels, "phase": episode.phase}, 1) for labels, episode in pairs],
        ),
        (
            "kube_ovn_bfdd_session_zero_seconds",
            "gauge",
            "Seconds for which no expected session has been Up.",
            [({}, counters.none_up_seconds(now))],
        ),
        (
            "kube_ovn_bfdd_child_restarts_total",
            "counter",
            "How often the speaker was started again, or its sockets were opened anew.",
            [({}, ladder.rebuilds)],
        ),
        (
            "kube_ovn_bfdd_child_circuit_open",
            "gauge",
            "Always 0: the speaker is never given up.",
            [({}, 0)],
        ),
        (
            "kube_ovn_bfdd_circuit_open",
            "gauge",
            "Whether the recovery of a session has slowed down to hourly steps.",
            [(labels, episode.phase == CIRCUIT_OPEN) for labels, episode in pairs],
        ),
        (
            "natgw_bfd_session_state",
            "gauge",
            "State of a session as on the wire: 0 AdminDown, 1 Down, 2 Init, 3 Up.",
            [(labels, session.state) for labels, session in sessions],
        ),
        (
            "natgw_bfd_packets_sent_total",
            "counter",
            "BFD Control packets sent.",
            [(labels, session.packets_sent) for labels, session in sessions],
        ),
        (
            "natgw_bfd_packets_received_total",
            "counter",
            "BFD Control packets accepted.",
            [(labels, session.packets_received) for labels, session in sessions],
        ),
        (
            "natgw_bfd_packets_discarded_total",
            "counter",
            "BFD Control packets thrown away, by the rule that says so.",
            [({"reason": reason.value}, times) for reason, times in speaker.table.discarded.items()],
        ),
        (
            "natgw_bfd_send_errors_total",
            "counter",
            "BFD Control packets that could not be sent.",
            [({}, speaker.send_errors)],
        ),
        ("natgw_bfd_draining", "gauge", "Whether traffic is sent elsewhere on purpose.", [({}, draining)]),
        *(_health(health) if health is not None else ()),
    ]
    return exposition.text(families)


def _health(health: Health) -> Iterable[Family]:
    said = {name: result.verdict for name, result in health.results.items() if result is not None}
    return (
        (
            "natgw_bfd_healthy",
            "gauge",
            "Whether the gateway can do its job; while not, its sessions are held Down.",
            [({}, health.healthy)],
        ),
        (
            "natgw_bfd_health",
            "gauge",
            "1 for a probe that passes, 0 for one that fails; absent where it does not apply.",
            [
                ({"probe": name}, verdict is Verdict.PASS)
                for name, verdict in said.items()
                if verdict is not Verdict.NOT_APPLICABLE
            ],
        ),
    )
