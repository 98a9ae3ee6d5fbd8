"""``natgw status`` and ``natgw top``: the documents of the HTTP face put together, as tables for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from api.show import ago, head_lines, marked, on_off

FEW = 2
"""So many port mappings of an EIP are spelled out in its row."""

Document = dict[str, Any]


@dataclass
class Row:
    """An EIP, what hangs on it, and its traffic; ``wanted``: it is an EIP of the gateway, not only named by a rule."""

    eip: str
    wanted: bool = False
    objects: list[tuple[str, str, Document | None]] = field(default_factory=list)
    traffic: Document | None = None

    @property
    def carries(self) -> str:
        """What hangs on it, in words; of many port mappings the number and the first."""
        mapped = [text for kind, text, _ in self.objects if kind == "DNAT"]
        words = [f"{kind} {text}" for kind, text, _ in self.objects if kind != "DNAT" or len(mapped) <= FEW]
        if len(mapped) > FEW:
            ports = ", ".join(text.partition(" ")[0] for text in mapped[:FEW])
            words.insert(0, f"{len(mapped)} DNATs ({ports}, ...)")
        return ", ".join(words) or "nothing"

    def matches(self, wanted: str) -> bool:
        """Whether the words that were looked for stand in it."""
        return all(word in f"{self.eip} {' '.join(f'{k} {t}' for k, t, _ in self.objects)}" for word in wanted.split())


def gather(ask: Callable[[str], Any], maybe: Callable[[str], Any]) -> Document:
    """One look: the status, and of the other documents what is to be had (``maybe`` gives None for what is not)."""
    status = ask("/v1/status")
    spec = maybe("/v1/load-balancer" if status["appliance"] == "lb-svc" else "/v1/gateway")
    return {
        **status,
        "spec": spec,
        "traffic": maybe("/v1/traffic"),
        "surroundings": maybe("/v1/surroundings"),
    }


def document(look: Document, search: str, limit: int, offset: int) -> Document:
    """The look as ``--json`` prints it: the status, and beside it who is next to us and the EIPs with their traffic."""
    found = _found(look, search)
    status = {name: value for name, value in look.items() if name not in ("spec", "traffic", "surroundings")}
    return {
        **status,
        "nextHops": [hop.__dict__ for hop in next_hops(look)],
        "conntrack": (look["traffic"] or {}).get("conntrack"),
        "eips": [
            {
                "eip": row.eip,
                "carries": [{"kind": kind, "text": text, "traffic": traffic} for kind, text, traffic in row.objects],
                "traffic": row.traffic,
            }
            for row in found[offset : offset + limit]
        ],
        "eipsFound": len(found),
    }


def rows(look: Document) -> list[Row]:
    """Every EIP in the spec's order, then those that only rules name."""
    spec, traffic = look["spec"] or {}, look["traffic"] or {}
    if look["appliance"] == "lb-svc":
        spec = _as_gateway(spec)
    found: defaultdict[str, Row] = _Rows()
    for eip in spec.get("eips", ()):
        found[eip["address"].partition("/")[0]].wanted = True
    if not _measured(look):
        traffic = {}
    measured = {kind: {_key(kind, each): each for each in traffic.get(kind, ())} for kind in _KINDS}
    for kind, named in _KINDS.items():
        for each in spec.get(kind, ()):
            found[each["eip"]].objects.append((*named(each), measured[_TRAFFIC_OF[kind]].get(_key(kind, each))))
    for limit in spec.get("qos", ()):
        if "eip" in limit:
            found[limit["eip"]].objects.append(("limit", f"{limit['direction']} {limit['rateMax']} Mbit/s", None))
    for each in traffic.get("eips", ()):
        if each["eip"] in found:
            found[each["eip"]].traffic = each
    return list(found.values())


def _found(look: Document, search: str) -> list[Row]:
    """The EIPs that are looked for: one that is named whole, else all that have the words in them."""
    every = rows(look)
    return [row for row in every if row.eip == search] or [row for row in every if row.matches(search)]


class _Rows(defaultdict[str, Row]):
    def __missing__(self, eip: str) -> Row:
        row = self[eip] = Row(eip)
        return row


_KINDS: dict[str, Callable[[Document], tuple[str, str]]] = {
    "fips": lambda each: ("FIP", f"{each['internalIp']}"),
    "dnats": lambda each: (
        "DNAT",
        f"{each['externalPort']}/{each['protocol']} -> {each['internalIp']}:{each['internalPort']}",
    ),
    "sharedDnats": lambda each: (
        "DNAT",
        f"{each['externalPort']}/{each['protocol']} -> {len(each['backends'])} backends",
    ),
    "snats": lambda each: ("SNAT", f"{each['internalCIDR']}"),
}
_TRAFFIC_OF = {"fips": "fips", "dnats": "dnats", "sharedDnats": "dnats", "snats": "snats"}


