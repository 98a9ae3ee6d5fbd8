"""The real kernel refuses a step, or the process dies between two: all of it or nothing, in every subsystem."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from netns import Namespace
from rig import Rig, rig

from gateway import transaction
from gateway.ports import Refused
from gateway.transaction import NotReverted
from rules.desired import Facts
from rules.spec import GatewaySpec
from tests.gateway_kit import example
from tests.test_crash import CHANGES, EMPTY, OTHER, Died

FACTS = Facts()


@pytest.fixture(params=["legacy", "nft"])
def real(netns: Namespace, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rig(netns, request.param) as made:
        yield made


def apply(real: Rig, spec: GatewaySpec) -> None:
    transaction.apply(real.kernel, spec, FACTS)


def before_step(n: int, act: Callable[[str], None]) -> Callable[[str], None]:
    """A fault: the ``n``-th step from now meets ``act``."""
    left = [n]

    def fault(step: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            act(step)

    return fault


def each_step(real: Rig, old: GatewaySpec, new: GatewaySpec) -> Iterator[int]:
    """The number of every step of the change, or of some; at each the kernel is as ``old`` says."""
    apply(real, old)
    n = 1
    while True:
        yield n
        if real.wire.fault is None:  # the change went through: it has fewer steps
            return
        real.wire.fault = None
        n += 2 if real.kernel.firewall.variant == "legacy" else 3


def refusal(act: Callable[[], None]) -> Refused | None:
    """What the kernel said, if it refused."""
    try:
        act()
    except Refused as error:
        return error
    return None


@pytest.mark.parametrize("name", CHANGES)
def test_a_refusal_at_any_step_leaves_everything_as_it_was(real: Rig, name: str) -> None:
    old, new = CHANGES[name]
    refusals = 0

    def refuse(step: str) -> None:
        raise Refused(step, "No space left on device", retryable=True)

    for n in each_step(real, old, new):
        before = real.state()
        real.wire.fault = before_step(n, refuse)
        error = refusal(lambda: apply(real, new))
        if error is None:
            real.wire.fault = None
            continue
        refusals += 1
        assert not isinstance(error, NotReverted), error
        assert error.reason == "No space left on device"
        assert error.step
        for was, now in zip(before, real.state(), strict=True):
            assert now == was, (n, error.step)
    assert refusals > 2
    assert not transaction.plan(new, FACTS, real.read())


@pytest.mark.parametrize("name", CHANGES)
def test_after_death_at_any_step_the_kernel_converges(real: Rig, name: str) -> None:
    old, new = CHANGES[name]
    deaths = 0

    def die(_: str) -> None:
        raise Died

    for n in each_step(real, old, new):
        real.wire.fault = before_step(n, die)
        try:
            apply(real, new)
        except Died:
            deaths += 1
            fault, real.wire.fault = real.wire.fault, None
            if real.kernel.memory:
                real.kernel.memory.forget()  # the next process has none
            apply(real, old)
            assert not transaction.plan(old, FACTS, real.read())
            real.wire.fault = fault
        else:
            real.wire.fault = None
    assert deaths > 2


# What the kernel itself refuses.

_CAP_NET_ADMIN, _PR_CAPBSET_DROP = 12, 24


def _give_up_net_admin() -> None:
    """Take CAP_NET_ADMIN from the calling thread for good, and from what it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = (ctypes.c_uint32 * 6)()
    for call in (lambda: libc.prctl(_PR_CAPBSET_DROP, _CAP_NET_ADMIN, 0, 0, 0), lambda: libc.capget(header, data)):
        assert call() == 0, os.strerror(ctypes.get_errno())
    for word in (0, 1):  # effective, permitted
        data[word] &= ~(1 << _CAP_NET_ADMIN)
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def in_a_thread(act: Callable[[], None]) -> BaseException | None:
    """What ``act`` raised in a thread of its own, in this thread's namespace."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 -- the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("at", [1, 4, 8])
def test_without_the_privilege_nothing_is_done_and_the_kernel_says_why(netns: Namespace, at: int) -> None:
    """From some step on every one is refused, those that undo the others included."""
    with rig(netns, "legacy") as real:
        apply(real, example())
        before = real.state()
        real.wire.fault = before_step(at, lambda _: _give_up_net_admin())
        error = in_a_thread(lambda: apply(real, OTHER))
        real.wire.fault = None
        assert isinstance(error, Refused)
        assert "not permitted" in str(error) or "ermission denied" in str(error)
        if at == 1:
            assert not isinstance(error.__cause__, Died)
            assert real.state() == before
        else:
            assert isinstance(error, NotReverted)
            apply(real, example())  # the next process, or the writer's next try
            assert real.state() == before


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_an_interface_that_vanishes_in_the_middle(real: Rig, at: int) -> None:
    apply(real, EMPTY)
    chains = real.state()[0]
    real.wire.fault = before_step(at, lambda _: real.netns.run("ip", "link", "del", "net1"))
    with pytest.raises(Refused) as caught:
        apply(real, example())
    assert caught.value.retryable
    real.wire.fault = None
    assert real.state()[0] == chains  # what does not hang on the interface is as it was
    with pytest.raises(Refused, match="no such interface"):
        apply(real, example())
    real.netns.run("ip", "link", "del", "eth0")
    real.plug()
    apply(real, example())
    assert not transaction.plan(example(), FACTS, real.read())
