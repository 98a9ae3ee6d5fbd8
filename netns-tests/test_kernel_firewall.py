"""Both iptables variants on the real kernel: what is written is read back, in order, whole or not at all."""

from __future__ import annotations

import fcntl
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from netns import Namespace, require

from gateway.kernel import legacy, restore, variant
from gateway.kernel.legacy import LegacyFirewall
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.ports import Firewall, Refused
from rules import nat
from rules.apply import apply_edits
from rules.iptables import render_rule
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainEdit,
    ChainRef,
    Conntrack,
    DeleteChain,
    DeleteRule,
    Destination,
    DestinationPort,
    Dnat,
    Foreign,
    InsertRule,
    Jump,
    NewChain,
    ReplaceRules,
    Rule,
    Rules,
    SetMark,
)
from rules.spec import GatewaySpec

TABLES = ("nat", "mangle")
PREROUTING = ChainRef("nat", "PREROUTING")
CHAIN = ChainRef("nat", "SHARED_DNAT")
OTHER = ChainRef("nat", "EXCLUSIVE_DNAT")
SPEC = GatewaySpec.model_validate(
    {
        "eips": [{"address": "192.168.0.10/24"}],
        "fips": [{"eip": "192.168.0.11", "internalIp": "10.0.1.5"}],
        "dnats": [
            {
                "eip": "192.168.0.10",
                "externalPort": 8888,
                "protocol": protocol,
                "internalIp": "10.0.1.10",
                "internalPort": 80,
            }
            for protocol in ("tcp", "udp")
        ],
        "snats": [
            {"eip": "192.168.0.10", "internalCIDR": "10.0.1.0/24"},
            {"eip": "192.168.0.10", "internalCIDR": "0.0.0.0/0", "randomFully": False},
        ],
    }
)


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path) -> Iterator[Path]:
    """The lock of iptables' tools is a file of the machine; here nobody waits for those of tests beside this one."""
    path = tmp_path / "xtables.lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", str(path))
        patch.setattr(restore, "LOCK_SECONDS", 60)
        yield path


@pytest.fixture(params=["legacy", "nft"])
def firewall(request: pytest.FixtureRequest, netns: Namespace) -> Iterator[Firewall]:
    """A driver inside its namespace."""
    require(*(f"iptables-{request.param}{tool}" for tool in ("", "-save", "-restore")))
    with netns.entered():
        yield LegacyFirewall() if request.param == "legacy" else NftVariantFirewall()


@pytest.fixture
def legacy_firewall(netns: Namespace) -> Iterator[LegacyFirewall]:
    require("iptables-legacy", "iptables-legacy-save", "iptables-legacy-restore")
    with netns.entered():
        yield LegacyFirewall()


