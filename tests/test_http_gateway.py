"""The whole state over HTTP: PUT, GET, PATCH, dry runs, and every kind of refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.fake import FakeKernel
from gateway.ports import Refused
from rules.spec import GatewaySpec, Interfaces
from rules.state import AddressKey
from tests.gateway_kit import STATE
from tests.http_kit import Face, assert_problem, face

DNAT = STATE["dnats"][0]


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


@pytest.fixture
def ready(http: Face) -> Face:
    assert http("PUT", "/v1/gateway", STATE).status_code == 201
    return http


def kernel_picture(http: Face) -> Any:
    kernel = http.gateway.kernel
    return deepcopy((kernel.links, kernel.addresses, kernel.routes, kernel.chains))


def refuse(http: Face, when: str, reason: str) -> None:
    """Have the fake kernel refuse, once, the first step whose description contains ``when``."""
    kernel = http.gateway.kernel

    def fault(step: str) -> None:
        if when in step:
            kernel.faults = None
            raise Refused(step, reason, retryable=True)

    kernel.faults = fault


def test_before_init_there_is_no_gateway_to_get_or_to_change(http: Face) -> None:
    missing = assert_problem(http("GET", "/v1/gateway"), 404, "not-found")
    assert missing["detail"] == "nat gateway not initialized"
    command = {"op": "eip-add", "address": "192.168.0.10/24"}
    for commands in ([command], []):
        refused = assert_problem(http("PATCH", "/v1/gateway", commands), 409, "not-initialized")
        assert refused["detail"] == "nat gateway not initialized"
    assert http.gateway.kernel.writes == 0


def test_a_whole_state_initializes_and_comes_back_as_it_was_put(http: Face) -> None:
    first = http("PUT", "/v1/gateway", STATE)
    assert first.status_code == 201
    assert first.json()["changed"] is True
    assert first.json()["announced"] == ["192.168.0.10", "192.168.0.11", "192.168.0.12"]
    assert http("GET", "/v1/gateway").json() == STATE
    assert AddressKey("net1", "192.168.0.10/24") in http.gateway.kernel.addresses


def test_putting_the_export_back_is_an_empty_plan(ready: Face) -> None:
    exported = ready("GET", "/v1/gateway").json()
    writes = ready.gateway.kernel.writes
    again = ready("PUT", "/v1/gateway", exported)
    assert again.status_code == 200
    assert again.json()["plan"] == {"steps": []}
    assert again.json()["changed"] is False
    assert ready.gateway.kernel.writes == writes


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(ready: Face) -> None:
    before = kernel_picture(ready)
    wanted = {**STATE, "dnats": [{**DNAT, "internalPort": 81}]}
    plan = ready("PUT", "/v1/gateway?dryRun=true", wanted)
    assert plan.status_code == 200
    assert plan.json()["dryRun"] is True
    assert plan.json()["changed"] is True
    (step,) = plan.json()["plan"]["steps"]
    assert (step["step"], step["table"]) == ("edit-table", "nat")
    texts = [edit["text"] for edit in step["edits"]]
    rule = "-d 192.168.0.10/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 10.0.1.10"
    assert texts == [f"iptables -t nat -I SHARED_DNAT 1 {rule}:81", f"iptables -t nat -D SHARED_DNAT {rule}:80"]
    assert kernel_picture(ready) == before
    assert ready("GET", "/v1/gateway").json() == STATE


def test_a_dry_run_tells_exactly_what_the_change_then_does(http: Face) -> None:
    told = http("PUT", "/v1/gateway?dryRun=true", STATE)
    assert told.status_code == 200
    assert http.gateway.service.spec is None
    assert told.json()["plan"] == http("PUT", "/v1/gateway", STATE).json()["plan"]


def test_a_dry_run_of_commands_changes_nothing(ready: Face) -> None:
    commands = [{"op": "eip-add", "address": "192.168.0.30/24"}]
    plan = ready("PATCH", "/v1/gateway?dryRun=true", commands).json()
    assert any(step["text"] == "ip address add 192.168.0.30/24 dev net1" for step in plan["plan"]["steps"])
    assert ready("GET", "/v1/gateway").json() == STATE


def test_a_change_of_the_spec_alone_is_a_change_without_steps(http: Face) -> None:
    assert http("PUT", "/v1/gateway", {"gatewayV4": "192.168.0.1"}).status_code == 201
    done = http("PUT", "/v1/gateway", {"gatewayV4": "192.168.0.2"}).json()
    assert done["changed"] is True
    assert done["plan"] == {"steps": []}


def test_without_interfaces_those_that_stand_stay(ready: Face) -> None:
    rest = {key: value for key, value in STATE.items() if key != "interfaces"}
    assert ready("PUT", "/v1/gateway", rest).json()["changed"] is False


@pytest.mark.parametrize(("method", "body"), [("PUT", {}), ("PATCH", [{"op": "init"}])])
def test_before_init_the_interfaces_are_the_daemons(tmp_path: Path, method: str, body: Any) -> None:
    kernel = FakeKernel.gateway_pod("lan0", "wan0")
    fixture = face(tmp_path, kernel=kernel, interfaces=Interfaces(vpc="lan0", external="wan0"))
    http = next(fixture)
    assert http(method, "/v1/gateway", body).status_code in (200, 201)
    assert http("GET", "/v1/gateway").json()["interfaces"] == {"vpc": "lan0", "external": "wan0"}
    next(fixture, None)


def test_commands_are_applied_all_or_none(ready: Face) -> None:
    before = kernel_picture(ready)
    commands = [
        {"op": "eip-add", "address": "192.168.0.30/24"},
        {"op": "dnat-add", **DNAT, "internalPort": 81},
    ]
    document = assert_problem(ready("PATCH", "/v1/gateway", commands), 409, "conflict")
    assert document["wanted"] == "DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:81"
    assert document["standing"] == "DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:80"
    assert document["detail"] == f"{document['wanted']} conflicts with {document['standing']}"
    assert kernel_picture(ready) == before
    assert ready("GET", "/v1/gateway").json() == STATE


def test_commands_repeated_change_nothing_but_an_eip_is_announced_once_more(ready: Face) -> None:
    commands = [{"op": "eip-add", "address": "192.168.0.10/24"}, {"op": "dnat-add", **DNAT}]
    done = ready("PATCH", "/v1/gateway", commands).json()
    assert done["changed"] is False
    assert done["announced"] == ["192.168.0.10"]


def test_an_eip_that_goes_ends_its_part_of_the_state(ready: Face) -> None:
    done = ready("PATCH", "/v1/gateway", [{"op": "eip-del", "address": "192.168.0.12"}]).json()
    assert any(step["text"] == "ip address del 192.168.0.12/24 dev net1" for step in done["plan"]["steps"])
    assert ready("GET", "/v1/gateway").json()["eips"] == [{"address": "192.168.0.10/24"}]


def test_one_body_with_two_contradicting_objects_is_a_conflict(ready: Face) -> None:
    twice = {**STATE, "dnats": [DNAT, {**DNAT, "internalIp": "10.0.1.99"}]}
    document = assert_problem(ready("PUT", "/v1/gateway", twice), 409, "conflict")
    assert document["wanted"] == "DNAT 192.168.0.10:8888/tcp -> 10.0.1.99:80"
    assert document["standing"] == "DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:80"


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        ("dnats", [{**DNAT, "externalPort": 0}], "dnats.0.externalPort", "greater than or equal to 1"),
        ("dnats", [DNAT, {**DNAT, "internalIp": "10.0.1.999"}], "dnats.1.internalIp", "10.0.1.999"),
        ("dnats", [{**DNAT, "protocol": "sctp"}], "dnats.0.protocol", "'tcp' or 'udp'"),
        ("eips", [{"address": "fe80::1/64"}], "eips.0.address", "fe80::1"),
        ("eips", [{}], "eips.0.address", "required"),
        ("snats", [{"eip": "192.168.0.10", "cidr": "10.0.1.0/24"}], "snats.0.cidr", "unknown field"),
        ("gatewayV4", "224.0.0.1", "gatewayV4", "not a unicast address"),
        ("interfaces", {"vpc": "net1", "external": "net1"}, "interfaces", "cannot be both"),
        ("limits", [], "limits", "unknown field"),
        ("qos", [{"eip": "192.168.0.10", "direction": "up"}], "qos.0.direction", "'egress' or 'ingress'"),
        ("qos", [{"interface": "net1", "direction": "egress", "rateMax": ""}], "qos.0.rateMax", "decimal number"),
        ("eips", "192.168.0.10/24", "eips", "list"),
    ],
)
def test_bad_input_names_the_field(ready: Face, path: str, value: Any, field: str, message: str) -> None:
    document = assert_problem(ready("PUT", "/v1/gateway", {**STATE, path: value}), 422, "invalid")
    errors = {error["field"]: error["message"] for error in document["errors"]}
    assert message in errors[field]
    assert field in document["detail"]
    assert ready("GET", "/v1/gateway").json() == STATE


def test_every_bad_field_is_named_at_once(ready: Face) -> None:
    wrong = {**STATE, "eips": [{"address": "x"}], "dnats": [{**DNAT, "externalPort": 70000}]}
    document = assert_problem(ready("PUT", "/v1/gateway", wrong), 422, "invalid")
    assert {error["field"] for error in document["errors"]} == {"eips.0.address", "dnats.0.externalPort"}


def test_a_bad_command_is_named_by_its_place_and_field(ready: Face) -> None:
    commands = [{"op": "init"}, {"op": "dnat-add", **DNAT, "externalPort": "http"}]
    document = assert_problem(ready("PATCH", "/v1/gateway", commands), 422, "invalid")
    assert [error["field"] for error in document["errors"]] == ["1.externalPort"]
    unknown = assert_problem(ready("PATCH", "/v1/gateway", [{"op": "reboot"}]), 422, "invalid")
    assert [error["field"] for error in unknown["errors"]] == ["0"]
    assert "eip-add" in unknown["detail"]


@pytest.mark.parametrize("content", [b"", b"{", b"gatewayV4: 192.168.0.1", b"\xff\xfe", b"null", b"[]"])
def test_a_body_that_is_no_state_is_refused(ready: Face, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    document = assert_problem(ready("PUT", "/v1/gateway", content=content, headers=headers), 422, "invalid")
    assert [error["field"] for error in document["errors"]] == ["body"]


def test_a_kernel_refusal_is_told_in_its_words_and_the_state_before_stands(ready: Face) -> None:
    before = kernel_picture(ready)
    refuse(ready, "AddAddress", "RTNETLINK answers: No buffer space available")
    wanted = {**STATE, "eips": [*STATE["eips"], {"address": "192.168.0.99/24"}], "dnats": []}
    document = assert_problem(ready("PUT", "/v1/gateway", wanted), 500, "refused")
    assert document["reason"] == "RTNETLINK answers: No buffer space available"
    assert "192.168.0.99/24" in document["step"]
    assert document["retryable"] is True
    assert document["restored"] is True
    assert kernel_picture(ready) == before
    assert ready("GET", "/v1/gateway").json() == STATE
    status = ready("GET", "/v1/status").json()
    assert status["ready"] is True
    assert "No buffer space" in status["lastError"]["message"]
    assert status["lastError"]["by"] == "HTTP PUT /v1/gateway"


def test_a_missing_interface_is_a_refusal_that_names_it(ready: Face) -> None:
    wanted = {**STATE, "interfaces": {"vpc": "eth0", "external": "net9"}}
    document = assert_problem(ready("PUT", "/v1/gateway", wanted), 500, "refused")
    assert "net9" in document["detail"]
    assert ready("GET", "/v1/gateway").json() == STATE


def test_what_could_not_be_undone_is_said_and_readiness_ends(ready: Face) -> None:
    def always(step: str) -> None:
        if "DeleteAddress" in step or "192.168.0.99" in step or "nat" in step:
            raise Refused(step, "I/O error", retryable=True)

    def after_first_edit(step: str) -> None:
        if "edit table" in step:
            ready.gateway.kernel.faults = always

    ready.gateway.kernel.faults = after_first_edit
    wanted = {**STATE, "eips": [*STATE["eips"], {"address": "192.168.0.99/24"}], "dnats": []}
    document = assert_problem(ready("PUT", "/v1/gateway", wanted), 500, "refused")
    assert document["restored"] is False
    unready = assert_problem(ready("GET", "/readyz"), 503, "not-ready")
    assert unready["pending"] == ["kernel does not equal the spec"]
    assert "I/O error" in unready["detail"]


def test_many_callers_at_once_are_served_one_after_the_other(ready: Face) -> None:
    """A hundred port mappings by as many callers: all stand at the end, none lost, none twice."""
    total = 100

    async def add(client: httpx.AsyncClient, port: int) -> int:
        command = {"op": "dnat-add", **DNAT, "externalPort": port}
        return (await client.patch("/v1/gateway", json=[command])).status_code

    async def go() -> list[int]:
        transport = httpx.ASGITransport(ready.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await asyncio.gather(*(add(client, port) for port in range(1, total + 1)))

    assert asyncio.run(go()) == [200] * total
    spec = GatewaySpec.model_validate(ready("GET", "/v1/gateway").json())
    assert sorted(d.external_port for d in spec.dnats) == [*range(1, total + 1), 8888]


def test_contradicting_callers_at_once_one_wins(ready: Face) -> None:
    async def go() -> list[int]:
        transport = httpx.ASGITransport(ready.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            commands = [{"op": "dnat-add", **DNAT, "externalPort": 9000, "internalPort": port} for port in range(1, 21)]
            answers = await asyncio.gather(*(client.patch("/v1/gateway", json=[c]) for c in commands))
            return sorted(answer.status_code for answer in answers)

    assert asyncio.run(go()) == [200] + [409] * 19
