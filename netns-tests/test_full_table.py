"""The connection tracking table is full: what stands goes on, every call is answered, and people are told.

nf_conntrack_max is one value for the machine, and each network namespace may have so many entries of its own: this one
fills up alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tracked import fill
from traffic import Stream, anything, tcp, udp, udp_again
from world import A1, A2, Gateway, World, wait_for

from api.client import Client
from gateway.kernel.conntrack import KernelFlows
from rules.flows import FlowFilter

NATGW = Path(sys.executable).with_name("natgw")
EIP, BUSY = "192.168.0.50", "192.168.0.51"
MAPPING = {"eip": EIP, "externalPort": 57, "protocol": "udp", "internalIp": A2, "internalPort": 57}
PORTS = ((53, "udp"), (54, "tcp"), (55, "udp"))
LONGEST = 10.0  # seconds that a controller waits for a verb
FULL = "the connection tracking table is full"

pytestmark = pytest.mark.alone


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def gateway(world: World) -> Iterator[Gateway]:
    with world.gateway(variant=os.environ.get("NATGW_IPTABLES") or "legacy") as made:
        made.verb("eip-add", f"{EIP}/24", f"{BUSY}/24")
        made.verb("dnat-add", *(f"{EIP},{port},{protocol},{A2},{port}" for port, protocol in PORTS))
        made.verb("snat-add", f"{BUSY},10.0.0.0/16")
        made.status()  # the HTTP face is up
        yield made


def entries(gateway: Gateway, wanted: FlowFilter) -> int:
    """How many entries there are of those wanted."""
    with gateway.entered():
        flows = KernelFlows()
        try:
            return len(flows.matching([wanted]))
        finally:
            flows.close()


def resident(gateway: Gateway) -> float:
    """The most memory that the daemon had, in MiB."""
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


class Calls:
    """Verbs and HTTP requests, with the longest time that one took."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self.longest = gateway, 0.0

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        assert took < LONGEST, what

    def verb(self, *words: str) -> None:
        with self._timed(words[0]):
            self._gateway.verb(*words)

    def http(self, method: str, path: str, document: object = None) -> bytes:
        body = None if document is None else json.dumps(document).encode()
        with self._timed(path):
            answer = Client(self._gateway.run_dir).request(method, path, body)
        assert answer.ok, answer
        return answer.body


def natgw(gateway: Gateway, *words: str) -> str:
    done = gateway.exec_argv([str(NATGW), *words], {"PATH": os.environ["PATH"]})
    assert done.stderr == ""
    return done.stdout


def test_a_full_connection_tracking_table(world: World, gateway: Gateway) -> None:
    internet, a2 = world.internet, world.vpc.a2
    backend, late = a2.tcp_server(54), a2.udp(55)
    doomed = [tcp(internet, (EIP, 54), backend) for _ in range(10)]
    caller = internet.udp()
    caller.connect((EIP, 55))
    before, calls = resident(gateway), Calls(gateway)
    with Stream(udp(internet, (EIP, 53), a2.udp(53))) as stream:
        fill(gateway, "10.0.1.100", BUSY, "198.51.100.1")
        assert full(gateway)
        caller.send(b"is anybody there?")
        assert not anything(late)
        what_people_are_told(gateway, calls)
        calls.verb("dnat-add", f"{EIP},56,udp,{A2},56")
        calls.verb("eip-add", "192.168.0.53/24")
        calls.verb("floating-ip-add", f"192.168.0.53,{A1}")
        calls.verb("snat-add", f"{EIP},10.0.1.0/24")
        calls.verb("eip-egress-qos-add", f"{EIP},1,100,100")
        calls.verb("floating-ip-del", "192.168.0.53")
        calls.verb("eip-del", "192.168.0.53/24")
        calls.http("PUT", f"/v1/dnats/{EIP}/57/udp", MAPPING)
        assert full(gateway)  # none of it ended a connection
        calls.http("DELETE", f"/v1/dnats/{EIP}/57/udp")
        calls.verb("dnat-del", f"{EIP},54,tcp")
        # Among so many it may take longer than an answer does.
        wait_for(lambda: gateway.status()["ready"], "the end of the connections to port 54")
        assert not entries(gateway, FlowFilter(orig_dst=EIP, protocol=6, orig_dport=54))
        assert doomed[0].is_cut(udp_again(caller, late))  # there was room for that one
        assert gateway.status()["ready"]
        fill(gateway, "10.0.2.100", BUSY, "198.51.101.1")
        assert full(gateway)
        usual = calls.longest
        calls.verb("snat-del", f"{BUSY},10.0.0.0/16")
        pending = gateway.status()["pending"]
        assert figures(gateway)[0] < 1000 or pending == ["stale connections are being deleted"]
        for port in (58, 59):
            calls.verb("dnat-add", f"{EIP},{port},udp,{A2},{port}")
        # Many, one after the other, on a machine that may be busy: for each thousand of them there is patience.
        while (left := figures(gateway)[0]) > 1000:
            wait_for(lambda left=left: figures(gateway)[0] < max(left - 1000, 1000), "fewer connections")
        wait_for(lambda: gateway.status()["ready"], "all of that to be over")
        assert not entries(gateway, FlowFilter(reply_dst=BUSY))
        assert gateway.status()["warnings"] == []
        udp(internet, (EIP, 55), late)
        assert gateway.get("/v1/drift")["now"] == []
    grown = resident(gateway) - before
    print(
        f"{2 * stream.sent} datagrams sent, {stream.lost} lost, longest gap {stream.longest_gap * 1000:.0f} ms; "
        f"longest call {usual:.2f} s, with all connections to end {calls.longest:.2f} s; "
        f"the daemon grew by {grown:.0f} MiB"
    )
    assert stream.lost == 0
    assert grown < 64


def figures(gateway: Gateway) -> tuple[int, int]:
    """How many entries there are, and may be."""
    flows = KernelFlows()  # which opens nothing for this
    with gateway.entered():
        return flows.count(), flows.maximum()


def full(gateway: Gateway) -> bool:
    there, most = figures(gateway)
    return there >= most


def what_people_are_told(gateway: Gateway, calls: Calls) -> None:
    """The gateway has done its own work, and says what is wrong all the same."""
    status = json.loads(calls.http("GET", "/v1/status"))
    assert status["ready"]
    assert any(FULL in warning for warning in status["warnings"])
    assert calls.http("GET", "/readyz") == b"ok\n"
    dropped = re.search(rb"^natgw_conntrack_dropped_total (\S+)$", calls.http("GET", "/metrics"), re.MULTILINE)
    assert dropped
    assert float(dropped[1]) >= 1
    assert f"warning: {FULL}" in natgw(gateway, "status")
    assert FULL in natgw(gateway, "doctor", "--no-ask")
