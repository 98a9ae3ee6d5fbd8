"""What the gateway says of itself over HTTP: status, ruleset, probes, and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from api.http_models import Problem
from gateway.status import Status
from rules.iptables import parse_save
from rules.nat import HOOKS, chains
from tests.gateway_kit import STATE, example
from tests.http_kit import Face, assert_problem, face


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


def test_status_before_and_after_init(http: Face) -> None:
    before = http("GET", "/v1/status").json()
    assert (before["initialized"], before["ready"], before["lastError"]) == (False, True, None)
    http("PUT", "/v1/gateway", STATE)
    after = http("GET", "/v1/status").json()
    assert after["initialized"] is True
    assert after["counts"] == {
        "eips": 2,
        "fips": 1,
        "dnats": 1,
        "snats": 1,
        "routes": 1,
        "sharedDnats": 1,
        "qos": 2,
    }
    assert after["transactions"] == {"committed": 1, "unchanged": 0, "failed": 0}
    assert Status.model_validate(after).arp.on is True


def test_the_ruleset_is_what_the_kernel_holds(http: Face) -> None:
    assert_problem(http("GET", "/v1/ruleset"), 404, "not-found")
    http("PUT", "/v1/gateway", STATE)
    response = http("GET", "/v1/ruleset")
    assert response.headers["content-type"].startswith("text/plain")
    saved, _, listed = response.text.partition("table ip kube-ovn {\n")
    said = parse_save(saved).chains
    ours = {ref: rules for ref, rules in http.gateway.kernel.chains.items() if rules or ref in said}
    assert said == ours
    wanted = chains(example(), guard=False)
    assert set(said) == {ref for ref, _ in HOOKS} | {ref for ref, rules in wanted.items() if rules is not None}
    assert "192.168.0.10 . udp . 53 : goto dnat-" in listed
    http("DELETE", "/v1/shared-dnats/192.168.0.10/53/udp")
    assert "table ip" not in http("GET", "/v1/ruleset").text


def test_while_arp_is_off_the_ruleset_has_the_guard(http: Face) -> None:
    http("PUT", "/v1/gateway", {})
    assert "-A ARP_GUARD -o net1 -j DROP\n" in http("GET", "/v1/ruleset").text


def test_where_arp_is_never_touched_the_ruleset_has_no_guard(tmp_path: Path) -> None:
    fixture = face(tmp_path, arp="on")
    http = next(fixture)
    http("PUT", "/v1/gateway", {})
    assert "-j DROP" not in http("GET", "/v1/ruleset").text
    next(fixture, None)


def test_probes(http: Face) -> None:
    for path in ("/healthz", "/readyz"):
        response = http("GET", path)
        assert (response.status_code, response.text) == (200, "ok\n")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1"), ("GET", "/v2/gateway"), ("GET", "/v1/eips/a/b")])
def test_an_unknown_path_is_a_problem(http: Face, method: str, path: str) -> None:
    assert_problem(http(method, path), 404, "not-found")


def test_an_unknown_method_is_a_problem_that_says_what_is_allowed(http: Face) -> None:
    response = http("POST", "/v1/gateway", {})
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"]


def openapi(http: Face) -> dict[str, Any]:
    document: dict[str, Any] = http("GET", "/openapi.json").json()
    return document


def test_every_route_of_the_face_is_described(http: Face) -> None:
    paths = {path: set(operations) for path, operations in openapi(http)["paths"].items()}
    item = {"get", "put", "delete"}
    assert paths == {
        "/v1/drift": {"get"},
        "/v1/events": {"get"},
        "/v1/gateway": {"get", "put", "patch"},
        **{f"/v1/{kind}": {"get"} for kind in ("eips", "fips", "dnats", "snats", "routes", "shared-dnats", "qos")},
        "/v1/eips/{ip}": item,
        "/v1/fips/{eip}": item,
        "/v1/dnats/{eip}/{port}/{protocol}": item,
        "/v1/snats/{eip}/{addr}/{len}": item,
        "/v1/shared-dnats/{eip}/{port}/{protocol}": item,
        "/v1/routes/{addr}/{len}": item,
        "/v1/qos/eips/{eip}/{direction}": item,
        "/v1/qos/interfaces/{interface}/{direction}/{priority}": item,
        "/v1/qos/interfaces/{interface}/{direction}/{priority}/{side}/{addr}/{len}": item,
        **{
            path: {"get"}
            for path in (
                "/v1/status",
                "/v1/load-balancer",
                "/v1/ruleset",
                "/v1/explain",
                "/v1/state",
                "/v1/surroundings",
                "/v1/traffic",
                "/metrics",
                "/healthz",
                "/readyz",
            )
        },
    }


def test_problems_are_declared_with_their_media_type(http: Face) -> None:
    responses = openapi(http)["paths"]["/v1/gateway"]["put"]["responses"]
    assert set(responses) == {"200", "201", "409", "413", "422", "500", "503"}
    for status in ("409", "413", "422", "500"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    assert list(responses["200"]["content"]) == ["application/json"]


def test_fields_have_the_names_of_the_wire(http: Face) -> None:
    schemas = openapi(http)["components"]["schemas"]
    assert set(schemas["GatewaySpec"]["properties"]) == {*STATE, "initialized"}
    assert set(schemas["Snat"]["properties"]) == {"eip", "internalCIDR", "randomFully"}


def test_the_examples_work_as_they_stand(tmp_path: Path) -> None:
    described = next(face(tmp_path / "described"))
    tried = 0
    for method in ("put", "patch"):
        body = openapi(described)["paths"]["/v1/gateway"][method]["requestBody"]
        for name, told in body["content"]["application/json"]["examples"].items():
            http = next(face(tmp_path / f"{method} {name}".replace("/", " ")))
            if method == "patch":
                assert http("PUT", "/v1/gateway", {}).status_code == 201
            answer = http(method.upper(), "/v1/gateway", told["value"])
            assert answer.status_code in (200, 201), answer.text
            tried += 1
    assert tried >= 4


def test_a_problem_reads_back_as_the_schema_says(http: Face) -> None:
    document = assert_problem(http("PUT", "/v1/gateway", {"eips": [{}]}), 422, "invalid")
    assert TypeAdapter(Problem).validate_python(document).errors
