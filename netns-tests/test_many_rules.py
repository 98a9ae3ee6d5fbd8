"""Faults in a gateway of many rules: what holds for ten holds for tens of thousands, and the stream runs on.

The chains of so many rules follow behind the maps (``gateway/chase.py``), so a daemon can die, and others can write,
while they do not say yet what the maps say. The mappings are of UDP, and besides there are a fiftieth as many EIPs: of
such ports iptables' tools ask the resolver, which lists all addresses. ``NATGW_MANY_RULES=50000`` for figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from netns import Namespace
from rig import rig
from traffic import Stream, udp
from world import A2, Gateway, World

from api.client import Client
from gateway import transaction
from gateway.ports import Refused
from rules.chase import FOLLOW_ABOVE
from rules.desired import Facts
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Route, Snat

BIG = os.environ.get("NATGW_MANY_RULES")
RULES = int(BIG or "2500")
EIP, MANY = "192.168.0.50", "192.168.0.51"
FIRST = 10_000  # port
PATIENCE = 120.0  # seconds, for tens of thousands of rules on a busy machine

pytestmark = [pytest.mark.alone, pytest.mark.timeout(60 + RULES // 50)]


class Crowd:
    """A gateway with RULES port mappings on one EIP, and what it must come back to."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.ports = set(range(FIRST, FIRST + RULES))
        spec = gateway.get("/v1/gateway")
        spec["eips"] += [{"address": f"198.18.{n // 200}.{n % 200 + 1}/32"} for n in range(RULES // 50)]
        mapping = {"eip": MANY, "protocol": "udp", "internalIp": A2, "internalPort": 80}
        spec["dnats"] += [{**mapping, "externalPort": port} for port in sorted(self.ports)]
        answer = Client(gateway.run_dir).request("PUT", "/v1/gateway", json.dumps(spec).encode())
        assert answer.ok, answer
        self.settled()

    def add(self, port: int) -> None:
        self.gateway.verb("dnat-add", f"{MANY},{port},udp,{A2},80")
        self.ports.add(port)

    def settled(self) -> None:
        """Wait until it is ready and the chains say what the maps say."""
        self.until(lambda: (now := self.gateway.status())["ready"] and not now["fastpath"]["behind"], "to be ready")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def lines(self) -> list[str]:
        """The mappings' rules."""
        return self.gateway.rules(f"-A SHARED_DNAT -d {MANY}/32 -p udp")

    def exact(self) -> None:
        """Spec, chain and maps hold every mapping, and nothing else."""
        gateway = self.gateway
        found = {each["externalPort"] for each in gateway.get("/v1/gateway")["dnats"] if each["eip"] == MANY}
        assert found == self.ports
        lines = self.lines()
        assert len(lines) == len(self.ports)
        assert {int(line.split("--dport ")[1].split()[0]) for line in lines} == self.ports
        assert gateway.get("/v1/drift")["now"] == []


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        print(f"{RULES} rules, {what}: {time.monotonic() - began:.1f} s")


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"] if BIG else ["legacy"])
def crowd(world: World, request: pytest.FixtureRequest) -> Iterator[Crowd]:
    """With a packet stream through it, of which nothing may be lost."""
    assert RULES > FOLLOW_ABOVE
    with world.gateway(variant=request.param) as gateway:
        gateway.verb("eip-add", f"{EIP}/24", f"{MANY}/24")
        gateway.verb("dnat-add", f"{EIP},53,udp,{A2},53")
        with timed("put"):
            made = Crowd(gateway)
        with Stream(udp(world.internet, (EIP, 53), world.vpc.a2.udp(53))) as stream:
            yield made
        print(f"{2 * stream.sent} datagrams sent, {stream.lost} lost, longest gap {stream.longest_gap * 1000:.0f} ms")
        assert stream.lost == 0


# When the daemon is killed: while its chains follow the maps; at once, before they do; when they just have; idle.
MOMENTS = (0.12, 0.0, 0.4, None) if BIG else (0.12,)


def test_faults_among_many_rules(crowd: Crowd) -> None:
    killed_at_any_moment(crowd)
    changed_by_others(crowd)


def killed_at_any_moment(crowd: Crowd) -> None:
    for port, moment in enumerate(MOMENTS, start=1):
        if moment is not None:
            crowd.add(port)
            time.sleep(moment)
        with timed(f"killed {'idle' if moment is None else f'{moment} s after an answer'}, ready again after"):
            crowd.gateway.kill_daemon()
            # A call waits ten seconds for a daemon; a controller asks again.
            crowd.until(lambda: crowd.gateway.exec("get-iptables-version").returncode == 0, "a daemon")
            crowd.settled()
        crowd.exact()


def changed_by_others(crowd: Crowd) -> None:
    gateway = crowd.gateway
    iptables = f"iptables-{gateway.variant}"
    changes = {
        "a chain flushed": (iptables, "-t", "nat", "-F", "SHARED_DNAT"),
        "the maps' table deleted": ("nft", "delete", "table", "ip", "natgw"),
        "an address deleted": ("ip", "addr", "del", f"{MANY}/24", "dev", "net1"),
    }
    for port, (what, command) in enumerate(changes.items(), start=100):
        crowd.add(port)
        flushed = "-F" in command
        if not flushed:
            crowd.settled()
        # The chains that are flushed do not follow yet. When they just do, they are written whole, and nothing is left
        # to be repaired.
        repairs = gateway.status()["drift"]["repairs"]
        with timed(f"{what}, repaired after"):
            gateway.run(*command)
            crowd.until(
                lambda repairs=repairs, flushed=flushed: (  # type: ignore[misc]
                    gateway.status()["drift"]["repairs"] > repairs
                    or (flushed and len(crowd.lines()) == len(crowd.ports))
                ),
                what,
            )
            crowd.settled()
        assert MANY in gateway.net1_addresses()
        crowd.exact()
    with timed("a full comparison"):
        assert gateway.get("/v1/drift")["now"] == []


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_a_refusal_among_many_rules_leaves_everything_as_it_was(netns: Namespace, variant: str) -> None:
    """Some steps of a change that touches chains, maps, addresses and routes."""
    mappings = [
        Dnat(eip=MANY, external_port=FIRST + n, protocol="tcp", internal_ip=A2, internal_port=80) for n in range(RULES)
    ]
    old = GatewaySpec(initialized=True, gateway_v4="192.168.0.1", eips=[Eip(address=f"{MANY}/24")], dnats=mappings)
    new = old.model_copy(
        update={
            "eips": type(old.eips)([*old.eips, Eip(address=f"{EIP}/24")]),
            "fips": type(old.fips)([Fip(eip=EIP, internal_ip=A2)]),
            "dnats": type(old.dnats)(mappings[1:]),
            "snats": type(old.snats)([Snat(eip=MANY, internal_cidr="10.0.0.0/16")]),
            "routes": type(old.routes)([Route(cidr="10.0.2.0/24", next_hop_ip="10.0.1.1")]),
        }
    )
    with rig(netns, variant) as real:
        transaction.apply(real.kernel, old, Facts())
        before = real.state()
        steps = real.wire.steps
        transaction.apply(real.kernel, new, Facts())
        steps = real.wire.steps - steps
        transaction.apply(real.kernel, old, Facts())
        assert real.state() == before
        for refused in sorted({1, steps // 2, steps}):
            left = [refused]

            def refuse(step: str, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Refused(step, "No space left on device", retryable=True)

            real.wire.fault = refuse
            with (
                pytest.raises(Refused, match="No space left"),
                timed(f"step {refused} of {steps} refused, undone after"),
            ):
                transaction.apply(real.kernel, new, Facts())
            real.wire.fault = None
            assert real.state() == before
