"""``kill -9`` at random moments under load: no packet is lost, and what stands at the end is what was asked for.

``make soak`` does it 500 times and prints the figures.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from traffic import Stream, udp
from world import A1, A2, INTERNET, Gateway, World, end, wait_for

KILLS = int(os.environ.get("NATGW_SOAK_KILLS", "10"))
SEED = int(os.environ.get("NATGW_SOAK_SEED", "1"))
EIP, EIP2 = "192.168.0.50", "192.168.0.51"
PORTS = range(1000, 1040)

pytestmark = pytest.mark.alone


@pytest.fixture
def gateway() -> Iterator[tuple[World, Gateway]]:
    with World() as world, world.gateway(variant=os.environ.get("NATGW_IPTABLES") or "legacy") as made:
        made.verb("subnet-route-add", "10.0.2.0/24,10.0.1.1")
        made.verb("eip-add", f"{EIP}/24", f"{EIP2}/24")
        made.verb("floating-ip-add", f"{EIP},{A1}")
        made.verb("dnat-add", f"{EIP2},53,udp,{A2},53")
        made.verb("snat-add", f"{EIP2},10.0.0.0/16")
        yield world, made


class Controller:
    """Adds and deletes port mappings at random, one call after the other; each again until it is done, as it does."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._stop = threading.Event()
        self._random = random.Random(SEED)
        self._thread = threading.Thread(target=self._run)
        self.wanted: set[int] = set()
        self.calls = self.repeated = 0

    def __enter__(self) -> Controller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            port = self._random.choice(PORTS)
            add = self._random.random() < 0.6
            words = ("dnat-add", f"{EIP2},{port},tcp,{A2},80") if add else ("dnat-del", f"{EIP2},{port},tcp")
            done = self._gateway.exec(*words)
            while done.returncode or done.stderr:
                self.repeated += 1
                done = self._gateway.exec(*words)
            self.calls += 1
            (self.wanted.add if add else self.wanted.discard)(port)


def daemon_of(gateway: Gateway) -> int | None:
    """The daemon's process, also while it starts; its keeper and the calls run other programs."""
    listed = subprocess.run(["ip", "netns", "pids", gateway.name], capture_output=True, text=True, check=False)
    for word in listed.stdout.split():
        with contextlib.suppress(OSError):
            if b"api.main" in Path(f"/proc/{word}/cmdline").read_bytes():
                return int(word)
    return None


@pytest.mark.timeout(60 + 6 * KILLS)
def test_killed_at_random_moments_under_load(gateway: tuple[World, Gateway]) -> None:
    world, made = gateway
    moments = random.Random(SEED)
    inbound = udp(world.internet, (EIP2, 53), world.vpc.a2.udp(53))
    outbound = udp(world.vpc.b, (INTERNET, 53), world.internet.udp(53))
    killed: list[float] = []
    began = time.monotonic()
    with Stream(inbound) as one, Stream(outbound) as two, Controller(made) as controller:
        while len(killed) < KILLS:
            # One in four dies while it starts; the others have answered a call and are busy with the next ones.
            calls, starting = controller.calls, moments.random() < 0.25
            while (pid := daemon_of(made)) is None or not (starting or controller.calls > calls):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.4))
            with contextlib.suppress(ProcessLookupError):
                end(pid)
                killed.append(time.monotonic() - began)
    took = time.monotonic() - began
    assert (one.lost, two.lost) == (0, 0)
    made.verb("init")
    assert made.get("/v1/drift")["now"] == []
    wait_for(lambda: made.status()["ready"], "the gateway to be ready")
    spec = made.get("/v1/gateway")
    assert {dnat["externalPort"] for dnat in spec["dnats"]} == controller.wanted | {53}
    lines = [line for line in made.rules("-A SHARED_DNAT") if "--dport 53 " not in line]
    assert len(lines) == len(controller.wanted)
    assert all(any(f"--dport {port} " in line for line in lines) for port in controller.wanted)
    assert not list(made.state_dir.glob("*.corrupt"))
    print(
        f"\n{len(killed)} kills in {took:.0f} s; {controller.calls} calls answered, {controller.repeated} asked again; "
        f"{2 * (one.sent + two.sent)} datagrams sent, {one.lost + two.lost} lost, "
        f"longest gap {max(one.longest_gap, two.longest_gap) * 1000:.0f} ms; final state exact"
    )
