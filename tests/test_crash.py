"""The process dies between any two steps: the next one finds the spec before or the one after, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import transaction
from gateway.fake import FakeKernel
from gateway.ports import Refused
from gateway.store import JOURNAL_ABOVE
from rules import commands as c
from rules.desired import Facts
from rules.edit import edit_all
from rules.spec import GatewaySpec
from rules.state import AddressKey
from tests.gateway_kit import STATE, Gateway, example, gateway, ports
from tests.test_service import run

EMPTY = GatewaySpec()
OTHER = GatewaySpec.model_validate(
    STATE
    | {
        "eips": [{"address": "192.168.0.12/24"}, {"address": "192.168.0.13/24"}],
        "fips": [{"eip": "192.168.0.13", "internalIp": "10.0.1.5"}],
        "dnats": [],
        "snats": [{"eip": "192.168.0.12", "internalCIDR": "10.0.1.0/24"}],
        "routes": [],
        "sharedDnats": [],
        "qos": [{"eip": "192.168.0.12", "direction": "ingress", "priority": 1, "rateMax": "20", "burstMax": "1"}],
    }
)
CHANGES = {"making": (EMPTY, example()), "changing": (example(), OTHER), "unmaking": (OTHER, EMPTY)}


class Died(BaseException):
    """The process is killed here: nothing of it runs any more, so nothing catches this."""


class DieAt:
    """Dies before the ``n``-th step from now, and stays dead."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Died


def kill(pod: Gateway) -> None:
    """Be rid of the old process's thread; it was dead at every step that it would have taken since."""
    pod.service.close()
    pod.kernel.faults = None


def change(pod: Gateway, spec: GatewaySpec) -> None:
    pod.service.change(lambda _: spec, by="test").result(timeout=60)


def converged(pod: Gateway, *allowed: GatewaySpec) -> GatewaySpec:
    """The spec that a restarted service has, which is one of these and is what the kernel holds."""
    spec = pod.service.spec
    assert spec in allowed
    assert pod.service.ready
    assert not transaction.plan(spec, pod.service.facts, transaction.read(ports(pod.kernel)))
    return spec


Making = Callable[[], FakeKernel]


@pytest.fixture(params=["chains alone", "maps ahead", "maps in the same transaction"])
def made(request: pytest.FixtureRequest) -> Making:
    """Makes kernels, with or without maps ahead of the chains."""

    def make() -> FakeKernel:
        kernel = FakeKernel.gateway_pod()
        if request.param != "chains alone":
            kernel.no_maps = ""
        kernel.at_once = request.param == "maps in the same transaction"
        return kernel

    return make


def steps_of(old: GatewaySpec, new: GatewaySpec, directory: Path, made: Making) -> int:
    pod = gateway(directory, made())
    change(pod, old)
    before = pod.kernel.writes
    change(pod, new)
    pod.service.close()
    return pod.kernel.writes - before


@pytest.mark.parametrize("name", CHANGES)
def test_death_before_any_kernel_step(tmp_path: Path, name: str, made: Making) -> None:
    old, new = CHANGES[name]
    steps = steps_of(old, new, tmp_path / "count", made)
    assert steps > 5
    for n in range(1, steps + 1):
        pod = gateway(tmp_path / str(n), made())
        change(pod, old)
        pod.kernel.faults = DieAt(n)
        with pytest.raises(Died):
            change(pod, new)
        kill(pod)
        again = gateway(tmp_path / str(n), pod.kernel)
        assert converged(again, old, new) == old  # the change was never answered
        change(again, new)
        converged(again, new)
        again.service.close()


@pytest.mark.parametrize("name", CHANGES)
def test_death_before_any_step_of_the_way_back(tmp_path: Path, name: str, made: Making) -> None:
    """A step is refused, and the process dies while it undoes the others."""
    old, new = CHANGES[name]
    steps = steps_of(old, new, tmp_path / "count", made)
    for n in range(1, 2 * steps):
        pod = gateway(tmp_path / str(n), made())
        change(pod, old)
        pod.kernel.faults = _refuse_then_die(steps // 2, n)
        with pytest.raises((Died, Refused)):
            change(pod, new)
        kill(pod)
        again = gateway(tmp_path / str(n), pod.kernel)
        assert converged(again, old, new) == old
        again.service.close()


def _refuse_then_die(refused: int, dead: int) -> Callable[[str], None]:
    count = 0

    def fault(step: str) -> None:
        nonlocal count
        count += 1
        if count >= refused + dead:
            raise Died
        if count == refused:
            raise Refused(step, "No space left on device", retryable=True)

    return fault


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[DieAt | None], None]:
    """Has the process die before one of the calls by which the store changes the disk."""
    plan: list[DieAt] = []

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            if plan:
                plan[0]()
            return call(*arguments, **more)

        return called

    for name in ("open", "write", "fsync", "link", "unlink", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))

    def at(die: DieAt | None) -> None:
        plan[:] = [die] if die else []

    return at


