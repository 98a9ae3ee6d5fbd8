"""KernelFlows on real connections through a translating gateway, with conntrack(8) as the witness."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace

import pytest
from netns import Namespace, require, veth

from gateway.kernel import conntrack
from gateway.kernel.conntrack import KernelFlow, KernelFlows
from rules.flows import IP_PROTOCOLS, Flow, FlowFilter

EIP, NET1, OUTSIDE = "192.168.0.10", "192.168.0.2", "192.168.0.1"
TENANT, BARE = "10.0.1.10", "10.0.2.10"
SETTLE = 30.0  # seconds that a packet may take within one machine


@pytest.fixture
def gateway(make_netns: Callable[[], Namespace]) -> Iterator[Namespace]:
    """Inside a gateway with a DNAT and a SNAT, through which TCP, UDP and ICMP have passed.

    Connections: TCP in by the DNAT; UDP and a ping out by the SNAT; UDP out from an address without a rule.
    """
    require("conntrack", "iptables-legacy", "ping")
    tenant, gw, outside = make_netns(), make_netns(), make_netns()
    veth(tenant, "eth0", gw, "eth0")
    veth(outside, "eth0", gw, "net1")
    addresses = (
        (tenant, f"{TENANT}/24", "eth0"),
        (tenant, f"{BARE}/24", "eth0"),
        (gw, "10.0.1.1/24", "eth0"),
        (gw, "10.0.2.1/24", "eth0"),
        (gw, f"{NET1}/24", "net1"),
        (gw, f"{EIP}/24", "net1"),
        (outside, f"{OUTSIDE}/24", "eth0"),
    )
    for namespace, address, interface in addresses:
        namespace.run("ip", "addr", "add", address, "dev", interface)
    tenant.run("ip", "route", "add", "default", "via", "10.0.1.1")
    outside.run("ip", "route", "add", "10.0.2.0/24", "via", NET1)
    gw.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    add = ("iptables-legacy", "-w", "-t", "nat", "-A")
    gw.run(*add, "PREROUTING", *f"-d {EIP}/32 -p tcp --dport 8888 -j DNAT --to-destination {TENANT}:80".split())
    gw.run(*add, "POSTROUTING", *f"-s 10.0.1.0/24 -o net1 -j SNAT --to-source {EIP}".split())
    with ExitStack() as opened:
        talk(tenant, outside, opened)
        with gw.entered():
            yield gw


def talk(tenant: Namespace, outside: Namespace, opened: ExitStack) -> None:
    """One exchange on each connection; the sockets stay open as long as ``opened``."""

    def made(kind: int, where: Namespace, address: tuple[str, int]) -> socket.socket:
        with where.entered():
            made = opened.enter_context(socket.socket(socket.AF_INET, kind))
        made.settimeout(SETTLE)
        made.bind(address)
        return made

    web = made(socket.SOCK_STREAM, tenant, (TENANT, 80))
    web.listen()
    client = made(socket.SOCK_STREAM, outside, (OUTSIDE, 40000))
    client.connect((EIP, 8888))
    opened.enter_context(web.accept()[0])
    dns = made(socket.SOCK_DGRAM, outside, (OUTSIDE, 53))
    for source in (TENANT, BARE):
        asking = made(socket.SOCK_DGRAM, tenant, (source, 5000))
        asking.sendto(b"?", (OUTSIDE, 53))
        dns.sendto(b"!", dns.recvfrom(16)[1])
        asking.recv(16)
    tenant.run("ping", "-c", "1", "-I", TENANT, OUTSIDE)


@pytest.fixture
def flows(gateway: Namespace) -> Iterator[KernelFlows]:
    driver = KernelFlows()
    yield driver
    driver.close()


def witnessed(gateway: Namespace) -> set[Flow]:
    """What ``conntrack -L`` lists, IPv4 only."""
    return {seen for line in gateway.run("conntrack", "-L", "-f", "ipv4").splitlines() if (seen := _witnessed(line))}


def _witnessed(line: str) -> Flow | None:
    found = [re.findall(rf"\b{key}=(\S+)", line) for key in ("src", "dst", "sport", "dport")]
    if not found[0]:
        return None
    (osrc, rsrc), (odst, rdst) = found[:2]
    (osport, rsport), (odport, rdport) = ((int(p[0]), int(p[1])) if p else (0, 0) for p in found[2:])
    zone = re.search(r"\bzone=(\d+)", line)
    number = int(line.split()[1])
    return Flow(number, osrc, odst, osport, odport, rsrc, rdst, rsport, rdport, int(zone[1]) if zone else 0)


def plain(flow: Flow) -> Flow:
    return Flow(**{field.name: getattr(flow, field.name) for field in fields(Flow)})


def seen(flows: KernelFlows, *filters: FlowFilter) -> set[Flow]:
    listed = flows.matching(filters)
    assert len(set(listed)) == len(listed)
    return set(map(plain, listed))


FILTERS = {
    "to the EIP": FlowFilter(orig_dst=EIP),
    "by the EIP": FlowFilter(reply_dst=EIP),
    "from the tenant": FlowFilter(orig_src=TENANT),
    "a DNAT": FlowFilter(orig_dst=EIP, protocol=IP_PROTOCOLS["tcp"], orig_dport=8888),
    "another port": FlowFilter(orig_dst=EIP, protocol=IP_PROTOCOLS["tcp"], orig_dport=8889),
    "another protocol": FlowFilter(orig_dst=EIP, protocol=IP_PROTOCOLS["udp"], orig_dport=8888),
    "tcp": FlowFilter(protocol=IP_PROTOCOLS["tcp"]),
    "untranslated": FlowFilter(untranslated=True),
    "untranslated of a prefix": FlowFilter(untranslated=True, source_prefix="10.0.2.0/24"),
    "of a prefix": FlowFilter(source_prefix="10.0.0.0/16"),
    "of another prefix": FlowFilter(untranslated=True, source_prefix="10.0.3.0/24"),
    "a port of any protocol": FlowFilter(orig_dport=53),
    "all": FlowFilter(),
}


def test_the_scene_is_set(gateway: Namespace) -> None:
    assert witnessed(gateway) >= {
        Flow(6, OUTSIDE, EIP, 40000, 8888, TENANT, OUTSIDE, 80, 40000),
        Flow(17, TENANT, OUTSIDE, 5000, 53, OUTSIDE, EIP, 53, 5000),
        Flow(17, BARE, OUTSIDE, 5000, 53, OUTSIDE, BARE, 53, 5000),
        Flow(1, TENANT, OUTSIDE, 0, 0, OUTSIDE, EIP, 0, 0),
    }


@pytest.mark.parametrize("filtering", [True, False], ids=["kernel", "all"])
@pytest.mark.parametrize("wanted", FILTERS.values(), ids=FILTERS.keys())
def test_a_filter_finds_what_the_witness_lists(
    gateway: Namespace, flows: KernelFlows, wanted: FlowFilter, filtering: bool
) -> None:
    flows._kernel_filters = filtering
    assert seen(flows, wanted) == {flow for flow in witnessed(gateway) if wanted.matches(flow)}


def test_many_filters_find_each_entry_once(gateway: Namespace, flows: KernelFlows) -> None:
    assert seen(flows, *FILTERS.values()) == witnessed(gateway)
    assert seen(flows) == set()


@pytest.mark.parametrize("name", ["to the EIP", "by the EIP", "from the tenant", "a DNAT", "tcp", "untranslated"])
def test_the_kernel_itself_sends_no_more_than_that(gateway: Namespace, flows: KernelFlows, name: str) -> None:
    wanted = FILTERS[name]
    sent = list(flows._netlink.stream(conntrack._filtered(wanted)))
    assert len(sent) == len({flow for flow in witnessed(gateway) if wanted.matches(flow)}) > 0


def test_a_kernel_that_refuses_the_filter_is_read_whole(
    gateway: Namespace, flows: KernelFlows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Flags for a tuple that is not there: EINVAL, as for a filter that the kernel does not know.
    request = conntrack._filtered(FlowFilter(orig_dst=EIP))
    bare = request.body[:4] + request.body[4 + int.from_bytes(request.body[4:6], "little") :]
    monkeypatch.setattr(conntrack, "_filtered", lambda _: request._replace(body=bare))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(seen(flows, FlowFilter(orig_dst=EIP))) == 1
    assert len(caplog.records) == 1
    assert "Invalid argument" in caplog.text


@pytest.mark.parametrize("name", ["a DNAT", "by the EIP", "untranslated of a prefix"])
def test_deleted_entries_are_gone_and_others_stay(gateway: Namespace, flows: KernelFlows, name: str) -> None:
    before = witnessed(gateway)
    doomed = flows.matching([FILTERS[name]])
    assert doomed
    assert flows.delete(doomed) == len(doomed)
    assert witnessed(gateway) == before - set(map(plain, doomed))
    assert flows.delete(doomed) == 0


def test_an_icmp_flow_is_told_from_another_of_the_same_addresses(gateway: Namespace, flows: KernelFlows) -> None:
    for identifier in (1, 2):
        gateway.run(*f"conntrack -I -p icmp -s 10.9.0.1 -d 10.9.0.2 --icmp-type 8 --icmp-code 0 "
                    f"--icmp-id {identifier} -t 100".split())  # fmt: skip
    first, second = flows.matching([FlowFilter(orig_src="10.9.0.1")])
    assert flows.delete([first]) == 1
    assert flows.matching([FlowFilter(orig_src="10.9.0.1")]) == [second]


def test_zones_are_told_apart(gateway: Namespace, flows: KernelFlows) -> None:
    row = "-I -p udp -s 10.9.0.1 -d 10.9.0.2 --sport 7 --dport 8 -t 100"
    gateway.run("conntrack", "-R", "-", stdin=f"{row}\n{row} --zone 7\n")
    found = {flow.zone: flow for flow in flows.matching([FlowFilter(orig_src="10.9.0.1")])}
    assert found.keys() == {0, 7}
    assert flows.delete([found[7]]) == 1
    assert flows.matching([FlowFilter(orig_src="10.9.0.1")]) == [found[0]]


def test_a_flow_that_was_not_read_here_is_deleted_by_its_fields(gateway: Namespace, flows: KernelFlows) -> None:
    (found,) = flows.matching([FILTERS["a DNAT"]])
    assert isinstance(found, KernelFlow)
    assert flows.delete([replace(plain(found), orig_sport=1)]) == 0
    assert flows.delete([plain(found)]) == 1
    assert flows.matching([FILTERS["a DNAT"]]) == []


def test_more_than_one_batch_is_deleted(gateway: Namespace, flows: KernelFlows) -> None:
    rows = "".join(f"-I -p udp -s 10.9.0.1 -d 10.9.0.2 --sport {n} --dport 8 -t 100\n" for n in range(1, 301))
    gateway.run("conntrack", "-R", "-", stdin=rows)
    found = flows.matching([FlowFilter(orig_src="10.9.0.1")])
    assert len(found) == 300
    assert flows.delete(found) == 300
    assert flows.matching([FlowFilter(orig_src="10.9.0.1")]) == []


def test_the_figures_are_those_of_the_namespace(gateway: Namespace, flows: KernelFlows) -> None:
    assert flows.count() == int(gateway.run("conntrack", "-C"))
    assert flows.maximum() >= flows.count() > 0
