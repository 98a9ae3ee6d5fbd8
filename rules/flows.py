"""Which tracked connections a change of the spec makes stale.

The kernel asks the NAT chains only about a connection's first packet; what was decided then holds for as
long as the connection lives. So after a change two kinds of connections must be forgotten: those whose
translation a rule gave that is gone or changed, in both directions, and those that passed untranslated
before their rule existed. A connection whose rule still stands is never touched; a shared DNAT stands for all
connections that it ever gave a backend, also for those of a backend that it no longer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import TypeVar

from rules.keyed import HasKey, Keyed
from rules.spec import GatewaySpec, SharedDnat

IP_PROTOCOLS = {"tcp": 6, "udp": 17}
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
        wanted = (self.orig_src, self.orig_dst, self.reply_src, self.reply_dst, self.protocol, self.orig_dport)
        found = (flow.orig_src, flow.orig_dst, flow.reply_src, flow.reply_dst, flow.protocol, flow.orig_dport)
        return (
            all(w is None or w == f for w, f in zip(wanted, found, strict=True))
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


def is_stale(flow: Flow, old: GatewaySpec, new: GatewaySpec) -> bool:
    """Whether the entry lost the rule that translated it, or passed untranslated before its rule existed."""
    if any(a in old.eips and a not in new.eips for a in (flow.orig_dst, flow.reply_dst)):
        return True
    targets, new_targets = _targets(flow, old), _targets(flow, new)
    sources, new_sources = _sources(flow, old), _sources(flow, new)
    if flow.destination_translated:
        target = (flow.reply_src, flow.reply_sport)
        if target not in new_targets and _lost(flow, target, old, new):
            return True
    elif new_targets and not targets:
        return True
    if flow.source_translated:
        return flow.reply_dst in sources and flow.reply_dst not in new_sources
    return not flow.destination_translated and bool(new_sources) and not sources


def _lost(flow: Flow, target: tuple[str, int], old: GatewaySpec, new: GatewaySpec) -> bool:
    """Whether what translated the entry is gone, given that nothing in ``new`` would translate it so."""
    if _shared(flow, old) is None:
        return target in _targets(flow, old)
    # Whatever a shared DNAT translated ends with it and lives with it, whoever its backends are by then.
    return _shared(flow, new) is None or target in _exclusive(flow, old) - _backends(flow, old)


def _targets(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    """Where rules of the spec send a connection to this destination: every rule that could have decided it."""
    return _exclusive(flow, spec) | _backends(flow, spec)


def _exclusive(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    fip = spec.fips.get(flow.orig_dst)
    targets = {(fip.internal_ip, flow.orig_dport)} if fip else set()
    for name, number in IP_PROTOCOLS.items():
        if number == flow.protocol and (dnat := spec.dnats.get((flow.orig_dst, flow.orig_dport, name))):
            targets.add((dnat.internal_ip, dnat.internal_port))
    return targets


def _backends(flow: Flow, spec: GatewaySpec) -> set[tuple[str, int]]:
    shared = _shared(flow, spec)
    return {(b.internal_ip, b.internal_port) for b in shared.backends} if shared else set()


def _shared(flow: Flow, spec: GatewaySpec) -> SharedDnat | None:
    """The shared DNAT that decides a connection to this destination."""
    protocol = next((name for name, number in IP_PROTOCOLS.items() if number == flow.protocol), None)
    return spec.shared_dnats.get((flow.orig_dst, flow.orig_dport, protocol))


def _sources(flow: Flow, spec: GatewaySpec) -> set[str]:
    """The external addresses that rules of the spec could have given this connection's source."""
    floating = {fip.eip for fip in spec.fips if fip.internal_ip == flow.orig_src}
    # From the tenant's side by an EIP back to the tenant's side, the EIP itself becomes the source.
    hairpin = {flow.orig_dst} if flow.destination_translated and flow.orig_dst in spec.eips else set()
    return floating | hairpin | {snat.eip for snat in spec.snats if _within(flow.orig_src, snat.internal_cidr)}


@lru_cache(maxsize=4096)
def _network(prefix: str) -> IPv4Network:
    return IPv4Network(prefix)


def _within(address: str, prefix: str) -> bool:
    return IPv4Address(address) in _network(prefix)
