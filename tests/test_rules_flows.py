"""Stale connections: those that lost their rule, or passed before it existed; never one whose rule stands.

Entries are made as the kernel makes them: from the fate of a connection's first packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import commands as c
from rules.edit import Conflict, edit, edit_all
from rules.flows import Flow, FlowFilter, Staleness, suspects
from rules.packet import Packet
from rules.routing import Host
from rules.ruleset import ChainRef, Dnat, Rule, Snat
from rules.share import services_of
from rules.spec import Backend, GatewaySpec
from rules.trace import Fate, trace
from tests import strategies as some

NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17}


def fate(packet: Packet, spec: GatewaySpec) -> Fate:
    actual = some.settled(spec)
    return trace(packet, actual.ruleset, Host.of(actual), strict=True, services=services_of(actual.nft))


def entry(found: Fate) -> Flow:
    """The connection tracking entry that the packet leaves behind."""
    first, final = found.packet, found.final
    original = {"orig_src": first.src, "orig_dst": first.dst, "orig_sport": first.sport, "orig_dport": first.dport}
    reply = {"reply_src": final.dst, "reply_dst": final.src, "reply_sport": final.dport, "reply_dport": final.sport}
    return Flow(protocol=NUMBERS[first.protocol], **original, **reply)  # type: ignore[arg-type]


def translations(found: Fate) -> list[tuple[ChainRef | None, Rule]]:
    """The rules that translated the packet."""
    rules = [(step.ref, step.rule) for step in found.steps if isinstance(step.rule, Rule)]
    return [(ref, rule) for ref, rule in rules if isinstance(rule.target, Dnat | Snat)]


# Changes as they come: a few commands, or a whole other state. Interfaces and routes stay.
_changes = st.lists(some.commands.filter(lambda command: not isinstance(command, c.Init | c.RouteAdd | c.RouteDel)))


@st.composite
def changes(draw: st.DrawFn) -> tuple[GatewaySpec, GatewaySpec]:
    kept = {"interfaces": GatewaySpec().interfaces, "routes": GatewaySpec().routes}
    old, new = (spec.model_copy(update=kept) for spec in draw(st.tuples(some.specs, some.specs)))
    if draw(st.booleans()):
        new = old
        for command in draw(_changes):
            with suppress(Conflict):
                new = edit(new, command)
    return old, new


PACKETS = [
    Packet(protocol, src, 40000, dst, port, "eth0" if src.startswith("10.") else "net1")
    for protocol, port in (("tcp", 80), ("udp", 443))
    for src in ("10.0.1.5", "10.0.1.6", "10.0.2.5", "203.0.113.7")
    for dst in (*some.EXTERNAL, "203.0.113.9", "10.0.1.6")
]


def fates(old: GatewaySpec, new: GatewaySpec) -> Iterator[tuple[Fate, Fate, Flow]]:
    """Each packet that left an entry behind under ``old``; how the same packet fares under ``new``; the entry."""
    for before, after in zip(all_fates(old), all_fates(new), strict=True):
        if before.reply is not None:
            yield before, after, entry(before)


def all_fates(spec: GatewaySpec) -> list[Fate]:
    actual = some.settled(spec)
    host, services = Host.of(actual), services_of(actual.nft)
    return [trace(packet, actual.ruleset, host, strict=True, services=services) for packet in PACKETS]


@some.quick
@given(changes())
def test_a_connection_whose_rules_stand_is_never_stale(change: tuple[GatewaySpec, GatewaySpec]) -> None:
    old, new = change
    chains = some.settled(new).ruleset.chains
    for before, after, flow in fates(old, new):
        used = translations(before)
        stands = used and all(ref and rule in chains[ref] for ref, rule in used) and not lost_eip(flow, old, new)
        stands = stands and not lost_share(used, flow, new)
        # Where only the source was translated, a destination that is translated from now on is another matter.
        if stands and (flow.destination_translated or not entry(after).destination_translated):
            assert not Staleness(old, new)(flow)


def lost_share(used: list[tuple[ChainRef | None, Rule]], flow: Flow, new: GatewaySpec) -> bool:
    """Whether its destination was chosen by a shared DNAT, which stands in no chain, and which is gone."""
    if not flow.destination_translated or any(isinstance(rule.target, Dnat) for _, rule in used):
        return False
    protocol = next(name for name, number in NUMBERS.items() if number == flow.protocol)
    return (flow.orig_dst, flow.orig_dport, protocol) not in new.shared_dnats


def lost_eip(flow: Flow, old: GatewaySpec, new: GatewaySpec) -> bool:
    return any(ip in old.eips and ip not in new.eips for ip in (flow.orig_dst, flow.reply_dst))


@some.quick
@given(changes())
def test_a_translated_connection_that_would_fare_the_same_again_is_not_stale(
    change: tuple[GatewaySpec, GatewaySpec],
) -> None:
    for before, after, flow in fates(*change):
        if translations(before) and before.outcome == after.outcome and not lost_eip(flow, *change):
            assert not Staleness(*change)(flow)


@some.quick
@given(changes())
def test_a_stale_connection_is_always_among_the_suspects(change: tuple[GatewaySpec, GatewaySpec]) -> None:
    looked_at = suspects(*change)
    for _, _, flow in fates(*change):
        if Staleness(*change)(flow):
            assert any(suspect.matches(flow) for suspect in looked_at)


@some.quick
@given(changes())
def test_what_passed_untranslated_before_its_rule_existed_is_stale(change: tuple[GatewaySpec, GatewaySpec]) -> None:
    for before, after, flow in fates(*change):
        translated = flow.destination_translated or flow.source_translated  # a shared DNAT does it in no chain
        passed = not translated and (before.verdict == "local" or before.out_interface == "net1")
        if passed and after.reply is not None and translations(after):
            assert Staleness(*change)(flow)


@some.quick
@given(changes())
def test_what_lost_its_rule_is_stale(change: tuple[GatewaySpec, GatewaySpec]) -> None:
    old, new = change
    backends = {part.internal_ip for part in (*new.fips, *new.dnats)}
    backends |= {backend.internal_ip for shared in new.shared_dnats for backend in shared.backends}
    named = {part.eip for part in (*new.fips, *new.snats)} | {eip.ip for eip in new.eips}
    for before, _, flow in fates(old, new):
        lost_target = flow.destination_translated and flow.reply_src not in backends
        lost_target = lost_target and not (before.backends and shared_key(flow) in new.shared_dnats)
        lost_source = flow.source_translated and flow.reply_dst not in named
        if lost_target or lost_source:
            assert Staleness(old, new)(flow)


def shared_key(flow: Flow) -> tuple[str, int, str]:
    return flow.orig_dst, flow.orig_dport, next(name for name, number in NUMBERS.items() if number == flow.protocol)


@some.quick
@given(changes())
def test_a_connection_of_a_shared_mapping_lives_as_long_as_that(change: tuple[GatewaySpec, GatewaySpec]) -> None:
    old, new = change
    for before, _, flow in fates(old, new):
        if before.backends and not flow.source_translated and not lost_eip(flow, old, new):
            stands = shared_key(flow) in new.shared_dnats
            fip, dnat = new.fips.get(flow.orig_dst), new.dnats.get(shared_key(flow))
            ends = {(fip.internal_ip, flow.orig_dport)} if fip else set()
            ends |= {(dnat.internal_ip, dnat.internal_port)} if dnat else set()
            lost = not stands and (flow.reply_src, flow.reply_sport) not in ends
            former = old.fips.get(flow.orig_dst)  # a floating IP to the same end that goes may have been its rule, too
            if not (former and former.internal_ip == flow.reply_src):
                assert Staleness(old, new)(flow) is lost


@some.quick
@given(some.specs)
def test_nothing_is_stale_where_nothing_changed(spec: GatewaySpec) -> None:
    assert not suspects(spec, spec)
    assert not any(Staleness(spec, spec)(flow) for _, _, flow in fates(spec, spec))


EIP, OTHER = "192.168.0.20", "192.168.0.21"
BASE = [c.EipAdd(address=f"{EIP}/24"), c.EipAdd(address=f"{OTHER}/24")]
OUTSIDE = Packet("tcp", "203.0.113.7", 40000, EIP, 80, "net1")
TENANT = Packet("tcp", "10.0.1.5", 40000, "203.0.113.7", 80, "eth0")
HAIRPIN = Packet("tcp", "10.0.1.6", 40000, EIP, 80, "eth0")


def dnat(ip: str = "10.0.1.5", port: int = 80) -> c.DnatAdd:
    return c.DnatAdd(eip=EIP, external_port=port, protocol="tcp", internal_ip=ip, internal_port=80)


UNDNAT = c.DnatDel(eip=EIP, external_port=80, protocol="tcp")


def share(*ips: str) -> c.SharedDnatAdd:
    ends = tuple(Backend(internal_ip=ip, internal_port=80) for ip in ips)
    return c.SharedDnatAdd(eip=EIP, external_port=80, protocol="tcp", backends=ends)


UNSHARE = c.SharedDnatDel(eip=EIP, external_port=80, protocol="tcp")
FIP = c.FipAdd(eip=EIP, internal_ip="10.0.1.5")
SNAT = c.SnatAdd(eip=EIP, internal_cidr="10.0.1.0/24")
UNSNAT = c.SnatDel(eip=EIP, internal_cidr="10.0.1.0/24")


@pytest.mark.parametrize(
    ("before", "change", "packet", "stale"),
    [
        ([dnat()], [UNDNAT], OUTSIDE, True),
        ([dnat()], [UNDNAT, dnat("10.0.1.6")], OUTSIDE, True),
        ([dnat()], [UNDNAT, dnat()], OUTSIDE, False),
        ([dnat()], [dnat(port=443)], OUTSIDE, False),
        ([dnat()], [c.EipDel(address=f"{EIP}/24")], OUTSIDE, True),
        ([dnat()], [c.EipDel(address=f"{OTHER}/24")], OUTSIDE, False),
        ([FIP], [c.FipDel(eip=EIP)], OUTSIDE, True),
        ([FIP], [c.FipDel(eip=EIP)], TENANT, True),
        ([FIP], [c.FipDel(eip=EIP), c.FipAdd(eip=EIP, internal_ip="10.0.1.6")], OUTSIDE, True),
        ([dnat()], [FIP], OUTSIDE, False),
        ([SNAT], [UNSNAT], TENANT, True),
        ([SNAT], [UNSNAT, c.SnatAdd(eip=OTHER, internal_cidr="10.0.1.0/24")], TENANT, True),
        ([SNAT], [c.SnatAdd(eip=OTHER, internal_cidr="10.0.1.5/32")], TENANT, False),
        ([SNAT], [FIP], TENANT, False),
        ([], [SNAT], TENANT, True),
        ([], [FIP], TENANT, True),
        ([], [c.SnatAdd(eip=EIP, internal_cidr="10.0.2.0/24")], TENANT, False),
        ([], [dnat()], OUTSIDE, True),
        ([], [dnat(port=443)], OUTSIDE, False),
        # A shared mapping: its backends come and go, and its connections end with it.
        ([share("10.0.1.5", "10.0.1.6")], [share("10.0.1.6")], OUTSIDE, False),
        ([share("10.0.1.5", "10.0.1.6")], [UNSHARE], OUTSIDE, True),
        ([share("10.0.1.5")], [UNSHARE, share("10.0.1.6")], OUTSIDE, False),
        ([share("10.0.1.5")], [UNSHARE, dnat("10.0.1.5")], OUTSIDE, False),
        ([share("10.0.1.5")], [UNSHARE, dnat("10.0.1.6")], OUTSIDE, True),
        ([dnat("10.0.1.5")], [UNDNAT, share("10.0.1.5", "10.0.1.6")], OUTSIDE, False),
        ([dnat("10.0.1.5")], [UNDNAT, share("10.0.1.6")], OUTSIDE, True),
        ([], [share("10.0.1.5")], OUTSIDE, True),
        ([FIP], [share("10.0.1.6")], OUTSIDE, False),
        ([FIP, share("10.0.1.6")], [UNSHARE], OUTSIDE, True),
        ([share("10.0.1.5")], [UNSHARE], HAIRPIN, True),
        ([share("10.0.1.5")], [c.EipDel(address=f"{EIP}/24")], OUTSIDE, True),
        # By an EIP back to the tenant's side: the EIP gave the source, no SNAT did.
        ([dnat(), SNAT], [UNSNAT], HAIRPIN, False),
        ([dnat(), SNAT], [UNDNAT], HAIRPIN, True),
        ([dnat(), SNAT], [c.EipDel(address=f"{EIP}/24")], HAIRPIN, True),
    ],
)
def test_changes(before: list[c.Command], change: list[c.Command], packet: Packet, stale: bool) -> None:
    old = edit_all(GatewaySpec(), [*BASE, *before])
    new = edit_all(old, change)
    assert old is not None
    assert new is not None
    flow = entry(fate(packet, old))
    assert Staleness(old, new)(flow) is stale
    if stale:
        assert any(suspect.matches(flow) for suspect in suspects(old, new))


def test_what_foreign_rules_translated_is_left_alone() -> None:
    old = edit_all(GatewaySpec(), [*BASE, dnat(), SNAT])
    assert old is not None
    new = edit_all(old, [UNDNAT, UNSNAT])
    assert new is not None
    masqueraded = replace(entry(fate(TENANT, GatewaySpec())), reply_dst="192.168.0.11")
    assert not Staleness(old, new)(masqueraded)
    redirected = replace(entry(fate(OUTSIDE, GatewaySpec())), reply_src="10.0.9.9")
    assert not Staleness(old, new)(redirected)


def test_one_more_rule_makes_suspects_only_of_what_it_is_about() -> None:
    old = edit_all(GatewaySpec(), [*BASE, dnat(), SNAT])
    assert old is not None
    assert suspects(old, edit(old, dnat(port=443))) == (FlowFilter(orig_dst=EIP, protocol=6, orig_dport=443),)
    added = c.SnatAdd(eip=OTHER, internal_cidr="10.0.2.0/24")
    assert suspects(old, edit(old, added)) == (FlowFilter(untranslated=True, source_prefix="10.0.2.0/24"),)
    assert suspects(old, edit(old, UNSNAT)) == (FlowFilter(reply_dst=EIP),)


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (FlowFilter(), True),
        (FlowFilter(orig_src="10.0.1.5"), True),
        (FlowFilter(orig_src="10.0.1.6"), False),
        (FlowFilter(orig_dst="203.0.113.7", protocol=6, orig_dport=80), True),
        (FlowFilter(orig_dst="203.0.113.7", protocol=17), False),
        (FlowFilter(orig_dport=81), False),
        (FlowFilter(reply_dst=EIP), True),
        (FlowFilter(reply_dst="10.0.1.5"), False),
        (FlowFilter(untranslated=True), False),
        (FlowFilter(source_prefix="10.0.1.0/24"), True),
        (FlowFilter(source_prefix="10.0.1.128/25"), False),
    ],
)
def test_a_filter_needs_all_its_fields(wanted: FlowFilter, matches: bool) -> None:
    spec = edit_all(GatewaySpec(), [*BASE, SNAT])
    assert spec is not None
    assert wanted.matches(entry(fate(TENANT, spec))) is matches


def test_a_connection_of_a_backend_that_went_earlier_ends_with_its_mapping() -> None:
    first = edit_all(GatewaySpec(), [*BASE, share("10.0.1.5", "10.0.1.6")])
    assert first is not None
    flow = entry(fate(OUTSIDE, first))
    less = edit(first, share("10.0.1.6"))
    assert not suspects(first, less)
    gone = edit(less, UNSHARE)
    assert Staleness(less, gone)(flow)
    assert [found for found in suspects(less, gone) if found.matches(flow)]
