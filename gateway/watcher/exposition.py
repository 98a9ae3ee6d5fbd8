"""The sums as Prometheus reads them, text format 0.0.4. Pure.

Ten thousands of samples are made here and not in the daemon, whose threads would have to wait for each other.
Label values are addresses, prefixes, numbers and words of our own: nothing in them needs to be escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gateway.watcher.accounts import ACTIVE_IN, BYTES_IN, NEW_IN, PACKETS_IN, SUMS, TOTAL, Key
from gateway.watcher.ledger import Ledger

MOST_OBJECTS = 5000
"""Objects of each kind that have series of their own; what the others carry has the label value ``other``."""
OTHER = "other"
PORTS_AVAILABLE = 64512
"""Source ports that the kernel gives translated connections of one protocol to one destination: 1024 to 65535."""


class Metric(NamedTuple):
    """One metric; a sample gives its labels' values in this order."""

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...] = ()


class Traffic(NamedTuple):
    """The four metrics of the traffic of one kind of object."""

    bytes: Metric
    packets: Metric
    active: Metric
    flows: Metric


WAY = "direction"
"""in: from the external network; out: to it."""


def _traffic(prefix: str, whose: str, labels: tuple[str, ...]) -> Traffic:
    named = (*labels, WAY)
    return Traffic(
        Metric(f"natgw_{prefix}_bytes_total", "counter", f"Bytes of IP packets of {whose}.", named),
        Metric(f"natgw_{prefix}_packets_total", "counter", f"Packets of {whose}.", named),
        Metric(f"natgw_{prefix}_flows_active", "gauge", f"Living connections of {whose}, by who opened them.", named),
        Metric(f"natgw_{prefix}_flows_total", "counter", f"New connections of {whose}, by who opened them.", named),
    )


ALL = _traffic("translated", "everything that is translated", ())
EIP = _traffic("eip", "an EIP", ("eip",))
FIP = _traffic("fip", "a floating IP", ("eip", "internal_ip"))
DNAT = _traffic("dnat", "a port mapping", ("eip", "port", "protocol"))
SNAT = _traffic("snat", "a source translation", ("eip", "cidr"))

PORTS = Metric(
    "natgw_snat_ports_in_use",
    "gauge",
    "Different source ports of an EIP that translated connections hold, each protocol's own.",
    ("eip",),
)
BUSIEST = Metric(
    "natgw_snat_ports_busiest_in_use",
    "gauge",
    "Source ports of an EIP in use towards the destination with most connections (which one: GET /v1/traffic).",
    ("eip",),
)
AVAILABLE = Metric(
    "natgw_snat_ports_available", "gauge", "Source ports that an EIP has for each protocol and destination."
)
ACCOUNTING = Metric(
    "natgw_flow_accounting", "gauge", "1 while the kernel counts bytes and packets of connections (nf_conntrack_acct)."
)
WATCHED = Metric("natgw_flows_watched", "gauge", "Connections that the watcher remembers.")
CAPACITY = Metric("natgw_flows_capacity", "gauge", "Connections that it can remember.")
BEYOND = Metric("natgw_flows_beyond_capacity_total", "counter", "Connections that were counted, but not remembered.")
EVENTS = Metric("natgw_flow_events_total", "counter", "Events of connections that the kernel told of.", ("event",))
LOST = Metric("natgw_flow_events_lost_total", "counter", "Times that the kernel dropped events; a resync follows each.")
RESYNCS = Metric("natgw_flow_resyncs_total", "counter", "Dumps of the kernel's table in the background.")
RESYNC = Metric("natgw_flow_resync_seconds", "gauge", "CPU time of the last of them.")
READ_AT = Metric(
    "natgw_flow_resync_timestamp_seconds", "gauge", "When the last of them ended, as far as living connections count."
)
LOGGED = Metric("natgw_flow_log_records_total", "counter", "Records written to the flow log.")
LOG_DROPS = Metric("natgw_flow_log_drops_total", "counter", "Records that were not.", ("reason",))

METRICS: tuple[Metric, ...] = (
    *(metric for traffic in (ALL, EIP, FIP, DNAT, SNAT) for metric in traffic),
    *(PORTS, BUSIEST, AVAILABLE),
    *(ACCOUNTING, WATCHED, CAPACITY, BEYOND, EVENTS, LOST, RESYNCS, RESYNC, READ_AT, LOGGED, LOG_DROPS),
)
"""All of them, in the order in which they are told."""


