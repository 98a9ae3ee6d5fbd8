"""natgw against a daemon's HTTP face on a Unix socket, over the fake kernel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from api.cli import app
from gateway.ports import Refused
from tests.gateway_kit import STATE, Gateway, gateway
from tests.http_kit import serving


@dataclass
class Natgw:
    """The command line of one daemon."""

    directory: Path
    gateway: Gateway

    @property
    def environment(self) -> dict[str, str]:
        return {"NATGW_RUN_DIR": str(self.directory), "COLUMNS": "200"}

    def __call__(self, *arguments: str, stdin: str | None = None, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [*arguments], input=stdin, env=self.environment)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def file(self, state: Any, name: str = "state.yaml") -> str:
        path = self.directory / name
        path.write_text(json.dumps(state) if name.endswith(".json") else yaml.safe_dump(state))
        return str(path)


@pytest.fixture
def natgw(tmp_path: Path) -> Iterator[Natgw]:
    made = gateway(tmp_path / "state")
    with serving(made, tmp_path):
        yield Natgw(tmp_path, made)
    made.service.close()


@pytest.mark.parametrize("name", ["state.yaml", "state.json"])
def test_apply_export_and_plan_close_the_circle(natgw: Natgw, name: str) -> None:
    file = natgw.file(STATE, name)
    planned = natgw("plan", "-f", file, code=2).stdout
    assert "+ ip address add 192.168.0.10/24 dev net1\n" in planned
    assert "+ iptables -t nat -N SHARED_DNAT\n" in planned
    assert natgw.gateway.service.spec is None

    applied = natgw("apply", "-f", file)
    assert re.fullmatch(r"applied: \d+ steps in \d+ ms; announced 192\.168\.0\.10, .*\n", applied.stdout)
    assert applied.stderr == ""
    assert json.loads(natgw("export").stdout) == STATE
    for output in ("json", "yaml"):
        exported = natgw("export", "-o", output).stdout
        assert natgw("plan", "-f", "-", stdin=exported).stdout == "nothing to do\n"
        assert natgw("apply", "--file", "-", stdin=exported).stdout == "nothing to do\n"


def test_a_plan_shows_what_comes_and_what_goes(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    changed = {**STATE, "eips": STATE["eips"][:1], "fips": [], "routes": []}  # type: ignore[index]
    lines = natgw("plan", "-f", natgw.file(changed), code=2).stdout.splitlines()
    assert "- ip address del 192.168.0.12/24 dev net1" in lines
    assert "- ip route del 10.0.2.0/24 via 10.0.1.1 dev eth0" in lines
    assert "- iptables -t nat -D EXCLUSIVE_DNAT -d 192.168.0.12/32 -j DNAT --to-destination 10.0.1.5" in lines
    assert json.loads(natgw("export").stdout) == STATE


def test_a_large_plan_lists_every_rule_unfolded(natgw: Natgw) -> None:
    dnats = [{**STATE["dnats"][0], "externalPort": port} for port in range(1, 601)]
    lines = natgw("plan", "-f", natgw.file({**STATE, "dnats": dnats}), code=2).stdout.splitlines()
    rule = "-d 192.168.0.10/32 -p tcp -m tcp --dport 600 -j DNAT --to-destination 10.0.1.10:80"
    assert f"+ iptables -t nat -A SHARED_DNAT {rule}" in lines


def test_a_change_of_the_state_alone_is_told(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file({}))
    planned = natgw("plan", "-f", natgw.file({"gatewayV4": "192.168.0.1"}), code=2)
    assert planned.stdout == "no step in the kernel; the desired state itself changes\n"


def test_json_is_what_the_http_face_says(natgw: Natgw) -> None:
    file = natgw.file(STATE)
    assert json.loads(natgw("plan", "-f", file, "--json", code=2).stdout)["dryRun"] is True
    assert json.loads(natgw("apply", "-f", file, "--json").stdout)["changed"] is True
    assert json.loads(natgw("plan", "-f", file, "--json").stdout)["plan"] == {"steps": []}
    assert json.loads(natgw("status", "--json").stdout)["counts"]["eips"] == 2
    question = ("explain", "tcp", "203.0.113.5:40000", "192.168.0.10:8888")
    assert json.loads(natgw(*question, "--json").stdout)["verdict"] == "forwarded"


def test_status_for_people(natgw: Natgw) -> None:
    assert "not initialized" in natgw("status").stdout
    natgw("apply", "-f", natgw.file(STATE))
    shown = natgw("status").stdout
    assert re.search(r"vpc-nat-gateway test +ready +iptables-legacy, fastpath off, up 0:00:00", shown)
    assert re.search(r"^eth0 +vpc +up +on +02:00:00:00:00:02 +1400", shown, re.M)
    assert re.search(r"^net1 +external +up +on +02:00:00:00:00:03 +1400", shown, re.M)
    assert "2 eips, 1 fips, 1 dnats, 1 snats, 1 routes" in shown
    assert "1 committed, 0 unchanged, 0 failed" in shown
    assert "error" not in shown


def test_explain_tells_the_walk(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))
    told = natgw("explain", "TCP", "203.0.113.5:40000", "192.168.0.10:8888", "--in", "net1").stdout
    assert "nat SHARED_DNAT rule 1 [-d 192.168.0.10/32" in told
    assert "destination becomes 10.0.1.10:80" in told
    assert told.endswith("=> forwarded; nothing is known that keeps it from working\n")
    refused = natgw("explain", "tcp", "203.0.113.5:40000", "192.168.0.10", code=1)
    assert refused.stderr == "natgw: dst: tcp needs a port (192.0.2.1:443)\n"
    assert refused.stdout == ""


def test_api_is_the_http_face_by_stdin_and_stdout(natgw: Natgw) -> None:
    assert natgw("api", "PUT", "/v1/gateway", stdin="{}").exit_code == 0
    eip = {"address": "192.168.0.10/24"}
    done = natgw("api", "put", "/v1/eips/192.168.0.10", stdin=json.dumps(eip))
    assert json.loads(done.stdout)["announced"][0] == "192.168.0.10"
    assert natgw("api", "GET", "/v1/eips").stdout == json.dumps([eip], separators=(",", ":")) + "\n"
    assert natgw("api", "GET", "/v1/ruleset").stdout.startswith("*mangle\n")
    assert natgw("api", "DELETE", "/v1/eips/192.168.0.10").stdout == ""
    missing = natgw("api", "GET", "/v1/eips/192.168.0.10", code=1)
    assert json.loads(missing.stdout)["status"] == 404
    assert missing.stderr == ""
    wrong = natgw("api", "PATCH", "/v1/gateway", stdin='[{"op": "eip-add", "address": "x"}]', code=1)
    assert json.loads(wrong.stdout)["errors"][0]["field"] == "0.address"
    assert "does not begin with /" in natgw("api", "GET", "v1/eips", code=2).stderr


def test_bad_input_is_a_line_for_each_field(natgw: Natgw) -> None:
    wrong = {**STATE, "gatewayV4": "192.168.0.300", "snats": [{"eip": "192.168.0.10", "cidr": "10.0.1.0/24"}]}
    refused = natgw("apply", "-f", natgw.file(wrong), code=1)
    assert refused.stdout == ""
    lines = refused.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("natgw: gatewayV4: ")
    assert lines[1:] == ["natgw: snats.0.internalCIDR: required", "natgw: snats.0.cidr: unknown field"]


def test_a_conflict_names_both_objects(natgw: Natgw) -> None:
    dnat = STATE["dnats"][0]
    twice = {**STATE, "dnats": [dnat, {**dnat, "internalPort": 81}]}
    refused = natgw("apply", "-f", natgw.file(twice), code=1)
    wanted, standing = ("DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:" + port for port in ("81", "80"))
    assert refused.stderr == f"natgw: {wanted} conflicts with {standing}\n"


def test_a_kernel_refusal_says_that_nothing_changed_and_status_remembers_it(natgw: Natgw) -> None:
    natgw("apply", "-f", natgw.file(STATE))

    def fault(step: str) -> None:
        if "edit table" in step:
            natgw.gateway.kernel.faults = None
            raise Refused(step, "Resource temporarily unavailable", retryable=True)

    natgw.gateway.kernel.faults = fault
    refused = natgw("apply", "-f", natgw.file({**STATE, "dnats": []}), code=1)
    said = "edit table nat: Resource temporarily unavailable (everything is as it was before; a retry may succeed)"
    assert refused.stderr == f"natgw: {said}\n"
    assert "HTTP PUT /v1/gateway: edit table nat: Resource temporarily unavailable" in natgw("status").stdout


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("broken.json", '{"eips": [', "not JSON: Expecting value"),
        ("broken.yaml", "eips: [", "not YAML: while parsing"),
        ("tagged.yaml", "eips: !!python/object/apply:os.getpid []", "not YAML: could not determine a constructor"),
        ("date.yaml", "gatewayV4: 2024-01-01", "JSON has no form for a value in it: "),
        ("latin1.yaml", b"eips: [] # \xe9\xff", "not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_state(natgw: Natgw, name: str, content: str | bytes, sentence: str) -> None:
    path = natgw.directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused = natgw("apply", "-f", str(path), code=1)
    assert len(refused.stderr.splitlines()) == 1
    assert f"natgw: {path}: " in refused.stderr
    assert sentence in refused.stderr


def test_a_file_that_is_not_there(natgw: Natgw) -> None:
    missing = natgw.directory / "none.yaml"
    assert natgw("plan", "-f", str(missing), code=1).stderr == f"natgw: {missing}: No such file or directory\n"


def test_export_before_init_fails_with_the_sentence(natgw: Natgw) -> None:
    assert natgw("export", code=1).stderr == "natgw: nat gateway not initialized\n"
    assert "neither json nor yaml" in natgw("export", "-o", "xml", code=2).stderr
