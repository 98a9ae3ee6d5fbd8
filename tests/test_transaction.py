"""The one operation over the strict fake kernel: all of it, or nothing."""

from __future__ import annotations

import copy

import pytest

from gateway import transaction
from gateway.fake import FakeKernel
from gateway.ports import Refused
from rules import fastpath
from rules.desired import Facts
from rules.iptables import parse_rule
from rules.nat import ARP_GUARD, EXCLUSIVE_DNAT
from rules.ruleset import ChainRef
from rules.spec import Dnat, Eip, GatewaySpec, Snat
from rules.state import AddressKey, RouteEntry, RouteKey
from tests.gateway_kit import example, ports

AUTO = Facts("auto")


@pytest.fixture(params=["chains alone", "maps ahead"])
def kernel(request: pytest.FixtureRequest) -> FakeKernel:
    """A pod, in which maps can stand or not."""
    made = FakeKernel.gateway_pod()
    made.no_maps = "" if request.param == "maps ahead" else "chains alone"
    return made


def state_of(kernel: FakeKernel) -> tuple[object, ...]:
    """Everything a transaction may change, with the order of chains and addresses left out."""
    parts = (kernel.chains, kernel.addresses, kernel.routes, kernel.links, kernel.nft, kernel.maps, dict(kernel.tc))
    return copy.deepcopy(parts)


class FailAt:
    """A fault: the ``n``-th kernel step from now is refused."""

    def __init__(self, n: int, *, for_ever: bool = False) -> None:
        self.left = n
        self.for_ever = for_ever

    def __call__(self, step: str) -> None:
        self.left -= 1
        if self.left == 0 or (self.for_ever and self.left < 0):
            raise Refused(step, "No space left on device", retryable=True)


def test_apply_makes_the_kernel_as_wanted_and_the_second_apply_is_empty(kernel: FakeKernel) -> None:
    assert transaction.apply(ports(kernel), example(), AUTO).plan
    writes = kernel.writes
    assert not transaction.apply(ports(kernel), example(), AUTO).plan
    assert kernel.writes == writes
    assert kernel.addresses[AddressKey("net1", "192.168.0.10/24")]
    assert kernel.routes[RouteKey("0.0.0.0/0")] == RouteEntry("net1", "192.168.0.1", onlink=True)


def test_without_an_eip_arp_is_off_and_nothing_is_forwarded_out() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)
    assert not kernel.links["net1"].arp
    assert len(kernel.chains[ARP_GUARD]) == 1
    transaction.apply(ports(kernel), example(), AUTO)
    assert kernel.links["net1"].arp
    assert kernel.chains[ARP_GUARD] == ()


def test_the_guard_stands_whenever_arp_is_off() -> None:
    """At no step between two states may ARP be off while packets can leave by the external interface."""
    kernel = FakeKernel.gateway_pod()
    seen = []

    def look(_: str) -> None:
        seen.append((kernel.links["net1"].arp, bool(kernel.chains.get(ARP_GUARD))))

    kernel.faults = look
    for spec in (GatewaySpec(), example(), GatewaySpec()):
        transaction.apply(ports(kernel), spec, AUTO)
        look("after")
    assert (True, False) in seen
    assert (False, True) in seen
    assert (False, False) not in seen


def test_arp_policy_on_never_touches_arp() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), GatewaySpec(), Facts("on"))
    assert kernel.links["net1"].arp
    assert kernel.chains[ARP_GUARD] == ()


def test_a_refusal_at_any_step_leaves_the_kernel_as_it_was(kernel: FakeKernel) -> None:
    total, no_maps = kernel, kernel.no_maps
    transaction.apply(ports(total), GatewaySpec(), AUTO)
    begin = total.writes
    transaction.apply(ports(total), example(), AUTO)
    steps = total.writes - begin
    assert steps >= 6
    for n in range(1, steps + 1):
        kernel = FakeKernel.gateway_pod()
        kernel.no_maps = no_maps
        transaction.apply(ports(kernel), GatewaySpec(), AUTO)
        before = state_of(kernel)
        kernel.faults = FailAt(n)
        with pytest.raises(Refused, match="No space left on device"):
            transaction.apply(ports(kernel), example(), AUTO)
        assert state_of(kernel) == before, f"step {n}"


def test_a_refusal_while_removing_leaves_the_kernel_as_it_was(kernel: FakeKernel) -> None:
    no_maps = kernel.no_maps
    for n in range(1, 6):
        kernel = FakeKernel.gateway_pod()
        kernel.no_maps = no_maps
        transaction.apply(ports(kernel), example(), AUTO)
        before = transaction.read(ports(kernel))
        kernel.faults = FailAt(n)
        with pytest.raises(Refused):
            transaction.apply(ports(kernel), GatewaySpec(), AUTO)
        assert transaction.read(ports(kernel)) == before, f"step {n}"


@pytest.fixture
def pod() -> FakeKernel:
    """A gateway whose chains and maps can be changed at once."""
    made = FakeKernel.gateway_pod()
    made.no_maps, made.at_once = "", True
    transaction.apply(ports(made), example(), AUTO)
    return made


ANOTHER = Dnat(eip="192.168.0.10", external_port=8081, protocol="tcp", internal_ip="10.0.1.11", internal_port=80)
ONE_MORE = example().model_copy(update={"dnats": example().dnats.put(ANOTHER)})


