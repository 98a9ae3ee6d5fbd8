"""A remembered reading of bandwidth limits follows what we do and what others do, and never says what is not so."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator

import pytest
from netns import Namespace, require, veth

from gateway.kernel.shaper import KernelShaper
from gateway.kernel.tc_reading import Reading
from rules import qos, qos_held
from rules.keyed import Keyed
from rules.spec import EipLimit, GatewaySpec, InterfaceLimit
from rules.tc import TcStep, steps_after, steps_before

SIDES = GatewaySpec().interfaces


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    require("tc", "ip")
    made = Namespace("tc")
    with made.entered():
        for name in ("eth0", "net1"):
            veth(made, name, made, f"p-{name}")
            made.run("ip", "link", "set", name, "up")
        yield made
    made.remove()


def steps(said: qos_held.Statements, shaper: KernelShaper) -> list[TcStep]:
    have = shaper.read()
    return [*steps_before(said, have), *steps_after(said, have)]


def commit(limits: Keyed[EipLimit | InterfaceLimit], shaper: KernelShaper) -> None:
    shaper.commit(steps(qos.everything(limits, SIDES, shaper.read()), shaper))
    assert not steps(qos.everything(limits, SIDES, shaper.read()), shaper)


def eip_limit(number: int, **others: object) -> EipLimit:
    said = {"eip": f"192.168.{number // 250}.{number % 250 + 1}", "rateMax": "10", "burstMax": "1", **others}
    return EipLimit.model_validate({"direction": "egress", **said})


def interface_limit(**others: object) -> InterfaceLimit:
    said = {"interface": "net1", "direction": "egress", "rateMax": "10", "burstMax": "1", **others}
    return InterfaceLimit.model_validate(said)


MANY: list[EipLimit | InterfaceLimit] = [
    *(eip_limit(n, direction=way, priority=n % 3) for n in (1, 2, 300, 301) for way in ("egress", "ingress")),
    *(eip_limit(n, rateMax="20", priority=2) for n in (1, 2)),
    *(
        interface_limit(priority=p, matchType="ip", matchValue=f"src 10.{p}.0.0/{length}")
        for p in (4, 5)
        for length in (16, 24)
    ),
    interface_limit(priority=6),
    interface_limit(priority=6, direction="ingress", interface="eth0"),
    interface_limit(priority=7, rateMax="40000"),
]


def test_whatever_is_asked_for_the_reading_is_what_a_dump_says(namespace: Namespace) -> None:
    shaper, rng = KernelShaper(), random.Random(3)
    limits: Keyed[EipLimit | InterfaceLimit] = Keyed()
    for _ in range(120):
        one = rng.choice(MANY)
        limits = limits.put(one) if rng.random() < 0.6 else limits.drop(one.key)
        commit(limits, shaper)
        assert shaper.read() == KernelShaper().read()
    commit(Keyed(), shaper)
    assert shaper.read() == KernelShaper().read()


def test_one_limit_more_or_less_takes_no_dump(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    shaper = KernelShaper()
    limits: Keyed[EipLimit | InterfaceLimit] = Keyed(
        eip_limit(n, direction=way) for n in range(300) for way in ("egress", "ingress")
    )
    commit(limits, shaper)
    with monkeypatch.context() as patched:
        patched.setattr(Reading, "read", None)
        for one in (
            eip_limit(400),
            eip_limit(400, rateMax="20"),
            eip_limit(400, priority=3),
            interface_limit(priority=6),
        ):
            limits = limits.put(one)
            commit(limits, shaper)
        commit(limits.drop(one.key), shaper)
        found = shaper.read()
    assert found == KernelShaper().read()


OTHERS = (
    "tc class change dev net1 parent 1: classid 1:1 htb rate 3mbit ceil 3mbit",
    "tc class add dev net1 parent 1: classid 1:77 htb rate 3mbit",
    "tc filter add dev net1 parent 1: protocol ip prio 1 u32 match ip dst 10.0.0.1/32 flowid 1:77",
    "tc filter add dev net1 parent 1: protocol ip prio 30 u32 match ip dst 10.0.0.1/32 match ip tos 4 0xff flowid 1:77",
    "tc filter del dev net1 parent 1: protocol ip prio 30",
    "tc qdisc add dev net1 parent 1:77 handle 77: pfifo",
    "tc qdisc del dev net1 parent 1:77 handle 77:",
    "tc filter del dev net1 parent 1: protocol ip prio 1",
    "tc class del dev net1 classid 1:77",
    "tc qdisc add dev eth0 root handle 1: htb",
    "tc class add dev eth0 parent 1: classid 1:5 htb rate 3mbit",
    "tc filter del dev net1 parent ffff:",
    "tc qdisc del dev net1 ingress",
    "ip link set ifb-net1 down",
    "ip link del ifb-net1",
    "tc qdisc del dev net1 root",
    "ip link set net1 name net2",
    "ip link del net2",
)


def test_it_follows_whatever_others_do(namespace: Namespace) -> None:
    shaper = KernelShaper()
    commit(Keyed(MANY[:4]), shaper)
    first = shaper.read()
    assert shaper.read() is first
    for words in OTHERS:
        if "name" in words:
            namespace.run("ip", "link", "set", "net1", "down")
        subprocess.run(words.split(), check=True)
        assert shaper.read() == KernelShaper().read(), words


def test_a_priority_that_goes_takes_its_tables_along(namespace: Namespace) -> None:
    shaper = KernelShaper()
    commit(Keyed([eip_limit(1, priority=1), eip_limit(2, priority=2)]), shaper)
    before = shaper.read()
    for words in ("filter del dev net1 parent 1: protocol ip prio 2", "filter del dev net1 parent 1:"):
        subprocess.run(["tc", *words.split()], check=True)
        assert shaper.read() == KernelShaper().read() != before
