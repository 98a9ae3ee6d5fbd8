"""A whole state at once: ``PUT /v1/gateway`` beside bare tools that load the same objects, and its replay by verbs."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from bench import scenes, timing
from bench.bed import SCRIPT, Bed, Gateway, Spec, gateway, settle
from bench.report import Figure, Report, ratios
from bench.scale import Scale
from bench.verbs import INTERPRETER, Variant, interpreter

UNIT = "milliseconds"
NOTES = (
    "1,100 EIPs, 1,000 floating IPs, 5,000 port mappings and 200 SNATs. The bare tools are `ip -batch`, "
    "`iptables-restore` and `nft -f`, each once, in a namespace without a gateway, with what the gateway left in its "
    "own. The replay is what a controller does after a pod has restarted: one verb per object, all of which stand."
)
EMPTY, ONE, BARE, REPLAY = "PUT, from empty", "PUT, one object differs", "bare tools, from empty", "replayed verb"


@dataclass(frozen=True)
class Loaded:
    """What loads the same objects without a gateway: the input of each tool."""

    addresses: str
    iptables: str
    nft: str

    @classmethod
    def of(cls, made: Gateway) -> Loaded:
        """As they stand in a gateway's namespace."""
        (net1,) = made.host.ip_json("-4", "addr", "show", "net1")
        mine = [f"{one['local']}/{one['prefixlen']}" for one in net1["addr_info"][1:]]
        rules = "".join(made.host.run(f"iptables-{made.variant}-save", "-t", table) for table in ("mangle", "nat"))
        return cls("".join(f"addr add {one} dev net1\n" for one in mine), rules, _own_tables(made))

    def load(self, variant: Variant) -> timing.Milliseconds:
        """Addresses last: for every UDP port iptables-restore asks the resolver, which lists all that there are."""
        took = timing.program([f"iptables-{variant}-restore"], stdin=self.iptables)
        took += timing.program(["nft", "-f", "-"], stdin=self.nft) if self.nft else 0
        return took + timing.program(["ip", "-batch", "-"], stdin=self.addresses)


def _own_tables(made: Gateway) -> str:
    """The nft tables that are not an iptables variant's, as nft reads them."""
    listed = json.loads(made.host.run("nft", "-j", "list", "tables"))["nftables"]
    tables = [(one["table"]["family"], one["table"]["name"]) for one in listed if "table" in one]
    texts = [
        made.host.run("nft", "list", "table", family, name) for family, name in tables if name not in ("nat", "mangle")
    ]
    return "".join(texts)


@contextlib.contextmanager
def empty_bed() -> Iterator[Bed]:
    bed = Bed(polled=False)
    try:
        yield bed
    finally:
        bed.remove()


def puts(scale: Scale, variant: Variant) -> Report:
    """From empty, with one object different, and the bare tools."""
    fips, dnats, snats = scale.pick((1000, 5000, 200), (1000, 5000, 200), (20, 40, 4))
    nothing = scenes.spec(eips=0)
    state = scenes.spec(fips=fips, dnats=dnats, snats=snats)
    other = json.loads(json.dumps(state))
    other["dnats"][dnats // 2]["internalPort"] = 9090
    report = Report(f"bulk-{variant}", f"How long does a whole state take? (iptables variant {variant})", UNIT, NOTES)
    found: dict[str, list[float]] = {EMPTY: [], ONE: [], BARE: []}
    with gateway(polled=False, variant=variant) as made:
        for _ in range(scale.pick(5, 3, 1)):
            made.put(nothing)
            found[EMPTY].append(put(made, state))
            found[ONE].append(put(made, other))
            with empty_bed() as bed:
                loaded = Loaded.of(made)
                with bed.gateway.entered():
                    found[BARE].append(loaded.load(variant))
        replayed = _replay(made, state, scale.pick(60, 30, 3))
    starts = [timing.program(interpreter()) for _ in replayed]
    report.figures = [Figure(label, tuple(values)) for label, values in found.items()]
    report.figures += [Figure(REPLAY, tuple(replayed)), Figure(INTERPRETER, tuple(starts))]
    report.limit(EMPTY, found[EMPTY], at_most=1500, unit="ms")
    report.limit(ONE, found[ONE], at_most=150, unit="ms")
    report.limit("PUT from empty against the bare tools", ratios(found[EMPTY], found[BARE]), at_most=4)
    report.limit(REPLAY, replayed, at_most=15, unit="ms")
    report.limit(f"{REPLAY} against {INTERPRETER}", ratios(replayed, starts), at_most=2)
    return report


def put(made: Gateway, state: Spec) -> timing.Milliseconds:
    """One PUT, from the first byte of the request to the last of the answer."""
    body = json.dumps(state).encode()
    return timing.call(partial(made.request, "PUT", "/v1/gateway", body))


def _replay(made: Gateway, state: Spec, calls: int) -> list[timing.Milliseconds]:
    """Verbs that add what stands, picked at random."""
    made.put(state)
    settle([made], 1)
    words = [("eip-add", one["address"]) for one in state["eips"]]
    words += [("floating-ip-add", f"{one['eip']},{one['internalIp']}") for one in state["fips"]]
    words += [("dnat-add", ",".join(map(str, one.values()))) for one in state["dnats"]]
    words += [("snat-add", f"{one['eip']},{one['internalCIDR']},--random-fully") for one in state["snats"]]
    with made.host.entered():
        return [
            timing.program(["bash", str(SCRIPT), *one], environment=made.environment)
            for one in random.sample(words, calls)
        ]
