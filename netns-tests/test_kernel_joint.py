"""Chains and maps in one nf_tables transaction, in the nft variant: whole or not at all, and no more transactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from netns import Namespace, require
from rig import Rig, rig
from specs import edited

from gateway import transaction
from gateway.kernel.generation import Generation
from gateway.kernel.joint import KernelJoint
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft_edits import Handles
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.ports import Moved, Refused
from gateway.remembered import RememberedFirewall
from rules import fastpath
from rules.desired import Facts
from rules.iptables import parse_rule
from rules.maps import AddEntry, DropEntry, EntryKey
from rules.ruleset import ChainRef, DeleteRule, Destination, Dnat, InsertRule, Jump, NewChain, Rule, Rules
from rules.spec import Interfaces

FACTS = Facts()
EIP, OTHER = "192.168.0.40", "192.168.0.41"
STANDING = (
    ("init",),
    ("eip-add", f"{EIP}/24"),
    ("dnat-add", f"{EIP},8080,tcp,10.0.1.5,80"),
    ("snat-add", f"{EIP},10.1.0.0/24"),
)
# How many nf_tables transactions each verb is.
VERBS = (
    (("eip-add", f"{OTHER}/24"), 1),
    (("eip-add", f"{OTHER}/24"), 0),
    (("floating-ip-add", f"{OTHER},10.0.1.7"), 1),
    (("floating-ip-del", OTHER), 1),
    (("dnat-add", f"{OTHER},8081,udp,10.0.1.8,53"), 1),
    (("dnat-del", f"{OTHER},8081,udp"), 1),
    (("snat-add", f"{OTHER},10.1.1.0/24"), 1),
    (("snat-del", f"{OTHER},10.1.1.0/24"), 1),
    (("snat-add", f"{OTHER},10.1.2.0/25"), 2),  # the first of its length: a map is made for it
    (("snat-del", f"{OTHER},10.1.2.0/25"), 2),
    (("eip-del", f"{OTHER}/24"), 1),
)


@pytest.fixture
def real(netns: Namespace) -> Iterator[Rig]:
    require("nft", "iptables-nft")
    with rig(netns, "nft") as made:
        yield made


def test_an_everyday_verb_is_one_transaction(real: Rig) -> None:
    """Each that deletes something is followed by a grace period, for which the next verb waits."""
    spec = None
    for words in STANDING:
        spec = edited(spec, words)
    assert spec is not None
    transaction.apply(real.kernel, spec, FACTS)
    counter = Generation()
    for words, most in VERBS:
        before = counter.number()
        spec = edited(spec, words)
        assert transaction.apply(real.kernel, spec, FACTS).actual.maps == fastpath.table(spec)
        after = counter.number()
        assert before is not None
        assert after is not None
        assert after - before == most, words
    assert not transaction.plan(spec, FACTS, real.read())


def test_own_transactions_are_no_drift(real: Rig) -> None:
    spec = None
    for words in STANDING:
        spec = edited(spec, words)
        transaction.apply(real.kernel, spec, FACTS)
        real.watch.settle()
        assert not real.watch.changed(), words


CHAIN = ChainRef("nat", "SHARED_DNAT")
FOREIGN = parse_rule("-p icmp -j ACCEPT")
KEY, OLD = EntryKey("ports", "192.168.0.1", "tcp", 80), EntryKey("ports", "192.168.0.1", "tcp", 81)
ENTRY = AddEntry(KEY, ("10.0.1.1", 80))


def rule(address: str) -> Rule:
    return Rule((Destination("192.168.0.1/32"),), Dnat(address))


@dataclass
class Both:
    """The drivers of one namespace."""

    netns: Namespace
    firewall: RememberedFirewall
    maps: KernelMaps
    joint: KernelJoint

    def state(self) -> tuple[Rules, dict[Any, Any]]:
        """The chain and the entries as drivers without a memory find them."""
        chains = NftVariantFirewall().read(["nat"]).chains
        return chains[CHAIN], dict(KernelMaps("nft", Generation()).read().table.entries)


@pytest.fixture
def both(netns: Namespace) -> Iterator[Both]:
    """A chain with one rule, and a map with one entry."""
    require("nft", "iptables-nft")
    with netns.entered():
        generation = Generation()
        driver = NftVariantFirewall(generation)
        firewall, maps = RememberedFirewall(driver), KernelMaps("nft", generation)
        reached = InsertRule(ChainRef("nat", "PREROUTING"), 0, Rule((), Jump(CHAIN.chain)))
        firewall.edit("nat", [NewChain(CHAIN), InsertRule(CHAIN, 0, rule("10.0.1.1")), reached])
        standing = fastpath.table_of(Interfaces(), {OLD: ("10.0.1.1", 81)})
        maps.commit(tuple(fastpath.edits(standing, maps.read().table)))
        firewall.read(["nat"])
        yield Both(netns, firewall, maps, KernelJoint(driver, firewall, maps))


def test_both_change_and_are_known_without_another_reading(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NftVariantFirewall, "read", lambda *_: pytest.fail("the chains were read"))
    monkeypatch.setattr(KernelMaps, "_list", lambda *_: pytest.fail("the maps were read"))
    assert both.joint.commit("nat", [InsertRule(CHAIN, 1, rule("10.0.1.2"))], [ENTRY, DropEntry(OLD)])
    # A rule that came so can be taken out so: its handle is known.
    assert both.joint.commit("nat", [DeleteRule(CHAIN, 1, rule("10.0.1.2"))], [DropEntry(KEY)])
    assert both.joint.commit("nat", [InsertRule(CHAIN, 0, rule("10.0.1.3"))], [ENTRY])
    found = both.firewall.read(["nat"]).chains[CHAIN], dict(both.maps.read().table.entries)
    monkeypatch.undo()
    assert found == both.state() == ((rule("10.0.1.3"), rule("10.0.1.1")), {KEY: ENTRY.target})


@pytest.mark.parametrize(
    "edits",
    [
        [InsertRule(CHAIN, 0, FOREIGN)],
        [NewChain(ChainRef("nat", "ANOTHER"))],
        [InsertRule(CHAIN, 0, Rule((), Jump(CHAIN.chain)))],
    ],
    ids=["a rule for the tool", "a chain", "a loop, which the kernel refuses"],
)
def test_what_cannot_be_at_once_changes_neither(both: Both, edits: Sequence[Any]) -> None:
    before, counter = both.state(), Generation()
    number = counter.number()
    assert not both.joint.commit("nat", edits, [ENTRY])
    assert counter.number() == number
    assert both.state() == before
    both.maps.commit([ENTRY])  # each knows what stands
    both.firewall.edit("nat", [InsertRule(CHAIN, 1, rule("10.0.1.2"))])
    assert both.state() == ((rule("10.0.1.1"), rule("10.0.1.2")), {OLD: ("10.0.1.1", 81), KEY: ENTRY.target})


def test_an_entry_that_cannot_be_is_refused_and_neither_changes(both: Both) -> None:
    before = both.state()
    with pytest.raises(Refused):
        both.joint.commit("nat", [InsertRule(CHAIN, 0, rule("10.0.1.2"))], [DropEntry(KEY)])
    assert both.state() == before


def test_what_others_wrote_before_is_seen(both: Both) -> None:
    both.maps.read()
    both.netns.run("nft", "add", "element", "ip", "natgw", "ports", "{ 192.168.0.9 . tcp . 9 : 10.0.1.9 . 9 }")
    before = both.state()
    with pytest.raises(Moved):
        both.joint.commit("nat", [InsertRule(CHAIN, 0, rule("10.0.1.2"))], [ENTRY])
    assert both.state() == before
    both.firewall.read(["nat"])
    assert both.joint.commit("nat", [InsertRule(CHAIN, 0, rule("10.0.1.2"))], [ENTRY])
    assert dict(both.maps.read().table.entries) == both.state()[1]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_others_write_right_behind_is_not_taken_for_ours(
    both: Both, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Handles.commit

    def followed(*args: Any, **how: Any) -> bool:
        done = commit(*args, **how)
        both.netns.run("iptables-nft", "-t", "nat", "-A", CHAIN.chain, "-p", "icmp", "-j", "ACCEPT")
        both.netns.run("nft", "add", "element", "ip", "natgw", "ports", "{ 192.168.0.9 . tcp . 9 : 10.0.1.9 . 9 }")
        return done

    monkeypatch.setattr(Handles, "commit", followed)
    edits = [InsertRule(CHAIN, 0, rule("10.0.1.2"))]
    if at_once:
        assert both.joint.commit("nat", edits, [ENTRY])
    else:
        both.firewall.edit("nat", edits)
    monkeypatch.undo()
    chain, entries = both.state()
    assert chain == (rule("10.0.1.2"), rule("10.0.1.1"), FOREIGN)
    assert both.firewall.read(["nat"]).chains[CHAIN] == chain
    assert dict(both.maps.read().table.entries) == entries
