"""The QoS verbs and the kernel they leave, as tc shows it to upstream's end-to-end tests and to operators."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from itertools import pairwise

import pytest
from netns import require, veth
from world import Gateway, World, identical

EIP, EIP2 = "172.31.0.152", "172.31.4.60"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("tc")
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        yield made


def tc(gateway: Gateway, *words: str) -> str:
    return gateway.run("tc", *words)


def classes(gateway: Gateway, device: str) -> str:
    return tc(gateway, "class", "show", "dev", device)


def tree(gateway: Gateway) -> str:
    """Everything of tc but counters."""
    devices = ("net1", "ifb-net1")
    shown = [tc(gateway, "qdisc", "show")]
    shown += [classes(gateway, d) + tc(gateway, "filter", "show", "dev", d, "parent", "1:") for d in devices]
    text = "".join([*shown, tc(gateway, "filter", "show", "dev", "net1", "parent", "ffff:")])
    return re.sub(r"direct_packets_stat \d+ ", "", text)


def fill(gateway: Gateway) -> None:
    for direction in ("ingress", "egress"):
        gateway.verb(f"eip-{direction}-qos-add", f"{EIP},1,0.5,0.06", f"{EIP2},1,2.5,0.3")
        gateway.verb("qos-add", f"{direction},net1,3,matchall,,,,50,50")
        side = "src" if direction == "ingress" else "dst"
        gateway.verb("qos-add", f"{direction},net1,2,u32,ip,{side},198.51.100.0/24,10,10")


RATES = ("rate 500Kbit", "rate 2500Kbit", "rate 50Mbit", "rate 10Mbit")


def test_classes_show_the_rates_that_upstreams_tests_look_for(gateway: Gateway) -> None:
    fill(gateway)
    for device in ("net1", "ifb-net1"):
        shown = classes(gateway, device)
        assert [shown.count(f"{rate} ") for rate in RATES] == [1, 1, 1, 1], shown
    for direction, device, other in (("egress", "net1", "ifb-net1"), ("ingress", "ifb-net1", "net1")):
        before = classes(gateway, other)
        gateway.verb(f"eip-{direction}-qos-del", EIP)
        assert "rate 500Kbit" not in classes(gateway, device)
        assert classes(gateway, other) == before
    for direction in ("ingress", "egress"):
        gateway.verb("qos-del", f"{direction},net1,3,matchall,,,,50,50")
        gateway.verb(f"eip-{direction}-qos-del", EIP2)
        side = "src" if direction == "ingress" else "dst"
        gateway.verb("qos-del", f"{direction},net1,2,u32,ip,{side},198.51.100.0/24")
    assert classes(gateway, "net1").strip() == classes(gateway, "ifb-net1").strip() == ""
    assert "htb" not in tc(gateway, "qdisc", "show")


def test_repeated_verbs_change_nothing(gateway: Gateway) -> None:
    fill(gateway)
    before = tree(gateway)
    identical(gateway, lambda: fill(gateway))
    assert tree(gateway) == before


def test_300_eips_with_limits_of_their_own(gateway: Gateway) -> None:
    eips = [f"172.31.{n // 200}.{n % 200 + 1}" for n in range(300)]
    rules = [f"{eip},1,{n + 1}.5,1" for n, eip in enumerate(eips)]
    gateway.verb("eip-ingress-qos-add", *rules)
    gateway.verb("eip-egress-qos-add", *rules)
    for device, side in (("net1", "src"), ("ifb-net1", "dst")):
        shown = dict(line.split()[2:13:10] for line in classes(gateway, device).splitlines())
        assert len(shown) == 300
        filters = tc(gateway, "-p", "filter", "show", "dev", device, "parent", "1:").splitlines()
        led = {
            match.split()[-1]: line.split("flowid ")[1].split()[0]
            for line, match in pairwise(filters)
            if "flowid" in line
        }
        assert set(led) == {f"{eip}/32" for eip in eips}
        assert len(set(led.values())) == 300
        assert f"match IP {side} 172.31.0.1/32" in "\n".join(filters)


def test_fast_limits_leave_stderr_and_the_kernels_log_silent(gateway: Gateway) -> None:
    before, ours = kernel_log(gateway), set()
    for rate in ("16.5", "100", "10000", "50000"):
        for verb, device in (("eip-ingress-qos-add", "ifb-net1"), ("eip-egress-qos-add", "net1")):
            gateway.verb(verb, f"{EIP},1,{rate},{rate}")  # which asserts that stderr is empty
            ours |= set(re.findall(r"^class htb 1:([0-9a-f]+)", classes(gateway, device), re.MULTILINE))
    assert ours
    # The log is everybody's on this machine: others write there, and old lines fall out. It names classes, in hex.
    said = "".join(kernel_log(gateway) - before)
    assert not [minor for minor in ours if f"quantum of class 1{minor:0>4}".lower() in said.lower()]


def kernel_log(gateway: Gateway) -> set[str]:
    """The lines of the kernel's log, with their times."""
    return set(gateway.run("dmesg").splitlines())


