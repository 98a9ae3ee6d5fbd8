"""The flow watcher beside the real daemon: real connections are counted for the rules that translate them."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from traffic import Flow, tcp, udp
from world import A1, A2, INTERNET, SCRIPT, Gateway, World, end, parent, set_sysctl, wait_for

from gateway.watcher.hearing import SOON
from gateway.watcher.main import PACE

EIP, EIP2, FLOATING = "192.168.0.60", "192.168.0.61", "192.168.0.62"
NOBODY = 65534
NATGW = Path(sys.executable).with_name("natgw")
DUMPED = 60.0  # seconds; the next dump waits for a hundred times the processor time that the last one took


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def by_dump(condition: Callable[[], bool], what: str) -> None:
    """As ``wait_for``, for what nothing but a dump tells."""
    wait_for(condition, what, DUMPED)


def acknowledged(flow: Flow) -> None:
    """Wait until each end of a TCP connection knows that the other has everything: then nothing is under way."""

    def under_way() -> int:
        queues = (fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)) for end in (flow.near, flow.far))
        return sum(struct.unpack("i", queue)[0] for queue in queues)

    wait_for(lambda: not under_way(), "all is acknowledged")


def watched(gateway: Gateway) -> dict[str, Any]:
    """The traffic, once a watcher runs."""
    found: list[dict[str, Any]] = []

    def running() -> bool:
        found.append(gateway.get("/v1/traffic"))
        return bool(found[-1]["collector"]["running"] and found[-1]["collector"]["resyncs"])

    wait_for(running, "a running flow watcher")
    return found[-1]


def one(traffic: dict[str, Any], kind: str, **names: object) -> dict[str, Any]:
    """The object with these names."""
    (found,) = [each for each in traffic[kind] if all(each[name] == value for name, value in names.items())]
    return dict(found)


def watcher_pid(gateway: Gateway) -> int:
    """The daemon's child that watches."""
    found: list[int] = []

    def one_watches() -> bool:
        children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
        found[:] = [int(child) for child in children if b"gateway.watcher" in command(child)]
        return len(found) == 1

    def command(pid: str) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return b""  # it has ended since

    wait_for(one_watches, "one child that watches")
    return found[0]


def test_every_kind_of_object_has_its_traffic(world: World, variant: str) -> None:
    with world.gateway(variant=variant) as gateway:
        gateway.verb("eip-add", f"{EIP}/24", f"{EIP2}/24", f"{FLOATING}/24")
        gateway.verb("dnat-add", f"{EIP},8888,tcp,{A1},80")
        gateway.verb("snat-add", f"{EIP2},10.0.1.0/24")
        gateway.verb("floating-ip-add", f"{FLOATING},{A2}")
        watched(gateway)
        kinds = {"eips": 3, "dnats": 1, "snats": 1, "fips": 1}
        wait_for(lambda: numbers(watched(gateway), kinds) == kinds, "the watcher knows the spec")
        mapped = tcp(world.internet, (EIP, 8888), world.vpc.a1.tcp_server(80))
        mapped.near.send(b"x" * 1000)
        left = tcp(world.vpc.a1, (INTERNET, 443), world.internet.tcp_server(443))
        floating = udp(world.vpc.a2, (INTERNET, 53), world.internet.udp(53))
        assert floating.source[0] == FLOATING

        def seen() -> bool:
            now = watched(gateway)
            each = (("dnats", EIP, "in", 1000), ("snats", EIP2, "out", 0), ("fips", FLOATING, "out", 0))
            sums = [(one(now, kind, eip=eip), way, least) for kind, eip, way, least in each]
            return all(
                found[way]["bytes"] > least and found["in"]["bytes"] and found["out"]["bytes"]
                for found, way, least in sums
            )

        # They live: no event has told of their bytes, the dump in the background has.
        by_dump(seen, "bytes of living connections")
        now = watched(gateway)
        assert now["collector"]["accounting"]
        for kind, eip, way, other in (
            ("dnats", EIP, "in", "out"),
            ("snats", EIP2, "out", "in"),
            ("fips", FLOATING, "out", "in"),
        ):
            for found in (one(now, kind, eip=eip), one(now, "eips", eip=eip)):
                assert (found[way]["activeFlows"], found[way]["newFlows"]) == (1, 1), (kind, found)
                assert (found[other]["activeFlows"], found[other]["newFlows"]) == (0, 0), (kind, found)
                assert found[way]["packets"] >= 1
                assert found[other]["bytes"] > 0
        ports = one(now, "eips", eip=EIP2)["snatPorts"]
        assert ports == {
            "inUse": 1,
            "available": 64512,
            "busiest": {"protocol": "tcp", "address": INTERNET, "port": 443, "inUse": 1},
        }
        assert one(now, "eips", eip=FLOATING)["snatPorts"]["inUse"] == 0, "a floating IP has all ports to itself"
        assert now["total"]["in"]["newFlows"] == 1
        assert now["total"]["out"]["newFlows"] == 2
        assert now["conntrack"]["count"] >= 3
        assert {each["address"] for each in now["topSources"]} == {A1, A2}
        assert {each["address"] for each in now["topDestinations"]} == {INTERNET}
        before = one(now, "dnats", externalPort=8888)["in"]["bytes"]
        mapped.near.send(b"x" * 500)
        acknowledged(mapped)
        gateway.run("conntrack", "-D", "-p", "tcp", "--orig-dst", EIP)
        # The event of a connection's end tells of its bytes, as soon as it is read.
        wait_for(lambda: one(watched(gateway), "dnats", externalPort=8888)["in"]["activeFlows"] == 0, "its end")
        assert one(watched(gateway), "dnats", externalPort=8888)["in"]["bytes"] >= before + 500
        left.talk()


