"""What Prometheus reads of a NAT gateway, through prometheus_client: a collector over values that others keep.

Nothing is measured because somebody asks: the daemon's meters are in memory, and of the kernel there are procfs and
two dumps of tc. The traffic of EIPs and rules, ten thousands of samples, is told by the flow watcher in its own
process (``gateway.watcher.exposition``): made here it would take the writer's time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from api import metric_names as names
from api.traffic import PROC, asked, conntrack
from gateway.meters import METERS, Counter, Gauge, Histogram, Meter
from gateway.observer.interfaces import parse_proc_net_dev
from gateway.ports import Shaped
from gateway.service import Service
from gateway.traffic import Conntrack
from gateway.watcher.exposition import MOST_OBJECTS, Metric, text
from rules.qos import classes
from rules.spec import EipLimit, Limit
from rules.tc import ClassKey

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

Values = Iterable[tuple[Sequence[str], float]]
ShapedReader = Callable[[Iterable[ClassKey]], Mapping[ClassKey, Shaped]]


class GatewayCollector(Collector):
    """All metrics of one gateway; each ``collect`` is one look. For any thread."""

    def __init__(self, service: Service, shaped: ShapedReader, proc: Path = PROC) -> None:
        self._service = service
        self._shaped = shaped
        self._proc = proc

    def collect(self) -> Iterator[Family]:
        """The families, in the order of docs/metrics.md."""
        yield from self._status()
        yield from self._interfaces()
        yield from _table(conntrack(self._proc))
        yield from self._limits()
        for meter in METERS.values():
            yield _metered(meter)

    def describe(self) -> Iterable[Family]:
        """Nothing: to register needs no look at the gateway."""
        return ()

    def _status(self) -> Iterator[Family]:
        status = self._service.status()
        yield _family(names.INFO, [((status.version, status.variant, status.appliance), 1)])
        yield _family(names.READY, [((), status.ready)])
        yield _family(names.INITIALIZED, [((), status.initialized)])
        yield _family(names.UPTIME, [((), status.uptime_seconds)])
        yield _family(names.GENERATION, [((), status.generation)])
        yield _family(names.OBJECTS, [((kind,), number) for kind, number in status.counts.model_dump().items()])
        yield _family(names.PENDING, [((), len(status.pending))])
        yield _family(names.LAST_ERROR, [((), status.last_error.at)] if status.last_error else [])
        yield _family(names.CONFLICTS, [((), len(status.conflicts))])
        yield _family(names.ARP, [((), status.arp.on)])
        sides = status.interfaces.model_dump().items()
        links = [((side,), status.links[name].up) for side, name in sides if name in status.links]
        yield _family(names.LINK_UP, links)

    def _interfaces(self) -> Iterator[Family]:
        try:
            counted = parse_proc_net_dev((self._proc / "net/dev").read_text())
        except (OSError, ValueError) as error:
            log.warning("the interfaces' counters cannot be read: %s", error)
            counted = {}
        sides = self._service.status().interfaces.model_dump().items()
        found = [(side, name, counted[name]) for side, name in sides if name in counted]
        for metric, field in (
            (names.LINK_BYTES, "bytes"),
            (names.LINK_PACKETS, "packets"),
            (names.LINK_DROPS, "drops"),
            (names.LINK_ERRORS, "errors"),
        ):
            values = [
                ((name, side, way), getattr(counters, f"{way}_{field}"))
                for side, name, counters in found
                for way in ("rx", "tx")
            ]
            yield _family(metric, values)

    def _limits(self) -> Iterator[Family]:
        spec = self._service.spec
        kept = classes(spec, self._service.actual.tc) if spec else {}
        try:
            shaped = self._shaped(kept.values()) if kept else {}
        except OSError as error:
            log.warning("the bandwidth limits' counters cannot be read: %s", error)
            shaped = {}
        told = list(spec.qos)[:MOST_OBJECTS] if spec else []
        rates = [(_limit(limit), float(limit.rate_max) * 125_000) for limit in told]
        yield _family(names.LIMIT, rates)
        counters = [(_limit(limit), shaped[kept[limit]]) for limit in told if kept.get(limit) in shaped]
        yield _family(names.SHAPED_BYTES, [(labels, each.bytes) for labels, each in counters])
        yield _family(names.SHAPED_PACKETS, [(labels, each.packets) for labels, each in counters])
        yield _family(names.SHAPED_DROPS, [(labels, each.drops) for labels, each in counters])
        yield _family(names.BACKLOG, [(labels, each.backlog) for labels, each in counters])


def no_limits(classes: Iterable[ClassKey]) -> Mapping[ClassKey, Shaped]:
    """Where there is no kernel to ask."""
    return {}


class Exposition:
    """The whole text of ``/metrics``; for any thread. ``watcher`` is the flow watcher's socket, ``shaped`` reads tc."""

    def __init__(self, service: Service, watcher: Path | None, shaped: ShapedReader) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(GatewayCollector(service, shaped))
        ProcessCollector(namespace="natgw", registry=self._registry)
        self._watcher = watcher

    def __call__(self) -> bytes:
        """As it is now. Without a flow watcher its metrics are missing, and one says that there is none."""
        watched = b""
        if self._watcher is not None:
            with suppress(OSError):
                watched = asked(self._watcher, b"metrics\n")
        up = text(names.WATCHER_UP, [((), int(bool(watched)))])
        return generate_latest(self._registry) + up.encode() + watched


def _limit(limit: Limit) -> tuple[str, ...]:
    way = "out" if limit.direction == "egress" else "in"
    if isinstance(limit, EipLimit):
        return limit.eip, way, "all", str(limit.priority)
    return limit.interface, way, limit.match_value or "all", str(limit.priority)


def _table(table: Conntrack) -> Iterator[Family]:
    """The kernel's connection tracking table; what it does not say is left out."""
    for metric, value in (
        (names.ENTRIES, table.count),
        (names.ENTRIES_LIMIT, table.maximum),
        (names.INSERT_FAILED, table.insert_failed),
        (names.DROPPED, table.drop),
        (names.EARLY_DROPPED, table.early_drop),
        (names.INVALID, table.invalid),
    ):
        yield _family(metric, [((), value)] if value is not None else [])


def _family(metric: Metric, values: Values) -> Family:
    family = Family(metric.name.removesuffix("_total"), metric.meaning, metric.kind)
    name, labels = metric.name, metric.labels
    family.samples = [Sample(name, dict(zip(labels, given, strict=True)), float(value)) for given, value in values]
    return family


def _metered(meter: Meter) -> Family:
    family = Family(meter.name.removesuffix("_total"), meter.explanation, meter.kind)
    if isinstance(meter, Counter | Gauge):
        for series, value in meter.values().items():
            family.add_sample(meter.name, dict(zip(meter.labels, series, strict=True)), value)
    elif isinstance(meter, Histogram):
        bounds = [*map(str, meter.buckets), "+Inf"]
        for series, held in meter.values().items():
            labels = dict(zip(meter.labels, series, strict=True))
            for bound, count in zip(bounds, held.cumulative(), strict=True):
                family.add_sample(f"{meter.name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{meter.name}_count", labels, held.count)
            family.add_sample(f"{meter.name}_sum", labels, held.sum)
    return family
