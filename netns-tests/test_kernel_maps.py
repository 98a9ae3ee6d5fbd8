"""The driver of the maps ahead of the chains, on the real kernel: what is written is what is read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from netns import Namespace, require
from specs import random_spec

from gateway.kernel import maps, netlink
from gateway.kernel import mapwire as wire
from gateway.kernel.generation import Generation
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.tool import Ended, run
from gateway.ports import MapsReading, Refused, Variant
from rules import fastpath
from rules.apply import Rejected, apply_map_edits
from rules.fastpath import NO_TABLE
from rules.maps import (
    AddEntry,
    DropEntry,
    DropTable,
    EntryKey,
    MapEdit,
    MapTable,
    PrefixSnat,
    Unlabelled,
    WriteChains,
    label,
    rule_text,
    script,
)
from rules.nft import ServiceKey
from rules.share import Service, edits, table_of
from rules.spec import Interfaces


@pytest.fixture
def inside(netns: Namespace) -> Iterator[Namespace]:
    """The test runs in a namespace of its own."""
    require("nft", "iptables-nft", "iptables-legacy")
    with netns.entered():
        yield netns


@pytest.fixture
def driver(inside: Namespace) -> KernelMaps:
    return KernelMaps("legacy", Generation())


def test_any_spec_follows_any_other(driver: KernelMaps) -> None:
    for seed in range(60):
        wanted = fastpath.table(random_spec(random.Random(seed)))
        driver.commit(tuple(fastpath.edits(wanted, driver.read().table)))
        assert driver.read().table == wanted
        assert KernelMaps("legacy", Generation()).read().table == wanted
        assert not list(fastpath.edits(wanted, driver.read().table))
    driver.commit((DropTable(),))
    assert driver.read() == KernelMaps("legacy", Generation()).read()
    assert driver.read().table == NO_TABLE


FIP, PORT = EntryKey("fip-in", "192.168.0.1"), EntryKey("ports", "192.168.0.1", "tcp", 80)
STANDING = fastpath.table_of(Interfaces(), {FIP: ("10.0.1.1", 0), EntryKey("snat-24", "10.0.1.0"): ("192.168.0.1", 0)})
FEWER = fastpath.chains(Interfaces(), ())


@pytest.mark.parametrize(
    "commands",
    [
        (AddEntry(PORT, ("10.0.1.1", 8080)),),
        (AddEntry(FIP, ("10.0.1.1", 0)),),
        (AddEntry(FIP, ("10.0.1.2", 0)),),
        (DropEntry(FIP), AddEntry(FIP, ("10.0.1.2", 0))),
        (DropEntry(PORT),),
        (DropEntry(FIP), DropEntry(FIP)),
        (AddEntry(PORT, ("10.0.1.1", 8080)), DropEntry(PORT._replace(port=81))),
        (AddEntry(EntryKey("snat-8", "10.0.0.0"), ("192.168.0.1", 0)),),
        (WriteChains(FEWER, ("snat-24",)),),
        (WriteChains(FEWER, ("snat-8",)),),
        (WriteChains(STANDING.chains, ("snat-24",)),),
        (DropTable(),),
        (DropTable(), DropTable()),
        (DropTable(), WriteChains(FEWER), AddEntry(FIP, ("10.0.1.3", 0))),
        (DropTable(), AddEntry(FIP, ("10.0.1.3", 0))),
        (WriteChains({"prerouting": (Unlabelled("x"),)}),),
        (AddEntry(FIP._replace(address="192.168.0.1; flush ruleset"), ("10.0.1.3", 0)),),
        (AddEntry(PORT._replace(protocol="icmp"), ("10.0.1.3", 0)),),
    ],
    ids=repr,
)
def test_the_fake_refuses_what_the_kernel_refuses(driver: KernelMaps, commands: Sequence[MapEdit]) -> None:
    driver.commit(tuple(fastpath.edits(STANDING, NO_TABLE)))
    try:
        expected = apply_map_edits(STANDING, commands)
    except Rejected:
        with pytest.raises(Refused):
            driver.commit(commands)
        if can_be_said(commands):
            with pytest.raises(Refused):
                force(driver, commands)
        expected = STANDING
    else:
        driver.commit(commands)
    assert driver.read().table == KernelMaps("legacy", Generation()).read().table == expected


def can_be_said(commands: Sequence[MapEdit]) -> bool:
    try:
        return bool(script(commands))
    except ValueError:
        return False


def force(driver: KernelMaps, commands: Sequence[MapEdit]) -> None:
    """Have the kernel itself refuse, not the driver's expectation."""
    expectation = maps.apply_map_edits
    maps.apply_map_edits = lambda table, _: table  # type: ignore[assignment]
    try:
        driver.commit(commands)
    finally:
        maps.apply_map_edits = expectation


