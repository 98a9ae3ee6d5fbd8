"""``natgw status`` and ``natgw top`` by made documents: what is shown, of how many, in how many columns."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from api import overview
from gateway.status import ArpStatus, Counts, FastpathStatus, LinkStatus, Status, TransactionCounts
from gateway.traffic import (
    BusiestDestination,
    Collector,
    Conntrack,
    Direction,
    DnatTraffic,
    EipTraffic,
    SnatPorts,
    Talker,
    Traffic,
)
from rules.spec import GatewaySpec, Interfaces
from tests.gateway_kit import example
from tests.test_story import LB

LINK = LinkStatus(up=True, arp=True, mac="02:00:00:00:00:02", mtu=1400)
WELL = Status(
    ready=True,
    initialized=True,
    version="1.2.3",
    variant="legacy",
    interfaces=Interfaces(),
    links={"eth0": LINK, "net1": LINK},
    arp=ArpStatus(policy="auto", on=True),
    counts=Counts(eips=2),
    conflicts=[],
    last_error=None,
    pending=[],
    generation=7,
    transactions=TransactionCounts(),
    uptime_seconds=61.0,
    fastpath=FastpathStatus(on=True),
)
BUSY = Direction(bytes_per_second=1_250_000, active_flows=1200, packets_per_second=900, new_flows_per_second=5)
PORTS = SnatPorts(
    in_use=60_000,
    busiest=BusiestDestination(protocol="tcp", address="203.0.113.5", port=443, in_use=59_000),
)
TRAFFIC = Traffic(
    interval_seconds=2.0,
    collector=Collector(running=True),
    conntrack=Conntrack(count=200_000, max=262_144, drop=3),
    eips=[EipTraffic(eip="192.168.0.10", snat_ports=PORTS, **{"in": BUSY}), EipTraffic(eip="192.168.0.12")],
    dnats=[DnatTraffic(eip="192.168.0.10", external_port=8888, protocol="tcp", **{"in": BUSY})],
    top_sources=[Talker(address="10.0.1.10", **{"in": BUSY})],
    top_destinations=[Talker(address="203.0.113.5", out=BUSY)],
)
AROUND = {
    "kernel": "6.18.0",
    "neighbours": [
        {"interface": "net1", "address": "192.168.0.1", "mac": "f6:86:90:cd:29:30", "state": "reachable"},
        {"interface": "eth0", "address": "10.0.1.1", "mac": None, "state": "failed"},
    ],
}


def look(spec: GatewaySpec | None = None, traffic: Traffic | None = TRAFFIC, **more: Any) -> dict[str, Any]:
    return {
        **WELL.model_dump(mode="json"),
        "spec": (spec or example()).model_dump(mode="json"),
        "traffic": traffic and traffic.model_dump(mode="json"),
        "surroundings": AROUND,
        **more,
    }


def shown(what: Any, width: int = 160) -> str:
    console = Console(width=width, color_system=None, emoji=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_everything_is_said_once() -> None:
    text = shown(overview.status(look()))
    assert "vpc-nat-gateway 1.2.3  ready  iptables-legacy, fastpath on, kernel 6.18.0, up 0:01:01" in text
    assert "external gateway 192.168.0.1 on net1: f6:86:90:cd:29:30 (reachable)" in text
    assert "tenants' gateway 10.0.1.1 on eth0: failed" in text
    assert "connections: 200,000 of 262,144 (76%), 3 dropped" in text
    (busy,) = [line for line in text.splitlines() if line.startswith("192.168.0.10")]
    assert "DNAT 8888/tcp -> 10.0.1.10:80, DNAT 53/udp -> 2 backends, SNAT 10.0.1.0/24, limit egress 10 Mbit/s" in busy
    assert busy.split()[-5:] == ["10.0M", "0", "1,200", "60,000", "(91%)"]
    (quiet,) = [line for line in text.splitlines() if line.startswith("192.168.0.12")]
    assert "FIP 10.0.1.5" in quiet


@pytest.mark.parametrize("width", [80, 160])
def test_no_line_is_wider_than_the_terminal_and_addresses_stay_whole(width: int) -> None:
    text = shown(overview.status(look()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "192.168.0.10 " in text
    assert "60,000 (91%)" in text


def test_without_a_measurement_a_clear_word_stands_for_it() -> None:
    unwatched = Traffic.unwatched(example(), "no flow watcher runs")
    assert "traffic: not measured (no flow watcher runs)" in shown(overview.status(look(traffic=unwatched)))
    text = shown(overview.status(look(traffic=None, surroundings=None)))
    assert "traffic: unknown" in text
    assert "192.168.0.10" in text


def thousand() -> GatewaySpec:
    eips = [{"address": f"100.64.{i // 250}.{i % 250 + 1}/16"} for i in range(1000)]
    dnats = [
        {"eip": "100.64.3.7", "externalPort": p, "protocol": "tcp", "internalIp": "10.0.1.99", "internalPort": 80}
        for p in range(1000, 1040)
    ]
    return GatewaySpec.model_validate({"eips": eips, "dnats": dnats})


def test_a_thousand_eips_are_paged_and_searched() -> None:
    spec = thousand()
    text = shown(overview.status(look(spec)))
    assert sum(line.startswith("100.64.") for line in text.splitlines()) == 20
    assert "20 of 1,000 EIPs" in text
    assert "100.64.3.250" in shown(overview.status(look(spec), limit=5, offset=995))
    by_target = shown(overview.status(look(spec), "10.0.1.99"))
    assert "40 DNATs (1000/tcp, 1001/tcp, ...)" in by_target
    assert "1039/tcp -> 10.0.1.99:80" in by_target  # the only one found is shown in full
    assert "no EIP has '10.9.9.9'" in shown(overview.status(look(spec), "10.9.9.9"))
    named = overview.document(look(spec), "100.64.0.1", 20, 0)
    assert (named["eipsFound"], named["eips"][0]["eip"]) == (1, "100.64.0.1")  # not 100.64.0.10 as well


def test_a_rule_of_an_address_that_is_no_eip_stands_out() -> None:
    spec = GatewaySpec.model_validate({"fips": [{"eip": "192.168.0.77", "internalIp": "10.0.1.5"}]})
    assert "192.168.0.77 no EIP" in shown(overview.status(look(spec)))


def test_other_parts_of_the_gateway_have_their_say() -> None:
    drift = {"policy": "repair", "repairs": 3, "looks": 9}
    more = {"fastpath": {"on": False, "reason": "no nf_tables"}, "drift": drift}
    text = shown(overview.status(look(**more)))
    assert "fastpath off (no nf_tables)" in text
    assert "drift: policy repair, 3 repairs" in text


def test_a_load_balancers_ports_are_shown_alike() -> None:
    text = shown(overview.status({**look(traffic=None, appliance="lb-svc"), "spec": LB}))
    assert "DNAT 80/tcp -> 10.96.0.20:8080" in text
    assert "external gateway 192.168.0.1 on net1: f6:86:90:cd:29:30 (reachable)" in text


def test_the_busiest_come_first() -> None:
    text = shown(overview.top(TRAFFIC.model_dump(mode="json"), 1))
    lines = [line.split()[0] for line in text.splitlines() if line]
    assert lines[1:] == ["EIP", "192.168.0.10", "inside", "10.0.1.10", "outside", "203.0.113.5"]
    unwatched = Traffic.unwatched(None, "no flow watcher runs").model_dump(mode="json")
    assert shown(overview.top(unwatched, 1)).strip() == "traffic is not measured: no flow watcher runs"
