"""Readings that are remembered: what others write between two of ours is seen, and never answered wrongly."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import Namespace, require, veth

from gateway.kernel import restore, subscription
from gateway.kernel.generation import Generation
from gateway.kernel.legacy import LegacyFirewall
from gateway.kernel.links import KernelLinks
from gateway.kernel.netlink import Message, Netlink, attributes
from gateway.kernel.nft_messages import GETRULE, NETLINK_NETFILTER, NFGENMSG, RULE_EXPRESSIONS, in_chain
from gateway.kernel.nft_rules import expressions
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.ports import Moved, Refused
from gateway.remembered import EvidentFirewall, RememberedFirewall
from rules import nat
from rules.delta import chain_edits
from rules.iptables import parse_rule, render_rule
from rules.ruleset import ChainRef, DeleteRule, InsertRule, NewChain, ReplaceRules, Rule, Rules
from rules.spec import Dnat, GatewaySpec, Snat
from rules.state import AddAddress, AddressKey, DeleteAddress, SetPromoteSecondaries

CHAIN = ChainRef("nat", "SHARED_DNAT")
FOREIGN = parse_rule("-p icmp -j ACCEPT")
"""Of this the drivers leave the writing to the tools."""


def mapping(port: int, to: str = "10.0.1.10") -> Dnat:
    return Dnat(eip="192.168.0.10", external_port=port, protocol="tcp", internal_ip=to, internal_port=80)


def rules(*ports: int) -> Rules:
    return nat.shared_dnat(GatewaySpec(dnats=[mapping(port) for port in ports]).dnats)


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    require("iptables-legacy", "iptables-nft")
    # Others use this machine's lock, too, which would be no lie but a second reading.
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    made = Namespace("rem")
    with made.entered():
        yield made
    made.remove()


def driver(variant: str) -> EvidentFirewall:
    return LegacyFirewall() if variant == "legacy" else NftVariantFirewall()


VARIANTS = pytest.mark.parametrize("variant", ["legacy", "nft"])


class Counted:
    """A driver that counts how often it is asked to read."""

    def __init__(self, inner: EvidentFirewall) -> None:
        self.reads = 0
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        if name == "read":
            self.reads += 1
        return getattr(self._inner, name)


@VARIANTS
def test_our_own_edits_need_no_second_reading(variant: str, namespace: Namespace) -> None:
    counted = Counted(driver(variant))
    firewall = RememberedFirewall(counted)  # type: ignore[arg-type]
    firewall.read(["nat"])
    firewall.edit("nat", [NewChain(CHAIN)])
    firewall.read(["nat"])
    counted.reads = 0
    standing: Rules = ()
    steps = (rules(2), rules(2, 3, 4), rules(2, 4), rules(1, 2, 4), rules(1, 9, 2, 4), rules(4), ())
    for wanted in steps:
        firewall.edit("nat", list(chain_edits(CHAIN, standing, wanted)))
        standing = wanted
        assert firewall.read(["nat"]).chains[CHAIN] == wanted
        assert driver(variant).read(["nat"]).chains[CHAIN] == wanted
    assert counted.reads == 0


@VARIANTS
def test_nor_do_those_that_go_through_the_tool(variant: str, namespace: Namespace) -> None:
    counted = Counted(driver(variant))
    firewall = RememberedFirewall(counted)  # type: ignore[arg-type]
    firewall.edit("nat", [NewChain(CHAIN)])
    standing = firewall.read(["nat"]).chains[CHAIN]
    counted.reads = 0
    for ports in (range(1, 301), (*range(1, 301), 700, 701), range(2, 301, 2), ()):
        wanted = (*rules(*ports), FOREIGN) if ports else ()
        firewall.edit("nat", list(chain_edits(CHAIN, standing, wanted)))
        standing = wanted
        assert firewall.read(["nat"]).chains[CHAIN] == wanted
        assert driver(variant).read(["nat"]).chains[CHAIN] == wanted
    assert counted.reads == 0


@VARIANTS
def test_a_chain_is_written_anew_without_the_tool(
    variant: str, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall = RememberedFirewall(driver(variant))
    mangle = ChainRef("mangle", "VPC_MARK")
    firewall.edit("mangle", [NewChain(mangle)])
    firewall.edit("nat", [NewChain(CHAIN), InsertRule(CHAIN, 0, FOREIGN)])
    for table in ("nat", "mangle"):
        firewall.read([table])
    tool, used = restore.edit, []

    def noted(*args: Any, **how: Any) -> None:
        used.append(args[1])
        tool(*args, **how)

    monkeypatch.setattr(restore, "edit", noted)
    for wanted in (rules(*range(1, 1501)), rules(*range(1500, 800, -1)), ()):
        firewall.edit("nat", [ReplaceRules(CHAIN, wanted)])
        assert firewall.read(["nat"]).chains[CHAIN] == driver(variant).read(["nat"]).chains[CHAIN] == wanted
        firewall.edit("nat", [InsertRule(CHAIN, len(wanted), rules(9)[0])])  # the handles are those of the new rules
        assert driver(variant).read(["nat"]).chains[CHAIN] == (*wanted, *rules(9))
    assert not used
    # What the kernel refuses in the midst of it leaves the chain as it was: DNAT belongs into nat.
    with pytest.raises(Refused):
        firewall.edit("mangle", [ReplaceRules(mangle, rules(*range(1, 700)))])
    assert driver(variant).read(["mangle"]).chains[mangle] == ()
    theirs = "-t nat -I SHARED_DNAT 1 -d 9.9.9.9 -j ACCEPT"
    namespace.run(f"iptables-{variant}", *theirs.split())
    with pytest.raises(Moved):
        firewall.edit("nat", [ReplaceRules(CHAIN, rules(*range(1, 700)))])


@VARIANTS
def test_a_rule_for_the_tool_at_the_end_of_a_new_chain_leaves_all_to_it(variant: str, namespace: Namespace) -> None:
    counted = Counted(driver(variant))
    firewall = RememberedFirewall(counted)  # type: ignore[arg-type]
    other = ChainRef("nat", "SHARED_SNAT")
    firewall.edit("nat", [NewChain(CHAIN), NewChain(other)])
    firewall.read(["nat"])
    counted.reads = 0
    wanted = (*rules(*range(1, 701)), FOREIGN)
    firewall.edit("nat", [InsertRule(other, 0, SHAPES[0]), ReplaceRules(CHAIN, wanted)])
    for chains in (firewall.read(["nat"]).chains, driver(variant).read(["nat"]).chains):
        assert (chains[other], chains[CHAIN]) == (SHAPES[:1], wanted)
    assert counted.reads == 0


def test_others_wait_while_the_tool_works_and_are_noticed(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(LegacyFirewall())
    firewall = RememberedFirewall(counted)  # type: ignore[arg-type]
    firewall.edit("nat", [NewChain(CHAIN), *chain_edits(CHAIN, (), rules(1))])
    standing = firewall.read(["nat"]).chains[CHAIN]
    real = restore.edit
    waiting: list[subprocess.Popen[bytes]] = []

    def with_another(*args: Any, **how: Any) -> None:
        # A rule of equal size in the place of ours: the sizes do not tell.
        change = "-t nat -R SHARED_DNAT 1 -d 192.168.0.10 -p tcp --dport 7 -j DNAT --to-destination 10.0.1.77:80"
        before = firewall._driver._inner._lock.opened()  # type: ignore[attr-defined]
        waiting.append(subprocess.Popen(["iptables-legacy", "-w", *change.split()]))
        while firewall._driver._inner._lock.opened() == before:  # type: ignore[attr-defined]
            assert waiting[0].poll() is None, "it has not waited"
        real(*args, **how)

    monkeypatch.setattr(restore, "edit", with_another)
    counted.reads = 0
    firewall.edit("nat", list(chain_edits(CHAIN, standing, (*rules(*range(1, 301)), FOREIGN))))
    assert waiting[0].wait() == 0
    assert len(firewall.read(["nat"]).chains[CHAIN]) == 301
    assert firewall.read(["nat"]).chains == LegacyFirewall().read(["nat"]).chains
    assert counted.reads == 1


@VARIANTS
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    "theirs",
    [
        "-I SHARED_DNAT 1 -d 9.9.9.9 -j ACCEPT",  # every rule of ours has another number now
        "-D SHARED_DNAT 1",
        "-R SHARED_DNAT 2 -d 192.168.0.10 -p tcp --dport 7 -j DNAT --to-destination 10.0.1.77:80",  # of equal size
        "-A POSTROUTING -j ACCEPT",
    ],
)
def test_an_edit_for_another_state_is_refused_and_the_next_reading_shows_it(
    variant: str, theirs: str, few: bool, namespace: Namespace
) -> None:
    firewall = RememberedFirewall(driver(variant))
    firewall.edit("nat", [NewChain(CHAIN), *chain_edits(CHAIN, (), rules(1, 2, 3))])
    standing = firewall.read(["nat"]).chains[CHAIN]
    namespace.run(f"iptables-{variant}", "-t", "nat", *theirs.split())
    now = driver(variant).read(["nat"]).chains
    many = [InsertRule(CHAIN, 0, rule) for rule in rules(*range(1000, 1300))]
    with pytest.raises(Moved):
        firewall.edit("nat", [DeleteRule(CHAIN, 1, standing[1]), *([] if few else many)])
    assert driver(variant).read(["nat"]).chains == now
    assert firewall.read(["nat"]).chains == now


def test_a_legacy_edit_that_leaves_no_evidence_makes_us_delete_nothing_else(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall = RememberedFirewall(LegacyFirewall())
    firewall.edit("nat", [NewChain(CHAIN), *chain_edits(CHAIN, (), rules(1, 2, 3))])
    standing = firewall.read(["nat"]).chains[CHAIN]
    # Another container's iptables has another lock, and the table stays as large as it is.
    swap = "\n".join(
        [
            "*nat",
            "-D SHARED_DNAT 1",
            f"-A SHARED_DNAT {render_rule(standing[0])}",
            "-R SHARED_DNAT 2 -d 192.168.0.10/32 -p tcp -m tcp --dport 7 -j DNAT --to-destination 10.0.1.77:80",
            "COMMIT\n",
        ]
    )
    elsewhere = ["env", "XTABLES_LOCKFILE=/run/natgw-test.lock", "iptables-legacy-restore", "--noflush"]
    namespace.run(*elsewhere, stdin=swap)
    firewall.edit("nat", [DeleteRule(CHAIN, 1, standing[1])])
    left = LegacyFirewall().read(["nat"]).chains[CHAIN]
    assert left == (parse_rule(render_rule(rules(7)[0]).replace("10.0.1.10", "10.0.1.77")), standing[0])
    with pytest.raises(Moved):
        firewall.edit("nat", [DeleteRule(CHAIN, 1, standing[2])])
    assert firewall.read(["nat"]).chains[CHAIN] == left


OTHER_SHAPES = ChainRef("nat", "OTHER_SHAPES")
SHAPES = tuple(
    map(
        parse_rule,
        (
            "-i eth0 -j MARK --set-xmark 0x1/0x1",
            "-m mark --mark 0x20000000/0x20000000 -g SHARED_DNAT",
            "-s 10.0.0.1/32 -o net1 -m mark --mark 0x5 -j SHARED_SNAT",
            "-p icmp -j RETURN",
            "-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN",
            "-o net1 -j MASQUERADE",
            "-d 10.0.0.0/9 -j MASQUERADE --random-fully",
        ),
    )
)


def raw(ref: ChainRef) -> list[bytes]:
    """The expressions of a chain's rules, as the kernel has them."""
    found = Netlink(NETLINK_NETFILTER).dump(Message(GETRULE, 0, in_chain(ref.table, ref.chain)))
    return [bytes(attributes(said, len(NFGENMSG))[RULE_EXPRESSIONS]) for said in found]


