"""Policers, as Kube-OVN's script left them up to release 1.15, become limits that shape: none is lost on the way."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from pyroute2.netlink.rtnl.tcmsg import cls_u32, tcmsg

from gateway.kernel import tc_wire as wire
from gateway.kernel.tc_police import police_options, policer_of
from gateway.kernel.tc_requests import made
from rules import qos
from rules.adopt import adopt
from rules.delta import delta, undo
from rules.desired import Facts, desired
from rules.keyed import Keyed
from rules.ruleset import ChainRef, Jump, Rule, Ruleset
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit, Interfaces
from rules.state import Actual, AddressKey, Plan
from rules.tc import (
    ClassKey,
    DeleteTc,
    Htb,
    Ingress,
    IngressKey,
    Key,
    Objects,
    Policer,
    PolicerKey,
    Rate,
    RedirectKey,
    RootKey,
    Selector,
    SetTc,
    Value,
    apply_tc,
    ticks,
)
from tests import strategies as some

TEN = Rate(1_250_000, ticks(10 * 2**20, 1_250_000))
TWENTY = Rate(2_500_000, ticks(20 * 2**20, 2_500_000))
EIP, OTHER = 0xC0A80032, 0xCB007163  # 192.168.0.50, 203.0.113.99


def host(address: int, offset: int) -> Selector:
    return Selector(address, 0xFFFFFFFF, offset)


# What 1.15 leaves of a limited EIP, of a limit of one address, and of one of all traffic.
LEFT: dict[Key, Value] = {
    RootKey("net1"): Htb(ours=False),
    PolicerKey("net1", False, 1, 0x800): Policer(host(EIP, 12), TEN),
    PolicerKey("net1", False, 1, 0x801): Policer(host(EIP, 12), TWENTY),  # an add that replaced nothing: never asked
    PolicerKey("net1", False, 2, 0x800): Policer(host(OTHER, 16), TEN),
    PolicerKey("net1", False, 3, 1): Policer(Selector(), TWENTY, matchall=True),
    IngressKey("net1"): Ingress(shared=True),
    PolicerKey("net1", True, 1, 0x800): Policer(host(EIP, 16), TEN),
}


def limits(objects: Objects) -> list[str]:
    return [f"{limit}, {limit.burst_max} MiB" for limit in qos.recovered(objects, Interfaces(), {"192.168.0.50"})]


ADOPTED = [
    "egress limit of EIP 192.168.0.50: 10 Mbit/s, 10 MiB",
    "egress limit 2 of net1 dst 203.0.113.99/32: 10 Mbit/s, 10 MiB",
    "egress limit 3 of net1: 20 Mbit/s, 20 MiB",
    "ingress limit of EIP 192.168.0.50: 10 Mbit/s, 10 MiB",
]


def test_policers_are_adopted_as_the_limits_that_they_keep() -> None:
    assert limits(LEFT) == ADOPTED


def limited(objects: Objects) -> Actual:
    return replace(some.pod(), tc=objects)


def spec_of(objects: Objects) -> GatewaySpec:
    return GatewaySpec(qos=Keyed(qos.recovered(objects, Interfaces(), {"192.168.0.50"})))


def test_each_limit_is_kept_until_it_is_kept_by_shaping() -> None:
    """But for one of all traffic: the kernel holds filters of one type at a priority."""
    spec, objects = spec_of(LEFT), dict(LEFT)
    plan = delta(desired(spec, Facts(), limited(LEFT)), limited(LEFT))
    for step in (step for step in plan.steps if isinstance(step, SetTc | DeleteTc)):
        objects = apply_tc(objects, step)
        kept = limits(objects)
        assert [line for line in ADOPTED if line not in kept] in ([], ADOPTED[2:3]), step
    assert sorted(limits(objects)) == sorted(ADOPTED)
    assert not any(isinstance(key, PolicerKey) for key in objects)
    assert objects[RootKey("net1")] == Htb(ours=False)
    assert RedirectKey("net1") in objects
    assert len([key for key in objects if isinstance(key, ClassKey)]) == 4
    settled = limited({**objects, IngressKey("net1"): Ingress(shared=False)})
    said = desired(spec, Facts(), settled).tc
    assert {key for key, value in said.items() if settled.tc.get(key) != value} == set()


def test_a_change_that_fails_brings_the_policers_back() -> None:
    before = limited(LEFT)
    plan = delta(desired(spec_of(LEFT), Facts(), before), before)
    todo = [step for step in plan.steps if isinstance(step, SetTc | DeleteTc)]
    objects = dict(LEFT)
    for step in todo:
        objects = apply_tc(objects, step)
        back = dict(objects)
        for undoing in undo(Plan(tuple(todo)), before, limited(objects)).steps:
            assert isinstance(undoing, SetTc | DeleteTc)
            back = apply_tc(back, undoing)
        assert limits(back) == ADOPTED
        assert LEFT.items() <= back.items()


def test_somebody_elses_policer_stays() -> None:
    foreign = {IngressKey("net1"): Ingress(shared=True), PolicerKey("net1", True, 7, 0x800): Policer(host(1, 16), TEN)}
    limited = EipLimit(eip="192.168.0.50", direction="ingress", rate_max="10", burst_max="10")
    for spec in (GatewaySpec(), GatewaySpec(qos=Keyed([limited]))):
        said = qos.statements(spec, foreign)
        assert not any(isinstance(key, PolicerKey) for key in said)
        assert said.get(IngressKey("net1"), Ingress(True)) == Ingress(True)


def test_an_eip_that_only_a_policer_names_keeps_its_limit() -> None:
    """Its address tells that the limit is an EIP's."""
    hook = {ChainRef("nat", "SNAT_FILTER"): (Rule((), Jump("SHARED_SNAT")),)}
    pod = some.pod()
    addresses = {**pod.addresses, AddressKey("net1", "192.168.0.50/24"): False}
    left = replace(pod, ruleset=Ruleset({**pod.ruleset.chains, **hook}), addresses=addresses, tc=LEFT)
    spec = adopt(left)
    assert isinstance(spec, GatewaySpec)
    assert [type(limit) for limit in spec.qos].count(EipLimit) == 2
    assert [type(limit) for limit in spec.qos].count(InterfaceLimit) == 2


