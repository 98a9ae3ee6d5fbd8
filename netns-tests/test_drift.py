"""Others change the real kernel: the gateway notices, puts it right, and says what it was."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from traffic import udp
from world import A1, A2, INTERNET, OWN, ROUTER, Gateway, World, wait_for

FOREIGN = ("PREROUTING", "-p", "tcp", "--dport", "7", "-j", "RETURN")
TC_CHANGE = ("tc", "class", "change", "dev", "net1", "parent", "1:", "classid", "1:1", "htb", "rate", "1mbit")
EIP, EIP2 = "192.168.0.50", "192.168.0.51"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(scope="module")
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        fill(made)
        yield made


def fill(gateway: Gateway) -> None:
    """One object of every kind."""
    gateway.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
    gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
    gateway.verb("floating-ip-add", f"{EIP},{A1}")
    gateway.verb("dnat-add", f"{EIP2},53,udp,{A2},53")
    gateway.verb("snat-add", f"{EIP2},10.0.0.0/16")
    gateway.verb("nft-dnat-map-add", f"{EIP2},8080,tcp,{A1}:80@{A2}:80")
    gateway.verb("eip-egress-qos-add", f"{EIP2},1,10,10")
    gateway.verb("eip-ingress-qos-add", f"{EIP2},1,10,10")


def everything(gateway: Gateway) -> str:
    """All that the gateway made, as the kernel's tools print it, but for what differs from one making to the next."""
    said = [
        gateway.saved(),
        "\n".join(sorted(gateway.net1_addresses())),
        gateway.ip_text("route", "show"),
        str(gateway.link("net1")["flags"]),
        gateway.run("nft", "--stateless", "list", "table", "ip", "kube-ovn"),
        gateway.run("tc", "filter", "show", "dev", "net1"),
        re.sub("leaf [0-9a-f]+:", "", gateway.run("tc", "class", "show", "dev", "net1")),
    ]
    return "\n".join(said)


def _iptables(*words: str) -> Callable[[Gateway], object]:
    return lambda gateway: gateway.run(f"iptables-{gateway.variant}", "-t", "nat", *words)


def _run(*words: str) -> Callable[[Gateway], object]:
    return lambda gateway: gateway.run(*words)


CHANGES: dict[str, tuple[Callable[[Gateway], object], str]] = {
    "a chain flushed": (_iptables("-F", "SHARED_DNAT"), "nat SHARED_DNAT lacks:"),
    "the hook deleted": (_iptables("-D", "PREROUTING", "-j", "DNAT_FILTER"), "nat PREROUTING lacks:"),
    "a rule put into ours": (_iptables("-I", "SHARED_SNAT", "-s", "10.0.9.0/24", "-j", "RETURN"), "has besides:"),
    "an address deleted": (_run("ip", "addr", "del", f"{EIP2}/24", "dev", "net1"), f"address {EIP2}/24 on net1"),
    "all addresses flushed": (_run("ip", "addr", "flush", "dev", "net1", "label", "net1:eip"), f"address {EIP}/24"),
    "a route deleted": (_run("ip", "route", "del", "10.0.2.0/24"), "route 10.0.2.0/24 via 10.0.1.1 dev eth0"),
    "the default route replaced": (
        _run("ip", "route", "replace", "default", "via", "192.168.0.99", "dev", "net1", "onlink"),
        f"route 0.0.0.0/0 via {ROUTER} dev net1 is there as 0.0.0.0/0 via 192.168.0.99",
    ),
    "ARP switched off": (_run("ip", "link", "set", "net1", "arp", "off"), "ARP is off on net1"),
    "the shaper deleted": (_run("tc", "qdisc", "del", "dev", "net1", "root"), "missing: tc qdisc add dev net1 root"),
    "a class changed": (
        _run(*TC_CHANGE),
        "differs: tc class replace dev net1",
    ),
    "the nft table deleted": (_run("nft", "delete", "table", "ip", "kube-ovn"), "nft differs:"),
    "the nft map flushed": (_run("nft", "flush", "map", "ip", "kube-ovn", "service-ips"), "nft differs:"),
}


