"""What a gateway's kernel must show of the objects that stand; shares no code with the gateway.

The objects of a transcript, and what is looked for:

====================================  ==================================================================
init                                  the chains, their hooks, the tenant's mark
eip ADDRESS/LENGTH                    the address on net1; its rule in HAIRPIN_SNAT
fip EIP INTERNAL                      one rule in EXCLUSIVE_DNAT, one in EXCLUSIVE_SNAT
dnat EIP PORT PROTOCOL INTERNAL PORT  one rule in SHARED_DNAT
snat EIP CIDR [--random-fully]        one rule in SHARED_SNAT, placed by prefix length
share EIP PORT PROTOCOL BACKEND ...   the element and the chain in nft's table ip kube-ovn
route CIDR GATEWAY                    a route by eth0
default GATEWAY [onlink]              the default route by net1
rate DIRECTION DEVICE MBITS           a class with that rate on the device, or its ifb for ingress
====================================  ==================================================================

The expressions on rules, maps and classes are those of Kube-OVN's own end-to-end tests
(test/e2e/iptables-vpc-nat-gw and iptables-eip-qos); each must match exactly one rule, and no rule may be left over.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Object = tuple[str, ...]

SKELETON = (
    "-A PREROUTING -j DNAT_FILTER",
    "-A POSTROUTING -j SNAT_FILTER",
    "-A DNAT_FILTER -j EXCLUSIVE_DNAT",
    "-A DNAT_FILTER -j SHARED_DNAT",
    "-A SNAT_FILTER -j EXCLUSIVE_SNAT",
    "-A SNAT_FILTER -j SHARED_SNAT",
    "-A SNAT_FILTER -j HAIRPIN_SNAT",
    "-A PREROUTING -j VPC_MARK",
    "-A VPC_MARK -i eth0 -j MARK --set-xmark 0x1/0x1",
    # The project's own: what maps did not know passes over our chains, while they decide ahead of them.
    "-A DNAT_FILTER -m mark --mark 0x20000000/0x20000000 -g MAPS_MISSED",
    "-A SNAT_FILTER -m mark --mark 0x20000000/0x20000000 -g MAPS_MISSED",
    "-A MAPS_MISSED -j MARK --set-xmark 0x0/0x20000000",
    # The project's own: nothing is forwarded out while net1 answers no ARP.
    "-A FORWARD -j ARP_GUARD",
)
DEVICES = ("net1", "ifb-net1", "eth0", "ifb-eth0")


@dataclass
class Seen:
    """What the gateway's namespace shows, as the tools print it."""

    rules: list[str]
    """All ``-A`` lines of iptables-save in all tables."""
    addresses: list[str]
    """net1's IPv4 addresses with their prefix lengths."""
    routes: list[str]
    """IPv4 routes of the main table, except those that come with an address."""
    maps: str
    """``nft list table ip kube-ovn``; empty where there is none."""
    classes: dict[str, str]
    """``tc class show`` by device; empty where there are none."""


