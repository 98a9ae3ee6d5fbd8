"""``/v1/state`` and ``/v1/explain`` of live connections: what goes out can be taken back and explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.explain import Endpoint, Question, explain
from api.http_app import build_app
from api.state import State, offline
from rules.flows import Flow
from rules.loadbalancer import LoadBalancerSpec
from tests.gateway_kit import STATE, gateway
from tests.http_kit import Face, assert_problem, call, face
from tests.test_http_explain import ask
from tests.test_story import LB


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Face]:
    fixture = face(tmp_path)
    http = next(fixture)
    assert http("PUT", "/v1/gateway", STATE).status_code == 201
    yield http
    next(fixture, None)


def test_a_saved_reading_explains_as_the_daemon_does(ready: Face) -> None:
    document = ready("GET", "/v1/state").json()
    assert document["kind"] == "natgw-state/1"
    assert document["gateway"]["eips"] == STATE["eips"]
    assert document["loadBalancer"] is None
    assert State.model_validate(document).model_dump(mode="json") == document
    reading = offline(document)
    for protocol, src, dst in (
        ("tcp", "203.0.113.5:40000", "192.168.0.10:8888"),
        ("udp", "10.0.1.77:5000", "203.0.113.5:53"),
        ("udp", "203.0.113.5:40000", "192.168.0.10:53"),
        ("icmp", "203.0.113.5", "192.168.0.12"),
        ("tcp", "203.0.113.5:40000", "192.168.0.10:22"),
    ):
        ends = [text.partition(":") for text in (src, dst)]
        source, destination = (Endpoint(address=a, port=int(port) if port else None) for a, _, port in ends)
        question = Question(protocol=protocol, source=source, destination=destination)
        assert explain(question, reading).model_dump(mode="json") == ask(ready, protocol, src, dst)


def test_a_foreign_hand_in_the_kernel_shows_in_the_story(ready: Face) -> None:
    kernel = ready.gateway.kernel
    for ref, rules in kernel.chains.items():
        if ref.chain == "SHARED_DNAT":
            kernel.chains[ref] = ()
            assert rules
    told = ask(ready, "tcp", "203.0.113.5:40000", "192.168.0.10:8888")
    assert told["verdict"] == "local"  # the kernel's rules count, not what they should be
    assert told["works"] is False


def test_a_live_connection_is_found_by_any_of_its_ends(ready: Face) -> None:
    through = Flow(6, "203.0.113.9", "192.168.0.10", 5000, 8888, "10.0.1.10", "203.0.113.9", 80, 5000)
    out = Flow(17, "10.0.1.7", "203.0.113.9", 4000, 53, "203.0.113.9", "192.168.0.10", 53, 40211)
    ready.gateway.kernel.conntrack = [through, out]
    for protocol, end in (
        ("tcp", "203.0.113.9:5000"),
        ("tcp", "192.168.0.10:8888"),
        ("tcp", "10.0.1.10:80"),
        ("tcp", "10.0.1.10"),
    ):
        told = ready("GET", "/v1/explain", params={"protocol": protocol, "flow": end}).json()
        assert (told["flow"]["source"], told["packet"]["destinationPort"]) == ("203.0.113.9", 8888)
    told = ready("GET", "/v1/explain", params={"protocol": "udp", "flow": "192.168.0.10:40211"}).json()
    assert (told["flow"]["source"], told["flow"]["sourcePort"]) == ("10.0.1.7", 4000)
    for protocol, end in (("udp", "10.0.1.10:80"), ("tcp", "192.168.0.10:8889")):
        document = assert_problem(
            ready("GET", "/v1/explain", params={"protocol": protocol, "flow": end}), 404, "not-found"
        )
        assert end in document["detail"]


def test_what_surrounds_the_gateway_is_read_when_asked(ready: Face) -> None:
    assert set(ready("GET", "/v1/surroundings").json()) == {"kernel", "sysctls", "neighbours", "otherRules", "unread"}


def test_in_a_load_balancers_pod_explain_answers_too(tmp_path: Path) -> None:
    made = gateway(tmp_path)
    dnat = {**LB["dnats"][0], "gateway": "10.0.1.1"}  # type: ignore[dict-item]
    spec = LoadBalancerSpec.model_validate({**LB, "dnats": [dnat]})
    made.service.balance(lambda _: spec, by="test").result(timeout=60)
    question = {"protocol": "tcp", "src": "203.0.113.5:40000", "dst": "192.168.0.30:80"}
    told = call(build_app(made.service), "GET", "/v1/explain", params=question).json()
    assert (told["verdict"], told["outInterface"], told["final"]["destination"]) == ("forwarded", "eth0", "10.96.0.20")
    assert call(build_app(made.service), "GET", "/v1/state").json()["loadBalancer"]["eip"] == LB["eip"]
    made.service.close()
