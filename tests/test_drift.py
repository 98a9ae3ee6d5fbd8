"""What others change in the kernel is noticed, repaired or reported, told once, and never fought over without end."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.drift import (
    CALM_SECONDS,
    COMPARE_SECONDS,
    COMPARE_SHARE,
    LONGEST_HOLD,
    LOOK_PAUSE,
    POLL_SECONDS,
    REPAIRS_IN_A_ROW,
    Drift,
    Look,
)
from gateway.fake import FakeKernel
from gateway.journal import Journal
from gateway.store import Store, Stored
from gateway.watch import Watch
from rules.edit import NotInitialized
from rules.flows import Flow
from rules.keyed import Keyed
from rules.nat import EXCLUSIVE_DNAT, HOOKS, SHARED_DNAT
from rules.nft import NftTable
from rules.ruleset import ChainRef, Drop, Foreign, Rule, Source
from rules.spec import GatewaySpec, Route
from rules.state import AddressKey, LinkState, RouteEntry, RouteKey
from rules.tc import RootKey
from tests.gateway_kit import STATE, Gateway, ManualClock, example, gateway
from tests.http_kit import Face, face
from tests.test_transaction import state_of

EIP = AddressKey("net1", "192.168.0.10/24")
DEFAULT = RouteKey("0.0.0.0/0")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path)
    made.service.change(lambda _: example(), by="test").result(timeout=60)
    yield made
    made.service.close()


def looked(pod: Gateway) -> None:
    """Whatever the gateway does about the kernel's events has been done."""
    pod.service.kernel_changed()
    pod.service.compare().result(timeout=60)


def _set(kernel: FakeKernel, **flags: bool) -> None:
    kernel.links["net1"] = dataclasses.replace(kernel.links["net1"], **flags)


def _chain(ref: ChainRef, *rules: Rule | Foreign) -> Callable[[FakeKernel], None]:
    def change(kernel: FakeKernel) -> None:
        kernel.chains[ref] = (*kernel.chains[ref], *rules) if rules else ()

    return change


def _without_tc(kernel: FakeKernel) -> None:
    kernel.tc = {key: value for key, value in kernel.tc.items() if key.device != "net1" or isinstance(key, RootKey)}