@dataclass
class Model:
    """The objects that stand, in the order in which they came; a new pod has what the CNI gave it."""

    own: str
    gateway: str
    objects: list[Object] = field(default_factory=list)
    rates_ever: set[tuple[str, str]] = field(default_factory=set)

    def new_pod(self) -> None:
        self.objects = [("default", self.gateway)]

    def add(self, what: Object) -> None:
        if what in self.objects:
            raise ValueError(f"the transcript adds {what}, which stands already")
        self.objects.append(what)
        if what[0] == "rate":
            self.rates_ever.add(_device_and_rate(what))

    def remove(self, what: Object) -> None:
        self.objects.remove(what)

    def of(self, kind: str) -> list[Object]:
        return [what[1:] for what in self.objects if what[0] == kind]

    def differences(self, seen: Seen) -> list[str]:
        """What is missing, what is too much, what is in the wrong place; empty if all is as it must be."""
        return [*self._rules(seen.rules), *self._net1(seen), *self._maps(seen.maps), *self._classes(seen.classes)]

    # --- iptables -------------------------------------------------------------------------------------

    def _rules(self, rules: list[str]) -> Iterator[str]:
        left = list(rules)
        for line in self._skeleton():
            if line in left:
                left.remove(line)
            else:
                yield f"missing: {line}"
        for pattern in self._patterns():
            matched = [line for line in left if re.search(pattern, line)]
            if len(matched) == 1:
                left.remove(matched[0])
            else:
                yield f"{len(matched)} rules instead of one match {pattern}"
        yield from (f"left over: {line}" for line in left)
        wanted = [snat[1] for snat in sorted(self.of("snat"), key=lambda snat: -int(snat[1].rpartition("/")[2]))]
        order = [match[1] for line in rules if (match := re.search(r"^-A SHARED_SNAT .*-s (\S+)", line))]
        if order != wanted:
            yield f"SHARED_SNAT is in the order {order} instead of {wanted}"

    def _skeleton(self) -> list[str]:
        if ("init",) not in self.objects:
            return []
        return [*SKELETON, *(() if self.of("eip") else ("-A ARP_GUARD -o net1 -j DROP",))]

    def _patterns(self) -> Iterator[str]:
        for (address,) in self.of("eip"):
            eip = _quoted(address.partition("/")[0])
            yield (
                rf"-A HAIRPIN_SNAT -o \b.*\b -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst {eip}"
                rf" -j SNAT --to-source {eip}"
            )
        for fip in self.of("fip"):
            eip, internal = map(_quoted, fip)
            yield rf"-A EXCLUSIVE_DNAT -d {_host(fip[0])} .* --to-destination {internal}"
            yield rf"-A EXCLUSIVE_SNAT -s {_host(fip[1])} .* --to-source {eip}"
        for eip, port, protocol, internal, internal_port in self.of("dnat"):
            yield (
                rf"-A SHARED_DNAT -d {_host(eip)} -p {protocol} .* --dport {port} -j DNAT"
                rf" --to-destination {_quoted(f'{internal}:{internal_port}')}"
            )
        for eip, cidr, *option in self.of("snat"):
            end = " --random-fully$" if option else "$"
            yield rf"-A SHARED_SNAT\b.*-s {re.escape(cidr)}\b.* -o net1 .*--to-source {re.escape(eip)}{end}"

    # --- addresses and routes -------------------------------------------------------------------------

    def _net1(self, seen: Seen) -> Iterator[str]:
        yield from _compare("address", [self.own, *(address for (address,) in self.of("eip"))], seen.addresses)
        routes = [f"{cidr} via {gateway} dev eth0" for cidr, gateway in self.of("route")]
        routes += [" ".join(["default via", gateway, "dev net1", *flags]) for gateway, *flags in self.of("default")]
        yield from _compare("route", routes, seen.routes)

    # --- nft and tc -----------------------------------------------------------------------------------

    def _maps(self, text: str) -> Iterator[str]:
        shares = self.of("share")
        elements = [f"{eip} . {protocol} . {port} : goto" for eip, port, protocol, *_ in shares]
        yield from _compare("share", elements, re.findall(r"[\d.]+ \. \w+ \. \d+ : goto", text))
        sizes = [f"numgen random mod {len(backends)} map" for _, _, _, *backends in shares]
        yield from _compare("share", sizes, re.findall(r"numgen random mod \d+ map", text))
        wanted = [" . ".join(backend.split(":")) for _, _, _, *backends in shares for backend in backends]
        yield from _compare("backend", wanted, re.findall(r"\d+ : (\d+\.\d+\.\d+\.\d+ \. \d+)", text))

    def _classes(self, classes: dict[str, str]) -> Iterator[str]:
        wanted = Counter(_device_and_rate(("rate", *rate)) for rate in self.of("rate"))
        for device, rate in sorted(self.rates_ever):
            shown = len(re.findall(_rate_pattern(rate), classes[device]))
            if shown != wanted[device, rate]:
                yield f"{shown} classes of {rate} Mbit/s on {device} instead of {wanted[device, rate]}"


def read_rules(saved: str) -> list[str]:
    """The rules in what iptables-save printed."""
    return [line for line in saved.splitlines() if line.startswith("-A ")]


def read_routes(shown: str) -> list[str]:
    """The routes in what ``ip -j route`` printed, except those that the kernel made itself."""
    return [
        " ".join([route["dst"], "via", route["gateway"], "dev", route["dev"], *route["flags"]])
        for route in json.loads(shown)
        if route.get("protocol") != "kernel"
    ]


def _compare(what: str, wanted: Iterable[str], found: Iterable[str]) -> Iterator[str]:
    missing, extra = Counter(wanted), Counter(found)
    yield from (f"missing {what}: {one}" for one in (missing - extra).elements())
    yield from (f"{what} left over: {one}" for one in (extra - missing).elements())


def _quoted(text: str) -> str:
    return rf"\b{re.escape(text)}\b"


def _host(address: str) -> str:
    return rf"\b{re.escape(address)}/32\b"


def _device_and_rate(what: Object) -> tuple[str, str]:
    _, direction, device, rate = what
    return (f"ifb-{device}" if direction == "ingress" else device), rate


def _rate_pattern(rate: str) -> str:
    """As Kube-OVN's tests look for it: in Mbit or in Kbit."""
    kilobits = f"{float(rate) * 1000:g}"
    return rf"\brate (?:{re.escape(rate)}Mbit|{re.escape(kilobits)}Kbit) "