def numbers(traffic: dict[str, Any], kinds: Iterable[str]) -> dict[str, int]:
    """How many objects of each kind it has."""
    return {kind: len(traffic[kind]) for kind in kinds}


def test_a_flow_that_was_there_before_its_rule_is_known(world: World) -> None:
    """The watcher hears of a rule a moment after the kernel has it: such a flow is attributed by the next dump."""
    with world.gateway() as gateway:
        gateway.verb("eip-add", f"{EIP}/24")
        watched(gateway)
        pid = watcher_pid(gateway)
        os.kill(pid, signal.SIGSTOP)
        gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
        left = tcp(world.vpc.a1, (INTERNET, 443), world.internet.tcp_server(443))
        left.talk()
        os.kill(pid, signal.SIGCONT)
        by_dump(lambda: one(watched(gateway), "eips", eip=EIP)["out"]["activeFlows"] == 1, "the flow is seen")
        by_dump(
            lambda: (
                bool(watched(gateway)["snats"]) and one(watched(gateway), "snats", eip=EIP)["out"]["activeFlows"] == 1
            ),
            "it is known whose it is",
        )


def test_a_connection_is_counted_once_whoever_tells_of_it(world: World) -> None:
    """By its end, if that comes before a dump, else by the dump; nobody asked the kernel to tell of its beginning."""
    short, long, size = 400, 20, 100
    with world.gateway() as gateway:
        set_sysctl(gateway, {"netfilter/nf_conntrack_udp_timeout": 3600})
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
        watched(gateway)
        wait_for(lambda: bool(watched(gateway)["snats"]), "the watcher knows the spec")
        by_dump(lambda: listening(gateway) == ENDS, "nobody hears of beginnings")
        counted, dumps = [0], [0.0]

        def out(*, at_least: int) -> bool:
            now = watched(gateway)
            dumps.append(now["collector"]["resyncSeconds"])
            counted.append(one(now, "snats", eip=EIP)["out"]["newFlows"])
            return counted[-1] >= at_least

        for batch in range(4):
            opened(world, short // 4, size)
            gateway.run("conntrack", "-D", "-p", "udp", "--orig-dst", INTERNET)
            wait_for(lambda batch=batch: out(at_least=(batch + 1) * short // 4), "the ends are counted")
        opened(world, long, size)
        by_dump(lambda: out(at_least=short + long), "those that live are counted")
        found = one(watched(gateway), "snats", eip=EIP)
        assert (found["out"]["newFlows"], found["out"]["activeFlows"]) == (short + long, long)
        gateway.run("conntrack", "-D", "-p", "udp", "--orig-dst", INTERNET)
        wait_for(lambda: one(watched(gateway), "snats", eip=EIP)["out"]["activeFlows"] == 0, "they have ended")
        assert out(at_least=0)
        assert counted == sorted(counted), "a counter does not go back"
        found = one(watched(gateway), "snats", eip=EIP)
        packets = short + long
        assert (found["out"]["newFlows"], found["out"]["packets"]) == (packets, packets)
        assert found["out"]["bytes"] == packets * (size + 28)
        events = watched(gateway)["collector"]["events"]
        assert events["end"] == packets
        # Where a dump takes that long (a busy machine's may), beginnings are heard of until the next one.
        assert events["new"] == 0 or max(dumps) > DEAR
        by_dump(lambda: listening(gateway) == ENDS, "nobody hears of beginnings")


DEAR = SOON / PACE.share / 1e6  # seconds
ENDS, BEGINNINGS_AND_ENDS = 0b100, 0b101


def listening(gateway: Gateway) -> int:
    """The groups of the kernel's events that somebody in the gateway's namespace hears."""
    rows = gateway.run("cat", "/proc/net/netlink").splitlines()[1:]
    groups = [int(row.split()[3], 16) for row in rows if row.split()[1] == "12"]
    return max(groups)


def opened(world: World, connections: int, size: int) -> None:
    """So many connections of one datagram from inside to the Internet, all of which have left."""
    port = world.internet.udp(9)
    for number in range(connections):
        near = world.vpc.a1.udp(20_000 + number)  # one of the kernel's choice may come twice
        near.sendto(b"x" * size, (INTERNET, 9))
        assert len(port.recv(2000)) == size, number
        near.close()
    port.close()


def test_it_has_one_capability_and_ends_with_the_daemon(world: World) -> None:
    with world.gateway() as gateway:
        watched(gateway)
        pid = watcher_pid(gateway)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert set(status["Uid"].split()) == {str(NOBODY)}
        assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {f"{1 << 12:016x}"}
        assert status["NoNewPrivs"].strip() == "1"
        held = os.pidfd_open(pid)
        gateway.kill()  # and its keeper; nobody tells the watcher anything
        wait_for(lambda: not alive(held), "the watcher has ended")
        os.close(held)


def alive(descriptor: int) -> bool:
    """Whether the process of a pidfd runs; a zombie does not."""
    return not select.select([descriptor], [], [], 0)[0]


def test_one_that_dies_is_started_again_and_leaves_no_zombie(world: World) -> None:
    with world.gateway() as gateway:
        gateway.verb("eip-add", f"{EIP}/24")
        watched(gateway)
        first = watcher_pid(gateway)
        end(first)
        gateway.verb("eip-add", f"{EIP2}/24")
        now = gateway.get("/v1/traffic")
        # Another one that runs by now may not have been told yet.
        assert now["collector"]["running"] or len(now["eips"]) == 2, "without it, too, the objects are there"
        wait_for(lambda: gateway.get("/v1/traffic")["collector"]["running"], "another watcher")
        assert watcher_pid(gateway) != first
        assert parent(watcher_pid(gateway)) == gateway.pid
        wait_for(lambda: len(watched(gateway)["eips"]) == 2, "it knows the spec")


def test_a_gateway_that_is_told_to_stop_takes_its_watcher_along(world: World) -> None:
    with world.gateway() as gateway:
        watched(gateway)
        held = os.pidfd_open(watcher_pid(gateway))
        gateway.kill(signal.SIGTERM)
        assert not alive(held)
        os.close(held)
        assert not (gateway.run_dir / "flows.sock").exists()


def test_the_flow_log_answers_who_it_was(world: World, tmp_path: Path) -> None:
    path = tmp_path / "flows.log"
    with world.gateway(environment={"NATGW_FLOW_LOG": str(path), "NATGW_FLOW_LOG_FILTER": "protocol=tcp"}) as gateway:
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
        watched(gateway)
        left = tcp(world.vpc.a1, (INTERNET, 443), world.internet.tcp_server(443))
        udp(world.vpc.a1, (INTERNET, 53), world.internet.udp(53)).talk()
        inside = "{}:{}".format(*left.near.getsockname())
        asked = "{}:{}".format(*left.source)
        wait_for(lambda: path.exists() and path.read_text().count("\n") == 1, "the beginning is logged")
        acknowledged(left)
        gateway.run("conntrack", "-D", "-p", "tcp", "--orig-src", A1)
        wait_for(lambda: path.read_text().count("\n") == 2, "the end is logged")
        begun, ended = map(json.loads, path.read_text().splitlines())
        assert (begun["event"], ended["event"], begun["conntrackID"]) == ("start", "end", ended["conntrackID"])
        assert ended["counters"]["originalPackets"] >= 2
        at = begun["timestamp"][:19]
        done = gateway.exec_argv((str(NATGW), "who", asked, "--at", at), {"NATGW_FLOW_LOG": str(path), "TZ": "UTC"})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[1].split()[:3] == ["tcp", inside, asked]
        assert listening(gateway) == BEGINNINGS_AND_ENDS
        assert gateway.get("/v1/traffic")["flowLog"] == {"enabled": True, "records": 2, "drops": {}}
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{watcher_pid(gateway)}/status").read_text().splitlines()
        )
        assert set(status["Uid"].split()) == {"0"}, "its file is root's"
        assert status["CapEff"].strip() == f"{1 << 12:016x}"


def test_metrics_over_every_way(world: World) -> None:
    """By exec, on the API's socket, and on a listener that was asked for: the same metrics, with real values."""
    with world.gateway(environment={"NATGW_METRICS_LISTEN": "127.0.0.1:9912"}) as gateway:
        gateway.verb("eip-add", f"{EIP}/24")
        gateway.verb("snat-add", f"{EIP},10.0.1.0/24")
        gateway.verb("eip-egress-qos-add", f"{EIP},1,8,1")
        watched(gateway)
        wait_for(lambda: len(watched(gateway)["snats"]) == 1, "the watcher knows the spec")
        left = udp(world.vpc.a1, (INTERNET, 443), world.internet.udp(443))
        left.near.send(b"x" * 500)
        assert len(left.far.recv(1000)) == 500
        gateway.run("conntrack", "-D", "-p", "udp", "--orig-src", A1)
        ended = {"newFlows": 1, "activeFlows": 0}
        wait_for(lambda: ended.items() <= one(watched(gateway), "snats", eip=EIP)["out"].items(), "its end is counted")

        def value(text: str, series: str) -> float:
            return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(series + " ")), -1)

        run = gateway.exec_argv(("sh", str(SCRIPT.parent.parent / "usr/bin/natgw"), "metrics"), {})
        assert (run.returncode, run.stderr) == (0, "")
        for text in (run.stdout, gateway.run("curl", "-s", "http://127.0.0.1:9912/metrics")):
            assert value(text, f'natgw_snat_flows_total{{eip="{EIP}",cidr="10.0.1.0/24",direction="out"}}') == 1
            assert value(text, f'natgw_eip_bytes_total{{eip="{EIP}",direction="out"}}') > 150
            assert value(text, "natgw_ready") == value(text, "natgw_flow_watcher_up") == 1
            assert value(text, 'natgw_verb_duration_seconds_count{outcome="ok",verb="snat-add"}') == 1
            limit = f'{{direction="out",match="all",priority="1",target="{EIP}"}}'
            assert value(text, f"natgw_qos_limit_bytes_per_second{limit}") == 1_000_000
            assert value(text, f"natgw_qos_bytes_total{limit}") > 150
            assert value(text, f"natgw_qos_drops_total{limit}") == 0
            assert value(text, "natgw_conntrack_entries_limit") > 1000
        refused = gateway.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:9912/v1/gateway")
        assert refused == "404", "nothing but metrics"
        assert gateway.run("curl", "-s", "http://127.0.0.1:9912/healthz") == "ok\n"
        listening = gateway.run("ss", "-Hltn").split()
        assert "127.0.0.1%lo:9912" in listening
        assert len([word for word in listening if word == "LISTEN"]) == 1, "and no listener that nobody asked for"


def test_a_metrics_listener_that_cannot_be_is_refused(world: World) -> None:
    with world.gateway() as gateway:
        gateway.kill(signal.SIGTERM)
        done = gateway.exec("get-iptables-version", NATGW_METRICS_LISTEN="9912")
        assert done.returncode == 1
        assert "NATGW_METRICS_LISTEN=9912 is not an address and a port" in done.stderr
