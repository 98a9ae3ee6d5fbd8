"""Maps ahead of the chains: the second rendering means what the first one means, and follows it entry by entry."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import fastpath, nat
from rules.apply import Rejected, apply, apply_map_edits, apply_step
from rules.commands import Command
from rules.delta import delta, touches_maps, undo
from rules.desired import Facts, desired
from rules.edit import Conflict, edit
from rules.maps import (
    MISSED,
    AddEntry,
    DropEntry,
    DropTable,
    EntryKey,
    MapTable,
    Unlabelled,
    WriteChains,
    label,
    labelled,
    script,
    table_text,
)
from rules.packet import Packet
from rules.routing import Host
from rules.ruleset import ChainRef, Foreign, Jump, Rule, Ruleset
from rules.share import services_of
from rules.spec import Eip, Fip, GatewaySpec, Interfaces, Snat
from rules.state import Actual, EditMaps, EditTable
from rules.trace import trace
from tests import strategies as some

ON, OFF = Facts(), Facts(fastpath="off")
HOOK = Rule((), Jump("DNAT_FILTER"))
FOREIGN = Foreign("-s 172.30.0.0/16 -j MASQUERADE")


def able(actual: Actual | None = None) -> Actual:
    """A pod in which maps can stand."""
    return replace(actual or some.both_pods(), no_maps="")


def fates(spec: GatewaySpec, packet: Packet, actual: Actual, choice: int = 0) -> tuple[object, object]:
    """What becomes of the packet with maps and without."""
    with_maps, without = some.settled(spec, actual, ON), some.settled(spec, actual, OFF)
    assert with_maps.maps.stands
    assert not without.maps.stands
    quick, slow = (
        trace(packet, a.ruleset, Host.of(a), services=services_of(a.nft), choice=choice, maps=a.maps)
        for a in (with_maps, without)
    )
    return (quick.outcome, quick.reply, quick.certain), (slow.outcome, slow.reply, slow.certain)


@some.thorough
@given(some.specs, st.data(), st.booleans())
def test_maps_decide_as_the_chains_do(spec: GatewaySpec, data: st.DataObject, followed: bool) -> None:
    actual = able(some.pod(spec.interfaces))
    if followed:  # rules of others behind our jump, which see in either case what we leave undecided
        hooks = {ref: (rule, FOREIGN) for ref, rule in nat.HOOKS if ref.table == "nat"}
        chains = {**actual.ruleset.chains, nat.DNAT_FILTER: (), nat.SNAT_FILTER: (), **hooks}
        actual = replace(actual, ruleset=Ruleset(chains))
    packet = data.draw(some.packets(spec.interfaces))
    quick, slow = fates(spec, packet, actual)
    assert quick == slow


@some.quick
@given(some.specs, st.data())
def test_a_hit_walks_no_chain_and_a_miss_passes_them_over(spec: GatewaySpec, data: st.DataObject) -> None:
    actual = some.settled(spec, able(some.pod(spec.interfaces)))
    fate = trace(data.draw(some.packets(spec.interfaces)), actual.ruleset, Host.of(actual), maps=actual.maps)
    walked = [step.ref.chain for step in fate.steps if step.ref and step.ref.table == "nat"]
    assert not {"EXCLUSIVE_DNAT", "SHARED_DNAT", "EXCLUSIVE_SNAT", "SHARED_SNAT", "HAIRPIN_SNAT"} & set(walked)
    assert fate.final.mark & MISSED == 0


prefixes = st.integers(0, 32).flatmap(
    lambda length: st.integers(0, 255).map(lambda n: str(IPv4Network((0x0A000000 + n, length), strict=False)))
)


@some.thorough
@given(st.lists(st.tuples(prefixes, some.external_ips, st.booleans()), max_size=12), st.integers(0, 255))
def test_the_longest_prefix_has_the_address_and_the_older_of_two_equals(
    drawn: list[tuple[str, str, bool]], host: int
) -> None:
    snats = list({(eip, cidr): Snat(eip=eip, internal_cidr=cidr, random_fully=r) for cidr, eip, r in drawn}.values())
    spec = GatewaySpec(eips=[Eip(address="192.168.0.30/24")], snats=snats)
    source = IPv4Address(0x0A000000 + host)
    holding = [snat for snat in snats if source in IPv4Network(snat.internal_cidr)]
    best = max(holding, key=lambda snat: snat.prefix_length, default=None)  # of equals the first
    packet = Packet("tcp", str(source), 40000, "203.0.113.7", 80, "eth0")
    actual = some.settled(spec, able(some.pod()))
    fate = trace(packet, actual.ruleset, Host.of(actual), strict=True, maps=actual.maps)
    assert fate.final.src == (best.eip if best else str(source))
    if best:
        said = next(step.what for step in fate.steps if step.ref and step.ref.chain.startswith("snat-"))
        assert said.endswith("any port") == best.random_fully


@some.quick
@given(some.specs, some.specs, st.sampled_from([ON, OFF]), st.sampled_from([ON, OFF]))
def test_any_state_follows_any_other_and_the_second_plan_is_empty(
    old: GatewaySpec, new: GatewaySpec, first: Facts, then: Facts
) -> None:
    before = some.settled(old, able(), first)
    after = apply(delta(desired(new, then, before), before), before)
    assert after.maps == (fastpath.table(new) if then is ON else fastpath.NO_TABLE)
    assert (nat.MAPS_MISSED in after.ruleset.chains) == (then is ON)
    assert not delta(desired(new, then, after), after)


@some.quick
@given(some.specs, some.specs, st.sampled_from([ON, OFF]), st.sampled_from([ON, OFF]), st.data())
def test_a_plan_that_was_cut_short_is_undone(
    old: GatewaySpec, new: GatewaySpec, first: Facts, then: Facts, data: st.DataObject
) -> None:
    before = some.settled(old, able(), first)
    plan = delta(desired(new, then, before), before)
    done = data.draw(st.integers(0, len(plan.steps)))
    midway = apply(replace(plan, steps=plan.steps[:done]), before)
    assert some.bare(apply(undo(plan, before, midway), midway)) == some.bare(before)


@some.quick
@given(some.specs, some.specs)
def test_a_packet_never_bears_a_mark_that_nobody_takes_off_nor_meets_half_a_table(
    old: GatewaySpec, new: GatewaySpec
) -> None:
    actual = some.settled(old, able(), OFF)
    for facts, spec in ((ON, new), (ON, old)):
        for step in delta(desired(spec, facts, actual), actual).steps:
            actual = apply_step(actual, step)
            if actual.maps.stands:
                assert nat.MAPS_MISSED in actual.ruleset.chains
                assert actual.maps.entries in (fastpath.entries(old), fastpath.entries(new))


@some.quick
@given(some.specs, some.commands)
def test_one_command_is_a_few_entries(spec: GatewaySpec, command: Command) -> None:
    try:
        new = edit(spec, command)
    except Conflict:
        return
    edits = list(fastpath.edits(fastpath.table(new), fastpath.table(spec)))
    assert sum(isinstance(one, AddEntry) for one in edits) <= 2
    assert sum(isinstance(one, DropEntry) for one in edits) <= 2
    assert apply_map_edits(fastpath.table(spec), edits) == fastpath.table(new)


def test_a_large_prefix_over_many_small_ones_is_one_entry() -> None:
    small = [Snat(eip="192.168.0.20", internal_cidr=f"10.0.{n}.0/24") for n in range(256)]
    spec = GatewaySpec(snats=small)
    large = GatewaySpec(snats=[*small, Snat(eip="192.168.0.21", internal_cidr="10.0.0.0/16")])
    *structure, entry = fastpath.edits(fastpath.table(large), fastpath.table(spec))
    assert entry == AddEntry(EntryKey("snat-16-random", "10.0.0.0"), ("192.168.0.21", 0))
    assert [type(one) for one in structure] == [WriteChains]


def test_what_makes_one_key_is_the_older_ones() -> None:
    spec = GatewaySpec(
        fips=[Fip(eip="192.168.0.21", internal_ip="10.0.1.5"), Fip(eip="192.168.0.20", internal_ip="10.0.1.5")],
        snats=[
            Snat(eip="192.168.0.23", internal_cidr="10.0.1.0/24", random_fully=False),
            Snat(eip="192.168.0.22", internal_cidr="10.0.1.0/24"),
        ],
    )
    assert fastpath.entries(spec) == {
        EntryKey("fip-in", "192.168.0.20"): ("10.0.1.5", 0),
        EntryKey("fip-in", "192.168.0.21"): ("10.0.1.5", 0),
        EntryKey("fip-out", "10.0.1.5"): ("192.168.0.21", 0),
        EntryKey("snat-24", "10.0.1.0"): ("192.168.0.23", 0),
    }


@pytest.mark.parametrize("chain", ["PREROUTING", "POSTROUTING"])
def test_a_rule_ahead_of_ours_keeps_the_maps_off_and_one_behind_does_not(chain: str) -> None:
    spec, ref = GatewaySpec(), ChainRef("nat", chain)
    standing = some.settled(spec, able())
    (hook,) = standing.ruleset.chains[ref]
    for rules, on in (((FOREIGN, hook), False), ((hook, FOREIGN), True)):
        actual = replace(standing, ruleset=Ruleset({**standing.ruleset.chains, ref: rules}))
        after = some.settled(spec, actual)
        assert after.maps.stands == on
        assert (nat.MAPS_MISSED in after.ruleset.chains) == on
        assert after.ruleset.chains[ref] == rules
    # Where there is no hook yet, it will come behind what stands.
    assert not some.settled(spec, able(replace(some.both_pods(), ruleset=foreign_first(ref)))).maps.stands


def foreign_first(ref: ChainRef) -> Ruleset:
    return Ruleset({**some.both_pods().ruleset.chains, ref: (FOREIGN,)})


def test_what_the_driver_found_keeps_the_maps_off() -> None:
    standing = some.settled(GatewaySpec(), able())
    assert standing.maps.stands
    assert not some.settled(GatewaySpec(), replace(standing, no_maps="the kernel has no nf_tables")).maps.stands
    assert not touches_maps(delta(desired(GatewaySpec(), OFF, some.both_pods()), some.both_pods()))


def test_the_chains_come_before_the_maps() -> None:
    for facts, before in ((ON, able()), (OFF, some.settled(GatewaySpec(), able()))):
        kinds = [type(step) for step in delta(desired(GatewaySpec(), facts, before), before).steps]
        assert kinds.index(EditMaps) > max(i for i, kind in enumerate(kinds) if kind is EditTable)


def test_a_damaged_table_is_written_anew() -> None:
    wanted = fastpath.table(GatewaySpec(eips=[Eip(address="192.168.0.20/24")]))
    first, *rest = fastpath.edits(wanted, MapTable(damaged=True))
    assert first == DropTable()
    assert apply_map_edits(fastpath.NO_TABLE, rest) == wanted


@some.quick
@given(some.specs)
def test_a_label_is_read_back_as_its_rule(spec: GatewaySpec) -> None:
    for rules in fastpath.table(spec).chains.values():
        for rule in rules:
            assert labelled(label(rule)) == rule
            assert len(label(rule)) < 128  # NFT_USERDATA_MAXLEN and nft's own bound on comments
            changed = label(rule)[:-1] + ("0" if label(rule)[-1] != "0" else "1")
            assert labelled(changed) == Unlabelled(changed)


@pytest.mark.parametrize("comment", ["", "missed", "snat net1 x 1", "snat net1 24 random 0", "hairpin a b c d"])
def test_other_comments_are_no_labels(comment: str) -> None:
    assert labelled(comment) == Unlabelled(comment)


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(ValueError, match="not the name of an interface"):
        script([WriteChains(fastpath.chains(Interfaces().model_copy(update={"vpc": 'a"; flush'}), ()))])
    with pytest.raises(ValueError, match="another writer"):
        script([WriteChains({"prerouting": (Unlabelled("theirs"),)})])
    with pytest.raises(Rejected, match="not an IPv4 address"):
        apply_map_edits(fastpath.table(GatewaySpec()), [AddEntry(EntryKey("fip-in", "0 }"), ("10.0.0.1", 0))])


GOLDEN = """\
table ip natgw {
	map fip-in {
		type ipv4_addr : ipv4_addr
	}

	map fip-out {
		type ipv4_addr : ipv4_addr
	}

	map hairpin {
		type ipv4_addr : ipv4_addr
		elements = { 192.168.0.20 : 192.168.0.20 }
	}

	map ports {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
	}

	map snat-24 {
		type ipv4_addr : ipv4_addr
		elements = { 10.0.1.0 : 192.168.0.20 }
	}

	chain prerouting {
		type nat hook prerouting priority -110; policy accept;
		dnat ip to ip daddr map @fip-in comment "fip-in 6d5659cd"
		dnat ip to ip daddr . meta l4proto . th dport map @ports comment "ports 16fe8197"
		meta mark set meta mark | 0x20000000 comment "missed 068fc27f"
	}

	chain postrouting {
		type nat hook postrouting priority 90; policy accept;
		snat ip to ip saddr map @fip-out comment "fip-out a7282fd4"
		oifname "net1" snat ip to ip saddr & 255.255.255.0 map @snat-24 comment "snat net1 24 07db40e4"
		oifname "eth0" meta mark & 0x1 == 0x1 ct status dnat snat ip to ct original ip daddr map @hairpin fully-random comment "hairpin eth0 1 4b40dcf8"
		meta mark set meta mark | 0x20000000 comment "missed 068fc27f"
	}
}
"""  # noqa: E501 -- the lines are as nft prints them


def test_the_table_as_people_read_it() -> None:
    snat = Snat(eip="192.168.0.20", internal_cidr="10.0.1.0/24", random_fully=False)
    spec = GatewaySpec(eips=[Eip(address="192.168.0.20/24")], snats=[snat])
    assert table_text(fastpath.table(spec)) == GOLDEN
    assert table_text(fastpath.NO_TABLE) == ""


def by_the_book(spec: GatewaySpec) -> dict[EntryKey, tuple[str, int]]:
    """Every entry of a spec, made from nothing."""
    found = {EntryKey("hairpin", e.ip): (e.ip, 0) for e in spec.eips}
    found |= {
        EntryKey("ports", d.eip, d.protocol, d.external_port): (d.internal_ip, d.internal_port) for d in spec.dnats
    }
    found |= {EntryKey("fip-in", f.eip): (f.internal_ip, 0) for f in spec.fips}
    for f in spec.fips:
        found.setdefault(EntryKey("fip-out", f.internal_ip), (f.eip, 0))
    oldest: dict[str, Snat] = {}
    for snat in spec.snats:
        oldest.setdefault(snat.internal_cidr, snat)
    return found | {fastpath.snat_key(snat): (snat.eip, 0) for snat in oldest.values()}


@some.quick
@given(st.lists(some.specs, min_size=1, max_size=4), st.lists(some.commands, max_size=6))
def test_entries_are_those_of_the_spec_whatever_was_asked_before(
    specs: list[GatewaySpec], commands: list[Command]
) -> None:
    for spec in specs:
        assert fastpath.entries(spec) == by_the_book(spec)
    for command in commands:
        with suppress(Conflict):
            spec = edit(spec, command)
        assert fastpath.entries(spec) == by_the_book(spec)
        assert fastpath.table(spec).maps == frozenset(
            {"fip-in", "ports", "fip-out", "hairpin"} | {key.map for key in by_the_book(spec)}
        )