def _key(kind: str, each: Document) -> tuple[Any, ...]:
    if kind in ("dnats", "sharedDnats"):
        return (each["eip"], each["externalPort"], each["protocol"])
    return (each["eip"], each["internalCIDR"]) if kind == "snats" else (each["eip"],)


def _as_gateway(spec: Document) -> Document:
    """A load balancer's spec in a gateway's words."""
    ports = [
        {
            "eip": each["eip"],
            "externalPort": each["port"],
            "protocol": each["protocol"],
            "internalIp": each["clusterIP"],
            "internalPort": each["targetPort"],
        }
        for each in spec.get("dnats", ())
    ]
    return {"eips": [spec["eip"]] if spec.get("eip") else [], "dnats": ports}


@dataclass(frozen=True)
class NextHop:
    """Somebody whom packets are given to, and what the ARP table says of them."""

    interface: str
    address: str
    role: str
    mac: str | None
    state: str


def next_hops(look: Document) -> Iterator[NextHop]:
    """The external gateway and those of the tenants' routes; nobody is asked, the kernel's table is read."""
    around, spec = look["surroundings"], look["spec"]
    if not around or not spec:
        return
    known = {(each["interface"], each["address"]): each for each in around["neighbours"]}
    sides = look["interfaces"]
    wanted = []
    gateway = spec.get("gatewayV4") or (spec.get("eip") or {}).get("gateway")
    if gateway:
        wanted.append((sides["external"], gateway, "external gateway"))
    wanted += [(sides["vpc"], route["nextHopIP"], "tenants' gateway") for route in spec.get("routes", ())]
    wanted += [
        (sides["vpc"], each["gateway"], "pod network's gateway") for each in spec.get("dnats", ()) if "gateway" in each
    ]
    for interface, address, role in dict.fromkeys(wanted):
        each = known.get((interface, address), {})
        yield NextHop(interface, address, role, each.get("mac"), each.get("state", "not asked yet"))


def status(look: Document, search: str = "", limit: int = 20, offset: int = 0) -> RenderableType:
    """The whole look; of the EIPs those that match, page by page; of a single one all that hangs on it."""
    found = _found(look, search)
    parts: list[RenderableType] = [*head_lines(look), _links(look), *_neighbours(look), *_flows(look)]
    shown = found[offset : offset + limit]
    if shown:
        parts += [Text(), _eips(shown)]
    if search and not found:
        parts.append(Text(f"no EIP has {search!r}", style="yellow"))
    if len(shown) < len(found):
        more = f"{len(shown)} of {len(found):,} EIPs; natgw status WORD finds one, --limit and --offset turn pages"
        parts.append(Text(more, style="dim"))
    if len(found) == 1 and search:
        parts += [Text(), _objects(found[0])]
    return Group(*parts)


def _links(look: Document) -> Table:
    table = _table("interface", "side", "link", "ARP", "MAC", "MTU")
    for side, name in look["interfaces"].items():
        link = look["links"].get(name)
        if link is None:
            table.add_row(escape(name), side, "[red]missing[/]")
            continue
        up, arp = on_off(link["up"], "up", "down"), on_off(link["arp"], "on", "off")
        table.add_row(escape(name), side, up, arp, link["mac"], str(link["mtu"]))
    return table


def _neighbours(look: Document) -> Iterator[RenderableType]:
    for hop in next_hops(look):
        good = hop.mac is not None and hop.state not in ("failed", "incomplete")
        state = f"{hop.mac} ({hop.state})" if hop.mac else hop.state
        colour = "green" if good else "red" if hop.state in ("failed", "incomplete") else "yellow"
        yield marked(f"{hop.role} {hop.address} on {escape(hop.interface)}: [{colour}]{state}[/]")