# What iptables does not write does not depend on its variant.
ALL = [("legacy", name) for name in CHANGES] + [("nft", name) for name in list(CHANGES)[:3]]


@pytest.mark.parametrize(("gateway", "name"), ALL, indirect=["gateway"])
def test_what_others_change_is_put_right(world: World, gateway: Gateway, name: str) -> None:
    change, told = CHANGES[name]
    before, repairs = everything(gateway), gateway.status()["drift"]["repairs"]
    began = time.monotonic()
    change(gateway)
    wait_for(lambda: gateway.status()["drift"]["repairs"] > repairs, "a repair")
    print(f"{gateway.variant}, {name}: {time.monotonic() - began:.3f} s until it was seen to be repaired")
    # What was changed in several steps may be repaired in as many.
    wait_for(lambda: everything(gateway) == before, f"all that stood before:\n{before}")
    history = gateway.get("/v1/drift")["history"]  # the newest first, and no more than some
    since = gateway.status()["drift"]["repairs"] - repairs
    lines = [line for entry in history[:since] for line in entry["differences"]]
    assert any(told in line for line in lines), lines
    gateway.logged("others, noticed by")
    flow = udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
    flow.talk()
    assert udp(world.vpc.b, (INTERNET, 53), world.internet.udp(53)).source[0] == EIP2
    world.close_sockets()


@pytest.mark.parametrize("gateway", ["legacy", "nft"], indirect=True)
def test_what_is_not_ours_stays_and_own_work_is_no_drift(gateway: Gateway) -> None:
    drift = gateway.status()["drift"]
    gateway.run(f"iptables-{gateway.variant}", "-t", "nat", "-I", *FOREIGN)
    gateway.ip("addr add 192.168.0.77/24 dev net1", "route add 198.51.100.0/24 via 192.168.0.1")
    gateway.verb("dnat-add", f"{EIP2},54,udp,{A2},53")
    gateway.verb("dnat-del", f"{EIP2},54,udp")
    assert gateway.get("/v1/drift")["now"] == []
    assert gateway.status()["drift"]["repairs"] == drift["repairs"]
    assert gateway.rules("--dport 7")
    assert {OWN, "192.168.0.77"} <= set(gateway.net1_addresses())
    assert gateway.ip_json("route", "show", "198.51.100.0/24")
    gateway.run(f"iptables-{gateway.variant}", "-t", "nat", "-D", *FOREIGN)
    gateway.ip("addr del 192.168.0.77/24 dev net1", "route del 198.51.100.0/24")


@pytest.mark.parametrize("gateway", ["legacy", "nft"], indirect=True)
def test_own_commits_cause_no_look(gateway: Gateway) -> None:
    """Each of the gateway's commits makes the kernel tell of it; none of that is news."""
    gateway.get("/v1/drift")
    looks = gateway.status()["drift"]["looks"]
    for port in range(1000, 1010):
        gateway.verb("dnat-add", f"{EIP2},{port},tcp,{A2},80")
        gateway.verb("dnat-del", f"{EIP2},{port},tcp")
    gateway.verb("eip-add", "192.168.0.52/24")
    gateway.verb("eip-del", "192.168.0.52/24")
    after = gateway.status()["drift"]
    comparisons = 3  # may have fallen into that time
    assert after["looks"] <= looks + comparisons


def test_reported_only_nothing_is_written(world: World) -> None:
    with world.gateway(vpc=world.make_vpc(), own="192.168.0.12/24", environment={"NATGW_DRIFT": "report"}) as gateway:
        fill(gateway)
        gateway.run("iptables-legacy", "-t", "nat", "-F", "SHARED_DNAT")
        wait_for(lambda: not gateway.status()["ready"], "the gateway to say that it is not as wanted")
        assert not gateway.rules("SHARED_DNAT", "--dport")
        assert gateway.status()["drift"]["last"]["repaired"] is False
        gateway.logged("not repaired")
        assert gateway.log().count("not repaired") == 1
        gateway.verb("init")  # any call makes all of it right
        wait_for(lambda: gateway.status()["ready"], "the gateway to be ready")
        assert gateway.rules("SHARED_DNAT", "--dport 53")
