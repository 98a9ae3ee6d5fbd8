"""A disk that is slow or does not answer: packets pass, all but changes goes on, and no state is lost."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from disk import Disk, SlowFsync
from traffic import Stream, udp
from world import A2, Gateway, World, end, wait_for

from api.client import Client

EIP, OTHER = "192.168.0.50", "192.168.0.60"
KILLS = int(os.environ.get("NATGW_SOAK_KILLS", "2"))
SEED = int(os.environ.get("NATGW_SOAK_SEED", "1"))

pytestmark = pytest.mark.alone


@pytest.fixture
def disk() -> Iterator[Disk]:
    # pytest's own directories may be too deep for the name of a socket.
    with tempfile.TemporaryDirectory(prefix="natgw-") as directory, Disk(Path(directory)) as made:
        yield made


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def fsync(tmp_path: Path) -> SlowFsync:
    return SlowFsync(tmp_path)


@contextlib.contextmanager
def streaming(world: World, **options: Any) -> Iterator[Gateway]:
    """A gateway, and a packet stream through it of which nothing may be lost; the options are ``World.gateway``'s."""
    with world.gateway(variant=os.environ.get("NATGW_IPTABLES") or "legacy", **options) as gateway:
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("dnat-add", f"{EIP},53,udp,{A2},53")
        gateway.status()
        with Stream(udp(world.internet, (EIP, 53), world.vpc.a2.udp(53))) as stream:
            yield gateway
        print(f"{2 * stream.sent} datagrams sent, {stream.lost} lost, longest gap {stream.longest_gap * 1000:.0f} ms")
        assert stream.lost == 0


def add(gateway: Gateway, port: int) -> CompletedProcess[str]:
    return gateway.exec("dnat-add", f"{EIP},{port},udp,{A2},53")


def ports_of(gateway: Gateway) -> set[int]:
    return {dnat["externalPort"] for dnat in gateway.get("/v1/gateway")["dnats"]} - {53}


def http(gateway: Gateway, path: str) -> tuple[int, str]:
    answer = Client(gateway.run_dir).request("GET", path)
    return answer.status, answer.body.decode()


def test_a_disk_that_does_not_answer_holds_up_changes_alone(world: World, disk: Disk) -> None:
    """All of the gateway's files are on it: state, log, sockets, what ``init`` leaves for operators."""
    with streaming(world, place=disk.path) as gateway, ThreadPoolExecutor(8) as pool:
        gateway.verb("eip-add", f"{OTHER}/24")
        with disk.frozen():
            calls = [pool.submit(add, gateway, port) for port in (1, 2, 3)]
            wait_for(lambda: "spec is not on disk" in gateway.status()["pending"], "the writer to wait for the disk")
            with socket.socket(socket.AF_UNIX) as gone:  # who goes away is told of in the log: on that disk, too
                gone.connect(str(gateway.run_dir / "exec.sock"))
            calls.append(pool.submit(gateway.exec, "init"))
            code, text = http(gateway, "/readyz")
            assert (code, "spec is not on disk" in text) == (503, True)
            assert http(gateway, "/healthz")[0] == 200
            assert "\nnatgw_ready 0" in http(gateway, "/metrics")[1]
            assert http(gateway, "/v1/traffic")[0] == 200
            assert gateway.exec("get-iptables-version").returncode == 0  # verbs are taken
            repaired_meanwhile(gateway)
            assert not any(call.done() for call in calls)
        for call in calls:
            assert (call.result().returncode, call.result().stderr) == (0, "")
        wait_for(lambda: gateway.status()["ready"], "the gateway to be ready")
        assert ports_of(gateway) == {1, 2, 3}
        gateway.logged("dnat-add", 4)  # every line comes in the end
        assert gateway.log().count("dnat-add") == 4


def repaired_meanwhile(gateway: Gateway) -> None:
    """What others change is made good as ever; the change that waits for its disk stands already, and stays."""
    repairs = gateway.status()["drift"]["repairs"]
    gateway.run("ip", "addr", "del", f"{OTHER}/24", "dev", "net1")
    gateway.run(f"iptables-{gateway.variant}", "-w", "-t", "nat", "-F", "SHARED_DNAT")
    wait_for(lambda: OTHER in gateway.net1_addresses(), "the address to be back")
    wait_for(lambda: len(gateway.rules(f"-A SHARED_DNAT -d {EIP}/32 -p udp")) == 2, "the chain to be filled")
    wait_for(lambda: gateway.status()["drift"]["repairs"] > repairs, "the repair to be told of")
    assert "spec is not on disk" in gateway.status()["pending"]


def test_on_a_slow_disk_calls_are_answered_late_and_right(world: World, fsync: SlowFsync) -> None:
    with streaming(world, environment=fsync.environment) as gateway:
        fsync.takes(200)
        began, waited = time.monotonic(), []
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(add, gateway, port) for port in range(1, 5)]
            while not waited or not all(call.done() for call in calls):
                asked = time.monotonic()
                for path in ("/v1/status", "/healthz", "/metrics"):
                    assert http(gateway, path)[0] == 200
                waited.append(time.monotonic() - asked)
        took = time.monotonic() - began
        assert [(call.result().returncode, call.result().stderr) for call in calls] == [(0, "")] * len(calls)
        assert took > len(calls) * 0.4  # each of them waited for its own two
        print(f"{len(calls)} calls in {took:.1f} s; HTTP meanwhile: {len(waited)} times, {max(waited) * 1000:.0f} ms")
        gateway.kill()
        gateway.verb("init")
        assert ports_of(gateway) == set(range(1, 5))
        assert gateway.get("/v1/drift")["now"] == []


def test_killed_in_the_midst_of_a_slow_fsync(world: World, fsync: SlowFsync) -> None:
    """Each change is stored by two of them: that of the file, before it has its name, and that of the directory."""
    chance = random.Random(SEED)
    with streaming(world, environment=fsync.environment) as gateway, ThreadPoolExecutor(1) as pool:
        wanted: set[int] = set()
        stood = 0
        for port in range(1, KILLS + 1):
            fsync.takes(60_000)  # until it was seen
            fresh, daemon = gateway.state_dir / "spec.json.new", gateway.pid
            call = pool.submit(add, gateway, port)
            wait_for(fresh.exists, "the change to be stored")
            fsync.takes(200)
            time.sleep(chance.uniform(0, 0.39))
            end(daemon)
            fsync.takes(0)
            answered = call.result().returncode == 0
            gateway.verb("init")
            ports = ports_of(gateway)
            assert ports in ([wanted | {port}] if answered else [wanted, wanted | {port}])
            stood += port in ports
            gateway.verb("dnat-add", f"{EIP},{port},udp,{A2},53")  # as a controller does
            wanted.add(port)
            assert ports_of(gateway) == wanted
        assert not list(gateway.state_dir.glob("*.corrupt"))
        assert gateway.get("/v1/drift")["now"] == []
        print(f"{KILLS} kills: {stood} times the change stood, {KILLS - stood} times the state before it")