def fill(driver: KernelMaps) -> None:
    driver.commit(tuple(fastpath.edits(STANDING, driver.read().table)))
    assert driver.read().table == STANDING


AGAIN = PrefixSnat("net1", 24, random_fully=False)  # one of those that stand
LENGTHS = [EntryKey(f"snat-{n}{how}", f"10.0.{n}.0") for n in (32, 24, 17, 16, 0) for how in ("", "-random")]


def as_the_kernel_tells(driver: KernelMaps) -> list[object]:
    """The maps and rules, attribute by attribute, but for what differs each time they are made: handles and places."""
    maps = [netlink.attributes(said, 4) for said in driver._netlink.dump(wire.MAPS)]
    rules = [netlink.attributes(said, 4) for said in driver._netlink.dump(wire.rules_of(2, "natgw", "postrouting"))]
    told: list[object] = sorted((bytes(a[2]), [(k, bytes(a[k])) for k in (3, 4, 5, 6, 7, 13)]) for a in maps)
    return [*told, *((bytes(a[4]), bytes(a[7])) for a in rules)]


def test_prefix_lengths_come_and_go_as_nft_would_write_them(
    driver: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(driver)
    rng = random.Random(7)
    for _ in range(30):
        some = dict.fromkeys(rng.sample(LENGTHS, rng.randrange(len(LENGTHS))), ("192.168.0.1", 0))
        wanted = fastpath.table_of(Interfaces(), {**some, FIP: ("10.0.1.1", 0)})
        edits = tuple(fastpath.edits(wanted, driver.read().table))
        with monkeypatch.context() as patched:
            patched.setattr(maps, "run", None)  # no program is started
            driver.commit(edits)
            assert driver.read().table == wanted
        written = as_the_kernel_tells(driver)
        with driver._generation.own():
            run(["nft", "delete", "table", "ip", "natgw"])
        run(["nft", "-f", "-"], stdin=script(fastpath.edits(wanted, NO_TABLE)))
        assert as_the_kernel_tells(driver) == written
    assert driver.read().table == wanted


@pytest.mark.parametrize("where", ["insert", "add"])
@pytest.mark.parametrize("text", ["counter", f'{rule_text(AGAIN)} comment "{label(AGAIN)}"'], ids=["other", "again"])
def test_where_another_rule_stands_among_ours_nft_writes_them_all(
    inside: Namespace, driver: KernelMaps, where: str, text: str
) -> None:
    fill(driver)
    inside.run("nft", f"{where} rule ip natgw postrouting {text}")
    driver.read()
    wanted = fastpath.table_of(Interfaces(), dict.fromkeys(LENGTHS[:3], ("192.168.0.1", 0)))
    driver.commit(tuple(fastpath.edits(wanted, driver.read().table)))
    assert KernelMaps("legacy", Generation()).read().table == driver.read().table == wanted


@pytest.mark.parametrize(
    "command",
    [
        "delete table ip natgw",
        "flush chain ip natgw prerouting",
        "insert rule ip natgw prerouting counter",
        "add rule ip natgw postrouting counter comment missed",
        "delete element ip natgw fip-in { 192.168.0.1 }",
        "add element ip natgw fip-in { 192.168.0.9 : 10.0.1.9 }",
        "add element ip natgw fip-in { 192.168.0.9 comment wolf : 10.0.1.9 }",
        "add element ip natgw ports { 192.168.0.9 . sctp . 80 : 10.0.1.9 . 80 }",
        "add map ip natgw snat-32 { type ipv4_addr : inet_service; }",
        "add map ip natgw other { type ipv4_addr : ipv4_addr; }",
        "add chain ip natgw other { type nat hook input priority 0; }",
    ],
)
def test_what_other_hands_did_to_the_table_is_put_right(driver: KernelMaps, command: str) -> None:
    fill(driver)
    run(["nft", *command.split(" ")])
    found = driver.read().table
    assert found != STANDING
    driver.commit(tuple(fastpath.edits(STANDING, found)))
    assert driver.read().table == KernelMaps("legacy", Generation()).read().table == STANDING


def test_rules_that_may_come_ahead_of_ours_speak_against_maps(inside: Namespace) -> None:
    def against(variant: Variant) -> str:
        return KernelMaps(variant, Generation()).read().hindrance

    assert (against("legacy"), against("nft")) == ("", "")
    inside.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN")
    inside.run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN")
    assert (against("legacy"), against("nft")) == ("", "")  # the variant's own tables are the other reading's
    inside.run("iptables-legacy", "-t", "nat", "-A", "POSTROUTING", "-j", "RETURN")
    assert against("legacy") == ""
    assert against("nft") == "another rule may come ahead of ours: iptables-legacy nat POSTROUTING"
    inside.run("iptables-legacy", "-t", "nat", "-F")
    inside.run("iptables-nft", "-t", "nat", "-A", "PREROUTING", "-j", "RETURN")
    assert against("nft") == ""
    assert against("legacy") == "another rule may come ahead of ours: nft table ip nat, chain PREROUTING"
    inside.run("iptables-nft", "-t", "nat", "-F")
    inside.run("nft", "-f", "-", stdin=OTHERS)
    assert (against("legacy"), against("nft")) == ("", "")
    inside.run("nft", "add rule inet other between counter")
    assert (
        against("legacy")
        == against("nft")
        == "another rule may come ahead of ours: nft table inet other, chain between"
    )


OTHERS = """
table inet other {
    chain before { type nat hook prerouting priority -150; counter; }
    chain behind { type nat hook postrouting priority 110; counter; }
    chain filter { type filter hook prerouting priority -105; counter; }
    chain between { type nat hook postrouting priority 95; }
}
"""


def test_the_whole_is_read_only_after_changes_of_others(
    inside: Namespace, driver: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = Generation()
    driver, share = KernelMaps("nft", generation), KernelNft(generation)
    fill(driver)
    read: list[str] = []
    listing = KernelMaps._list
    monkeypatch.setattr(KernelMaps, "_list", lambda self: read.append("list") or listing(self))
    driver.commit([AddEntry(PORT, ("10.0.1.1", 8080)), DropEntry(FIP)])
    share.commit(
        tuple(edits(table_of({ServiceKey("192.168.0.1", "tcp", 81): Service((("10.0.1.1", 80),))}), share.read()))
    )
    assert driver.read().table.entries[PORT] == ("10.0.1.1", 8080)
    assert FIP not in driver.read().table.entries
    assert read == []
    inside.run("nft", "delete", "element", "ip", "natgw", "ports", "{ 192.168.0.1 . tcp . 80 }")
    assert PORT not in driver.read().table.entries
    assert read == ["list"]


MANY = {EntryKey("ports", f"192.168.{n >> 8}.{n & 255}", "udp", 53): ("10.0.1.1", n + 1) for n in range(5000)}


@pytest.mark.parametrize("before", [NO_TABLE, STANDING], ids=["a new table", "one that stands"])
def test_many_entries_at_once(driver: KernelMaps, before: MapTable) -> None:
    driver.commit(tuple(fastpath.edits(before, NO_TABLE)))
    wanted = fastpath.table_of(Interfaces(), {**STANDING.entries, **MANY})
    driver.commit(tuple(fastpath.edits(wanted, before)))
    assert KernelMaps("legacy", Generation()).read().table == driver.read().table == wanted


def test_a_new_table_with_many_entries_comes_whole_or_not_at_all(
    inside: Namespace, driver: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(argv: Sequence[str], *, stdin: str = "") -> Ended:
        assert "chain" not in inside.run("nft", "--terse", "list", "ruleset")
        return run(argv, stdin=stdin.replace("saddr", "sadder"))

    driver.read()
    monkeypatch.setattr(maps, "run", failing)
    with pytest.raises(Refused):
        driver.commit(tuple(fastpath.edits(fastpath.table_of(Interfaces(), MANY), NO_TABLE)))
    assert inside.run("nft", "list", "tables") == ""
    assert driver.read() == MapsReading(NO_TABLE, driver.read().hindrance)
    assert driver.read().hindrance.startswith("the kernel refused them: syntax error")


def test_a_kernel_or_an_nft_that_cannot_do_it_says_so(inside: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(argv: Sequence[str], *, stdin: str = "") -> Ended:
        return run(argv, stdin=stdin.replace("fully-random", "wholly-random"))

    monkeypatch.setattr(maps, "run", refusing)
    assert KernelMaps("legacy", Generation()).read().hindrance.startswith("kernel or nft cannot: syntax error")
    assert inside.run("nft", "list", "tables") == ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert KernelMaps("legacy", Generation()).read().hindrance == "nft is not installed"


def test_what_is_not_there_is_asked_for_without_giving_up_the_socket(
    driver: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the socket the kernel gives back what was deleted before, and waits for it: 10 ms of every deletion."""
    driver.commit(tuple(fastpath.edits(STANDING, driver.read().table)))
    driver.read()
    opened: list[int] = []
    real = netlink._open
    monkeypatch.setattr(netlink, "_open", lambda protocol: opened.append(protocol) or real(protocol))
    for _ in range(3):
        driver.commit((DropEntry(FIP),))
        driver.commit((AddEntry(FIP, ("10.0.1.1", 0)),))
    assert driver.read().table == STANDING
    assert opened == []
