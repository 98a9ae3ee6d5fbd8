"""Bandwidth limits as tc objects: every packet finds its class, whatever stood before and whatever is changed."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import qos
from rules.keyed import Keyed
from rules.qos_tree import Unshapeable
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit, Interfaces
from rules.tc import (
    ROOT_TABLE,
    TICKS_MAX,
    Classify,
    ClassKey,
    DeleteTc,
    FilterKey,
    Htb,
    IfbKey,
    Ingress,
    IngressKey,
    Key,
    Link,
    Matchall,
    Objects,
    Rate,
    RedirectKey,
    RootKey,
    Selector,
    SetTc,
    TcStep,
    Unknown,
    Value,
    apply_tc,
    steps_after,
    steps_before,
)
from rules.tc_text import tc_text
from tests import strategies as some

Limit = EipLimit | InterfaceLimit


def steps(spec: GatewaySpec, have: Objects) -> list[TcStep]:
    said = qos.statements(spec, have)
    return [*steps_before(said, have), *steps_after(said, have)]


def applied(spec: GatewaySpec, have: Objects | None = None) -> Objects:
    """The objects after the spec was applied; the second time there must be nothing to do."""
    objects: Objects = have or {}
    for step in steps(spec, objects):
        objects = apply_tc(objects, step)
    assert steps(spec, objects) == []
    return objects


def with_limits(*limits: Limit) -> GatewaySpec:
    return GatewaySpec(qos=Keyed(limits))


def eip_limit(eip: str, rate: str = "10", direction: str = "egress", priority: int = 1) -> EipLimit:
    fields = {"eip": eip, "direction": direction, "rateMax": rate, "burstMax": "1", "priority": priority}
    return EipLimit.model_validate(fields)


def class_of(objects: Objects, device: str, source: str, destination: str) -> Rate | None:
    """The class of a packet as the kernel's u32 finds it: priority by priority, link by link; None: unshaped."""
    words = {12: int(IPv4Address(source)), 16: int(IPv4Address(destination))}
    filters = {k: v for k, v in objects.items() if isinstance(k, FilterKey) and k.device == device}

    def walk(priority: int, table: int, bucket: int) -> int | None:
        here = [k for k in filters if (k.priority, k.table, k.bucket) == (priority, table, bucket)]
        for key in sorted(here, key=lambda k: k.node):
            match filters[key]:
                case Link(into, offset, mask):
                    shift = (mask & -mask).bit_length() - 1
                    found = walk(priority, into, (words[offset] & mask) >> shift)
                    if found is not None:
                        return found
                case Classify(selectors, minor):
                    if all((words.get(s.offset, 0) ^ s.value) & s.mask == 0 for s in selectors):
                        return minor
                case Matchall(minor):
                    return minor
        return None

    for priority in sorted({key.priority for key in filters}):
        minor = walk(priority, ROOT_TABLE, 0)
        if minor is not None:
            value = objects[ClassKey(device, minor)]
            assert isinstance(value, Rate)
            return value
    return None


def expected(spec: GatewaySpec, interface: str, direction: str, source: str, destination: str) -> str | None:
    """The rate of the limit that decides, by its definition; None where none does."""

    def rank(limit: Limit) -> tuple[object, ...] | None:
        if isinstance(limit, EipLimit):
            address = source if direction == "egress" else destination
            mine = interface == spec.interfaces.external and limit.eip == address
            return (limit.priority, 0) if mine else None
        if limit.interface != interface:
            return None
        if not limit.match_value:
            return (limit.priority, 2)
        side, _, prefix = limit.match_value.partition(" ")
        network = IPv4Network(prefix)
        inside = IPv4Address(source if side == "src" else destination) in network
        of_eip_side = side == ("src" if direction == "egress" else "dst")
        return (limit.priority, 1, -network.prefixlen, not of_eip_side) if inside else None

    ranked = [(rank(limit), limit.rate_max) for limit in spec.qos if limit.direction == direction]
    return min(((r, rate) for r, rate in ranked if r is not None), default=(None, None))[1]


ADDRESSES = [*some.EXTERNAL, *some.INTERNAL, *some.OUTSIDE]
packets = st.tuples(st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES))