def test_chains_and_maps_change_in_one_step_where_one_can_be_about_both(pod: FakeKernel) -> None:
    steps: list[str] = []
    pod.faults = steps.append
    for spec in (ONE_MORE, example()):
        assert transaction.apply(ports(pod), spec, AUTO).actual.maps == pod.maps == fastpath.table(spec)
        assert not transaction.plan(spec, AUTO, transaction.read(ports(pod)))
    assert steps == ["edit tables nat and natgw"] * 2
    pod.at_once = False
    transaction.apply(ports(pod), ONE_MORE, AUTO)
    assert steps[2:] == ["edit table nat", "edit table ip natgw"]


def test_what_one_step_cannot_do_two_do(pod: FakeKernel) -> None:
    """A source translation of another prefix length has a map of its own."""
    longer = example().model_copy(
        update={"snats": example().snats.put(Snat(eip="192.168.0.10", internal_cidr="10.0.9.0/27"))}
    )
    steps: list[str] = []
    pod.faults = steps.append
    transaction.apply(ports(pod), longer, AUTO)
    assert steps == ["edit table nat", "edit table ip natgw"]
    assert pod.maps == fastpath.table(longer)


def test_a_refusal_of_both_at_once_leaves_both_as_they_were(pod: FakeKernel) -> None:
    before = state_of(pod)
    pod.faults = FailAt(1)
    with pytest.raises(Refused, match="No space left on device"):
        transaction.apply(ports(pod), ONE_MORE, AUTO)
    assert state_of(pod) == before


def test_what_others_write_right_before_both_is_seen_and_stays(pod: FakeKernel) -> None:
    theirs = parse_rule("-p icmp -j ACCEPT")
    chain = ChainRef("nat", "POSTROUTING")

    def write(_: str) -> None:
        if theirs not in pod.chains[chain]:
            pod.chains[chain] = (*pod.chains[chain], theirs)

    pod.faults = write
    transaction.apply(ports(pod), ONE_MORE, AUTO)
    assert pod.chains[chain][-1] == theirs
    assert not transaction.plan(ONE_MORE, AUTO, transaction.read(ports(pod)))


def test_any_other_exception_reverts_too() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)
    before = state_of(kernel)
    calls = []

    def surprise(step: str) -> None:
        calls.append(step)
        if len(calls) == 3:
            raise ZeroDivisionError(step)

    kernel.faults = surprise
    with pytest.raises(ZeroDivisionError):
        transaction.apply(ports(kernel), example(), AUTO)
    assert state_of(kernel) == before


def test_when_going_back_fails_too_it_says_so() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)
    kernel.faults = FailAt(3, for_ever=True)
    with pytest.raises(transaction.NotReverted) as raised:
        transaction.apply(ports(kernel), example(), AUTO)
    assert "No space left on device" in str(raised.value)
    assert raised.value.retryable


def test_a_missing_interface_is_refused_before_anything_is_written() -> None:
    kernel = FakeKernel.gateway_pod()
    del kernel.links["net1"]
    with pytest.raises(Refused, match="interface net1: no such interface"):
        transaction.apply(ports(kernel), example(), AUTO)
    assert kernel.writes == 0


def test_a_kernel_that_forgets_what_it_took_is_noticed() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)

    class Forgetful(dict[AddressKey, bool]):
        def setdefault(self, key: AddressKey, default: bool = False) -> bool:  # type: ignore[override]
            return default

    kernel.addresses = Forgetful(kernel.addresses)
    with pytest.raises(transaction.Unverified, match="still differs"):
        transaction.apply(ports(kernel), example(), AUTO)


def test_deleting_the_primary_address_keeps_the_secondaries() -> None:
    kernel = FakeKernel.gateway_pod()
    del kernel.addresses[AddressKey("net1", "192.168.0.11/24")]
    both = GatewaySpec(eips=example().eips)
    transaction.apply(ports(kernel), both, AUTO)
    transaction.apply(ports(kernel), GatewaySpec(eips=both.eips.drop("192.168.0.10")), AUTO)
    assert [k.address for k in kernel.addresses if k.interface == "net1"] == ["192.168.0.12/24"]


def test_foreign_objects_stay() -> None:
    kernel = FakeKernel.gateway_pod()
    foreign = RouteEntry("eth0", "10.0.1.1", protocol=3)
    kernel.routes[RouteKey("10.96.0.0/12")] = foreign
    transaction.apply(ports(kernel), example(), AUTO)
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)
    assert kernel.routes[RouteKey("10.96.0.0/12")] == foreign
    assert AddressKey("net1", "192.168.0.11/24") in kernel.addresses
    assert RouteKey("10.0.2.0/24") not in kernel.routes


def test_an_eip_that_is_the_interfaces_own_address_is_neither_replaced_nor_taken_away() -> None:
    kernel = FakeKernel.gateway_pod()
    own = GatewaySpec(eips=GatewaySpec().eips.put(Eip(address="192.168.0.11/24")), gateway_v4="192.168.0.1")
    transaction.apply(ports(kernel), own, AUTO)
    transaction.apply(ports(kernel), GatewaySpec(), AUTO)
    assert AddressKey("net1", "192.168.0.11/24") in kernel.addresses


def test_a_rule_inserted_into_our_chain_is_taken_out_again() -> None:
    kernel = FakeKernel.gateway_pod()
    transaction.apply(ports(kernel), example(), AUTO)
    kernel.chains[EXCLUSIVE_DNAT] = ()
    plan = transaction.apply(ports(kernel), example(), AUTO).plan
    assert len(plan.steps) == 1
    assert len(kernel.chains[EXCLUSIVE_DNAT]) == 1
