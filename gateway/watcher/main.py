"""The flow watcher's process: standard input brings the spec's objects, an inherited socket the questions.

A line of input is a JSON object with ``eips``, ``fips``, ``dnats`` and ``snats`` (``Objects.of``), the whole spec; or
with two of these, ``gone`` and ``new``: what has changed. A question is the line ``report`` (JSON) or ``metrics``
(Prometheus' text). The process ends with its input, so it cannot outlive the daemon.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from gateway.observer import ctnetlink
from gateway.observer.flow import Flow, Recorder
from gateway.observer.limit import TokenBucket
from gateway.observer.metrics import CONNTRACK, Tally, add
from gateway.observer.output import Complaints, RecordWriter, fail, write_if_possible
from gateway.observer.source import ConntrackSource, Pace
from gateway.small.loop import Loop, on_signals
from gateway.small.server import Server, line_protocol, same_user_or_root
from gateway.watcher.accounts import Objects
from gateway.watcher.exposition import exposition
from gateway.watcher.hearing import Hearing
from gateway.watcher.ledger import Ledger
from gateway.watcher.logfile import LogFile
from gateway.watcher.options import LogOptions, identity
from gateway.watcher.privileges import NOBODY, give_up
from gateway.watcher.report import Rates, report

PROGRAM = "natgw-watcher"
PACE = Pace(every=2_000_000, share=100)
FLOODED = Pace(every=2_000_000, share=10)
"""Where nothing but dumps can tell what lives."""
NICE = 5
"""Verbs go first."""
STDIN, STDOUT = 0, 1
FLUSH = 20_000
"""Microseconds until a reader of the log who was behind is looked at again."""
ACCOUNTING, TRACKED = (Path("/proc/sys/net/netfilter", name) for name in ("nf_conntrack_acct", "nf_conntrack_count"))


class Watcher:
    """Everything that the flow watcher does, as a participant of ``loop``."""

    def __init__(self, loop: Loop, log: LogOptions | None) -> None:
        self.tally = Tally()
        self._loop = loop
        self._complaints = Complaints(self.tally)
        self._log = log
        self._writer: RecordWriter | LogFile | None = None
        if log is not None:
            self._recorder = Recorder(identity(os.environ))
            self._limit = TokenBucket(log.rate, log.burst)
            self._writer = _writer(log, self.tally)
        self.ledger = Ledger(self._happened)
        self._hearing = Hearing()
        groups = ctnetlink.END_GROUP if log is None else ctnetlink.LIFE_GROUPS
        self.source = ConntrackSource(
            loop, self.ledger, self.tally, self._complaints, groups=groups, pace=PACE, count=tracked
        )
        self._rates = Rates()
        self._dumps = 0
        self._received = b""
        loop.add(self)
        self.source.open()

    def next_timer(self) -> int | None:
        """When a reader of the log who was behind is looked at again."""
        return self._loop.clock() + FLUSH if self._writer else None

    def tick(self, now: int) -> None:
        """Write the log; with each dump an interval ends, and it is decided anew what to hear."""
        if self._writer is not None:
            self._writer.flush()
        self._hearing.heard(self.ledger.events["new"], now)
        self._hearing.dumping(PACE.share * self.source.dump_takes)
        if self.source.dumps != self._dumps:
            self._hearing.dumped(self.ledger.begun, max(PACE.every, PACE.share * self.source.dump_took), now)
            self._dumps = self.source.dumps
            self._rates.tick(self.ledger.accounts.sums() if self.ledger.moved else None, now / 1e6, time.time())
            self.ledger.moved = False
            self.ledger.sources.tick()
            self.ledger.destinations.tick()
        if self._log is None:
            hearing = self._hearing
            groups = ctnetlink.LIFE_GROUPS if hearing.on else ctnetlink.END_GROUP
            self.source.hear(groups, FLOODED if hearing.flooded else PACE)

    def _happened(self, event: str, flow: Flow) -> None:
        log, writer = self._log, self._writer
        if log is None or writer is None or not log.filter.lets_through(flow):
            return
        if not self._limit.take(self._loop.clock()):
            add(self.tally.drops, "rate_limit")
            return
        writer.put(event, self._recorder.line(event, flow, time.time_ns()))

    def read_input(self) -> None:
        """The daemon has written, or is gone."""
        data = os.read(STDIN, 1 << 20)
        if not data:
            self._loop.stop()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "gone" in said:
                self.ledger.change(Objects.of(said["gone"]), Objects.of(said["new"]))
            else:
                self.ledger.set(Objects.of(said))

    def answer(self, request: str) -> str:
        """The reply to a line on the socket."""
        errors = self.tally.errors
        collector = {
            "detail": "; ".join(f"{who}: {what}" for who, what in self._complaints.standing.items()),
            "accounting": accounting(),
            "lost": errors[CONNTRACK, "overrun"],
            "resyncs": self.source.dumps,
            "resyncSeconds": self.source.dump_took / 1e6,
        }
        log = {
            "enabled": self._log is not None,
            "records": sum(self.tally.records.values()),
            "drops": self.tally.drops,
        }
        if request == "metrics":
            return exposition(self.ledger, self._rates.at, collector, log)
        if request == "report":
            return report(self.ledger, self._rates, collector, log) + "\n"
        return '{"error":"a request is one of: report, metrics"}\n'


def _writer(log: LogOptions, tally: Tally) -> RecordWriter | LogFile:
    """Where the log goes: files that are rotated, or what a reader empties (a pipe, say) and may be slow to."""
    if log.to_file:
        path = Path(log.target)
        if not path.exists() or path.is_file():
            return LogFile(path, log.file_bytes, log.files, tally)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    else:
        descriptor = STDOUT
    return RecordWriter(partial(write_if_possible, descriptor), tally)


def tracked() -> int | None:
    """How many connections the kernel tracks in this namespace; None where that cannot be known."""
    try:
        return int(TRACKED.read_text())
    except (OSError, ValueError):
        return None


def accounting() -> bool:
    """Whether the kernel counts packets and bytes of connections that begin now."""
    try:
        return ACCOUNTING.read_text().strip() == "1"
    except OSError:
        return False


def _account() -> None:
    """Have the kernel count. Where /proc/sys is read-only somebody else has to; the report says whether it counts."""
    with suppress(OSError):
        ACCOUNTING.write_text("1")


def main(listener: int) -> int:
    """Watch until the input ends, or a signal comes; ``listener`` is the descriptor of a listening socket."""
    loop = Loop()
    on_signals(loop, loop.stop)
    try:
        log = LogOptions.of(os.environ)
        _account()
        os.nice(NICE)
        # Files are root's: with root's name alone, and none of root's privileges, they can be written and rotated.
        give_up(None if log is not None and log.to_file else NOBODY)
        watcher = Watcher(loop, log)
        listening = socket.socket(fileno=listener)
        Server(loop, listening, line_protocol(watcher.answer), same_user_or_root)
        loop.watch(STDIN, watcher.read_input)
    except (OSError, ValueError) as error:
        return fail(PROGRAM, error)
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