def _flows(look: Document) -> Iterator[RenderableType]:
    traffic = look["traffic"]
    if traffic is None:
        yield Text("traffic: unknown", style="yellow")
        return
    table = traffic["conntrack"]
    if table["count"] is not None and table["max"]:
        share = table["count"] / table["max"]
        colour = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
        lost = f", [red]{table['drop']:,} dropped[/]" if table["drop"] else ""
        failed = f", {table['insertFailed']:,} refused" if table["insertFailed"] else ""
        yield marked(f"connections: [{colour}]{table['count']:,} of {table['max']:,} ({share:.0%})[/]{lost}{failed}")
    if not _measured(look):
        yield Text(f"traffic: not measured ({traffic['collector']['detail']})", style="yellow")
        return
    ways = (
        f"{way} {rate(traffic['total'][way])}, {traffic['total'][way]['activeFlows']:,} flows" for way in ("in", "out")
    )
    yield Text("traffic: " + "; ".join(ways))


def _measured(look: Document) -> bool:
    return bool(look["traffic"] and look["traffic"]["collector"]["running"])


def _eips(found: Iterable[Row]) -> Table:
    table = _table("EIP", "carries", ">in bit/s", ">out bit/s", ">flows", ">ports")
    table.columns[1].no_wrap = False  # the one that gives way where the terminal is narrow
    for row in found:
        name = row.eip if row.wanted else f"{row.eip} [red]no EIP[/]"
        table.add_row(name, escape(row.carries), *_figures(row.traffic), _ports(row.traffic))
    return table


def _objects(row: Row) -> Table:
    table = _table("kind", "what", ">in bit/s", ">out bit/s", ">flows", ">new/s")
    for kind, text, traffic in row.objects:
        new = "" if traffic is None else f"{sum(traffic[way]['newFlowsPerSecond'] for way in ('in', 'out')):.0f}"
        table.add_row(kind, escape(text), *_figures(traffic), new)
    return table


def _figures(traffic: Document | None) -> tuple[str, str, str]:
    if traffic is None:
        return "-", "-", "-"
    flows = sum(traffic[way]["activeFlows"] for way in ("in", "out"))
    return brief(traffic["in"]), brief(traffic["out"]), f"{flows:,}"


def _ports(traffic: Document | None) -> str:
    """Source ports in use towards the busiest destination, of those there are: the first to run out."""
    ports = (traffic or {}).get("snatPorts")
    if not ports:
        return "-"
    busiest = ports["busiest"]
    share = busiest["inUse"] / ports["available"] if busiest else 0.0
    colour = "red" if share >= 0.9 else "yellow" if share >= 0.7 else ""
    text = f"{ports['inUse']:,}" if share < 0.01 else f"{ports['inUse']:,} ({share:.0%})"
    return f"[{colour}]{text}[/]" if colour else text


def rate(way: Document) -> str:
    """A direction's rate with its unit."""
    number = brief(way)
    unit = number[-1] if number[-1] in "kMG" else ""
    return f"{number.removesuffix(unit)} {unit}bit/s"


def brief(way: Document) -> str:
    """A direction's rate in bits per second, as a number with k, M or G."""
    bits = way["bytesPerSecond"] * 8
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= size:
            return f"{bits / size:.1f}{unit}"
    return f"{bits:.0f}"


def top(traffic: Document, count: int) -> RenderableType:
    """The busiest EIPs, inner and outer addresses of the last interval."""
    if not traffic["collector"]["running"]:
        return Text(f"traffic is not measured: {traffic['collector']['detail']}", style="yellow")
    age = f"rates of the last {traffic['intervalSeconds']:.0f} s, {ago(traffic['ageSeconds'])}"
    ways = "; ".join(f"{way} {rate(traffic['total'][way])}" for way in ("in", "out"))
    parts: list[RenderableType] = [Text(f"{ways}; {age}", style="bold")]
    busiest = sorted(traffic["eips"], key=_busy, reverse=True)
    named = (
        ("EIP", busiest, "eip"),
        ("inside", traffic["topSources"], "address"),
        ("outside", traffic["topDestinations"], "address"),
    )
    for title, found, key in named:
        table = _table(title, ">in bit/s", ">out bit/s", ">packets/s", ">new/s", ">flows")
        for each in found[:count]:
            packets, new, flows = (
                sum(each[way][name] for way in ("in", "out"))
                for name in ("packetsPerSecond", "newFlowsPerSecond", "activeFlows")
            )
            table.add_row(
                each[key], brief(each["in"]), brief(each["out"]), f"{packets:,.0f}", f"{new:,.0f}", f"{flows:,}"
            )
        if found:
            parts += [Text(), table]
    return Group(*parts)


def _busy(each: Document) -> float:
    return float(each["in"]["bytesPerSecond"] + each["out"]["bytesPerSecond"])


def _table(*columns: str) -> Table:
    """A table without lines; a column that begins with > is a number's."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        number = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if number else "left", no_wrap=True)
    return table