@some.quick
@given(some.specs, some.specs, st.lists(packets, min_size=1, max_size=8))
def test_every_packet_finds_the_class_of_the_limit_that_decides(
    old: GatewaySpec, new: GatewaySpec, seen: list[tuple[str, str]]
) -> None:
    objects = applied(new, applied(old))
    for interface in ("eth0", "net1", "ext-0.12"):
        for direction, device in (("egress", interface), ("ingress", f"ifb-{interface}")):
            for source, destination in seen:
                found = class_of(objects, device, source, destination)
                wanted = expected(new, interface, direction, source, destination)
                assert (found and f"{found.rate / 125000:g}") == (wanted and f"{float(wanted):g}")


@some.quick
@given(some.specs, st.randoms(use_true_random=False))
def test_the_order_in_which_limits_came_means_nothing(spec: GatewaySpec, chance: st.DataObject) -> None:
    limits = list(spec.qos)
    chance.shuffle(limits)  # type: ignore[attr-defined]
    assert applied(spec) == applied(spec.model_copy(update={"qos": Keyed(limits)}))


@some.quick
@given(some.specs, some.specs)
def test_what_the_kernel_has_says_what_the_limits_were(old: GatewaySpec, new: GatewaySpec) -> None:
    found = qos.recovered(applied(new, applied(old)), new.interfaces)
    assert sorted(found, key=str) == sorted(new.qos, key=str)


@some.quick
@given(some.specs, some.specs)
def test_a_limit_that_stays_is_never_out_of_force(old: GatewaySpec, new: GatewaySpec) -> None:
    """Not at any step: what is limited before and after is limited all the time, by one rate or the other."""
    objects = applied(old)
    kept = [limit for limit in new.qos if limit.key in old.qos and isinstance(limit, EipLimit)]
    if old.interfaces != new.interfaces:
        return
    external = new.interfaces.external
    for step in steps(new, objects):
        objects = apply_tc(objects, step)
        for limit in kept:
            device = external if limit.direction == "egress" else f"ifb-{external}"
            assert class_of(objects, device, limit.eip, limit.eip) is not None


def many(count: int, first: int = 0) -> list[EipLimit]:
    """EIPs of several prefixes, among them many that Kube-OVN's hash leads to one number; all rates differ."""
    eips = [f"172.{31 - n % 2}.{n % 7 * 36}.{n % 250 + 1}" for n in range(first, first + 600)]
    chosen = list(dict.fromkeys(eips))[:count]
    assert len(chosen) == count
    return [eip_limit(e, f"{n + 1}.5", d) for n, e in enumerate(chosen) for d in ("egress", "ingress")]


def test_300_eips_with_different_limits_in_both_directions_do_not_collide() -> None:
    limits = many(300)
    objects = applied(with_limits(*limits))
    for device, direction in (("net1", "egress"), ("ifb-net1", "ingress")):
        for limit in limits:
            if limit.direction == direction:
                found = class_of(objects, device, limit.eip, limit.eip)
                assert found is not None
                assert found.rate == float(limit.rate_max) * 125000
        assert len({k.minor for k in objects if isinstance(k, ClassKey) and k.device == device}) == 300
        buckets = [(k.table, k.bucket) for k in objects if isinstance(k, FilterKey) and k.device == device]
        assert max(buckets.count(bucket) for bucket in set(buckets)) <= 2


@pytest.mark.parametrize("others", [["172.31.0.152", "172.31.4.60"], ["10.0.113.238", "10.0.1.1"]])
def test_addresses_whose_numbers_collide_in_kube_ovns_script_do_not_here(others: list[str]) -> None:
    objects = applied(with_limits(*(eip_limit(eip, str(n)) for n, eip in enumerate(others, start=1))))
    for n, eip in enumerate(others, start=1):
        found = class_of(objects, "net1", eip, "198.51.100.9")
        assert found is not None
        assert found.rate == n * 125000


def classes(objects: Objects) -> dict[str, int]:
    """Class ids by EIP, of what leaves."""
    found = ((k, v) for k, v in objects.items() if isinstance(k, FilterKey) and isinstance(v, Classify))
    return {str(IPv4Address(v.selectors[0].value)): v.minor for k, v in found if k.device == "net1"}


