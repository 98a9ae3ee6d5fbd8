"""New connections per second of one processor, by who has the kernel tell of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from world import set_sysctl

from bench import scenes
from bench.bed import Gateway, gateway, settle
from bench.flows import NOTES, UNIT, heard
from bench.generator import line
from bench.report import Figure, Report
from bench.scale import Scale

EVENTS = "netfilter/nf_conntrack_events"
AS_IT_IS, ELSEWHERE, OFF = "gateway", "gateway, beginnings heard in another namespace", "gateway, events off"


@contextlib.contextmanager
def _as_it_is(made: Gateway) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _off(made: Gateway) -> Iterator[None]:
    """No event of any kind for connections that begin now."""
    set_sysctl(made.host, {EVENTS: 0})
    try:
        yield
    finally:
        set_sysctl(made.host, {EVENTS: 2})


STATES: dict[str, Callable[[Gateway], AbstractContextManager[None]]] = {
    AS_IT_IS: _as_it_is,
    ELSEWHERE: lambda made: heard(made.bed),
    OFF: _off,
}


def listening(scale: Scale) -> Report:
    """One gateway with ten port mappings, while the flow watcher alone listens, or somebody else, too, or nobody."""
    rounds, bursts, seconds = scale.pick((15, 4, 0.1), (7, 3, 0.1), (1, 1, 0.02))
    report = Report(
        "flows-listening",
        "New connections: what does it cost to be told of them?",
        UNIT,
        f"{NOTES} Events off: net.netfilter.nf_conntrack_events=0, so that ends are not told either. The kernel makes "
        "events of beginnings for all namespaces as soon as anybody listens for them in one: whoever does so elsewhere "
        "on the machine slows the first figure down to the second.",
    )
    spec = scenes.spec(dnats=10)
    values: dict[str, list[float]] = {state: [] for state in STATES}
    with gateway() as made:
        made.put(spec)
        settle([made], scale.pick(2, 2, 0))
        with line(made.bed, scenes.to_dnats(spec)) as through:
            for _ in range(rounds):
                for state in random.sample(list(STATES), len(STATES)):
                    with STATES[state](made):
                        values[state].append(max(through.round(seconds).per_core for _ in range(bursts)))
    report.figures = [Figure(state, tuple(found)) for state, found in values.items()]
    report.ratio("gateway against one with events off", *map(report.figure, (AS_IT_IS, OFF)), at_least=0.9)
    report.ratio(
        "gateway against one where beginnings are heard", *map(report.figure, (AS_IT_IS, ELSEWHERE)), at_least=1.1
    )
    return report