def test_a_rule_is_written_as_iptables_writes_it(namespace: Namespace) -> None:
    """Byte for byte, so that every tool reads ours as its own."""
    spec = GatewaySpec.model_validate(
        {
            "eips": [{"address": "192.168.0.10/24"}],
            "fips": [{"eip": "192.168.0.12", "internalIp": "10.0.1.5"}],
            "dnats": [mapping(8888).model_dump(), {**mapping(53).model_dump(), "protocol": "udp"}],
            "snats": [
                Snat(eip="192.168.0.10", internal_cidr=cidr, random_fully=cidr.endswith("4")).model_dump()
                for cidr in ("10.0.1.0/24", "10.0.0.0/16", "10.32.0.0/11", "10.0.1.9/32", "0.0.0.0/0")
            ],
        }
    )
    refs = [nat.EXCLUSIVE_DNAT, nat.SHARED_DNAT, nat.EXCLUSIVE_SNAT, nat.SHARED_SNAT, nat.HAIRPIN_SNAT]
    chains = {ref: nat.chains(spec, guard=False)[ref] for ref in refs} | {OTHER_SHAPES: SHAPES}
    refs.append(OTHER_SHAPES)
    by_tool, by_us = NftVariantFirewall(), RememberedFirewall(NftVariantFirewall())
    by_tool.edit("nat", [NewChain(ref) for ref in chains])
    by_us.read(["nat"])
    for ref, wanted in chains.items():
        by_us.edit("nat", list(chain_edits(ref, (), wanted)))
    mine = {ref: raw(ref) for ref in refs}
    assert by_tool.read(["nat"]).chains.items() >= chains.items()
    by_tool.edit("nat", [edit for ref, wanted in chains.items() for edit in chain_edits(ref, wanted, ())])
    by_tool.edit("nat", [edit for ref, wanted in chains.items() for edit in chain_edits(ref, (), wanted)])
    assert mine == {ref: raw(ref) for ref in refs}
    assert all(isinstance(rule, Rule) and expressions(rule) for wanted in chains.values() for rule in wanted)