def test_class_ids_are_kept_while_others_come_and_go() -> None:
    spec = with_limits(*(eip_limit(f"192.168.0.{n}") for n in range(10, 20)))
    objects = applied(spec)
    before = classes(objects)
    fewer = spec.model_copy(update={"qos": spec.qos.drop(("192.168.0.10", "egress"))})
    objects = applied(fewer, objects)
    assert classes(objects).items() < before.items()
    objects = applied(fewer.model_copy(update={"qos": fewer.qos.put(eip_limit("192.168.0.99"))}), objects)
    assert classes(objects)["192.168.0.99"] == before["192.168.0.10"]


def test_a_changed_rate_is_one_step_in_place() -> None:
    objects = applied(with_limits(eip_limit("192.168.0.10", "10"), eip_limit("192.168.0.11")))
    (step,) = steps(with_limits(eip_limit("192.168.0.10", "50"), eip_limit("192.168.0.11")), objects)
    assert isinstance(step, SetTc)
    assert step.key in objects
    assert "rate 50000000bit" in tc_text(step)


def test_a_changed_priority_is_a_new_filter_to_the_same_class_before_the_old_one_goes() -> None:
    objects = applied(with_limits(eip_limit("192.168.0.10", priority=1)))
    todo = steps(with_limits(eip_limit("192.168.0.10", priority=5)), objects)
    assert not any(isinstance(step.key, ClassKey) for step in todo)
    kinds = [type(step) for step in todo if isinstance(step.value, Classify)]
    assert kinds == [SetTc, DeleteTc]


def test_the_last_limit_takes_the_whole_tree_along_but_not_the_ifb() -> None:
    objects = applied(with_limits(eip_limit("192.168.0.10", direction="ingress"), eip_limit("192.168.0.10")))
    assert RootKey("net1") in objects
    assert applied(GatewaySpec(), objects) == {IfbKey("ifb-net1"): objects[IfbKey("ifb-net1")]}


def test_somebody_elses_filters_keep_the_ingress_qdisc() -> None:
    objects = applied(with_limits(eip_limit("192.168.0.10", direction="ingress")), {IngressKey("net1"): Ingress(True)})
    after = applied(GatewaySpec(), objects)
    assert IngressKey("net1") in after
    assert RedirectKey("net1") not in after


# What Kube-OVN's script leaves: the example of two EIPs, one prefix and one limit of all.
SCRIPTS: dict[Key, Value] = {
    RootKey("net1"): Htb(0x9999, ours=False),
    ClassKey("net1", 0x9999): Rate(1_250_000_000, 20),
    ClassKey("net1", 0x5030): Rate(1_250_000, 131_072_000),
    ClassKey("net1", 0x8123): Rate(2_500_000, 131_072_000),
    ClassKey("net1", 0xFF03): Rate(6_250_000, 131_072_000),
    FilterKey("net1", 1, ROOT_TABLE, 0, 0x030): Classify((Selector(0xAC1F0098, 0xFFFFFFFF, 12),), 0x5030),
    FilterKey("net1", 2, ROOT_TABLE, 0, 0x123): Classify((Selector(0xCB007100, 0xFFFFFF00, 16),), 0x8123),
    FilterKey("net1", 3, ROOT_TABLE, 0, 1): Matchall(0xFF03),
}


def test_the_scripts_own_tree_is_taken_over_class_by_class() -> None:
    found = qos.recovered(SCRIPTS, Interfaces())
    assert [(str(limit), limit.burst_max) for limit in found] == [
        ("egress limit of EIP 172.31.0.152: 10 Mbit/s", "10"),
        ("egress limit 2 of net1 dst 203.0.113.0/24: 20 Mbit/s", "20"),
        ("egress limit 3 of net1: 50 Mbit/s", "50"),
    ]
    objects = SCRIPTS
    for step in steps(with_limits(*found), objects):
        objects = apply_tc(objects, step)
        of_eip = class_of(objects, "net1", "172.31.0.152", "198.51.100.9")
        assert of_eip is not None
        assert of_eip.rate == 1_250_000
    assert steps(with_limits(*found), objects) == []
    assert objects[RootKey("net1")] == Htb(0x9999, ours=False)
    assert {k.minor for k in objects if isinstance(k, ClassKey)} == {0x5030, 0x8123, 0xFF03, 0x9999}
    left = applied(GatewaySpec(), objects)
    assert [left[key] for key in (RootKey("net1"), ClassKey("net1", 0x9999))] == list(SCRIPTS.values())[:2]
    assert {k.minor for k in left if isinstance(k, ClassKey)} == {0x9999}, "an adopted tree stays, its limits go"


