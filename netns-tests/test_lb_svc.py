"""lb-svc.sh end to end: the pod that Kube-OVN runs for a Service, driven as its controller does, with real packets.

::

    client 203.0.113.2 ─ router 192.168.0.1 ─┐          ┌─────┐
                        rival 192.168.0.99 ──┴── net1 ──┤ pod ├── eth0 10.0.1.77 ── 10.0.1.1 ── 10.96.0.20 (on a1)
                                       192.168.0.30     └─────┘

The VPC router stands for the pod network's gateway. OVN balances a cluster IP over endpoints; here it is an address
of the one endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from pod import (
    CLUSTER_IP,
    DNAT,
    DNS,
    HTTP,
    LB_IP,
    MASQUERADE,
    POD_GATEWAY,
    POD_IP,
    Pod,
    dns_server,
    plugged,
    world_of_a_service,
)
from traffic import tcp, udp
from world import PATIENCE, ROUTER, SCRIPT, Gateway, World, identical, wait_for

from gateway.arp.ask import ask


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_a_service() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def pod(world: World, request: pytest.FixtureRequest) -> Iterator[Pod]:
    with plugged(world, request.param) as made:
        yield made


def web_server(world: World, port: int = 8080) -> socket.socket:
    return world.vpc.a1.tcp_server(port)


def test_a_service_is_reached_from_outside(world: World, pod: Pod) -> None:
    pod.sequence()
    web, dns = web_server(world), dns_server(world)
    for client in (world.internet, world.rival):
        flow = tcp(client, (LB_IP, 80), web)
        assert flow.source[0] == POD_IP
        udp(client, (LB_IP, 53), dns)
    # One connection, opened once: no first packet may be lost to a slow start.
    assert world.external_mac(LB_IP) == pod.mac


def test_rules_and_routes_have_the_forms_that_operators_know(pod: Pod) -> None:
    pod.sequence(HTTP, f"{LB_IP},9,sctp,{CLUSTER_IP},9")
    sctp = f"-A PREROUTING -d {LB_IP}/32 -p sctp -m sctp --dport 9 -j DNAT --to-destination {CLUSTER_IP}:9"
    assert pod.rules("-A PREROUTING") == [DNAT, sctp]
    assert pod.rules("MASQUERADE") == [MASQUERADE]
    assert pod.led_to_table() == ["eth0", "net1"]
    assert pod.table() == {
        "192.168.0.0/24 dev net1",
        f"default via {ROUTER} dev net1",
        f"{CLUSTER_IP} via {POD_GATEWAY} dev eth0",
    }
    assert pod.net1_addresses() == [LB_IP]


def test_before_it_has_an_address_it_answers_no_arp(pod: Pod) -> None:
    pod.ip("link set net1 down")
    pod.verb("init")
    assert pod.link("net1")["flags"].count("UP") == 1
    assert not pod.arp()
    assert pod.rules("-A FORWARD") == ["-A FORWARD -o net1 -j DROP"]
    pod.verb("eip-add", f"{LB_IP}/24,{ROUTER}")
    assert pod.arp()
    assert not pod.rules("-A FORWARD")


def test_sequences_sent_again_disturb_nothing(world: World, pod: Pod) -> None:
    pod.sequence()
    web, dns = web_server(world), dns_server(world)
    connection = tcp(world.internet, (LB_IP, 80), web)
    near = udp(world.internet, (LB_IP, 53), dns).near
    with link_messages(pod) as messages, echoing(dns):
        lost = Stream(near)
        for _ in range(5):
            identical(pod, pod.sequence)
        assert lost.stop() == set()
    assert not [line for line in messages if "net1" in line and "NOARP" in line]
    connection.talk()


class Stream(threading.Thread):
    """Datagrams sent one after the other, each after an answer, or half a second without one."""

    def __init__(self, near: socket.socket) -> None:
        super().__init__(daemon=True)
        self._near = near
        self._end = threading.Event()
        self._sent: set[bytes] = set()
        self._back: set[bytes] = set()
        self.start()

    def run(self) -> None:
        self._near.settimeout(0.5)
        number = 0
        while not self._end.is_set():
            number += 1
            token = b"stream %d" % number
            self._near.send(token)
            self._sent.add(token)
            with contextlib.suppress(TimeoutError):
                self._back.add(self._near.recv(64))
            self._end.wait(0.002)
        deadline = time.monotonic() + PATIENCE
        while self._sent - self._back and time.monotonic() < deadline:  # answers that came late
            with contextlib.suppress(TimeoutError):
                self._back.add(self._near.recv(64))

    def stop(self) -> set[bytes]:
        """End it; the datagrams that were never answered."""
        wait_for(lambda: len(self._back) > 100, "a hundred answers")
        self._end.set()
        self.join()
        return self._sent - self._back


@contextlib.contextmanager
def echoing(server: socket.socket) -> Iterator[None]:
    """The server sends back what it gets."""
    end = threading.Event()

    def serve() -> None:
        server.settimeout(0.2)
        while not end.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = server.recvfrom(64)
                server.sendto(data, source)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=5)


@contextlib.contextmanager
def link_messages(pod: Pod) -> Iterator[list[str]]:
    """The lines of ``ip monitor link`` in the pod while the block runs; complete after it."""
    lines: list[str] = []
    monitor = pod.spawn("ip", "-o", "monitor", "link")
    assert monitor.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(monitor.stdout,), daemon=True)
    reader.start()
    try:
        # It listens once it has told of a change made for it, and has told all once it has told of the last.
        def told(mtu: int) -> bool:
            pod.ip(f"link set lo mtu {mtu - 1}", f"link set lo mtu {mtu}")
            return any("lo:" in line and f" mtu {mtu} " in line for line in lines)

        wait_for(lambda: told(60_000), "a message of ip monitor")
        yield lines
        wait_for(lambda: told(65_536), "the last message of ip monitor")
    finally:
        monitor.send_signal(signal.SIGTERM)
        monitor.wait(timeout=PATIENCE)
        reader.join(timeout=PATIENCE)


def test_a_new_pod_takes_the_place_of_the_old_one(world: World, pod: Pod) -> None:
    pod.sequence()
    tcp(world.internet, (LB_IP, 80), web_server(world))
    world.close_sockets()
    pod.remove()
    with plugged(world, pod.variant) as heir:
        heir.sequence()
        tcp(world.internet, (LB_IP, 80), web_server(world))
        assert world.external_mac(LB_IP) == heir.mac != pod.mac


def test_a_deleted_port_ends_its_connections_and_no_others(world: World, pod: Pod) -> None:
    pod.sequence()
    web, dns = web_server(world), dns_server(world)
    gone = tcp(world.internet, (LB_IP, 80), web)
    kept = udp(world.internet, (LB_IP, 53), dns)
    pod.verb("dnat-del", HTTP)
    assert gone.is_cut(kept)
    assert not pod.rules(DNAT)
    assert pod.rules("MASQUERADE") == [MASQUERADE]
    pod.verb("dnat-del", DNS)
    assert not pod.rules("PREROUTING -d")
    assert not pod.rules("MASQUERADE")
    assert pod.table() == {"192.168.0.0/24 dev net1", f"default via {ROUTER} dev net1"}
    pod.verb("dnat-del", DNS)  # twice is once


def test_a_port_gets_another_target(world: World, pod: Pod) -> None:
    pod.sequence(HTTP)
    moved = HTTP.replace("8080", "9090")
    # In whichever order these come, the port must end at its new target.
    pod.verb("dnat-add", f"{moved},{POD_GATEWAY}")
    pod.verb("dnat-del", HTTP)
    assert pod.rules("PREROUTING -d") == [DNAT.replace("8080", "9090")]
    tcp(world.internet, (LB_IP, 80), web_server(world, 9090))


def test_the_files_may_be_lost(world: World, pod: Pod) -> None:
    pod.sequence()
    dns = dns_server(world)
    near = udp(world.internet, (LB_IP, 53), dns).near
    before = pod.get("/v1/load-balancer")
    pod.kill()
    shutil.rmtree(pod.run_dir)
    shutil.rmtree(pod.state_dir)
    with link_messages(pod) as messages, echoing(dns):
        lost = Stream(near)
        pod.verb("init")
        assert pod.get("/v1/load-balancer") == before
        pod.sequence()
        assert lost.stop() == set()
    assert not [line for line in messages if "net1" in line and "NOARP" in line]
    assert pod.status()["ready"]


def test_a_daemon_that_dies_comes_back_with_the_next_call(world: World, pod: Pod) -> None:
    pod.sequence()
    pod.kill()
    pod.verb("dnat-del", DNS)
    assert pod.get("/v1/load-balancer")["dnats"] == [
        {
            "eip": LB_IP,
            "port": 80,
            "protocol": "tcp",
            "clusterIP": CLUSTER_IP,
            "targetPort": 8080,
            "gateway": POD_GATEWAY,
        }
    ]
    tcp(world.internet, (LB_IP, 80), web_server(world))


def test_a_silent_gateway_is_told_of_and_fails_nobody(pod: Pod) -> None:
    pod.verb("init")
    said = pod.verb("eip-add", f"{LB_IP}/24,192.168.0.77")
    assert said == f"{LB_IP} is up, but its gateway 192.168.0.77 does not answer ARP on net1\n"
    assert pod.arp()
    assert pod.verb("eip-add", f"{LB_IP}/24,{ROUTER}") == ""
    assert "192.168.0.77" not in str(pod.table())


def test_an_answer_counts_however_late_we_look_for_it(world: World, pod: Pod) -> None:
    """A daemon that stood still must not say of a gateway that it is silent."""
    pod.sequence()

    async def late() -> bytes | None:
        asked = asyncio.create_task(ask("net1", IPv4Address(LB_IP), IPv4Address(ROUTER), patience=0.5))
        await asyncio.sleep(0)  # the question is sent
        time.sleep(0.8)  # this is standing still
        return await asked

    with pod.entered():
        answer = asyncio.run(late())
    assert answer is not None
    assert answer.hex(":") == world.router.ip_json("link", "show", "eth0")[0]["address"]


def test_a_gateway_that_is_asked_knows_us(world: World, pod: Pod) -> None:
    world.router.ip("neigh flush dev eth0")
    pod.verb("init")
    pod.verb("eip-add", f"{LB_IP}/24,{ROUTER}")
    assert world.external_mac(LB_IP) == pod.mac


def test_deleting_before_init_is_no_failure(pod: Pod) -> None:
    pod.verb("dnat-del", HTTP)
    assert not pod.status()["initialized"]


def test_a_pod_is_one_thing_only(world: World, pod: Pod) -> None:
    pod.sequence()
    before = pod.saved()
    done = call(pod, SCRIPT, "init")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "this pod is a load balancer (lb-svc) and cannot be a NAT gateway as well\n"
    assert pod.saved() == before
    status = pod.status()
    assert (status["appliance"], status["counts"]["dnats"], status["ready"]) == ("lb-svc", 2, True)
    pod.kill()
    assert call(pod, SCRIPT, "init").returncode == 1  # also the daemon that it starts knows
    assert pod.saved() == before


def test_a_nat_gateway_is_no_load_balancer(world: World) -> None:
    with world.gateway() as gateway:
        before = gateway.saved()
        done = call(gateway, Pod.script, "init")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "this pod is a NAT gateway and cannot be a load balancer (lb-svc) as well\n"
        assert gateway.saved() == before


def call(gateway: Gateway, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One call of another script than the pod's own."""
    gateway.script = script
    try:
        return gateway.exec(*words)
    finally:
        del gateway.script


@pytest.mark.parametrize(
    "words",
    [
        ("eip-add", LB_IP + "/24"),
        ("eip-add", f"256.0.0.1/24,{ROUTER}"),
        ("dnat-add", HTTP),
        ("dnat-add", HTTP.replace(",80,", ",0,") + "," + POD_GATEWAY),
        ("dnat-add", HTTP.replace("tcp", "icmp") + "," + POD_GATEWAY),
        ("dnat-add", f"{HTTP},{POD_GATEWAY},more"),
        ("dnat-del", f"{LB_IP},80"),
        ("init", "net1,eth0"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(world: World, words: tuple[str, ...]) -> None:
    with plugged(world, "legacy") as pod:
        pod.verb("init")
        before: list[Any] = [pod.saved(), pod.table(), pod.led_to_table()]
        done = pod.exec(*words)
        assert done.returncode == 1
        assert done.stderr.startswith(words[0])
        assert done.stderr.count("\n") == 1
        assert [pod.saved(), pod.table(), pod.led_to_table()] == before


def test_an_unknown_verb_gets_the_usage(world: World) -> None:
    with plugged(world, "legacy") as pod:
        done = pod.exec("eip-del", LB_IP)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.startswith("Usage: lb-svc.sh")
