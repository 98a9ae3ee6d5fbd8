"""The HTTP face and natgw on the real daemon and the real kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from world import A1, OWN, ROUTER, Gateway, World, wait_for

from rules.iptables import parse_save
from rules.nat import HOOKS

NATGW = Path(sys.executable).with_name("natgw")
STATE: dict[str, Any] = {
    "interfaces": {"vpc": "eth0", "external": "net1"},
    "gatewayV4": ROUTER,
    "gatewayV6": None,
    "eips": [{"address": "192.168.0.20/24"}, {"address": "192.168.0.21/24"}],
    "fips": [{"eip": "192.168.0.21", "internalIp": A1}],
    "dnats": [
        {"eip": "192.168.0.20", "externalPort": 8888, "protocol": "tcp", "internalIp": A1, "internalPort": 80},
        {"eip": "192.168.0.20", "externalPort": 53, "protocol": "udp", "internalIp": A1, "internalPort": 5353},
    ],
    "snats": [{"eip": "192.168.0.20", "internalCIDR": "10.0.1.0/24", "randomFully": True}],
    "routes": [{"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.1"}],
    "sharedDnats": [
        {
            "eip": "192.168.0.20",
            "externalPort": 123,
            "protocol": "udp",
            "backends": [{"internalIp": ip, "internalPort": 5353} for ip in ("10.0.1.11", "10.0.1.12")],
            "sessionAffinity": "ClientIP",
            "sessionAffinityTimeoutSeconds": 600,
        }
    ],
    "qos": [
        {"eip": "192.168.0.20", "direction": direction, "priority": 1, "rateMax": "100", "burstMax": "10"}
        for direction in ("egress", "ingress")
    ],
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as gateway:
        yield gateway


def natgw(gateway: Gateway, *arguments: str, stdin: str = "", code: int = 0, **environment: str) -> str:
    """The command line, in the gateway's namespace; its stdout where it succeeds, its stderr where it must not."""
    values = {"NATGW_RUN_DIR": str(gateway.run_dir), **environment}
    done = subprocess.run(
        ["ip", "netns", "exec", gateway.name, "env", *(f"{k}={v}" for k, v in values.items()), NATGW, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done}\n{gateway.log()}"
    return done.stderr if code == 1 and arguments[0] != "api" else done.stdout


def test_apply_export_plan_and_restart_close_the_circle(gateway: Gateway) -> None:
    planned = natgw(gateway, "plan", "-f", "-", stdin=json.dumps(STATE), code=2)
    assert "+ ip address add 192.168.0.20/24 dev net1\n" in planned
    assert natgw(gateway, "apply", "-f", "-", stdin=json.dumps(STATE)).startswith("applied: ")
    assert set(gateway.net1_addresses()) == {OWN, "192.168.0.20", "192.168.0.21"}
    exported = natgw(gateway, "export", "-o", "yaml")
    assert json.loads(natgw(gateway, "export")) == STATE
    assert natgw(gateway, "plan", "-f", "-", stdin=exported) == "nothing to do\n"

    before = gateway.saved()
    gateway.kill(signal.SIGKILL)
    gateway.verb("init")
    assert natgw(gateway, "plan", "-f", "-", stdin=exported) == "nothing to do\n"
    assert gateway.saved() == before


def test_the_ruleset_that_is_shown_is_the_kernels(gateway: Gateway) -> None:
    natgw(gateway, "apply", "-f", "-", stdin=json.dumps(STATE))
    said, _, maps = natgw(gateway, "api", "GET", "/v1/ruleset").partition("table ip natgw {\n")
    saved, shared, listed = said.partition("table ip kube-ovn {\n")
    shown = parse_save(saved).chains
    held = parse_save(gateway.saved()).chains
    assert {ref: held[ref] for ref in shown} == shown
    assert {ref for ref, _ in HOOKS} <= set(shown)
    assert _words(shared + listed) == _words(gateway.run("nft", "list", "table", "ip", "kube-ovn"))
    assert "192.168.0.20 . tcp . 8888" in maps
    assert maps.count(" : ") == gateway.run("nft", "list", "table", "ip", "natgw").count(" : ")


def _words(listing: str) -> list[str]:
    """What nft lists, without its own manner of saying the same: names for numbers, greater units, blanks."""
    told = listing.replace("priority mangle", "priority -150").replace("timeout 10m", "timeout 600s")
    return sorted(told.replace("dnat to", "dnat ip to").split())


def test_what_the_kernel_refuses_is_told_in_its_words_and_nothing_changes(gateway: Gateway) -> None:
    natgw(gateway, "apply", "-f", "-", stdin=json.dumps(STATE))
    before = (gateway.saved(), gateway.net1_addresses(), gateway.ip_json("route", "show"))
    unreachable = {**STATE, "dnats": [], "routes": [{"cidr": "10.9.0.0/16", "nextHopIP": "172.31.0.1"}]}
    refused = json.loads(natgw(gateway, "api", "PUT", "/v1/gateway", stdin=json.dumps(unreachable), code=1))
    assert (refused["status"], refused["type"]) == (500, "urn:natgw:problem:refused")
    assert "unreachable" in refused["reason"].lower()
    assert refused["restored"] is True
    assert (gateway.saved(), gateway.net1_addresses(), gateway.ip_json("route", "show")) == before
    assert "everything is as it was before" in natgw(gateway, "apply", "-f", "-", stdin=json.dumps(unreachable), code=1)
    assert json.loads(natgw(gateway, "export")) == STATE
    assert gateway.status()["ready"] is True


def test_one_object_at_a_time(gateway: Gateway) -> None:
    dnat = {"eip": "192.168.0.20", "externalPort": 8080, "protocol": "tcp", "internalIp": A1, "internalPort": 80}
    eip = json.dumps({"address": "192.168.0.20/24"})
    path = "/v1/dnats/192.168.0.20/8080/tcp"
    assert "192.168.0.20" in json.loads(natgw(gateway, "api", "PUT", "/v1/eips/192.168.0.20", stdin=eip))["announced"]
    natgw(gateway, "api", "PUT", path, stdin=json.dumps(dnat))
    assert gateway.rules("-A SHARED_DNAT", "--dport 8080", f"--to-destination {A1}:80")
    natgw(gateway, "api", "PUT", path, stdin=json.dumps({**dnat, "internalPort": 81}))
    (rule,) = gateway.rules("-A SHARED_DNAT")
    assert rule.endswith(f"--to-destination {A1}:81")
    natgw(gateway, "api", "DELETE", path)
    natgw(gateway, "api", "DELETE", path)
    assert gateway.rules("-A SHARED_DNAT") == []


def test_a_verb_and_the_http_face_see_one_state(gateway: Gateway) -> None:
    gateway.verb("eip-add", "192.168.0.20/24")
    gateway.verb("dnat-add", f"192.168.0.20,8888,tcp,{A1},80")
    assert json.loads(natgw(gateway, "export"))["dnats"] == STATE["dnats"][:1]
    other = {"op": "dnat-add", **STATE["dnats"][0], "internalPort": 81}
    conflict = json.loads(natgw(gateway, "api", "PATCH", "/v1/gateway", stdin=json.dumps([other]), code=1))
    assert conflict["standing"] == f"DNAT 192.168.0.20:8888/tcp -> {A1}:80"
    natgw(gateway, "api", "DELETE", "/v1/dnats/192.168.0.20/8888/tcp")
    gateway.verb("dnat-add", f"192.168.0.20,8888,tcp,{A1},81")
    told = natgw(gateway, "explain", "tcp", "203.0.113.2:40000", "192.168.0.20:8888")
    assert f"destination becomes {A1}:81" in told
    assert "=> forwarded" in told
    assert "ready" in natgw(gateway, "status")


def test_the_socket_is_roots_alone_and_nothing_listens_on_tcp(gateway: Gateway) -> None:
    gateway.status()
    assert os.stat(gateway.run_dir / "api.sock").st_mode & 0o777 == 0o600
    assert os.stat(gateway.run_dir).st_mode & 0o777 == 0o700
    assert gateway.run("ss", "-Hltn").strip() == ""


def test_tcp_is_served_only_with_the_token(world: World, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    environment = {"NATGW_LISTEN": "127.0.0.1:8080", "NATGW_TOKEN_FILE": str(token)}
    with world.gateway(environment=environment) as gateway:
        gateway.status()
        ask = (
            "import sys, urllib.request as u\n"
            "r = u.Request('http://127.0.0.1:8080/healthz', headers=dict(a.split('=') for a in sys.argv[1:]))\n"
            "try: print(u.urlopen(r, timeout=10).status)\n"
            "except u.HTTPError as e: print(e.code)\n"
        )
        assert gateway.run(sys.executable, "-c", ask).strip() == "401"
        assert gateway.run(sys.executable, "-c", ask, "Authorization=Bearer wrong").strip() == "401"
        assert gateway.run(sys.executable, "-c", ask, "Authorization=Bearer sesame").strip() == "200"
        wait_for(lambda: "127.0.0.1%lo:8080" in gateway.run("ss", "-Hltn"), "a listener")
        assert len(gateway.run("ss", "-Hltn").splitlines()) == 1


def test_without_a_token_the_daemon_refuses_to_listen(world: World, tmp_path: Path) -> None:
    gateway = world.plug()
    try:
        refused = natgw(
            gateway,
            "serve",
            code=1,
            NATGW_LISTEN="127.0.0.1:8080",
            NATGW_STATE_DIR=str(tmp_path / "state"),
            NATGW_ENV_FILE=str(tmp_path / "env"),
        )
        assert "NATGW_LISTEN needs NATGW_TOKEN_FILE" in refused
        assert not (gateway.run_dir / "api.sock").exists()
    finally:
        gateway.remove()
