"""Which tracked connections a change of the spec makes stale.

The kernel asks the NAT chains only about a connection's first packet; what was decided then holds for as
long as the connection lives. So after a change two kinds of connections must be forgotten: those whose
translation a rule gave that is gone or changed, in both directions, and those that passed untranslated
before their rule existed. A connection whose rule still stands is never touched; a shared DNAT stands for all
connections that it ever gave a backend, also for those of a backend that it no longer has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import TypeVar

from rules.keyed import HasKey, Keyed
from rules.spec import GatewaySpec, SharedDnat

IP_PROTOCOLS = {"tcp": 6, "udp": 17}
_NAMES = {number: name for name, number in IP_PROTOCOLS.items()}
_REMEMBERED = 65536
"""Tenants' addresses whose rules are remembered rather than looked for again."""
T = TypeVar("T", bound=HasKey)


@dataclass(frozen=True, slots=True)
class Flow:
    """One connection tracking entry (IPv4). Ports are 0 for protocols without them.

    ``protocol`` is the IP protocol number. Without translation the reply tuple is the original one reversed.
    """

    protocol: int
    orig_src: str
    orig_dst: str
    orig_sport: int
    orig_dport: int
    reply_src: str
    reply_dst: str
    reply_sport: int
    reply_dport: int
    zone: int = 0

    @property
    def destination_translated(self) -> bool:
        return (self.reply_src, self.reply_sport) != (self.orig_dst, self.orig_dport)

    @property
    def source_translated(self) -> bool:
        return (self.reply_dst, self.reply_dport) != (self.orig_src, self.orig_sport)


@dataclass(frozen=True, slots=True)
class FlowFilter:
    """Entries to look at; all fields that are set must hold. ``untranslated``: neither SNAT nor DNAT."""

    orig_src: str | None = None
    orig_dst: str | None = None
    reply_dst: str | None = None
    protocol: int | None = None
    orig_dport: int | None = None
    untranslated: bool = False
    source_prefix: str | None = None
    reply_src: str | None = None

    def matches(self, flow: Flow) -> bool:
        """Whether the entry is one of those meant."""
        return (
            (self.orig_src is None or self.orig_src == flow.orig_src)
            and (self.orig_dst is None or self.orig_dst == flow.orig_dst)
            and (self.reply_src is None or self.reply_src == flow.reply_src)
            and (self.reply_dst is None or self.reply_dst == flow.reply_dst)
            and (self.protocol is None or self.protocol == flow.protocol)
            and (self.orig_dport is None or self.orig_dport == flow.orig_dport)
            and not (self.untranslated and (flow.source_translated or flow.destination_translated))
            and (self.source_prefix is None or _within(flow.orig_src, self.source_prefix))
        )


def suspects(old: GatewaySpec, new: GatewaySpec) -> tuple[FlowFilter, ...]:
    """Where to look for stale entries after a change from ``old`` to ``new``: only at what changed."""
    return tuple(dict.fromkeys(_suspects(old, new)))


def _suspects(old: GatewaySpec, new: GatewaySpec) -> Iterator[FlowFilter]:
    for eip in new.eips.changes(old.eips)[0]:
        if eip.key not in new.eips:
            yield FlowFilter(orig_dst=eip.ip)
            yield FlowFilter(reply_dst=eip.ip)
    for fip in _changed(old.fips, new.fips):
        yield FlowFilter(orig_dst=fip.eip)
        yield FlowFilter(orig_src=fip.internal_ip)
    for dnat in _changed(old.dnats, new.dnats):
        yield FlowFilter(orig_dst=dnat.eip, protocol=IP_PROTOCOLS[dnat.protocol], orig_dport=dnat.external_port)
    left, came = new.shared_dnats.changes(old.shared_dnats)
    for key in {shared.key: None for shared in (*left, *came)}:
        if (key in old.shared_dnats) != (key in new.shared_dnats):
            address, port, protocol = key
            yield FlowFilter(orig_dst=address, protocol=IP_PROTOCOLS[protocol], orig_dport=port)
    for snat in _changed(old.snats, new.snats):
        if snat.key in new.snats:
            yield FlowFilter(untranslated=True, source_prefix=snat.internal_cidr)
        else:
            yield FlowFilter(reply_dst=snat.eip)


def _changed(old: Keyed[T], new: Keyed[T]) -> Iterator[T]:
    """Objects of either side that the other does not have just so."""
    gone, fresh = new.changes(old)
    yield from (item for item in gone if new.get(item.key) != item)
    yield from (item for item in fresh if old.get(item.key) != item)