@pytest.fixture(params=[-1, legacy.FEW_RULES], ids=["restore", "libiptc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the legacy variant; for the nft variant there is but one."""
    monkeypatch.setattr(legacy, "FEW_RULES", request.param)


def dnat(number: int) -> Rule:
    return Rule((Destination(f"192.168.0.{number}/32"), DestinationPort("tcp", 8888)), Dnat("10.0.1.10", 80))


def rules_of(firewall: Firewall, ref: ChainRef) -> Rules:
    return firewall.read([ref.table]).chains[ref]


def saved(netns: Namespace, firewall: Firewall, ref: ChainRef) -> list[str]:
    """The chain's rules as the variant's own tool prints them."""
    text = netns.run(f"iptables-{firewall.variant}-save", "-t", ref.table)
    start = f"-A {ref.chain} "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def test_a_table_nobody_touched_has_its_built_in_chains(firewall: Firewall) -> None:
    expected = {ChainRef(table, chain): () for table in TABLES for chain in BUILTIN[table]}
    assert dict(firewall.read(TABLES).chains) == expected


@pytest.mark.usefixtures("way")
def test_every_shape_of_rule_is_read_back_and_printed_as_rendered(netns: Namespace, firewall: Firewall) -> None:
    chains = nat.chains(SPEC, guard=True, maps=True)
    for table in TABLES:
        mine = {ref: rules for ref, rules in chains.items() if ref.table == table and rules is not None}
        hooks = [(ref, rule) for ref, rule in nat.HOOKS if ref.table == table]
        firewall.edit(
            table,
            [
                *map(NewChain, mine),
                *(ReplaceRules(ref, rules) for ref, rules in mine.items()),
                *(InsertRule(ref, i, rule) for i, (ref, rule) in enumerate(hooks) if ref == hooks[0][0]),
                *(InsertRule(ref, 0, rule) for ref, rule in hooks if ref != hooks[0][0]),
            ],
        )
    seen = firewall.read(TABLES).chains
    for ref, rules in chains.items():
        assert seen[ref] == rules
        assert saved(netns, firewall, ref) == list(map(render_rule, rules))
    for ref, rule in nat.HOOKS:
        assert rule in seen[ref]


@pytest.mark.usefixtures("way")
def test_random_edits_leave_what_they_leave_on_paper(firewall: Firewall) -> None:
    choice = random.Random(4787)
    chains = dict(firewall.read(["nat"]).chains)
    for _ in range(25):
        edits: list[ChainEdit] = []
        for _ in range(choice.randint(1, 6)):
            edit = random_edit(choice, chains)
            chains = apply_edits("nat", chains, [edit])
            edits.append(edit)
        firewall.edit("nat", edits)
        assert dict(firewall.read(["nat"]).chains) == chains, edits


def random_edit(choice: random.Random, chains: dict[ChainRef, Rules]) -> ChainEdit:
    ref = choice.choice([CHAIN, OTHER])
    if ref not in chains:
        return NewChain(ref)
    rules = chains[ref]
    kind = choice.choice(["insert"] * 5 + ["delete"] * 3 + ["replace", "drop"])
    if kind == "drop" and ref == OTHER:
        return DeleteChain(ref)
    if kind == "replace":
        return ReplaceRules(ref, tuple(dnat(choice.randint(1, 6)) for _ in range(choice.randint(0, 4))))
    if kind == "delete" and rules:
        index = choice.randrange(len(rules))
        return DeleteRule(ref, index, rules[index])
    # Few different rules, so that equal ones stand side by side.
    return InsertRule(ref, choice.randint(0, len(rules)), dnat(choice.randint(1, 6)))


@pytest.mark.usefixtures("way")
def test_of_equal_rules_the_one_at_the_index_goes(firewall: Firewall) -> None:
    firewall.edit("nat", [NewChain(CHAIN), ReplaceRules(CHAIN, (dnat(1), dnat(2), dnat(1)))])
    firewall.edit("nat", [DeleteRule(CHAIN, 2, dnat(1))])
    assert rules_of(firewall, CHAIN) == (dnat(1), dnat(2))


BAD: dict[str, list[ChainEdit]] = {
    "a chain that stands": [NewChain(CHAIN)],
    "a jump into nothing": [InsertRule(CHAIN, 0, Rule((), Jump("NOWHERE")))],
    "an index beyond the end": [InsertRule(CHAIN, 9, dnat(9))],
    "a deletion beyond the end": [DeleteRule(CHAIN, 9, dnat(9))],
    "a chain in use": [DeleteChain(OTHER)],
    "an unknown chain": [ReplaceRules(ChainRef("nat", "NOWHERE"), (dnat(1),))],
    "a chain's name too long": [NewChain(ChainRef("nat", "N" * 40))],
    "a name with a newline": [NewChain(ChainRef("nat", "A\nCOMMIT"))],
    "a state that is none": [InsertRule(CHAIN, 0, Rule((Conntrack("BOGUS", "10.0.0.1"),), Dnat("10.0.1.1")))],
    "an address that is none": [InsertRule(CHAIN, 0, Rule((), Dnat("10.0.1.999")))],
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_is_refused_changes_nothing(firewall: Firewall, bad: list[ChainEdit]) -> None:
    firewall.edit("nat", [NewChain(CHAIN), NewChain(OTHER), InsertRule(CHAIN, 0, Rule((), Jump(OTHER.chain)))])
    before = firewall.read(TABLES)
    good: list[ChainEdit] = [InsertRule(CHAIN, 0, dnat(1)), NewChain(ChainRef("nat", "NEW"))]
    with pytest.raises(Refused) as refused:
        firewall.edit("nat", [*good, *bad])
    assert refused.value.step.startswith("edit table nat")
    assert refused.value.reason
    assert firewall.read(TABLES) == before
    firewall.edit("nat", good)
    assert rules_of(firewall, CHAIN) == (dnat(1), Rule((), Jump(OTHER.chain)))


@pytest.mark.usefixtures("way")
def test_a_refusal_of_the_kernel_itself_changes_nothing(legacy_firewall: LegacyFirewall) -> None:
    # DNAT belongs into nat, which only the kernel checks, and only at the commit.
    ref = ChainRef("mangle", "VPC_MARK")
    legacy_firewall.edit("mangle", [NewChain(ref)])
    with pytest.raises(Refused, match=r"Invalid argument|line 4 failed: COMMIT"):
        legacy_firewall.edit("mangle", [InsertRule(ref, 0, Rule((), SetMark(1, 1))), InsertRule(ref, 1, dnat(1))])
    assert rules_of(legacy_firewall, ref) == ()


@pytest.mark.usefixtures("way")
def test_what_others_write_is_seen_and_kept(netns: Namespace, firewall: Firewall) -> None:
    iptables = f"iptables-{firewall.variant}"
    firewall.edit("nat", [NewChain(CHAIN)])
    netns.run(iptables, "-w", "-t", "nat", "-N", "THEIRS")
    netns.run(
        iptables, "-w", "-t", "nat", "-A", "THEIRS", "-p", "tcp", "-m", "comment", "--comment", "a b", "-j", "RETURN"
    )
    firewall.edit("nat", [InsertRule(PREROUTING, 0, Rule((), Jump(CHAIN.chain)))])
    netns.run(iptables, "-w", "-t", "nat", "-I", "PREROUTING", "-j", "THEIRS")
    firewall.edit("nat", [InsertRule(CHAIN, 0, dnat(1))])
    chains = firewall.read(["nat"]).chains
    (foreign,) = chains[ChainRef("nat", "THEIRS")]
    assert isinstance(foreign, Foreign)
    assert "a b" in foreign.text
    assert chains[PREROUTING] == (Rule((), Jump("THEIRS")), Rule((), Jump(CHAIN.chain)))
    assert chains[CHAIN] == (dnat(1),)


def test_a_foreign_rule_is_put_back_as_it_was(firewall: Firewall) -> None:
    foreign: AnyRule = Foreign('-p tcp -m comment --comment "a b" -m tcp --dport 1:5 -j RETURN')
    firewall.edit("nat", [NewChain(CHAIN), InsertRule(CHAIN, 0, foreign)])
    assert rules_of(firewall, CHAIN) == (foreign,)


def test_nothing_is_printed(firewall: Firewall, netns: Namespace, capfd: pytest.CaptureFixture[str]) -> None:
    # Legacy tables in the namespace make the nft variant's tools say so every time.
    netns.run("iptables-legacy", "-t", "nat", "-L", "-n")
    firewall.edit("nat", [NewChain(CHAIN), InsertRule(CHAIN, 0, dnat(1))])
    firewall.read(TABLES)
    with pytest.raises(Refused) as refused:
        firewall.edit("nat", [NewChain(CHAIN)])
    assert "Warning" not in refused.value.reason
    assert capfd.readouterr() == ("", "")


def test_a_table_written_with_nft_is_refused_not_taken_for_empty(netns: Namespace) -> None:
    require("nft", "iptables-nft-save")
    netns.run("nft", "add table ip nat; add chain ip nat X; add rule ip nat X numgen inc mod 2 vmap { 0 : accept }")
    with netns.entered(), pytest.raises(Refused, match="cannot show") as refused:
        NftVariantFirewall().read(["nat"])
    assert not refused.value.retryable


# The legacy variant's own ways.


def test_no_other_table_is_loaded(netns: Namespace, legacy_firewall: LegacyFirewall) -> None:
    legacy_firewall.edit("nat", [NewChain(CHAIN), InsertRule(PREROUTING, 0, Rule((), Jump(CHAIN.chain)))])
    assert netns.run("cat", "/proc/net/ip_tables_names").split() == ["nat"]


def test_in_a_built_in_chain_the_rule_itself_is_deleted(netns: Namespace, legacy_firewall: LegacyFirewall) -> None:
    hook = Rule((), Jump(CHAIN.chain))
    legacy_firewall.edit("nat", [NewChain(CHAIN), InsertRule(PREROUTING, 0, hook)])
    netns.run("iptables-legacy", "-w", "-t", "nat", "-I", "PREROUTING", "-j", "ACCEPT")
    legacy_firewall.edit("nat", [DeleteRule(PREROUTING, 0, hook)])
    assert saved(netns, legacy_firewall, PREROUTING) == ["-j ACCEPT"]


@pytest.mark.usefixtures("way")
def test_the_xtables_lock_is_waited_for(
    legacy_firewall: LegacyFirewall, own_lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "LOCK_SECONDS", 1)
    with open(own_lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="xtables lock") as refused:
            legacy_firewall.edit("nat", [NewChain(CHAIN), ReplaceRules(CHAIN, (dnat(1),))])
        assert refused.value.retryable
        assert CHAIN not in legacy_firewall.read(["nat"]).chains
        monkeypatch.setattr(restore, "LOCK_SECONDS", 60)
        release = threading.Timer(0.2, fcntl.flock, (other, fcntl.LOCK_UN))
        release.start()
        legacy_firewall.edit("nat", [NewChain(CHAIN), ReplaceRules(CHAIN, (dnat(1),))])
        release.join()
    assert rules_of(legacy_firewall, CHAIN) == (dnat(1),)


def test_no_change_of_another_process_is_lost(netns: Namespace, firewall: Firewall) -> None:
    firewall.edit("nat", [NewChain(CHAIN), NewChain(OTHER)])
    append = f"iptables-{firewall.variant} -w -t nat -A {OTHER.chain} -s 10.9.0.$i -j RETURN"
    other = netns.spawn("sh", "-c", f"for i in $(seq 1 60); do {append} || exit 1; done")
    try:
        for number in range(1, 61):
            firewall.edit("nat", [InsertRule(CHAIN, number - 1, dnat(number))])
        _, stderr = other.communicate(timeout=100)
    finally:
        other.kill()
    assert other.returncode == 0, stderr
    assert rules_of(firewall, CHAIN) == tuple(map(dnat, range(1, 61)))
    assert len(rules_of(firewall, OTHER)) == 60


def test_thousands_of_edits_leak_nothing(legacy_firewall: LegacyFirewall) -> None:
    legacy_firewall.edit("nat", [NewChain(CHAIN)])
    (hairpin,) = nat.hairpin_snat(SPEC.eips, SPEC.interfaces.vpc)

    def round_trips(count: int) -> int:
        for _ in range(count):
            legacy_firewall.edit("nat", [InsertRule(CHAIN, 0, hairpin), InsertRule(CHAIN, 0, dnat(1))])
            legacy_firewall.edit("nat", [DeleteRule(CHAIN, 0, dnat(1)), DeleteRule(CHAIN, 0, hairpin)])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    warm = round_trips(200)
    # In kB: one kept for each rule would be 3,000.
    assert round_trips(1500) - warm < 1500


# Which variant.


def test_auto_is_legacy_where_its_probe_succeeds(netns: Namespace) -> None:
    require("iptables-legacy")
    with netns.entered():
        assert variant.choose("auto") == "legacy"


def test_auto_is_nft_where_legacy_is_missing_or_fails(
    netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert variant.choose("auto") == "nft"
    broken = tmp_path / "iptables-legacy"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert variant.choose("auto") == "nft"


def test_a_setting_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert variant.choose("legacy") == "legacy"
    assert variant.choose("nft") == "nft"
    with pytest.raises(ValueError, match="none of auto, legacy, nft"):
        variant.choose("iptables")


@pytest.mark.parametrize(("name", "says"), [("legacy", "(legacy)"), ("nft", "(nf_tables)")])
def test_the_version_is_what_the_tool_prints(name: variant.Variant, says: str) -> None:
    require(f"iptables-{name}")
    text = variant.iptables_version(name)
    assert text.startswith("iptables v1.")
    assert text.endswith(says)
