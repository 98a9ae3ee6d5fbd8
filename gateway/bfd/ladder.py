"""When a session that should be Up is not: what to try, in which order, how often. Pure.

The steps, their names and their pace are those of Kube-OVN's bfdd supervisor, whose status and metrics operators and
tests read. What it does by restarting a child process is done here by opening the sockets anew, and no failure ends
this process: what a new process could do, this one can do itself.

Times are seconds since the epoch, because they outlive the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gateway.bfd.session import SessionConfig

NONE, REPLAY, RESET, REBUILD = "None", "ReplayConfiguration", "ResetSession", "RestartChild"
UP, GRACE, BACKOFF, CIRCUIT_OPEN = "Up", "Grace", "Backoff", "CircuitOpen"

BACKOFFS = (60.0, 300.0, 1800.0)
"""Seconds to wait after the first, second and third step."""
CIRCUIT = 3600.0
"""Seconds between the steps after those."""
ZERO_TIME = "0001-01-01T00:00:00Z"
"""How a Go program spells a time that is not set."""

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a session may be down before a first step, and must be Up before all is forgotten."""

    grace: float
    stable: float

    @staticmethod
    def of(config: SessionConfig) -> Timing:
        """At least a minute each; more where detection is slow."""
        detect = config.detect_mult * max(config.desired_min_tx, config.required_min_rx) / 1_000_000
        return Timing(max(60.0, 10 * detect), max(60.0, 2 * detect))


@dataclass(frozen=True, slots=True)
class Observed:
    """A session as it is: the name of its state, and whether somebody wants it not to be Up."""

    state: str
    deliberate: bool = False


@dataclass(slots=True)
class Episode:
    """What is remembered of one pair of addresses."""

    local: str
    remote: str
    state: str = ""
    phase: str = GRACE
    attempts: int = 0
    last_action: str = NONE
    last_result: str = ""
    next_retry: float | None = None
    failing_since: float | None = None
    stable_since: float | None = None
    circuit_until: float | None = None

    def status(self) -> dict[str, Any]:
        """The session's part of the status, in the words of the supervisor."""
        return {
            "Pair": {"Local": self.local, "Remote": self.remote},
            "State": self.state,
            "Phase": self.phase,
            "Attempts": self.attempts,
            "LastAction": self.last_action,
            "LastResult": self.last_result,
            "NextRetry": rfc3339(self.next_retry),
        }


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to try for one pair."""

    action: str
    episode: Episode


@dataclass(slots=True)
class Ladder:
    """The episodes of all expected pairs."""

    pairs: list[Pair]
    timing: Timing
    rebuilds: int = 0
    episodes: dict[Pair, Episode] = field(init=False)

    def __post_init__(self) -> None:
        self.episodes = {pair: Episode(*pair) for pair in self.pairs}

    @property
    def ready(self) -> bool:
        """Every expected session is Up."""
        return all(episode.state == UP for episode in self.episodes.values())

    def plan(self, observed: Mapping[Pair, Observed], now: float) -> Step | None:
        """Take notice of how the sessions are, and say what to try now: one step at a time, the first pair first."""
        none_up = not any(seen.state == UP for pair, seen in observed.items() if pair in self.episodes)
        step: Step | None = None
        for pair, episode in self.episodes.items():
            seen = observed.get(pair)
            episode.state = "" if seen is None else seen.state
            if episode.state == UP:
                self._up(episode, now)
            elif step is None:
                step = self._down(episode, seen, none_up, now)
        return step

    def record(self, step: Step, error: str | None) -> None:
        """Remember how a step went."""
        step.episode.last_result = "success" if error is None else error
        if step.action == REBUILD and error is None:
            self.rebuilds += 1

    def _up(self, episode: Episode, now: float) -> None:
        if episode.stable_since is None or episode.stable_since > now:
            episode.stable_since = now
        episode.phase = UP
        if now - episode.stable_since >= self.timing.stable:
            fresh = Episode(episode.local, episode.remote, UP, UP, stable_since=episode.stable_since)
            self.episodes[episode.local, episode.remote] = fresh

    def _down(self, episode: Episode, seen: Observed | None, none_up: bool, now: float) -> Step | None:
        episode.stable_since = None
        if seen is not None and seen.deliberate:
            # Held down by health or by hand: a repair would undo what somebody wants. The grace begins afterwards.
            episode.failing_since = None
            episode.phase = GRACE
            return None
        if episode.failing_since is None or episode.failing_since > now:
            episode.failing_since = now
        if now - episode.failing_since < self.timing.grace:
            episode.phase = GRACE
            return None
        if episode.next_retry is not None and now < episode.next_retry:
            # No wait is longer than this, unless the clock was set back.
            episode.next_retry = min(episode.next_retry, now + CIRCUIT)
            open_circuit = episode.circuit_until is not None and now < episode.circuit_until
            episode.phase = CIRCUIT_OPEN if open_circuit else BACKOFF
            return None
        action = _choose(episode.attempts, seen is not None, none_up)
        episode.attempts += 1
        episode.last_action, episode.last_result = action, "in_progress"
        if episode.attempts > len(BACKOFFS):
            episode.phase = CIRCUIT_OPEN
            episode.next_retry = episode.circuit_until = now + CIRCUIT
        else:
            episode.phase = BACKOFF
            episode.next_retry = now + BACKOFFS[episode.attempts - 1]
        return Step(action, episode)

    # The state file

    def dump(self) -> dict[str, Any]:
        """What outlives the process, ready for JSON."""
        episodes: dict[str, dict[str, Any]] = {}
        for episode in self.episodes.values():
            saved: dict[str, Any] = {"status": episode.status()}
            for key, value in _times(episode):
                if value is not None:
                    saved[key] = rfc3339(value)
            episodes[f"{episode.local}|{episode.remote}"] = saved
        return {"episodes": episodes, "childRestarts": self.rebuilds}

    def load(self, saved: Any) -> None:
        """Take up what ``dump`` left. Raises KeyError, TypeError or ValueError when it is not that."""
        rebuilds = int(saved["childRestarts"])
        loaded: dict[Pair, Episode] = {}
        for pair in self.pairs:
            entry = saved["episodes"].get("|".join(pair))
            if entry is not None:
                loaded[pair] = _loaded(pair, entry)
        self.episodes.update(loaded)
        self.rebuilds = rebuilds


def _choose(attempts: int, exists: bool, none_up: bool) -> str:
    if attempts == 1:
        return RESET if exists else REBUILD if none_up else REPLAY
    if attempts == 2:
        return REBUILD if none_up else RESET if exists else REPLAY
    return REPLAY


def _times(episode: Episode) -> Iterable[tuple[str, float | None]]:
    return (
        ("failingSince", episode.failing_since),
        ("stableSince", episode.stable_since),
        ("circuitUntil", episode.circuit_until),
    )


def _loaded(pair: Pair, entry: Any) -> Episode:
    status = entry["status"]
    return Episode(
        *pair,
        phase=str(status["Phase"]),
        attempts=int(status["Attempts"]),
        last_action=str(status["LastAction"]),
        last_result=str(status["LastResult"]),
        next_retry=_seconds(status["NextRetry"]),
        failing_since=_seconds(entry.get("failingSince")),
        stable_since=_seconds(entry.get("stableSince")),
        circuit_until=_seconds(entry.get("circuitUntil")),
    )


def rfc3339(seconds: float | None) -> str:
    """A time as JSON of the supervisor has it."""
    if seconds is None:
        return ZERO_TIME
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(text: str | None) -> float | None:
    return None if text is None or text == ZERO_TIME else datetime.fromisoformat(text).timestamp()