class Staleness:
    """Whether an entry lost the rule that translated it, or passed untranslated before its rule existed.

    Asked of many entries for one change, it looks for a tenant's rules once, whatever their number.
    """

    def __init__(self, old: GatewaySpec, new: GatewaySpec) -> None:
        self._old, self._new = old, new
        self._gone = {eip.ip for eip in new.eips.since(old.eips).old if eip.key not in new.eips}
        self._origins, self._new_origins = Origins(old), Origins(new)

    def __call__(self, flow: Flow) -> bool:
        """Whether this one is stale."""
        old, new = self._old, self._new
        if flow.orig_dst in self._gone or flow.reply_dst in self._gone:
            return True
        if flow.destination_translated:
            target = (flow.reply_src, flow.reply_sport)
            if target not in _targets(flow, new) and _lost(flow, target, old, new):
                return True
        elif _is_sent_on(flow, new) and not _is_sent_on(flow, old):
            return True
        if flow.source_translated:
            return self._origins.had(flow, flow.reply_dst) and not self._new_origins.had(flow, flow.reply_dst)
        return (
            not flow.destination_translated
            and bool(self._new_origins.of(flow.orig_src))
            and not self._origins.of(flow.orig_src)
        )


def _lost(flow: Flow, target: tuple[str, int], old: GatewaySpec, new: GatewaySpec) -> bool:
    """Whether what translated the entry is gone, given that nothing in ``new`` would translate it so."""
    if _shared(flow, old) is None:
        return target in _targets(flow, old)
    # Whatever a shared DNAT translated ends with it and lives with it, whoever its backends are by then.
    return _shared(flow, new) is None or target in _exclusive(flow, old) - _backends(flow, old)


def _is_sent_on(flow: Flow, spec: GatewaySpec) -> bool:
    """Whether a rule of the spec translates the destination of such a connection."""
    key = _mapped(flow)
    return flow.orig_dst in spec.fips or key in spec.dnats or key in spec.shared_dnats


def _targets(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    """Where rules of the spec send a connection to this destination: every rule that could have decided it."""
    return _exclusive(flow, spec) | _backends(flow, spec)


def _exclusive(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    fip, dnat = spec.fips.get(flow.orig_dst), spec.dnats.get(_mapped(flow))
    targets = {(fip.internal_ip, flow.orig_dport)} if fip else set()
    return targets | {(dnat.internal_ip, dnat.internal_port)} if dnat else targets


def _backends(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    shared = _shared(flow, spec)
    return {(b.internal_ip, b.internal_port) for b in shared.backends} if shared else set()


def _shared(flow: Flow, spec: GatewaySpec) -> SharedDnat | None:
    """The shared DNAT that decides a connection to this destination."""
    return spec.shared_dnats.get(_mapped(flow))


def _mapped(flow: Flow) -> tuple[str, int, str | None]:
    """What identifies a port mapping that such a connection would meet."""
    return (flow.orig_dst, flow.orig_dport, _NAMES.get(flow.protocol))


class Origins:
    """The external addresses that rules of a spec give the connections of a tenant's address."""

    def __init__(self, spec: GatewaySpec) -> None:
        self._spec = spec
        self._known: dict[str, frozenset[str]] = {}

    def had(self, flow: Flow, source: str) -> bool:
        """Whether a rule could have given this connection that source."""
        if source in self.of(flow.orig_src):
            return True
        # From the tenant's side by an EIP back to the tenant's side, the EIP itself becomes the source.
        return flow.destination_translated and source == flow.orig_dst and source in self._spec.eips

    def of(self, address: str) -> frozenset[str]:
        """What floating IPs and source translations give it."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[address] = frozenset(self._search(address))
        return found

    def _search(self, address: str) -> Iterator[str]:
        yield from self._floating.get(address, ())
        number = int(IPv4Address(address))
        for shift, networks in self._translated.items():
            yield from networks.get(number >> shift, ())

    @cached_property
    def _floating(self) -> Mapping[str, list[str]]:
        """EIPs by the internal address."""
        found: dict[str, list[str]] = {}
        for fip in self._spec.fips:
            found.setdefault(fip.internal_ip, []).append(fip.eip)
        return found

    @cached_property
    def _translated(self) -> Mapping[int, Mapping[int, list[str]]]:
        """EIPs by the number of an address's bits that do not matter, and by the others."""
        found: dict[int, dict[int, list[str]]] = {}
        for snat in self._spec.snats:
            network, _, length = snat.internal_cidr.partition("/")
            shift = 32 - int(length)
            found.setdefault(shift, {}).setdefault(int(IPv4Address(network)) >> shift, []).append(snat.eip)
        return found


@lru_cache(maxsize=4096)
def _network(prefix: str) -> IPv4Network:
    return IPv4Network(prefix)


def _within(address: str, prefix: str) -> bool:
    return IPv4Address(address) in _network(prefix)
