"""One object at a time over HTTP: make it so, look, take it away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_kit import STATE
from tests.http_kit import Face, assert_problem, face

# kind, path of one that stands, that object, the same identity made otherwise
STANDING: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("eips", "192.168.0.10", {"address": "192.168.0.10/24"}, {"address": "192.168.0.10/25"}),
    (
        "fips",
        "192.168.0.12",
        {"eip": "192.168.0.12", "internalIp": "10.0.1.5"},
        {"eip": "192.168.0.12", "internalIp": "10.0.1.6"},
    ),
    (
        "dnats",
        "192.168.0.10/8888/tcp",
        STATE["dnats"][0],
        {**STATE["dnats"][0], "internalPort": 81},
    ),
    (
        "snats",
        "192.168.0.10/10.0.1.0/24",
        {"eip": "192.168.0.10", "internalCIDR": "10.0.1.0/24", "randomFully": True},
        {"eip": "192.168.0.10", "internalCIDR": "10.0.1.0/24", "randomFully": False},
    ),
    (
        "shared-dnats",
        "192.168.0.10/53/udp",
        STATE["sharedDnats"][0],
        {**STATE["sharedDnats"][0], "sessionAffinity": "None"},
    ),
    (
        "routes",
        "10.0.2.0/24",
        {"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.1"},
        {"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.2"},
    ),
    ("qos", "eips/192.168.0.10/egress", STATE["qos"][0], {**STATE["qos"][0], "rateMax": "0.5", "priority": 4}),
    (
        "qos",
        "interfaces/net1/ingress/2/src/203.0.113.0/24",
        STATE["qos"][1],
        {**STATE["qos"][1], "burstMax": "1"},
    ),
]
FIELDS = {"shared-dnats": "sharedDnats"}  # where the wire does not name a collection as its path does
KINDS = pytest.mark.parametrize(("kind", "path", "standing", "other"), STANDING, ids=[s[0] for s in STANDING])


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


@pytest.fixture
def ready(http: Face) -> Face:
    assert http("PUT", "/v1/gateway", STATE).status_code == 201
    return http


@KINDS
def test_an_object_is_made_looked_at_replaced_and_taken_away(
    ready: Face, kind: str, path: str, standing: dict[str, Any], other: dict[str, Any]
) -> None:
    url = f"/v1/{kind}/{path}"
    assert ready("GET", url).json() == standing

    unchanged = ready("PUT", url, standing)
    assert (unchanged.status_code, unchanged.json()["changed"]) == (200, False)

    replaced = ready("PUT", url, other)
    assert (replaced.status_code, replaced.json()["changed"]) == (200, True)
    assert ready("GET", url).json() == other
    assert other in ready("GET", f"/v1/{kind}").json()

    assert ready("DELETE", url).status_code == 204
    assert ready("DELETE", url).status_code == 204
    assert_problem(ready("GET", url), 404, "not-found")
    assert other not in ready("GET", f"/v1/{kind}").json()

    created = ready("PUT", url, standing)
    assert (created.status_code, created.json()["changed"]) == (201, True)
    assert ready("GET", "/v1/gateway").json()[FIELDS.get(kind, kind)] == [
        *[item for item in STATE[FIELDS.get(kind, kind)] if item != standing],  # type: ignore[attr-defined]
        standing,
    ]


@KINDS
def test_collections_list_what_the_whole_state_holds(
    ready: Face, kind: str, path: str, standing: dict[str, Any], other: dict[str, Any]
) -> None:
    assert ready("GET", f"/v1/{kind}").json() == STATE[FIELDS.get(kind, kind)]


@KINDS
def test_before_init_there_is_nothing_and_nothing_can_be_made(
    http: Face, kind: str, path: str, standing: dict[str, Any], other: dict[str, Any]
) -> None:
    assert http("GET", f"/v1/{kind}").json() == []
    assert_problem(http("GET", f"/v1/{kind}/{path}"), 404, "not-found")
    assert_problem(http("PUT", f"/v1/{kind}/{path}", standing), 409, "not-initialized")
    assert_problem(http("DELETE", f"/v1/{kind}/{path}"), 409, "not-initialized")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("eips/192.168.0.11", {"address": "192.168.0.10/24"}, "address"),
        ("fips/192.168.0.11", {"eip": "192.168.0.12", "internalIp": "10.0.1.5"}, "eip"),
        ("dnats/192.168.0.10/8888/udp", STATE["dnats"][0], "protocol"),
        ("dnats/192.168.0.10/8889/tcp", STATE["dnats"][0], "externalPort"),
        ("dnats/192.168.0.11/8888/tcp", STATE["dnats"][0], "eip"),
        ("snats/192.168.0.10/10.0.1.0/25", STATE["snats"][0], "internalCIDR"),
        ("routes/10.0.3.0/24", STATE["routes"][0], "cidr"),
        ("qos/eips/192.168.0.11/egress", STATE["qos"][0], "eip"),
        ("qos/eips/192.168.0.10/ingress", STATE["qos"][0], "direction"),
        ("qos/interfaces/net1/ingress/3/src/203.0.113.0/24", STATE["qos"][1], "priority"),
        ("qos/interfaces/net1/ingress/2/dst/203.0.113.0/24", STATE["qos"][1], "matchValue"),
    ],
)
def test_path_and_body_must_speak_of_one_object(ready: Face, path: str, body: dict[str, Any], field: str) -> None:
    document = assert_problem(ready("PUT", f"/v1/{path}", body), 422, "invalid")
    assert [error["field"] for error in document["errors"]] == [field]
    assert ready("GET", "/v1/gateway").json() == STATE


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("eips/192.168.0.256", "ip"),
        ("eips/192.168.0.10%0A", "ip"),
        ("fips/::1", "eip"),
        ("dnats/192.168.0.10/0/tcp", "port"),
        ("dnats/192.168.0.10/http/tcp", "port"),
        ("dnats/192.168.0.10/80/icmp", "protocol"),
        ("snats/192.168.0.10/10.0.1.0/33", "len"),
        ("snats/192.168.0.10/x/24", "addr"),
        ("routes/10.0.2.0/33", "len"),
        ("routes/2001:db8::/129", "len"),
        ("routes/x/24", "addr"),
        ("qos/eips/x/egress", "eip"),
        ("qos/eips/192.168.0.10/out", "direction"),
        ("qos/interfaces/net1/egress/0", "priority"),
        ("qos/interfaces/net1/egress/2/any/10.0.0.0/8", "side"),
    ],
)
def test_a_path_that_names_no_object_says_which_part_is_wrong(ready: Face, path: str, field: str) -> None:
    for method in ("GET", "DELETE"):
        document = assert_problem(ready(method, f"/v1/{path}"), 422, "invalid")
        assert [error["field"] for error in document["errors"]] == [field]


def test_identities_are_compared_in_their_canonical_form(ready: Face) -> None:
    assert ready("GET", "/v1/dnats/192.168.0.10/8888/TCP").json() == STATE["dnats"][0]
    assert ready("GET", "/v1/snats/192.168.0.10/10.0.1.77/24").json() == STATE["snats"][0]
    body = {"eip": "192.168.0.10", "internalCIDR": "10.0.1.7/24"}
    assert ready("PUT", "/v1/snats/192.168.0.10/10.0.1.0/24", body).json()["changed"] is False


def test_an_interfaces_limit_without_a_match_has_a_path_of_its_own(ready: Face) -> None:
    body = {"interface": "net1", "direction": "egress", "priority": 3, "rateMax": 50, "burstMax": "50"}
    created = ready("PUT", "/v1/qos/interfaces/net1/egress/3", body)
    assert created.status_code == 201
    assert any(step["text"].startswith("tc class replace dev net1") for step in created.json()["plan"]["steps"])
    stands = ready("GET", "/v1/qos/interfaces/net1/egress/3").json()
    assert stands == {**body, "rateMax": "50", "matchType": "", "matchValue": ""}
    assert ready("DELETE", "/v1/qos/interfaces/net1/egress/3").status_code == 204


def test_a_prefix_may_be_everything(ready: Face) -> None:
    body = {"eip": "192.168.0.10", "internalCIDR": "0.0.0.0/0"}
    assert ready("PUT", "/v1/snats/192.168.0.10/0.0.0.0/0", body).status_code == 201
    assert ready("GET", "/v1/snats/192.168.0.10/0.0.0.0/0").json() == {**body, "randomFully": True}


def test_routes_may_be_of_ipv6(ready: Face) -> None:
    ready.gateway.kernel.faults = None
    body = {"cidr": "2001:db8:2::/64", "nextHopIP": "fd00::1"}
    # The fake gateway has no IPv6 address, so the kernel's own refusal comes through; the identity is understood.
    assert_problem(ready("PUT", "/v1/routes/2001:DB8:2:0::/64", body), 500, "refused")
    missing = assert_problem(ready("GET", "/v1/routes/2001:db8:2:0::/64"), 404, "not-found")
    assert missing["detail"] == "there is no route 2001:db8:2::/64"


def test_an_eip_that_is_put_again_is_announced_again(ready: Face) -> None:
    done = ready("PUT", "/v1/eips/192.168.0.10", {"address": "192.168.0.10/24"}).json()
    assert done["announced"] == ["192.168.0.10"]
    assert done["changed"] is False


def test_an_object_that_is_not_there_is_named(ready: Face) -> None:
    document = assert_problem(ready("GET", "/v1/dnats/192.168.0.10/80/udp"), 404, "not-found")
    assert document["detail"] == "there is no DNAT 192.168.0.10/80/udp"


def test_a_port_is_mapped_to_one_end_or_shared_by_several(ready: Face) -> None:
    shared = {**STATE["sharedDnats"][0], "externalPort": 8888, "protocol": "tcp"}
    said = ready("PUT", "/v1/shared-dnats/192.168.0.10/8888/tcp", shared)
    problem = assert_problem(said, 409, "conflict")
    assert problem["wanted"].startswith("shared DNAT 192.168.0.10:8888/tcp")
    assert problem["standing"].startswith("DNAT 192.168.0.10:8888/tcp")
    exclusive = {**STATE["dnats"][0], "externalPort": 53, "protocol": "udp"}
    assert_problem(ready("PUT", "/v1/dnats/192.168.0.10/53/udp", exclusive), 409, "conflict")
    assert_problem(ready("PUT", "/v1/gateway", {**STATE, "dnats": [*STATE["dnats"], exclusive]}), 409, "conflict")
    assert_problem(ready("PATCH", "/v1/gateway", [{"op": "dnat-add", **exclusive}]), 409, "conflict")
    assert ready("GET", "/v1/gateway").json() == STATE


def test_the_steps_of_a_shared_mapping_are_told_as_nft_commands(ready: Face) -> None:
    said = ready("DELETE", "/v1/shared-dnats/192.168.0.10/53/udp")
    assert said.status_code == 204
    shared = {**STATE["sharedDnats"][0], "sessionAffinity": "None"}
    (step,) = ready("PUT", "/v1/shared-dnats/192.168.0.10/53/udp", shared).json()["plan"]["steps"]
    assert step["step"] == "edit-nft"
    assert any(
        line.startswith("add element ip kube-ovn service-ips { 192.168.0.10 . udp . 53") for line in step["commands"]
    )
