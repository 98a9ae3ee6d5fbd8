"""What Prometheus reads: the names and labels of Kube-OVN's ``vpc-egress-gateway-observer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from gateway.observer.flow import Identity
from gateway.observer.interfaces import InterfaceCounters, InterfaceSums
from gateway.observer.table import FlowTable
from gateway.small.exposition import Family, Labels

PREFIX = "kube_ovn_vpc_egress_gateway_"

INTERFACE, CONNTRACK, CONFIG = "interface", "conntrack", "config"


class Tally:
    """What is counted by the observer of itself."""

    def __init__(self) -> None:
        self.up = {CONNTRACK: False, INTERFACE: False}
        self.reloads: dict[str, int] = {}
        """By result: success or error."""
        self.errors: defaultdict[tuple[str, str], int] = defaultdict(int)
        """By collector and operation."""
        self.records: dict[str, int] = {}
        """Log lines written, by event."""
        self.drops: dict[str, int] = {}
        """Log lines not written, by reason: rate_limit, queue_full, write_error."""


def add(counts: dict[str, int], name: str, number: int = 1) -> None:
    """Count something that may never have been seen before."""
    counts[name] = counts.get(name, 0) + number


def families(
    identity: Identity, tally: Tally, table: FlowTable, interfaces: InterfaceSums, flows: bool
) -> Iterator[Family]:
    """All metrics; those of flows if ``flows`` says so. Labels stand in alphabetical order, as Go's client has them."""
    for name, kind, text, samples in [
        *_observability(tally, table),
        *_interfaces(interfaces),
        *(_flows(table) if flows else ()),
    ]:
        base = identity._asdict()
        labelled = [(dict(sorted({**base, **labels}.items())), value) for labels, value in samples]
        if labelled:
            yield f"{PREFIX}{name}", kind, text, labelled


def _observability(tally: Tally, table: FlowTable) -> Iterable[Family]:
    return (
        (
            "observability_collector_up",
            "gauge",
            "Whether an observer collector is operating successfully.",
            _by("collector", tally.up),
        ),
        (
            "observability_config_reload_total",
            "counter",
            "Configurations that were read anew, by result.",
            _by("result", tally.reloads),
        ),
        (
            "observability_conntrack_events_total",
            "counter",
            "Events of NAT connections that the kernel told of.",
            _by("event", table.events),
        ),
        (
            "observability_errors_total",
            "counter",
            "What went wrong, by collector and operation.",
            [({"collector": who, "operation": what}, times) for (who, what), times in tally.errors.items()],
        ),
        ("observability_conntrack_cache_entries", "gauge", "NAT connections remembered.", [({}, len(table))]),
        (
            "observability_conntrack_cache_capacity",
            "gauge",
            "NAT connections that can be remembered.",
            [({}, table.capacity)],
        ),
        (
            "observability_conntrack_cache_evictions_total",
            "counter",
            "NAT connections forgotten to make room.",
            [({}, table.evictions)],
        ),
        ("observability_log_records_total", "counter", "Flow log records written.", _by("event", tally.records)),
        ("observability_log_drops_total", "counter", "Flow log records dropped.", _by("reason", tally.drops)),
        (
            "observability_conntrack_accounting_available",
            "gauge",
            "Whether the kernel counts packets and bytes of connections (net.netfilter.nf_conntrack_acct).",
            [({}, table.accounting)],
        ),
    )


def _interfaces(interfaces: InterfaceSums) -> Iterator[Family]:
    for field, text in (
        ("rx_bytes", "Bytes received by a gateway interface."),
        ("tx_bytes", "Bytes transmitted by a gateway interface."),
        ("rx_packets", "Packets received by a gateway interface."),
        ("tx_packets", "Packets transmitted by a gateway interface."),
    ):
        yield f"interface_{field}_total", "counter", text, _interface(interfaces, {field: {}})
    for what, text in (
        ("drops", "Packets dropped by a gateway interface."),
        ("errors", "Packet errors of a gateway interface."),
    ):
        directions: dict[str, Labels] = {f"{way}_{what}": {"direction": way} for way in ("rx", "tx")}
        yield f"interface_{what}_total", "counter", text, _interface(interfaces, directions)


def _interface(interfaces: InterfaceSums, fields: Mapping[str, Labels]) -> list[tuple[Labels, float]]:
    return [
        ({"interface": name, "type": kind, **more}, counters[InterfaceCounters._fields.index(field)])
        for (name, kind), counters in interfaces.sums.items()
        for field, more in fields.items()
    ]


def _flows(table: FlowTable) -> Iterator[Family]:
    series = [(labels._asdict(), of) for labels, of in table.series.items()]
    yield "conntrack_nat_flows_active", "gauge", "NAT connections alive.", [(at, of.active) for at, of in series]
    yield (
        "conntrack_nat_flows_started_total",
        "counter",
        "NAT connections that started.",
        [(at, of.started) for at, of in series],
    )
    yield (
        "conntrack_nat_flows_ended_total",
        "counter",
        "NAT connections that ended.",
        [(at, of.ended) for at, of in series],
    )
    for place, unit in enumerate(("packets", "bytes")):
        yield (
            f"conntrack_nat_{unit}_total",
            "counter",
            f"{unit.capitalize()} of NAT connections, where the kernel counts them.",
            [
                ({**at, "direction": way}, sums[place])
                for at, of in series
                if of.counted
                for way, sums in (("original", of.original), ("reply", of.reply))
            ],
        )


def _by(label: str, counts: Mapping[str, float]) -> list[tuple[Labels, float]]:
    return [({label: name}, value) for name, value in counts.items()]