def test_so_is_the_guard(namespace: Namespace) -> None:
    guard = nat.chains(GatewaySpec(), guard=True)[nat.ARP_GUARD]
    assert guard
    by_tool, by_us = NftVariantFirewall(), RememberedFirewall(NftVariantFirewall())
    by_tool.edit("mangle", [NewChain(nat.ARP_GUARD), *chain_edits(nat.ARP_GUARD, (), guard)])
    written = raw(nat.ARP_GUARD)
    by_us.read(["mangle"])
    by_us.edit("mangle", [DeleteRule(nat.ARP_GUARD, 0, guard[0])])
    by_us.edit("mangle", [InsertRule(nat.ARP_GUARD, 0, guard[0])])
    assert raw(nat.ARP_GUARD) == written
    assert expressions(guard[0])


def test_the_counter_tells_ours_from_theirs(namespace: Namespace) -> None:
    generation = Generation()
    before = generation.others()
    with generation.own():
        namespace.run("nft", "add", "table", "ip", "one")
    assert generation.others() == before
    namespace.run("nft", "add", "table", "ip", "two")
    theirs = generation.others()
    assert theirs != before
    with generation.own():
        namespace.run("nft", "add", "table", "ip", "three")
        namespace.run("nft", "add", "table", "ip", "four")  # somebody else's, in the same moment
    assert generation.others() != theirs


