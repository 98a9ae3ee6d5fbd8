"""Long chains follow behind the maps: late by a moment, all at once, and honestly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.chase import AGAIN, AT_LATEST, SOON, Chase
from gateway.fake import FakeKernel
from gateway.ports import Refused
from rules import commands as c
from rules import nat
from rules.apply import apply_edits
from rules.chase import FOLLOW_ABOVE
from rules.delta import chain_edits
from rules.edit import edit_all
from rules.iptables import rule_text
from rules.maps import EntryKey
from rules.ruleset import ReplaceRules
from rules.spec import Dnat, GatewaySpec
from tests.gateway_kit import Gateway, ManualClock, gateway

EIP = "192.168.0.10"


def mapping(number: int) -> Dnat:
    return Dnat(eip=EIP, external_port=number, protocol="tcp", internal_ip="10.0.1.10", internal_port=number)


MANY = GatewaySpec.model_validate(
    {"eips": [{"address": f"{EIP}/24"}], "dnats": [mapping(number + 1) for number in range(FOLLOW_ABOVE + 1)]}
)
KEY = EntryKey("ports", EIP, "tcp", 60000)


@pytest.fixture
def pod(tmp_path: Path) -> Gateway:
    kernel = FakeKernel.gateway_pod()
    kernel.no_maps = ""
    made = gateway(tmp_path, kernel)
    made.service.change(lambda _: MANY, by="test").result(timeout=60)
    assert not made.service.status().fastpath.behind
    return made


def run(pod: Gateway, *commands: c.Command) -> None:
    def edit(spec: GatewaySpec | None) -> GatewaySpec:
        edited = edit_all(spec, commands)
        assert edited is not None
        return edited

    pod.service.change(edit, by="test").result(timeout=60)


def add(number: int) -> c.Command:
    return c.DnatAdd(eip=EIP, external_port=number, protocol="tcp", internal_ip="10.0.1.10", internal_port=number)


def delete(number: int) -> c.Command:
    return c.DnatDel(eip=EIP, external_port=number, protocol="tcp")


def chain_is_right(pod: Gateway) -> bool:
    spec = pod.service.spec
    return spec is not None and pod.kernel.chains[nat.SHARED_DNAT] == nat.shared_dnat(spec.dnats)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_comes_when_the_maps_hold_and_the_chains_follow_at_once(pod: Gateway) -> None:
    edits: list[str] = []
    pod.kernel.faults = edits.append
    for number in range(60000, 60005):
        run(pod, add(number))
        assert pod.kernel.maps.entries[KEY._replace(port=number)] == ("10.0.1.10", number)
    run(pod, delete(60002), delete(1), delete(FOLLOW_ABOVE // 2))
    assert pod.service.status().fastpath.behind
    assert pod.service.ready
    assert not chain_is_right(pod)
    assert "edit table nat" not in edits
    pod.clock.now += AT_LATEST
    until(lambda: not pod.service.status().fastpath.behind)
    assert chain_is_right(pod)
    assert edits.count("edit table nat") == 1
    pod.service.close()


def test_a_chain_that_does_not_follow_is_told_and_tried_again(pod: Gateway) -> None:
    def refuse(step: str) -> None:
        if step == "edit table nat":
            raise Refused(step, "injected", retryable=True)

    pod.kernel.faults = refuse
    run(pod, add(60000))
    assert pod.service.ready
    pod.clock.now += AT_LATEST
    until(lambda: not pod.service.ready)
    assert "the chains do not follow the maps" in pod.service.status().pending
    assert KEY in pod.kernel.maps.entries
    error = pod.service.status().last_error
    assert error is not None
    assert "injected" in error.message
    pod.kernel.faults = None
    pod.clock.now += AGAIN
    until(lambda: pod.service.ready)
    assert chain_is_right(pod)
    pod.service.close()


def test_what_is_owed_is_done_before_the_end_and_before_a_comparison(pod: Gateway) -> None:
    run(pod, add(60000))
    assert not chain_is_right(pod)
    assert not pod.service.compare().result(timeout=60).plan
    assert chain_is_right(pod)
    run(pod, add(60001))
    assert not chain_is_right(pod)
    pod.service.close()
    assert chain_is_right(pod)


def test_what_others_do_to_chains_that_are_behind_is_told_and_what_we_owe_is_not(pod: Gateway) -> None:
    run(pod, add(60000))
    gone = pod.kernel.chains[nat.SHARED_DNAT][0]
    pod.kernel.chains[nat.SHARED_DNAT] = pod.kernel.chains[nat.SHARED_DNAT][1:]
    pod.clock.now += AT_LATEST
    until(lambda: bool(pod.service.drift.entries()))  # it is told of when the chains are right
    assert not pod.service.status().fastpath.behind
    assert chain_is_right(pod)
    (found,) = pod.service.drift.entries()
    assert found.repaired
    assert found.differences == [f"nat SHARED_DNAT lacks: {rule_text(gone)}"]
    run(pod, add(60001))
    pod.clock.now += AT_LATEST
    until(lambda: not pod.service.status().fastpath.behind)
    assert len(pod.service.drift.entries()) == 1
    pod.service.close()


def test_only_what_the_chains_say_makes_them_be_behind(pod: Gateway) -> None:
    run(pod, c.RouteAdd(cidr="10.9.0.0/16", next_hop_ip="10.0.1.1"))
    run(pod, delete(60000))
    assert not pod.service.status().fastpath.behind
    run(pod, add(60000))
    run(pod, add(60000))
    assert pod.service.status().fastpath.behind, "a repetition does not make good what is owed"
    pod.service.close()
    assert chain_is_right(pod)


def test_short_chains_and_those_without_maps_are_right_before_the_answer(pod: Gateway) -> None:
    run(pod, delete(1), delete(2))
    pod.service.compare().result(timeout=60)  # they are few from now on
    run(pod, delete(3))
    assert chain_is_right(pod)
    run(pod, add(1), add(2), add(3))
    pod.kernel.no_maps = "somebody else's rule stands ahead"
    run(pod, add(60000))
    assert chain_is_right(pod)
    assert not pod.service.status().fastpath.on
    pod.service.close()


def test_maps_that_go_off_wait_for_the_chains(pod: Gateway) -> None:
    run(pod, add(60000))
    steps: list[str] = []
    pod.kernel.faults = steps.append
    pod.kernel.no_maps = "somebody else's rule stands ahead"
    run(pod, add(60001))
    assert chain_is_right(pod)
    assert not pod.kernel.maps.stands
    assert steps.index("edit table nat") < next(i for i, step in enumerate(steps) if "natgw" in step)
    pod.service.close()


def test_it_is_time_soon_and_at_the_latest_after_a_second() -> None:
    clock = ManualClock()
    chase = Chase(clock)
    assert chase.wait() is None
    assert not chase.due()
    begun = clock.now
    while not chase.due():
        chase.note(behind=True)
        clock.now += SOON / 2
    assert clock.now - begun <= AT_LATEST + SOON
    chase.note(behind=False)
    assert not chase.behind
    chase.note(behind=True)
    clock.now += SOON
    assert chase.due()


def test_edits_that_lie_far_apart_are_single_ones() -> None:
    have = nat.shared_dnat(MANY.dnats)
    chance = random.Random(1)
    for _ in range(5):
        want = [rule for rule in have if chance.random() > 0.02]
        for number in range(20):
            want.insert(
                chance.randrange(len(want) + 1), nat.shared_dnat(GatewaySpec(dnats=[mapping(50000 + number)]).dnats)[0]
            )
        edits = list(chain_edits(nat.SHARED_DNAT, have, tuple(want)))
        assert not any(isinstance(edit, ReplaceRules) for edit in edits)
        assert len(edits) == 20 + len(set(have) - set(want))
        after = apply_edits("nat", {nat.SHARED_DNAT: have}, edits)
        assert after[nat.SHARED_DNAT] == tuple(want)


def test_prefixes_of_a_new_length_keep_nobody_waiting_either(pod: Gateway) -> None:
    edits: list[str] = []
    pod.kernel.faults = edits.append
    run(pod, c.SnatAdd(eip=EIP, internal_cidr="10.0.0.0/17", random_fully=False))
    assert pod.kernel.maps.entries[EntryKey("snat-17", "10.0.0.0")] == (EIP, 0)
    assert pod.service.status().fastpath.behind
    run(pod, c.SnatDel(eip=EIP, internal_cidr="10.0.0.0/17"))
    assert "snat-17" not in pod.kernel.maps.maps
    assert "edit table nat" not in edits
    pod.clock.now += AT_LATEST
    until(lambda: not pod.service.status().fastpath.behind)
    assert chain_is_right(pod)
