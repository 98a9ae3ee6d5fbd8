"""The document of the traffic, and what the kernel says of its table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.traffic import TrafficReader, conntrack, warnings
from gateway.traffic import Traffic
from tests.gateway_kit import STATE, example
from tests.http_kit import Face, face

STAT = """entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error
0000000a  00000000 00000001 00000000 00000002 00000000 00000000 00000000 00000000 00000010 00000003 00000000 00000000
0000000a  00000000 00000001 00000000 00000001 00000000 00000000 00000000 00000000 00000001 00000000 00000004 00000000
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A procfs with figures of connection tracking."""
    figures = tmp_path / "sys/net/netfilter"
    figures.mkdir(parents=True)
    (figures / "nf_conntrack_count").write_text("10\n")
    (figures / "nf_conntrack_max").write_text("262144\n")
    (tmp_path / "net/stat").mkdir(parents=True)
    (tmp_path / "net/stat/nf_conntrack").write_text(STAT)
    return tmp_path


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


def test_a_full_table_is_called_full(proc: Path) -> None:
    assert warnings(conntrack(proc)) == []
    (proc / "sys/net/netfilter/nf_conntrack_count").write_text("262144\n")
    (said,) = warnings(conntrack(proc))
    assert said == (
        "the connection tracking table is full (262,144 entries): new connections are dropped (3 packets so far)"
    )


def test_the_figures_of_all_cpus_are_summed_up(proc: Path) -> None:
    found = conntrack(proc)
    assert (found.count, found.maximum) == (10, 262144)
    assert (found.insert_failed, found.drop, found.early_drop, found.invalid) == (17, 3, 4, 3)


def test_what_the_kernel_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    assert set(conntrack(tmp_path).model_dump().values()) == {None}


def test_without_a_watcher_every_object_is_there_and_the_reason(proc: Path) -> None:
    traffic = TrafficReader(example, proc=proc)()
    assert not traffic.collector.running
    assert traffic.collector.detail == "no flow watcher runs"
    assert [each.eip for each in traffic.eips] == ["192.168.0.10", "192.168.0.12"]
    assert [(each.eip, each.internal_ip) for each in traffic.fips] == [("192.168.0.12", "10.0.1.5")]
    mappings = [(each.eip, each.external_port, each.protocol, each.shared) for each in traffic.dnats]
    assert mappings == [("192.168.0.10", 8888, "tcp", False), ("192.168.0.10", 53, "udp", True)]
    assert [each.internal_cidr for each in traffic.snats] == ["10.0.1.0/24"]
    assert traffic.conntrack.count == 10


def test_over_http(asked: Face) -> None:
    assert asked("PUT", "/v1/gateway", STATE).status_code == 201
    said = asked("GET", "/v1/traffic").json()
    assert said["eips"][0]["eip"] == "192.168.0.10"
    assert said["eips"][0]["in"]["bytesPerSecond"] == 0
    assert said["eips"][0]["snatPorts"] == {"inUse": 0, "available": 64512, "busiest": None}
    assert said["snats"][0]["internalCIDR"] == "10.0.1.0/24"
    assert Traffic.model_validate(said).dnats[0].external_port == 8888


def test_before_init_there_is_nothing_to_count(asked: Face) -> None:
    said = asked("GET", "/v1/traffic").json()
    assert (said["eips"], said["dnats"]) == ([], [])
