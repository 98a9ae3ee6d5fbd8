"""The observer of an egress gateway's pod: reads its configuration, watches, logs, and answers Prometheus."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from gateway.observer import config, interfaces, metrics, options, probe
from gateway.observer.config import Config, ConfigError
from gateway.observer.flow import Flow, Identity, Recorder
from gateway.observer.limit import TokenBucket
from gateway.observer.metrics import CONFIG, INTERFACE, Tally, add
from gateway.observer.options import Options
from gateway.observer.output import Complaints, RecordWriter, fail, write_if_possible
from gateway.observer.source import ConntrackSource
from gateway.observer.table import FlowTable
from gateway.small import exposition, http
from gateway.small.loop import Loop, on_signals
from gateway.small.server import Server, listen_tcp

PROGRAM = "vpc-egress-gateway-observer"
RELOAD = 2_000_000
"""Microseconds between looks at the configuration."""
OUTPUT_RETRY = 20_000
"""Microseconds until a reader of the log who was behind is looked at again."""
STDOUT = 1
PROC_NET_DEV = Path("/proc/self/net/dev")


class Observer:
    """Everything that an egress gateway's observer does, as a participant of ``loop``.

    ``write`` puts records where the log goes: all or none of what it is given, see ``write_if_possible``.
    Raises OSError and ConfigError when there is no configuration to begin with.
    """

    def __init__(
        self,
        loop: Loop,
        wanted: Options,
        environment: Mapping[str, str],
        write: Callable[[bytes], bool],
    ) -> None:
        self.tally = Tally()
        self.respond = http.responder({"/healthz": lambda: "ok\n", "/metrics": self.metrics})
        """The reply to an HTTP request."""
        self._loop = loop
        self._options = wanted
        self._config = config.parse(Path(wanted.config).read_bytes())
        self._identity = Identity(
            self._config.namespace,
            self._config.name,
            environment.get("POD_NAME", ""),
            environment.get("NODE_NAME", ""),
        )
        self._recorder = Recorder(self._identity)
        self._writer = RecordWriter(write, self.tally)
        self._complaints = Complaints(self.tally)
        self._interfaces = interfaces.InterfaceSums()
        self._interface_names: dict[str, str] = {}
        self.table = FlowTable(self._happened)
        self._next_reload = loop.clock() + RELOAD
        # The source is served first, so that what it tells in a turn is written in that turn.
        self._source = ConntrackSource(loop, self.table, self.tally, self._complaints)
        loop.add(self)
        self._apply(self._config)

    def next_timer(self) -> int:
        """When the configuration is read next, or the log's reader looked at again."""
        return min(self._next_reload, self._loop.clock() + OUTPUT_RETRY) if self._writer else self._next_reload

    def tick(self, now: int) -> None:
        """Write the log; read the configuration every two seconds."""
        self._writer.flush()
        if now >= self._next_reload:
            self._next_reload = now + RELOAD
            self._reload()

    # Configuration

    def _reload(self) -> None:
        try:
            fresh = config.parse(Path(self._options.config).read_bytes())
            if (fresh.namespace, fresh.name) != (self._identity.namespace, self._identity.name):
                raise ConfigError("namespace and name of a gateway cannot change")
        except (OSError, ConfigError) as error:
            add(self.tally.reloads, "error")
            self._complaints.say(CONFIG, str(error))
            return
        self._complaints.well(CONFIG)
        if fresh != self._config:
            self._apply(fresh)

    def _apply(self, fresh: Config) -> None:
        if fresh.flow_metrics != self._config.flow_metrics or not fresh.watches_flows:
            # What was counted before would not fit what is counted from now on.
            self._source.close()
            self.table.clear()
        self._config = fresh
        self._limit = TokenBucket(fresh.log.rate, fresh.log.burst)
        add(self.tally.reloads, "success")
        if fresh.watches_flows:
            self._source.open()

    # The log

    def _happened(self, event: str, flow: Flow) -> None:
        log = self._config.log
        if not log.enabled or event not in log.events or not log.filters.let_through(flow):
            return
        if not self._limit.take(self._loop.clock()):
            add(self.tally.drops, "rate_limit")
            return
        self._writer.put(event, self._recorder.line(event, flow, time.time_ns()))

    # What Prometheus reads

    def metrics(self) -> str:
        """All metrics as they are now."""
        self._read_interfaces()
        return exposition.text(
            metrics.families(self._identity, self.tally, self.table, self._interfaces, self._config.flow_metrics)
        )

    def _read_interfaces(self) -> None:
        self.tally.up[INTERFACE] = False
        if not self._config.interface_metrics:
            self._interfaces.clear()
            return
        try:
            if not self._interface_names:
                status = Path(self._options.network_status).read_text()
                self._interface_names = interfaces.resolve(status, self._config.external_network)
            counters = interfaces.parse_proc_net_dev(PROC_NET_DEV.read_text())
            self._interfaces.update(self._interface_names, counters)
        except (OSError, ValueError, RecursionError) as error:
            # Perhaps they have other names by now.
            self._interface_names = {}
            self.tally.errors[INTERFACE, "collect"] += 1
            self._complaints.say(INTERFACE, str(error))
        else:
            self.tally.up[INTERFACE] = True
            self._complaints.well(INTERFACE)


def main(argv: Sequence[str]) -> int:
    """``vpc-egress-gateway-observer``. Ends with 0 after a signal, with 1 when something needed cannot be had."""
    try:
        wanted = options.parse(argv)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    if wanted.health_check:
        return probe.main(())
    loop = Loop()
    on_signals(loop, loop.stop)
    try:
        observer = Observer(loop, wanted, os.environ, partial(write_if_possible, STDOUT))
        Server(loop, listen_tcp(wanted.listen_address), observer.respond)
    except (OSError, ValueError) as error:
        return fail(PROGRAM, error)
    loop.run()
    return 0