def test_a_lock_taken_for_nothing_is_no_reason_to_refuse(namespace: Namespace) -> None:
    firewall = RememberedFirewall(LegacyFirewall())
    firewall.edit("nat", [NewChain(CHAIN), *chain_edits(CHAIN, (), rules(1, 2))])
    standing = firewall.read(["nat"]).chains[CHAIN]
    namespace.run("iptables-legacy", "-t", "mangle", "-A", "PREROUTING", "-j", "ACCEPT")
    firewall.edit("nat", [DeleteRule(CHAIN, 0, standing[0])])
    assert LegacyFirewall().read(["nat"]).chains[CHAIN] == standing[1:]


class Restless:
    """A driver whose evidence never stands still."""

    def __init__(self, inner: EvidentFirewall) -> None:
        self._inner, self._asked = inner, 0

    def evidence(self, table: str) -> object:
        self._asked += 1
        return (self._asked, self._inner.evidence(table))

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@VARIANTS
def test_evidence_that_never_stands_still_stops_nobody(variant: str, namespace: Namespace) -> None:
    firewall = RememberedFirewall(Restless(driver(variant)))  # type: ignore[arg-type]
    firewall.edit("nat", [NewChain(CHAIN), *chain_edits(CHAIN, (), rules(1, 2))])
    for wanted in (rules(1, 2, 3), rules(2, 3), rules(2)):
        firewall.edit("nat", list(chain_edits(CHAIN, firewall.read(["nat"]).chains[CHAIN], wanted)))
        assert driver(variant).read(["nat"]).chains[CHAIN] == wanted