def text(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float]]) -> str:
    """One metric's text."""
    lines: list[str] = []
    _family(lines, metric, samples)
    return "\n".join([*lines, ""])


def exposition(ledger: Ledger, at: float, collector: Mapping[str, Any], log: Mapping[str, Any]) -> str:
    """All samples; ``at``, ``collector`` and ``log`` are as in ``gateway.watcher.report``."""
    accounts = ledger.accounts
    objects, sums = accounts.objects, accounts.sums()
    lines: list[str] = []
    kinds: Iterable[tuple[Traffic, Iterable[tuple[Key, tuple[Any, ...]]]]] = (
        (ALL, [(TOTAL, ())]),
        (EIP, ((("eip", eip), (eip,)) for eip in objects.eips)),
        (FIP, ((("fip", *fip), fip) for fip in objects.fips)),
        (DNAT, ((("dnat", *dnat[:3]), dnat[:3]) for dnat in objects.dnats)),
        (SNAT, ((("snat", *snat), snat) for snat in objects.snats)),
    )
    for traffic, named in kinds:
        _both_ways(lines, traffic, [(values, sums[key]) for key, values in named])
    holders = [(eip, use) for eip, use in accounts.ports.items() if len(use)][:MOST_OBJECTS]
    _family(lines, PORTS, [((eip,), len(use)) for eip, use in holders])
    _family(lines, BUSIEST, [((eip,), one.in_use) for eip, use in holders if (one := use.busiest())])
    _family(lines, AVAILABLE, [((), PORTS_AVAILABLE)])
    for metric, value in (
        (ACCOUNTING, int(collector["accounting"])),
        (WATCHED, len(ledger)),
        (CAPACITY, ledger.capacity),
        (BEYOND, ledger.beyond),
    ):
        _family(lines, metric, [((), value)])
    _family(lines, EVENTS, [((event,), number) for event, number in ledger.events.items()])
    for metric, said in (
        (LOST, collector["lost"]),
        (RESYNCS, collector["resyncs"]),
        (RESYNC, collector["resyncSeconds"]),
        (READ_AT, at),
    ):
        _family(lines, metric, [((), said)])
    if log["enabled"]:
        _family(lines, LOGGED, [((), log["records"])])
        _family(lines, LOG_DROPS, [((reason,), number) for reason, number in log["drops"].items()])
    lines.append("")
    return "\n".join(lines)


def _both_ways(lines: list[str], traffic: Traffic, objects: Sequence[tuple[tuple[Any, ...], list[int]]]) -> None:
    """The four families of one kind of object."""
    told = list(objects[:MOST_OBJECTS])
    if rest := objects[MOST_OBJECTS:]:
        told.append(((OTHER,) * (len(traffic.bytes.labels) - 1), [sum(s[n] for _, s in rest) for n in range(SUMS)]))
    named = [
        (_labels(traffic.bytes.labels, (*values, "in")), _labels(traffic.bytes.labels, (*values, "out")), sums)
        for values, sums in told
    ]
    for metric, place, next_way in (
        (traffic.bytes, BYTES_IN, 2),
        (traffic.packets, PACKETS_IN, 2),
        (traffic.active, ACTIVE_IN, 1),
        (traffic.flows, NEW_IN, 1),
    ):
        name, other = metric.name, place + next_way
        lines += _head(metric)
        lines += [f"{name}{arrived} {s[place]}\n{name}{left} {s[other]}" for arrived, left, s in named]


def _family(lines: list[str], metric: Metric, samples: Iterable[tuple[tuple[str, ...], float]]) -> None:
    lines += _head(metric)
    lines += [f"{metric.name}{_labels(metric.labels, values)} {value}" for values, value in samples]


def _head(metric: Metric) -> tuple[str, str]:
    return f"# HELP {metric.name} {metric.meaning}", f"# TYPE {metric.name} {metric.kind}"


def _labels(names: tuple[str, ...], values: Sequence[Any]) -> str:
    if not names:
        return ""
    return "{" + ",".join([f'{name}="{value}"' for name, value in zip(names, values, strict=True)]) + "}"