def test_an_adopted_limit_leaves_the_class_of_what_no_limit_claims() -> None:
    """The script's class ids can hit 0x9999, so that one address's limit is everybody's."""
    root, everybody = RootKey("net1"), ClassKey("net1", 0x9999)
    where = FilterKey("net1", 2, ROOT_TABLE, 0, 0x999)
    hit: dict[Key, Value] = {root: SCRIPTS[root], everybody: Rate(1_250_000, 131_072_000)}
    hit[where] = Classify((Selector(0x0A0071EE, 0xFFFFFFFF, 12),), 0x9999)
    found = qos.recovered(hit, Interfaces())
    assert [str(limit) for limit in found] == ["egress limit 2 of net1 src 10.0.113.238/32: 10 Mbit/s"]
    objects = applied(with_limits(*found), hit)
    assert everybody not in objects
    assert class_of(objects, "net1", "10.0.113.238", "198.51.100.9") == Rate(1_250_000, 131_072_000)
    assert class_of(objects, "net1", "10.0.113.1", "198.51.100.9") is None


def test_no_limit_gets_the_class_of_an_adopted_roots_default() -> None:
    limits = [
        InterfaceLimit.model_validate(
            {"interface": "net1", "direction": "egress", "priority": n, "rateMax": "1", "burstMax": "1"}
        )
        for n in range(1, 0x9999 - 0x8000 + 10)
    ]
    objects = qos.statements(with_limits(*limits), {RootKey("net1"): Htb(0x9999)})
    minors = {key.minor for key in objects if isinstance(key, ClassKey)}
    assert len(minors) == len(limits)
    assert 0x9999 not in minors


def test_a_filter_of_another_type_goes_before_ours_comes_to_its_priority() -> None:
    strange = {
        RootKey("net1"): Htb(),
        ClassKey("net1", 7): Rate(1, 1),
        FilterKey("net1", 1, 0, 0, 1): Unknown("flower"),
    }
    objects = applied(with_limits(eip_limit("192.168.0.10")), strange)
    assert Unknown("flower") not in objects.values()


def test_a_burst_is_as_long_as_the_kernel_has_room_for() -> None:
    slow = EipLimit(eip="192.168.0.10", direction="egress", rate_max="0.01", burst_max="100")
    (rate,) = (v for v in applied(with_limits(slow)).values() if isinstance(v, Rate))
    assert (rate.rate, rate.burst) == (1250, TICKS_MAX)


@pytest.mark.parametrize(
    ("interface", "direction", "says"),
    [
        ("twelve-chars", "ingress", "twelve-chars cannot have ingress limits: its name has more than 11 characters"),
        ("ifb-net1", "egress", "ifb-net1 is where"),
    ],
)
def test_an_interface_that_cannot_have_limits_is_named(interface: str, direction: str, says: str) -> None:
    fields = {"interface": interface, "direction": direction, "rateMax": "1", "burstMax": "1"}
    with pytest.raises(Unshapeable, match=says):
        qos.statements(with_limits(InterfaceLimit.model_validate(fields)), {})


def test_more_prefixes_of_one_length_than_fit_are_refused_in_words() -> None:
    limits = [
        InterfaceLimit.model_validate(
            {
                "interface": "net1",
                "direction": "egress",
                "matchType": "ip",
                "matchValue": f"dst 10.{n}.0.0/16",
                "rateMax": "1",
                "burstMax": "1",
            }
        )
        for n in range(64)
    ]
    assert applied(with_limits(*limits[:63]))
    with pytest.raises(Unshapeable, match="no more than 63"):
        qos.statements(with_limits(*limits), {})