CHANGES: dict[str, tuple[Callable[[FakeKernel], object], str]] = {
    "a chain is flushed": (_chain(SHARED_DNAT), "nat SHARED_DNAT lacks: -d 192.168.0.10/32 -p tcp"),
    "a chain of ours is deleted": (lambda k: k.chains.pop(EXCLUSIVE_DNAT), "chain nat EXCLUSIVE_DNAT is missing"),
    "a rule is put into ours": (
        _chain(SHARED_DNAT, Rule((Source("10.9.9.9/32"),), Drop())),
        "nat SHARED_DNAT has besides: -s 10.9.9.9/32 -j DROP",
    ),
    "the hooks are flushed": (_chain(ChainRef("nat", "PREROUTING")), "nat PREROUTING lacks: -j DNAT_FILTER"),
    "an address is deleted": (lambda k: k.addresses.pop(EIP), "address 192.168.0.10/24 on net1 is missing"),
    "the default route is deleted": (
        lambda k: k.routes.pop(DEFAULT),
        "route 0.0.0.0/0 via 192.168.0.1 dev net1 is missing",
    ),
    "a route leads elsewhere": (
        lambda k: k.routes.update({RouteKey("10.0.2.0/24"): RouteEntry("eth0", "10.0.1.9")}),
        "route 10.0.2.0/24 via 10.0.1.1 dev eth0 is there as 10.0.2.0/24 via 10.0.1.9 dev eth0",
    ),
    "ARP is switched off": (lambda k: _set(k, arp=False), "ARP is off on net1"),
    "promote_secondaries is cleared": (
        lambda k: _set(k, promote_secondaries=False),
        "promote_secondaries is 0 on net1",
    ),
    "a qdisc is deleted": (_without_tc, "missing: tc class replace dev net1"),
    "the nft table is deleted": (lambda k: setattr(k, "nft", NftTable()), "nft differs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_others_change_is_repaired_and_told(pod: Gateway, name: str) -> None:
    change, told = CHANGES[name]
    before = state_of(pod.kernel)
    change(pod.kernel)
    assert state_of(pod.kernel) != before
    looked(pod)
    assert state_of(pod.kernel) == before
    status = pod.service.status()
    assert status.ready
    assert status.drift.repairs == 1
    (entry,) = pod.service.drift.entries()
    assert entry.repaired
    assert any(line.startswith(told) for line in entry.differences), entry.differences


@pytest.mark.parametrize("name", CHANGES)
def test_reported_only_it_stays_and_readiness_says_so(tmp_path: Path, name: str) -> None:
    pod = gateway(tmp_path, drift="report")
    pod.service.change(lambda _: example(), by="test").result(timeout=60)
    before = state_of(pod.kernel)
    CHANGES[name][0](pod.kernel)
    changed, writes = state_of(pod.kernel), pod.kernel.writes
    for _ in range(3):
        pod.clock.now += COMPARE_SECONDS
        looked(pod)
    assert state_of(pod.kernel) == changed
    assert pod.kernel.writes == writes
    status = pod.service.status()
    assert status.pending == ["kernel does not equal the spec"]
    assert status.drift.differs
    assert [entry.repaired for entry in pod.service.drift.entries()] == [False]  # told once
    pod.service.change(lambda spec: spec or example(), by="test").result(timeout=60)  # any change makes it right
    assert state_of(pod.kernel) == before
    assert pod.service.ready
    assert not pod.service.status().drift.differs
    pod.service.close()


def test_while_the_disk_does_not_answer_what_stands_is_repaired(
    pod: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers, save = threading.Event(), threading.Event(), Store.save

    def slow(store: Store, stored: Stored) -> None:
        asked.set()
        assert answers.wait(100)
        save(store, stored)

    monkeypatch.setattr(Store, "save", slow)
    wanted = example().model_copy(update={"routes": Keyed[Route]()})
    change = pod.service.change(lambda _: wanted, by="test")
    later = pod.service.change(lambda _: example(), by="test")
    assert asked.wait(60)
    stands = state_of(pod.kernel)
    pod.kernel.addresses.pop(EIP)
    pod.kernel.chains[SHARED_DNAT] = ()
    pod.clock.now += POLL_SECONDS
    deadline = time.monotonic() + 60
    while not pod.service.status().drift.repairs:
        assert time.monotonic() < deadline, "not repaired"
        time.sleep(0.01)
    assert state_of(pod.kernel) == stands
    assert not change.done()
    assert not later.done()
    assert pod.service.spec == wanted
    assert "spec is not on disk" in pod.service.status().pending
    before = Store(tmp_path).load()
    assert before is not None
    assert before.spec == example()
    answers.set()
    assert change.result(timeout=60).spec == wanted
    assert later.result(timeout=60).spec == example()
    assert pod.service.ready
    assert pod.service.status().drift.repairs == 1


def test_own_changes_and_what_is_not_ours_are_no_drift(pod: Gateway) -> None:
    foreign = Foreign("-p tcp -m tcp --dport 7 -j RETURN")
    pod.kernel.chains[ChainRef("nat", "PREROUTING")] = (foreign, *pod.kernel.chains[ChainRef("nat", "PREROUTING")])
    pod.kernel.addresses[AddressKey("net1", "192.168.0.77/24")] = False
    pod.kernel.routes[RouteKey("198.51.100.0/24")] = RouteEntry("net1", "192.168.0.1", protocol=4)
    pod.kernel.links["tunnel"] = LinkState(9, "02:00:00:00:00:09", True, True, 1400, False)
    writes = pod.kernel.writes
    looked(pod)
    assert pod.kernel.writes == writes
    assert pod.service.drift.entries() == []
    assert foreign in pod.kernel.chains[ChainRef("nat", "PREROUTING")]


def test_own_commits_leave_no_evidence(pod: Gateway) -> None:
    looked(pod)
    looks = pod.service.status().drift.looks
    fewer = GatewaySpec.model_validate(STATE | {"dnats": [], "routes": [], "qos": [], "eips": STATE["eips"][1:]})  # type: ignore[index]
    for spec in (fewer, example()):
        pod.service.change(lambda _, wanted=spec: wanted, by="test").result(timeout=60)
    looked(pod)
    assert pod.service.status().drift.looks == looks


def test_what_leaves_no_evidence_is_found_by_the_comparison(pod: Gateway) -> None:
    pod.service.drift._watch = None  # a kernel that tells nothing
    del pod.kernel.addresses[EIP]
    pod.service.compare().result(timeout=60)
    assert EIP not in pod.kernel.addresses
    pod.clock.now += COMPARE_SECONDS
    assert pod.service.compare().result(timeout=60).plan  # the writer looks after the job
    assert not pod.service.compare().result(timeout=60).plan
    assert EIP in pod.kernel.addresses
    assert pod.service.drift.entries()[0].noticed_by == "comparison"


def test_an_address_that_comes_back_is_announced_again(pod: Gateway) -> None:
    pod.announcer.announced.clear()
    del pod.kernel.addresses[EIP]
    looked(pod)
    assert pod.announcer.announced == [("net1", "192.168.0.10")]


@pytest.mark.parametrize("lost", ["the rule", "the hook"])
def test_a_connection_that_began_without_its_rule_is_ended(pod: Gateway, lost: str) -> None:
    bare = Flow(6, "203.0.113.9", "192.168.0.10", 5000, 8888, "192.168.0.10", "203.0.113.9", 8888, 5000)
    right = Flow(6, "203.0.113.9", "192.168.0.10", 5001, 8888, "10.0.1.10", "203.0.113.9", 80, 5001)
    pod.kernel.conntrack = [bare, right]
    ref = SHARED_DNAT if lost == "the rule" else next(iter(HOOKS))[0]
    pod.kernel.chains[ref] = ()
    looked(pod)
    assert pod.kernel.conntrack == [right]


def test_without_a_spec_there_is_nothing_to_compare(tmp_path: Path) -> None:
    pod = gateway(tmp_path)
    pod.kernel.links["net2"] = pod.kernel.links["net1"]
    pod.service.kernel_changed()
    with pytest.raises(NotInitialized):
        pod.service.compare().result(timeout=60)
    assert "net2" in pod.service.actual.links
    pod.service.close()


# The schedule.


class Told:
    """Evidence that a test gives."""

    def __init__(self) -> None:
        self.domains: set[str] = set()

    def changed(self) -> set[str]:
        return self.domains

    def settle(self) -> None:
        pass


@pytest.mark.parametrize(("cost", "pause"), [(0.01, 0.09), (0.1, LOOK_PAUSE), (2.0, 2.0)])
def test_the_evidence_is_looked_into_at_once_but_not_without_a_pause(cost: float, pause: float) -> None:
    clock, told = ManualClock(), Told()
    drift = Drift(clock, Journal(clock), watch=told)
    assert drift.due() is None
    told.domains = {"links"}
    assert drift.due() is None  # it is asked for twice a second,
    drift.hint()
    assert drift.due() == Look(("links",))  # and when the kernel says so
    drift.looked(cost)
    clock.now += 0.9 * pause
    drift.hint()
    assert drift.due() is None
    clock.now += 0.11 * pause
    assert drift.due() == Look(("links",))


@pytest.mark.parametrize("cost", [0.001, 0.5])
def test_comparisons_cost_a_thousandth(cost: float) -> None:
    clock = ManualClock()
    drift = Drift(clock, Journal(clock), watch=Told())
    drift.looked(cost)
    looks, begun = 0, clock.now
    while clock.now < begun + 3000:
        clock.now += 1
        if drift.due() == Look():
            drift.looked(cost)
            looks += 1
    assert 0 < looks <= 3000 / max(COMPARE_SECONDS, COMPARE_SHARE * cost)


def test_a_fight_is_not_fought_faster_than_once_a_minute() -> None:
    clock, told = ManualClock(), Told()
    told.domains = {"chains"}
    drift = Drift(clock, Journal(clock), watch=told)
    repairs: list[float] = []
    while clock.now < 1000 + 3600:
        clock.now += 0.5
        if look := drift.due():
            drift.looked(0.001)
            drift.repaired(("a rule",), look, 0.001)
            repairs.append(clock.now)
            if len(repairs) == REPAIRS_IN_A_ROW + 3:
                assert drift.status().next_repair_in_seconds == 8.0
    assert repairs[REPAIRS_IN_A_ROW - 1] - repairs[0] < 3  # the first ones follow at once
    assert len(repairs) < REPAIRS_IN_A_ROW + 7 + 3600 / LONGEST_HOLD
    # When the other one gives up, the next repair is at once again.
    told.domains = set()
    clock.now += LONGEST_HOLD + 2 * CALM_SECONDS + LONGEST_HOLD
    told.domains = {"links"}
    assert drift.due() is not None
    drift.repaired(("an address",), Look(("links",)), 0.001)
    assert drift.status().next_repair_in_seconds is None


def test_evidence_that_cannot_be_had_fails_no_reading_and_is_no_news() -> None:
    def broken() -> int:
        raise OSError(1, "Operation not permitted")

    watch = Watch({"chains": broken, "links": lambda: 1})
    watch.reading("chains")
    watch.reading("links")
    watch.settle()
    assert watch.changed() == frozenset()


def test_a_counter_that_two_domains_share_tells_own_transactions_from_others() -> None:
    count = [7]

    def generation() -> int:
        return count[0]

    watch = Watch({"chains": generation, "nft": generation})

    def own(transactions: int) -> None:
        with watch.writing("chains"):
            count[0] += transactions
        watch.reading("chains")
        watch.settle()

    watch.reading("chains")
    watch.reading("nft")
    watch.settle()
    own(1)
    assert watch.changed() == frozenset()
    count[0] += 1  # another's
    own(1)
    assert watch.changed() == {"nft"}
    watch.reading("nft")
    watch.settle()
    own(2)  # another's fell into it
    assert watch.changed() == {"nft"}


# The face.


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path, drift="report")


def test_the_report_says_what_differs_now_and_what_was_found(http: Face) -> None:
    assert http("GET", "/v1/drift").status_code == 404
    pod = http.gateway
    pod.service.change(lambda _: example(), by="test").result(timeout=60)
    assert http("GET", "/v1/drift").json()["now"] == []
    del pod.kernel.addresses[EIP]
    line = "address 192.168.0.10/24 on net1 is missing"
    assert http("GET", "/v1/drift").json()["now"] == [line]
    looked(pod)
    said = http("GET", "/v1/drift").json()
    assert (said["count"], said["status"]["policy"], said["status"]["differs"]) == (1, "report", [line])
    assert [(entry["noticedBy"], entry["differences"]) for entry in said["history"]] == [("links", [line])]
    assert EIP not in pod.kernel.addresses