# On the wire: pyroute2 knows the same structures.


def filter_message(options: bytes, kind: str, protocol: int = 0x0800) -> wire.Tc:
    body = wire.encoded(wire.Header(1, 0x80000800, wire.ROOT_HANDLE, wire.filter_info(1, protocol)), kind, options)
    return wire.decoded(memoryview(body))


@pytest.mark.parametrize("policer", [value for value in LEFT.values() if isinstance(value, Policer)])
def test_what_is_written_of_a_policer_is_read_back(policer: Policer) -> None:
    kind, options = police_options(policer)
    assert policer_of(filter_message(options, kind)) == policer
    assert policer_of(filter_message(options, kind, protocol=0x0003)) is None


def test_rates_beyond_32_bits_are_kept() -> None:
    fast = Policer(Selector(), Rate(12_500_000_000, 100), matchall=True)
    kind, options = police_options(fast)
    assert policer_of(filter_message(options, kind)) == fast


def test_pyroute2_understands_what_is_written() -> None:
    step = SetTc(PolicerKey("net1", False, 1, 0x800), Policer(host(EIP, 12), TEN))
    message = made(step, 7)
    parsed = tcmsg(struct.pack("=IHHII", 16 + len(message.body), message.kind, 0, 0, 0) + message.body)
    parsed.decode()
    options = dict(parsed.get_attr("TCA_OPTIONS")["attrs"])
    police = dict(options["TCA_U32_POLICE"]["attrs"])["TCA_POLICE_TBF"]
    assert (police["rate"], police["burst"], police["action"]) == (TEN.rate, TEN.burst, 2)


def test_what_pyroute2_writes_is_understood() -> None:
    told = {"rate": "10mbit", "burst": 10 * 2**20, "action": "drop", "limit": 0}
    options = cls_u32.options()
    options["attrs"] = cls_u32.get_parameters({**told, "target": 1, "keys": ["0xc0a80032/0xffffffff+12"]})["attrs"]
    options.encode()
    found = policer_of(filter_message(bytes(options.data[4 : options.length]), "u32"))
    assert found is not None
    assert (found.selector, found.rate.rate) == (host(EIP, 12), TEN.rate)
