"""The speaker of a VpcEgressGateway pod: keeps the expected sessions alive and answers probes and Prometheus.

Kube-OVN's program of this name starts OpenBFDD as a child, watches it, and restarts it to repair a session. Here the
speaker is part of the program, which repairs itself, and ``live`` is true for as long as anybody answers. What the
outside sees is the same: the command line, the socket with its JSON, the state file, ``/livez`` and ``/metrics``.
``guard`` is the process above this one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gateway.bfd import control, healthwatch, metrics
from gateway.bfd.beacon import Beacon
from gateway.bfd.commands import STATE_NAMES
from gateway.bfd.guard import Ward
from gateway.bfd.healthwatch import HealthWatch
from gateway.bfd.ladder import REBUILD, RESET, UP, ZERO_TIME, Ladder, Observed, Pair, Step, Timing
from gateway.bfd.packet import State
from gateway.bfd.session import StateChange
from gateway.bfd.settings import HealthSettings, Settings, drain_grace
from gateway.bfd.table import Entry
from gateway.bfd.udp import CONTROL_PORT, MULTIHOP_PORT, UdpNetwork
from gateway.small import http
from gateway.small.log import log
from gateway.small.loop import Loop, on_signals
from gateway.small.server import Server, line_protocol, listen_tcp, listen_unix

RECONCILE = 5_000_000
"""Microseconds between looks at the sessions."""


class Supervisor:
    """Keeps the expected sessions alive, as a participant of the beacon's loop; answers probes and Prometheus."""

    def __init__(self, settings: Settings, beacon: Beacon, wall: Callable[[], float] = time.time) -> None:
        self.ladder = Ladder(settings.pairs(), Timing.of(settings.session))
        self.counters = metrics.Counters()
        self.health: HealthWatch | None = None
        """None while health is not watched."""
        self.respond = http.responder({"/livez": lambda: "", "/metrics": self._metrics})
        """The reply to an HTTP request."""
        self._settings = settings
        self._wall = wall
        self._beacon = beacon
        self._saved = ""
        self._next_reconcile = 0
        self._load()
        self._replay()
        self.reconcile()
        beacon.observers.append(self._changed)
        beacon.loop.add(self)

    # The loop

    def next_timer(self) -> int | None:
        """When the sessions are looked at next."""
        return self._next_reconcile

    def tick(self, now: int) -> None:
        """Look at the sessions every five seconds."""
        if now >= self._next_reconcile:
            self._next_reconcile = now + RECONCILE
            self.reconcile()

    def started_again(self) -> None:
        """The process before this one was lost: that counts as the restart of a child."""
        self.ladder.rebuilds += 1

    def reconcile(self) -> None:
        """Take notice of the sessions and try one step of repair if one is due."""
        if not self._beacon.speaker.listening:
            # The sockets could not be opened when they were last tried to be; nothing works until they are.
            with suppress(OSError):
                self._beacon.speaker.rebuild()
        observed = {
            (entry.local, entry.remote): Observed(
                STATE_NAMES[entry.session.state],
                entry.session.held is not None or entry.session.suspended or entry.session.state is State.ADMIN_DOWN,
            )
            for entry in self._beacon.table.entries
        }
        step = self.ladder.plan(observed, self._wall())
        if step is not None:
            self._try(step)
        self.counters.observe(sum(episode.state == UP for episode in self.ladder.episodes.values()), self._uptime())
        self._save()

    def _uptime(self) -> float:
        return self._beacon.loop.clock() / 1_000_000

    def _changed(self, entry: Entry, change: StateChange) -> None:
        """Do not let status and metrics lag behind."""
        self._next_reconcile = self._beacon.loop.clock()

    def _try(self, step: Step) -> None:
        pair = (step.episode.local, step.episode.remote)
        try:
            if step.action == RESET:
                entry = self._beacon.table.find(*pair)
                if entry is not None:
                    self._beacon.table.reset(entry, self._beacon.loop.clock())
            elif step.action == REBUILD:
                self._beacon.speaker.rebuild()
                self._replay()
            else:
                self._replay()
        except OSError as error:
            self.ladder.record(step, error.strerror or str(error))
        else:
            self.ladder.record(step, None)
        self.counters.step(step)
        log(f"repair of local={pair[0]} remote={pair[1]}: {step.action}: {step.episode.last_result}")

    def _replay(self) -> None:
        """Configure the beacon as if it had just been started."""
        self._beacon.table.defaults = self._settings.session
        self._beacon.commands.log_types["command"] = False
        for peer in self._settings.peer_ips:
            self._beacon.table.allow(peer, self._beacon.loop.clock())

    # What is told

    def status(self) -> dict[str, Any]:
        """The status in the words of Kube-OVN's supervisor. The child that it speaks of is this process, as well as its
        sockets, which are opened anew where that one restarts its child."""
        return {
            "Live": True,
            "Ready": self._ready(),
            "Sessions": [
                {**episode.status(), "State": self._state(pair)} for pair, episode in self.ladder.episodes.items()
            ],
            "ControlFailures": 0,
            "LastControlError": "",
            "ChildRestarts": self.ladder.rebuilds,
            "ChildRecoveryAttempts": 0,
            "ChildNextRetry": ZERO_TIME,
            "ChildCircuitOpen": False,
            # Not of Kube-OVN's program, whose readers take no offence at more fields.
            "Health": None if self.health is None else self.health.status(self._beacon.loop.clock()),
            "Drain": self._beacon.drain.status(),
        }

    def answer(self, word: str) -> str:
        """The reply to a line on the socket."""
        error = ""
        more: dict[str, str] = {}
        if word == "ready" and not self._ready():
            error = "not every expected BFD session is Up"
        elif word == "drain":
            self._beacon.drain.begin()
        elif word == "undrain":
            self._beacon.drain.cancel()
        elif word == "metrics":
            more["metrics"] = self._metrics()
        elif word not in ("live", "ready", "status"):
            error = f"unknown request {word!r}"
        return json.dumps({"status": self.status(), "error": error, **more}) + "\n"

    def _metrics(self) -> str:
        health = None if self.health is None else self.health.health
        draining = self._beacon.drain.active
        return metrics.render(
            self.ladder,
            self.counters,
            self._beacon.speaker,
            health=health,
            draining=draining,
            now=self._uptime(),
        )

    def _state(self, pair: Pair) -> str:
        entry = self._beacon.table.find(*pair)
        return "" if entry is None else STATE_NAMES[entry.session.state]

    def _ready(self) -> bool:
        return all(self._state(pair) == UP for pair in self.ladder.episodes)

    # The state file

    def _load(self) -> None:
        """Without its past the supervisor works as well, so a file that cannot be used is only told of."""
        path = self._settings.state_path
        try:
            self.ladder.load(json.loads(path.read_text()))
        except FileNotFoundError:
            return
        except OSError as error:
            log(f"cannot read the state in {path}: {error.strerror}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log(f"the state in {path} is of no use and put aside: {error!r}")
            with suppress(OSError):
                path.replace(f"{path}.corrupt")

    def _save(self) -> None:
        """Replace the file when there is something new, without waiting for the disk: the timers of all sessions would
        wait too, and a state that is lost with its node is of no use to the next one."""
        text = json.dumps(self.ladder.dump())
        if text == self._saved:
            return
        path = self._settings.state_path
        fresh = path.with_name(f".{path.name}.new")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w") as file:
                file.write(text)
            fresh.replace(path)
        except OSError as error:
            log(f"cannot save the state to {path}: {error.strerror}")
        else:
            self._saved = text


def run(environment: Mapping[str, str], ward: Ward | None) -> None:
    """Be the supervisor until a signal comes. Raises OSError or ValueError when something needed cannot be had."""
    settings = Settings.read(environment)
    health = HealthSettings.read(environment)
    loop = Loop()
    on_signals(loop, lambda: beacon.end())  # noqa: PLW0108 -- there is no beacon yet
    probes = listen_unix(settings.socket_path)
    port = MULTIHOP_PORT if settings.multihop else CONTROL_PORT
    try:
        beacon = Beacon(
            loop,
            UdpNetwork(settings.pod_ips, port),
            settings.session,
            [control.DEFAULT_CHANNEL, control.ALTERNATE_CHANNEL],
            drain_grace(environment),
        )
        supervisor = Supervisor(settings, beacon)
        supervisor.health = healthwatch.watch(
            loop, beacon.table, beacon.withdrawal, addresses=settings.served(), settings=health, log=log
        )
        Server(loop, probes, line_protocol(supervisor.answer))
        Server(loop, listen_tcp(settings.metrics_address), supervisor.respond)
        if ward is not None:
            if ward.again:
                supervisor.started_again()
            loop.watch(ward.fileno(), loop.stop)
            ward.serving((local, remote, port) for local, remote in settings.pairs())
        log(f"speaking BFD from {', '.join(settings.pod_ips)} to {', '.join(settings.peer_ips)}")
        loop.run()
        beacon.close()
    finally:
        settings.socket_path.unlink(missing_ok=True)


def main(argv: Sequence[str], ward: Ward | None = None) -> int:
    """``kube-ovn-bfdd-supervisor run``. Ends with 0 after a signal, with 1 when something needed cannot be had."""
    try:
        run(os.environ, ward)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"kube-ovn-bfdd-supervisor run: {reason}", file=sys.stderr)
        return 1
    return 0
