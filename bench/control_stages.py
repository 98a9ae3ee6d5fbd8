"""Where the time of one verb goes inside the daemon, by the number of port mappings: needs root.

    python -m bench.control_stages [--sizes 10,1000,10000,50000] [--variants legacy,nft] [--verbs 15] [--pause 1.2]

The writer runs in this process, on the kernel that the daemon would have (``api.main.real_kernel``). N port mappings
are put there as one change; then single adds and deletes are timed stage by stage, with a pause after each, in which
the chains follow the maps (``tend``). Printed are medians in milliseconds; a stage's time includes those within it.
How long a verb takes from outside is ``python -m bench verbs``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api.main import SystemClock, real_kernel
from api.settings import Settings
from bench import scenes
from bench.bed import Bed
from gateway import follow, standing, store, transaction
from gateway.drift import Drift
from gateway.journal import Journal
from gateway.kernel import conntrack, links, maps, nft, shaper
from gateway.kernel.evidence import Events
from gateway.remembered import RememberedFirewall
from gateway.service import Service
from gateway.store import Store
from rules import commands as c
from rules.desired import Facts
from rules.edit import edit_all
from rules.spec import GatewaySpec
from tests.gateway_kit import RecordingAnnouncer

STAGES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (standing.Standing, ("change", "tend")),
    (transaction, ("apply", "desired", "delta", "_commit", "_reread")),
    (RememberedFirewall, ("read", "edit", "share")),
    (maps.KernelMaps, ("read", "commit", "share")),
    (links.KernelLinks, ("read", "commit")),
    (nft.KernelNft, ("read", "commit")),
    (shaper.KernelShaper, ("read", "commit")),
    (conntrack.KernelFlows, ("matching", "delete")),
    (follow.Followers, ("announce", "save", "flush")),
    (store, ("patch",)),
    (Journal, ("tell",)),
)


class Book:
    """What each stage took, by the kind of change that it was part of."""

    def __init__(self) -> None:
        self.now = ""
        self._took: dict[tuple[str, str], list[float]] = defaultdict(list)

    def wrap(self, owner: Any, name: str) -> None:
        """Book the calls of a function or method from now on."""
        label = f"{owner.__name__.rpartition('.')[2]}.{name}"
        setattr(owner, name, self.timed(label, getattr(owner, name)))

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._took[self.now, label].append(1000 * (time.perf_counter() - begun))

        return wrapper

    def show(self, title: str) -> None:
        """Print what was booked, and begin anew."""
        print(f"\n{title}")
        kinds = dict.fromkeys(kind for kind, _ in self._took)
        for label in dict.fromkeys(label for _, label in self._took):
            figures = [self._took.get((kind, label), []) for kind in kinds]
            said = [f"{kind} {statistics.median(f):8.2f}" for kind, f in zip(kinds, figures, strict=True) if f]
            if any(max(f, default=0) >= 0.1 for f in figures):
                print(f"  {label:28} {'  '.join(said)}")
        self._took.clear()


@contextmanager
def writer(variant: str, book: Book) -> Iterator[Service]:
    """A writer at work in a namespace of its own."""
    bed = Bed(polled=False)
    try:
        with tempfile.TemporaryDirectory() as directory, bed.gateway.entered():
            os.environ["XTABLES_LOCKFILE"] = f"{directory}/xtables.lock"
            settings = Settings.from_environment({"NATGW_IPTABLES": variant, "NATGW_STATE_DIR": directory})
            clock = SystemClock()
            journal, events = Journal(clock), Events()
            kernel, watch = real_kernel(settings, events)
            drift = Drift(clock, journal, settings.drift, watch)
            kept = Store(Path(directory))
            service = Service(
                kernel, RecordingAnnouncer(), kept, clock, facts=Facts(settings.arp), drift=drift, journal=journal
            )
            service.start().result()
            try:
                yield service
            finally:
                book.now = "end"
                service.close()
                events.close()
    finally:
        bed.remove()


def measure(service: Service, book: Book, size: int, verbs: int, pause: float) -> None:
    """One state, and single verbs on it."""
    state = GatewaySpec.model_validate(scenes.spec(dnats=size, eips=-(-size // scenes.PORTS_PER_EIP) + 1))
    book.now = "put"
    service.change(lambda _: state, by="put").result()
    time.sleep(pause)
    for port in range(20000, 20000 + verbs):
        named = {"eip": "172.18.250.1", "external_port": port, "protocol": "tcp"}
        add = c.DnatAdd.model_validate({**named, "internal_ip": "10.9.9.9", "internal_port": 80})
        for word, command in (("add", add), ("del", c.DnatDel.model_validate(named))):
            book.now = word

            def edit(spec: GatewaySpec | None, command: c.Command = command) -> GatewaySpec:
                edited = edit_all(spec, [command])
                assert edited is not None
                return edited

            service.change(book.timed("edit", edit), by=word).result()
            time.sleep(pause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10,1000,10000,50000")
    parser.add_argument("--variants", default="legacy,nft")
    parser.add_argument("--verbs", type=int, default=15)
    parser.add_argument("--pause", type=float, default=1.2, help="seconds after each verb")
    options = parser.parse_args()
    book = Book()
    for owner, names in STAGES:
        for name in names:
            book.wrap(owner, name)
    for variant in options.variants.split(","):
        with writer(variant, book) as service:
            for size in map(int, options.sizes.split(",")):
                measure(service, book, size, options.verbs, options.pause)
                book.show(f"iptables variant {variant}, {size:,} port mappings")


if __name__ == "__main__":
    main()