@VARIANTS
def test_an_insert_between_two_new_ones_and_a_rule_for_the_tool(variant: str, namespace: Namespace) -> None:
    firewall = RememberedFirewall(driver(variant))
    firewall.edit("nat", [NewChain(CHAIN)])
    firewall.read(["nat"])
    a, b, c = rules(1, 2, 3)
    firewall.edit("nat", [InsertRule(CHAIN, 0, a), InsertRule(CHAIN, 1, c), InsertRule(CHAIN, 1, b)])
    foreign = parse_rule("-p icmp -j ACCEPT")
    firewall.edit("nat", [InsertRule(CHAIN, 1, foreign)])
    expected = (a, foreign, b, c)
    assert firewall.read(["nat"]).chains[CHAIN] == driver(variant).read(["nat"]).chains[CHAIN] == expected
    firewall.edit("nat", [DeleteRule(CHAIN, 2, b)])
    assert driver(variant).read(["nat"]).chains[CHAIN] == (a, foreign, c)


@VARIANTS
def test_the_first_rule_of_a_built_in_chain(variant: str, namespace: Namespace) -> None:
    """nf_tables knows no chain that nobody has made."""
    firewall = RememberedFirewall(driver(variant))
    forward = ChainRef("mangle", "FORWARD")
    guard = parse_rule("-o net1 -j DROP")
    for standing, wanted in (((), (guard,)), ((guard,), ()), ((), (guard,))):
        assert firewall.read(["mangle"]).chains[forward] == standing
        edit = InsertRule(forward, 0, guard) if wanted else DeleteRule(forward, 0, guard)
        firewall.edit("mangle", [edit])
        assert firewall.read(["mangle"]).chains[forward] == driver(variant).read(["mangle"]).chains[forward] == wanted


OTHERS = [
    "addr add 192.168.0.20/24 dev net1",
    "addr add 192.168.0.21/24 dev net1",
    "addr del 192.168.0.20/24 dev net1",
    "route add 10.9.0.0/16 via 192.168.0.21 dev net1",
    "-6 route add fd00:9::/64 dev eth0",
    "rule add from 10.1.0.0/16 lookup 100",
    "route replace 10.9.0.0/16 via 10.0.1.1 dev eth0",
    "link set net1 arp off",
    "link set net1 down",
    "link set net1 up",
    "addr flush dev net1",
    "rule del from 10.1.0.0/16 lookup 100",
    "link add third type veth peer name p-third",
    "addr add 192.168.7.1/24 dev third",
    "link set third up",
    "route add 10.10.0.0/16 dev third",
    "link set third name fourth",
    "link del fourth",
    "link set eth0 down",
    "link del net1",
]


def test_a_remembered_reading_of_links_follows_whatever_others_do(namespace: Namespace) -> None:
    for name, address in (("eth0", "10.0.1.254/24"), ("net1", "192.168.0.11/24")):
        veth(namespace, name, namespace, f"p-{name}")
        namespace.run("ip", "addr", "add", address, "dev", name)
    links = KernelLinks()
    first = links.read()
    assert links.read() is first
    for words in OTHERS:
        subprocess.run(["ip", *words.split()], check=words != "link set third name fourth")
        assert links.read() == KernelLinks().read(), words


def test_our_own_addresses_are_in_the_next_reading_without_a_dump(namespace: Namespace) -> None:
    veth(namespace, "net1", namespace, "p-net1")
    links = KernelLinks()
    links.commit([SetPromoteSecondaries("net1", True)])
    links.read()
    keys = [AddressKey("net1", f"192.168.{n // 200}.{n % 200 + 1}/16") for n in range(1000)]
    for steps in ([AddAddress(key) for key in keys], [DeleteAddress(keys[0]), DeleteAddress(keys[-1])]):
        links.commit(steps)
        assert links.read() == KernelLinks().read()
    assert {key for key in links.read().addresses if key.interface == "net1"} == set(keys[1:-1])


def test_more_news_than_fits_is_a_reason_to_read_everything(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(made: socket.socket) -> None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    monkeypatch.setattr(subscription, "receive_buffer", small)
    veth(namespace, "net1", namespace, "p-net1")
    links = KernelLinks()
    links.read()
    lines = [f"addr add 10.{n // 62500}.{n // 250 % 250}.{n % 250 + 1}/8 dev net1" for n in range(500)]
    namespace.run("ip", "-batch", "-", stdin="\n".join(lines))
    assert links.read() == KernelLinks().read()
