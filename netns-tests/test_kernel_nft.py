"""The driver of the share-type DNAT table on the real nft: what is written is what is read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence

import pytest
from netns import Namespace, require

from gateway.kernel import nft
from gateway.kernel.nft import KernelNft
from gateway.kernel.tool import Ended, run
from gateway.ports import Refused
from rules.apply import Rejected, apply_commands
from rules.nft import (
    AddChain,
    AddElement,
    AddSet,
    Complete,
    Deal,
    DeleteElement,
    DeleteSet,
    DropChain,
    NftCommand,
    NftTable,
    Recall,
    Remember,
    ServiceKey,
    SetRules,
    Spread,
    Unknown,
    parse,
    script,
)
from rules.share import Service, edits, services_of, table_of
from tests.share_goldens import CASES, GOLDENS

KEY = ServiceKey("192.168.0.10", "tcp", 80)
TWO = (("10.0.1.7", 8080), ("10.0.1.8", 8080))


@pytest.fixture
def inside(netns: Namespace) -> Iterator[Namespace]:
    """The test runs in a namespace of its own."""
    require("nft")
    with netns.entered():
        yield netns


def services(seed: int) -> dict[ServiceKey, Service]:
    """Some services; those of different seeds have identities and backends in common."""
    chance = random.Random(seed)
    made = {}
    for _ in range(chance.randrange(6)):
        key = ServiceKey(
            f"192.168.0.{chance.randrange(10, 12)}", chance.choice(["tcp", "udp"]), chance.choice([53, 80])
        )
        ends = [(f"10.0.1.{chance.randrange(5, 9)}", chance.choice([80, 8080])) for _ in range(chance.randrange(1, 5))]
        made[key] = Service(tuple(dict.fromkeys(ends)), chance.choice([None, None, 1, 600, 86400]))
    return made


@pytest.mark.usefixtures("inside")
def test_any_services_follow_any_others() -> None:
    driver = KernelNft()
    for seed in range(60):
        wanted = table_of(services(seed))
        driver.commit(tuple(edits(wanted, driver.read())))
        assert KernelNft().read() == wanted
        assert services_of(KernelNft().read()) == services(seed)
        assert not list(edits(wanted, driver.read()))
    driver.commit(tuple(edits(NftTable(), driver.read())))
    assert driver.read() == KernelNft().read() == NftTable()


STANDING: tuple[NftCommand, ...] = (
    Complete(),
    AddSet("dnat-set"),
    AddChain("dnat-a"),
    AddChain("dnat-b"),
    AddChain("dnat-empty"),
    SetRules("dnat-a", (Remember("dnat-set", 60), Deal(("dnat-b",)))),
    SetRules("dnat-b", (Spread("tcp", TWO),)),
    AddElement(KEY, "dnat-a"),
)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    "commands",
    [
        (AddElement(KEY, "dnat-empty"),),
        (AddElement(KEY, "dnat-a"),),
        (AddElement(KEY._replace(port=81), "dnat-none"),),
        (DeleteElement(KEY._replace(port=81)),),
        (DeleteElement(KEY), AddElement(KEY, "dnat-empty")),
        (DropChain("dnat-none"),),
        (DropChain("dnat-b"),),
        (DropChain("dnat-empty"),),
        (DropChain("dnat-empty"), DropChain("dnat-empty")),
        (SetRules("dnat-a", ()), SetRules("dnat-b", ()), DropChain("dnat-b")),
        (SetRules("dnat-a", ()), DropChain("dnat-a")),
        (DeleteSet("dnat-set"),),
        (DeleteSet("dnat-none"),),
        (SetRules("dnat-a", ()), DeleteSet("dnat-set")),
        (SetRules("dnat-none", ()),),
        (SetRules("dnat-b", (Deal(("dnat-none",)),)),),
        (SetRules("dnat-b", (Recall("dnat-none", "dnat-empty"),)),),
        (SetRules("dnat-b", (Unknown("[]"),)),),
        (AddSet("dnat-set"), AddChain("dnat-a"), Complete()),
        (AddChain("dnat-a b"),),
        (AddChain("dnat-c"), DropChain("dnat-none")),
    ],
    ids=repr,
)
def test_the_fake_refuses_what_the_kernel_refuses(commands: Sequence[NftCommand]) -> None:
    driver = KernelNft()
    driver.commit(STANDING)
    before = driver.read()
    assert before == apply_commands(NftTable(), STANDING)
    try:
        expected = apply_commands(before, commands)
    except Rejected:
        with pytest.raises(Refused):
            driver.commit(commands)
        expected = before
    else:
        driver.commit(commands)
    assert driver.read() == KernelNft().read() == expected


@pytest.mark.usefixtures("inside")
def test_without_a_table_there_is_nothing_to_write_to() -> None:
    with pytest.raises(Refused, match="No such file or directory; add chain ip kube-ovn dnat-a") as raised:
        KernelNft().commit([AddChain("dnat-a")])
    assert "\n" not in str(raised.value)
    assert not raised.value.retryable


def test_nft_is_asked_only_after_changes(inside: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def counting(argv: Sequence[str], *, stdin: str = "") -> Ended:
        started.append(" ".join(argv))
        return run(argv, stdin=stdin)

    monkeypatch.setattr(nft, "run", counting)
    driver = KernelNft()
    assert driver.read() == driver.read() == NftTable()
    inside.run("nft", "add", "table", "ip", "another")
    assert driver.read() == NftTable()
    assert started == []
    driver.commit(tuple(edits(table_of({KEY: Service(TWO)}), NftTable())))
    assert driver.read() == driver.read()
    assert [" ".join(line.split()[:2]) for line in started] == ["nft -f"]
    inside.run("nft", "flush", "map", "ip", "kube-ovn", "service-ips")
    assert driver.read().elements == {}


def test_other_hands(inside: Namespace) -> None:
    """What others did to the table is seen, and put right without touching what is theirs."""
    driver, wanted = KernelNft(), table_of({KEY: Service(TWO), KEY._replace(port=53): Service(TWO, 60)})
    driver.commit(tuple(edits(wanted, driver.read())))
    chain = wanted.elements[KEY]
    for line in (
        "add chain ip kube-ovn theirs",
        "add rule ip kube-ovn theirs counter accept",
        f"insert rule ip kube-ovn {chain} counter",
        f"add rule ip kube-ovn {chain} meta l4proto tcp dnat ip to numgen inc mod 1 map {{ 0 : 10.0.1.7 . 80 }}",
        f"add rule ip kube-ovn {chain} meta l4proto tcp dnat ip to 10.0.1.7",
        "add rule ip kube-ovn prerouting counter",
        "add chain ip kube-ovn dnat-leftover",
        "add element ip kube-ovn service-ips { 192.168.0.99 . sctp . 80 : goto dnat-leftover }",
        "add element ip kube-ovn service-ips { 192.168.0.99 . tcp . 80 : accept }",
    ):
        inside.run("nft", line)
    found = driver.read()
    assert not found.dispatch
    assert [isinstance(rule, Unknown) for rule in found.chains[chain]] == [True, False, True, True]
    assert services_of(found) == {}
    driver.commit(tuple(edits(wanted, found)))
    assert driver.read() == KernelNft().read() == wanted
    assert "counter" in inside.run("nft", "list", "chain", "ip", "kube-ovn", "theirs")


def test_clients_are_not_read(inside: Namespace) -> None:
    """A backend may remember thousands; the listing is of the rules alone."""
    driver, wanted = KernelNft(), table_of({KEY: Service(TWO, 600)})
    driver.commit(tuple(edits(wanted, driver.read())))
    (name, *_) = wanted.sets
    clients = ", ".join(f"172.16.{n // 256}.{n % 256} timeout 600s" for n in range(5000))
    inside.run("nft", "-f", "-", stdin=f"add element ip kube-ovn {name} {{ {clients} }}\n")
    assert driver.read() == KernelNft().read() == wanted
    assert len(run(nft._LIST_TABLE).stdout) < 10_000


@pytest.mark.parametrize("case", CASES)
def test_the_goldens_are_what_nft_prints(inside: Namespace, case: str) -> None:
    """UPDATE_GOLDENS=1 writes them anew."""
    directory = GOLDENS / case
    commands = script(edits(table_of(CASES[case]), NftTable()))
    inside.run("nft", "-f", "-", stdin=commands)
    printed = {"script.nft": commands, "table.json": run(nft._LIST_TABLE).stdout, "map.json": run(nft._LIST_MAP).stdout}
    if os.environ.get("UPDATE_GOLDENS"):
        directory.mkdir(exist_ok=True)
        for name, text in printed.items():
            (directory / name).write_text(_lines(text))
    golden = {name: (directory / name).read_text() for name in printed}
    assert golden["script.nft"] == commands
    assert parse(golden["table.json"], golden["map.json"]) == parse(printed["table.json"], printed["map.json"])


def _lines(text: str) -> str:
    """JSON with one object a line."""
    if not text.startswith("{"):
        return text
    objects = ",\n".join(json.dumps(item) for item in json.loads(text)["nftables"])
    return f'{{"nftables": [\n{objects}\n]}}\n'