def test_limits_may_come_before_init_and_outlast_it(world: World) -> None:
    gateway = world.plug()
    gateway.verb("eip-egress-qos-add", f"{EIP},1,10,10")
    gateway.verb("qos-add", "ingress,net1,3,matchall,,,,50,50")
    refused = gateway.exec("eip-add", "192.168.0.50/24")
    assert (refused.returncode, refused.stderr) == (1, "nat gateway not initialized\n")
    assert not gateway.status()["initialized"]
    gateway.kill(signal.SIGTERM)
    gateway.verb("eip-egress-qos-add", f"{EIP},1,10,10")
    assert not gateway.status()["initialized"]
    gateway.verb("init")
    assert gateway.status()["initialized"]
    assert "rate 10Mbit" in classes(gateway, "net1")
    assert "rate 50Mbit" in classes(gateway, "ifb-net1")
    gateway.remove()


@pytest.mark.parametrize("keeps_files", [True, False])
def test_limits_return_after_a_restart(gateway: Gateway, keeps_files: bool) -> None:
    fill(gateway)
    limits = sorted(gateway.get("/v1/qos"), key=str)
    before = tree(gateway)
    gateway.kill()
    if not keeps_files:
        shutil.rmtree(gateway.state_dir)
    gateway.verb("get-iptables-version")
    assert sorted(gateway.get("/v1/qos"), key=str) == limits
    assert tree(gateway) == before


def test_a_tree_that_the_script_left_is_taken_over(gateway: Gateway) -> None:
    """As Kube-OVN's script makes it since release 1.16, but for the matchall filter, which this kernel may lack."""
    gateway.verb("get-iptables-version")
    gateway.kill()
    shutil.rmtree(gateway.state_dir, ignore_errors=True)
    script = """
        qdisc add dev net1 root handle 1: htb default 9999
        class add dev net1 parent 1: classid 1:9999 htb rate 10000mbit ceil 10000mbit quantum 60000
        class add dev net1 parent 1: classid 1:5030 htb rate 10mbit ceil 10mbit burst 10485760 cburst 10485760
        filter add dev net1 parent 1: protocol ip prio 1 handle 800::30 u32 match ip src 172.31.0.152/32 flowid 1:5030
        qdisc add dev ifb-net1 root handle 1: htb default 9999
        class add dev ifb-net1 parent 1: classid 1:9999 htb rate 10000mbit ceil 10000mbit quantum 60000
        class add dev ifb-net1 parent 1: classid 1:8123 htb rate 20mbit ceil 20mbit burst 20971520 cburst 20971520
        filter add dev ifb-net1 parent 1: protocol ip prio 2 handle 800::123 u32 match ip src 203.0.113.2 flowid 1:8123
        qdisc add dev net1 ingress
        filter add dev net1 parent ffff: protocol all prio 65535 u32 match u32 0 0 action mirred egress redirect \
dev ifb-net1
    """
    gateway.ip("link add ifb-net1 type ifb", "link set ifb-net1 up")
    gateway.run("tc", "-batch", "-", stdin="\n".join(line.strip() for line in script.strip().splitlines()) + "\n")
    gateway.verb("get-iptables-version")
    found = [(one.get("eip") or one["matchValue"], one["rateMax"], one["burstMax"]) for one in gateway.get("/v1/qos")]
    assert sorted(found) == [(EIP, "10", "10"), ("src 203.0.113.2/32", "20", "20")]
    for device, rate, minor in (("net1", "10Mbit", "1:5030"), ("ifb-net1", "20Mbit", "1:8123")):
        shown = {line.split()[2]: line for line in classes(gateway, device).splitlines()}
        assert set(shown) == {"1:9999", minor}  # what no limit claims has its class still
        line = shown[minor]
        assert f"rate {rate} " in line
    redirects = tc(gateway, "filter", "show", "dev", "net1", "parent", "ffff:").count("Egress Redirect")
    assert redirects == 1
    gateway.verb("eip-egress-qos-del", EIP)
    (line,) = classes(gateway, "net1").splitlines()
    assert line.startswith("class htb 1:9999 ")  # as the script would leave it