@pytest.mark.parametrize("journal_above", [JOURNAL_ABOVE, 0], ids=["whole", "journal"])
def test_death_before_any_call_that_changes_the_disk(
    tmp_path: Path, system_calls: Callable[[DieAt | None], None], journal_above: int
) -> None:
    seen = []
    for n in range(1, 20):
        pod = gateway(tmp_path / str(n), journal_above=journal_above)
        change(pod, example())
        change(pod, OTHER)
        system_calls(DieAt(n))
        done = pod.service.change(lambda _: EMPTY, by="test").exception(timeout=60)
        system_calls(None)
        kill(pod)
        again = gateway(tmp_path / str(n), pod.kernel, journal_above=journal_above)
        seen.append(converged(again, OTHER, EMPTY))
        again.service.close()
        if done is None:
            break
    else:
        pytest.fail("the store makes more calls than expected")
    assert len(seen) > 1
    assert seen[0] == OTHER  # before anything was written
    assert seen[-1] == EMPTY
    assert seen == sorted(seen, key=lambda spec: spec == EMPTY)  # from one moment on it is the new one


@pytest.mark.parametrize("length", [0, 1, 100, 400])
def test_a_half_file_is_set_aside_and_the_kernel_tells(tmp_path: Path, length: int) -> None:
    first = gateway(tmp_path)
    change(first, EMPTY)
    change(first, example())
    first.service.close()
    data = (tmp_path / "spec.json").read_bytes()
    (tmp_path / "spec.json").write_bytes(data[:length])
    writes = first.kernel.writes
    second = gateway(tmp_path, first.kernel)
    # The kernel has the last change; spec.json.1 has not.
    assert second.service.spec is not None
    assert second.service.spec.model_copy(update={"qos": example().qos}) == example()
    assert first.kernel.writes == writes
    assert (tmp_path / "spec.json.corrupt").read_bytes() == data[:length]
    second.service.close()
    third = gateway(tmp_path, first.kernel)
    assert third.service.spec == second.service.spec
    third.service.close()


def test_a_half_file_in_a_new_namespace_gives_way_to_the_one_before(tmp_path: Path) -> None:
    first = gateway(tmp_path)
    change(first, example())
    change(first, OTHER)
    first.service.close()
    (tmp_path / "spec.json").write_text("{")
    second = gateway(tmp_path, FakeKernel.gateway_pod())
    converged(second, example())
    second.service.close()
    converged(gateway(tmp_path, second.kernel), example())


def test_what_cannot_be_read_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """Without a file and without a look at the kernel nobody knows what stands: an ``init`` must not sweep it away."""
    first = gateway(tmp_path / "one")
    change(first, example())
    first.service.close()
    kernel, writes = first.kernel, first.kernel.writes
    kernel.unreadable = True
    second = gateway(tmp_path / "two", kernel)
    assert second.service.status().pending == ["the last state is not known yet"]
    with pytest.raises(Refused, match="Operation not permitted"):
        run(second.service, c.Init())
    assert kernel.writes == writes
    kernel.unreadable = False
    run(second.service, c.Init())
    assert second.service.ready
    assert second.service.spec is not None
    assert second.service.spec.fips == example().fips
    assert kernel.writes == writes
    second.service.close()


def test_the_writer_finds_out_by_itself_what_stands(tmp_path: Path) -> None:
    first = gateway(tmp_path / "one")
    change(first, example())
    first.service.close()
    first.kernel.unreadable = True
    second = gateway(tmp_path / "two", first.kernel)
    first.kernel.unreadable = False
    second.clock.now += 60
    second.service.kernel_changed()
    second.service.compare().result(timeout=60)
    assert second.service.ready
    second.service.close()


def test_adopted_facts_survive_a_death(tmp_path: Path) -> None:
    """An unmarked address that goes with its EIP is remembered as such from the first file on."""
    first = gateway(tmp_path / "one")
    change(first, example())
    first.service.close()
    address = AddressKey("net1", "192.168.0.10/24")
    first.kernel.addresses[address] = False
    second = gateway(tmp_path / "two", first.kernel)
    second.kernel.faults = DieAt(1)
    wanted = edit_all(second.service.spec, [c.EipDel(address="192.168.0.10/24")])
    with pytest.raises(Died):
        second.service.change(lambda _: wanted or EMPTY, by="test").result(timeout=60)
    kill(second)
    third = gateway(tmp_path / "two", first.kernel)
    assert third.service.facts == Facts(claimed=frozenset({address}))
    third.service.close()
