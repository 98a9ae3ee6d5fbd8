"""GET /v1/explain: one packet's walk through what is rendered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_kit import STATE
from tests.http_kit import Face, assert_problem, face


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Face]:
    fixture = face(tmp_path)
    http = next(fixture)
    assert http("PUT", "/v1/gateway", STATE).status_code == 201
    yield http
    next(fixture, None)


def ask(http: Face, protocol: str, src: str, dst: str, **more: str) -> dict[str, Any]:
    response = http("GET", "/v1/explain", params={"protocol": protocol, "src": src, "dst": dst, **more})
    assert response.status_code == 200, response.text
    explanation: dict[str, Any] = response.json()
    return explanation


def test_a_port_mapping_from_outside(ready: Face) -> None:
    told = ask(ready, "tcp", "203.0.113.5:40000", "192.168.0.10:8888")
    assert (told["verdict"], told["inInterface"], told["outInterface"]) == ("forwarded", "net1", "eth0")
    assert (told["final"]["destination"], told["final"]["destinationPort"]) == ("10.0.1.10", 80)
    assert told["final"]["source"] == "203.0.113.5"
    reply = told["reply"]
    assert (reply["arrives"]["source"], reply["leaves"]["source"]) == ("10.0.1.10", "192.168.0.10")
    (translated,) = [step for step in told["steps"] if step["chain"] == "SHARED_DNAT"]
    assert translated["position"] == 1
    assert translated["rule"].endswith("-j DNAT --to-destination 10.0.1.10:80")
    assert any("destination becomes 10.0.1.10:80" in line for line in told["text"])


def test_a_tenant_goes_out_by_the_source_translation(ready: Face) -> None:
    told = ask(ready, "udp", "10.0.1.77:5000", "203.0.113.5:53")
    assert (told["inInterface"], told["outInterface"], told["nextHop"]) == ("eth0", "net1", "192.168.0.1")
    assert told["final"]["source"] == "192.168.0.10"


def test_a_floating_ip_works_both_ways(ready: Face) -> None:
    assert ask(ready, "icmp", "203.0.113.5", "192.168.0.12")["final"]["destination"] == "10.0.1.5"
    assert ask(ready, "icmp", "10.0.1.5", "203.0.113.5")["final"]["source"] == "192.168.0.12"


def test_a_hairpin_is_seen_as_the_eip(ready: Face) -> None:
    told = ask(ready, "tcp", "10.0.1.77:40000", "192.168.0.10:8888")
    assert told["final"]["source"] == "192.168.0.10"
    assert told["final"]["destination"] == "10.0.1.10"
    assert told["outInterface"] == "eth0"


def test_a_port_that_is_mapped_nowhere_ends_at_the_gateway(ready: Face) -> None:
    assert ask(ready, "tcp", "203.0.113.5:40000", "192.168.0.10:22")["verdict"] == "local"


def test_while_arp_is_off_nothing_leaves_by_the_external_interface(ready: Face) -> None:
    ready("PUT", "/v1/gateway", {**STATE, "eips": []})
    told = ask(ready, "tcp", "10.0.1.77:40000", "203.0.113.5:443")
    assert told["verdict"] == "dropped"
    assert told["reply"] is None
    assert [step["chain"] for step in told["steps"]][-1] == "ARP_GUARD"


def test_the_interface_it_comes_in_by_can_be_said(ready: Face) -> None:
    told = ask(ready, "tcp", "10.0.1.77:40000", "192.168.0.10:8888", **{"in": "net1"})
    assert told["inInterface"] == "net1"
    assert told["final"]["source"] == "10.0.1.77"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"protocol": "sctp"}, "protocol"),
        ({"src": "10.0.1.300:1"}, "src"),
        ({"src": "10.0.1.3:0"}, "src"),
        ({"src": "[::1]:80"}, "src"),
        ({"dst": "192.168.0.10:70000"}, "dst"),
        ({"dst": "192.168.0.10"}, "dst"),
        ({"in": "not an interface"}, "in"),
        ({"dst": None}, "dst"),
    ],
)
def test_a_wrong_question_names_the_field(ready: Face, wrong: dict[str, str | None], field: str) -> None:
    question = {"protocol": "tcp", "src": "10.0.1.3:40000", "dst": "192.168.0.10:8888", **wrong}
    given = {key: value for key, value in question.items() if value is not None}
    document = assert_problem(ready("GET", "/v1/explain", params=given), 422, "invalid")
    assert [error["field"] for error in document["errors"]] == [field]


def test_before_init_there_is_nothing_to_walk_through(tmp_path: Path) -> None:
    http = next(face(tmp_path / "empty"))
    question = {"protocol": "icmp", "src": "10.0.1.3", "dst": "192.0.2.1"}
    assert_problem(http("GET", "/v1/explain", params=question), 404, "not-found")


def test_a_shared_mapping_names_every_backend(ready: Face) -> None:
    told = ask(ready, "udp", "203.0.113.5:40000", "192.168.0.10:53")
    assert told["backends"] == ["10.0.1.10:5353", "10.0.1.11:5353"]
    assert (told["final"]["destination"], told["final"]["destinationPort"]) == ("10.0.1.10", 5353)
    assert [step["chain"] for step in told["steps"] if step["table"] == "ip kube-ovn"] == ["service-ips"]
    assert ask(ready, "tcp", "203.0.113.5:40000", "192.168.0.10:8888")["backends"] == []