def test_a_root_that_the_script_left_empty_is_used_and_known_again(gateway: Gateway) -> None:
    """Up to release 1.15 its limits are policers below a root without classes."""
    gateway.run("tc", "qdisc", "add", "dev", "net1", "root", "handle", "1:0", "htb")
    root = tc(gateway, "qdisc", "show", "dev", "net1").split()[2:5]
    gateway.verb("eip-egress-qos-add", f"{EIP},1,10,10")
    before = classes(gateway, "net1")
    gateway.kill()
    shutil.rmtree(gateway.state_dir)
    gateway.verb("get-iptables-version")
    assert [one["eip"] for one in gateway.get("/v1/qos")] == [EIP]
    assert classes(gateway, "net1") == before
    gateway.verb("eip-egress-qos-del", EIP)
    assert classes(gateway, "net1").strip() == ""
    assert tc(gateway, "qdisc", "show", "dev", "net1").split()[2:5] == root


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("ingress,twelve-chars,3,matchall,,,,10,10", "more than 11 characters"),
        ("egress,net9,3,matchall,,,,10,10", "no such interface"),
        ("egress,net1,3,matchall,,,,,", "rateMax: '' is not a decimal number of Mbit/s"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(gateway: Gateway, rule: str, says: str) -> None:
    veth(gateway, "twelve-chars", gateway, "peer")
    fill(gateway)
    before = tree(gateway)
    done = gateway.exec("qos-add", rule)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert says in done.stderr
    assert tree(gateway) == before
    gateway.verb("qos-del", rule)


def test_somebody_elses_shaper_is_left_alone(gateway: Gateway) -> None:
    gateway.run("tc", "qdisc", "add", "dev", "net1", "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms")
    done = gateway.exec("eip-egress-qos-add", f"{EIP},1,10,10")
    assert done.returncode == 1
    assert "tc qdisc add dev net1 root" in done.stderr
    assert "tbf" in tc(gateway, "qdisc", "show", "dev", "net1")
    assert gateway.get("/v1/qos") == []


def test_the_log_says_once_which_queue_limits_have(gateway: Gateway) -> None:
    fill(gateway)
    shown = tc(gateway, "qdisc", "show", "dev", "net1")
    kind = next(kind for kind in ("fq_codel", "sfq", "bfifo") if f"qdisc {kind} " in shown)
    told = {"sfq": "the kernel has no fq_codel", "bfifo": "bandwidth limits queue in bfifo"}
    if kind in told:
        gateway.logged(told[kind])
    log = gateway.log()
    assert log.count("the kernel has no fq_codel") == (kind != "fq_codel")
    assert log.count("bandwidth limits queue in bfifo") == (kind == "bfifo")


def test_an_ingress_limit_of_the_tenants_side_has_its_own_ifb(gateway: Gateway) -> None:
    """Release 1.17 names eth0 where a policy's ingress rule names no interface."""
    gateway.verb("qos-add", "ingress,eth0,3,matchall,,,,50,50")
    assert "rate 50Mbit" in classes(gateway, "ifb-eth0")
    gateway.verb("qos-del", "ingress,,3,matchall,,,,50,50")
    assert classes(gateway, "ifb-eth0").strip() == ""
