"""The observer but for its netlink sockets: interfaces, log output, metrics, options, configuration, health check."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway.observer import interfaces, metrics, observer, options, output, probe
from gateway.observer.flow import Counters, Identity
from gateway.observer.interfaces import InterfaceCounters, InterfaceSums
from gateway.observer.metrics import Tally
from gateway.observer.observer import Observer
from gateway.observer.options import Options
from gateway.observer.output import QUEUE, RecordWriter, write_if_possible
from gateway.observer.table import FlowTable
from gateway.small import exposition
from gateway.small.loop import Loop
from tests.observer_kit import flow
from tests.ports import free_port

PROGRAM = Path(__file__).parent.parent / "image" / "rootfs" / "kube-ovn" / "vpc-egress-gateway-observer"
STATUS = [
    {"name": "kube-ovn", "interface": "eth0", "ips": ["10.0.0.5"], "default": True, "dns": {}},
    {"name": "other/net", "interface": "net2"},
    {"name": "ns/external", "interface": "net1", "mac": "00:00:00:11:22:33"},
]
NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
  eth0:    1000      10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0
net1:123456789012 7 5 6 9 9 9 9 8 9 10 11 0 0 0 0
"""  # noqa: E501 -- as the kernel writes it


# Interfaces


def test_interfaces_are_found_by_their_networks() -> None:
    assert interfaces.resolve(json.dumps(STATUS), "ns/external") == {"internal": "eth0", "external": "net1"}


@pytest.mark.parametrize("text", ["", "{}", "[3]", "null", json.dumps(STATUS[:2]), json.dumps(STATUS[1:])])
def test_a_status_without_both_interfaces_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        interfaces.resolve(text, "ns/external")


def test_the_kernels_table_of_interfaces() -> None:
    counters = interfaces.parse_proc_net_dev(NET_DEV)
    assert set(counters) == {"lo", "eth0", "net1"}
    assert counters["eth0"] == InterfaceCounters(1000, 10, 1, 2, 2000, 20, 3, 4)
    assert counters["net1"] == InterfaceCounters(123456789012, 7, 5, 6, 8, 9, 10, 11)


def test_sums_outlive_an_interface() -> None:
    sums = InterfaceSums()
    for rx in (100, 150, 20):
        sums.update({"external": "net1"}, {"net1": InterfaceCounters(rx_bytes=rx)})
    assert sums.sums == {("net1", "external"): InterfaceCounters(rx_bytes=170)}
    with pytest.raises(ValueError, match="eth0"):
        sums.update({"external": "net1", "internal": "eth0"}, {"net1": InterfaceCounters(rx_bytes=30)})
    assert sums.sums == {("net1", "external"): InterfaceCounters(rx_bytes=170)}, "all or nothing"


# Output


def test_records_wait_for_their_reader_and_too_many_are_dropped() -> None:
    tally, written, room = Tally(), [], [False]

    def write(data: bytes) -> bool:
        if room[0]:
            written.append(data)
        return room[0]

    writer = RecordWriter(write, tally)
    for number in range(QUEUE + 3):
        writer.put("start", b"%d\n" % number)
        writer.flush()
    assert (len(writer), tally.drops, tally.records) == (QUEUE, {"queue_full": 3}, {})
    room[0] = True
    writer.flush()
    assert b"".join(written) == b"".join(b"%d\n" % number for number in range(QUEUE))
    assert max(map(len, written)) <= select.PIPE_BUF
    assert all(data.endswith(b"\n") for data in written)
    assert tally.records == {"start": QUEUE}
    assert len(writer) == 0


def test_a_log_that_cannot_be_written_is_counted() -> None:
    tally = Tally()

    def broken(data: bytes) -> bool:
        raise BrokenPipeError(32, "Broken pipe")

    writer = RecordWriter(broken, tally)
    for _ in range(3):
        writer.put("end", b"x" * 2000 + b"\n")
    writer.flush()
    assert (len(writer), tally.drops, tally.records) == (0, {"write_error": 3}, {})


def test_nobody_waits_for_a_full_pipe() -> None:
    reader, writer = os.pipe()
    try:
        writes = 0
        while write_if_possible(writer, b"x" * select.PIPE_BUF):
            writes += 1
            assert writes < 1000
        os.read(reader, select.PIPE_BUF)
        assert write_if_possible(writer, b"y" * 100)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_complaint_is_made_once(capfd: pytest.CaptureFixture[str]) -> None:
    complaints = output.Complaints(Tally())
    for what in ("broken", "broken", "worse"):
        complaints.say("conntrack", what)
    complaints.well("conntrack")
    complaints.say("conntrack", "worse")
    assert capfd.readouterr().err.splitlines() == ["conntrack: broken", "conntrack: worse", "conntrack: worse"]


# Metrics


def test_metrics_have_kube_ovns_names_and_labels() -> None:
    tally = Tally()
    tally.up["conntrack"] = True
    tally.reloads = {"success": 2}
    tally.errors["interface", "collect"] = 3
    tally.records, tally.drops = {"start": 4}, {"rate_limit": 5}
    table = FlowTable(lambda event, one: None)
    table.event("new", flow(1, counters=Counters(1, 64, 2, 128)))
    sums = InterfaceSums()
    sums.update({"external": "net1"}, {"net1": InterfaceCounters(1, 2, 3, 4, 5, 6, 7, 8)})
    families = list(metrics.families(Identity("ns", "gw", "pod", "node"), tally, table, sums, True))
    lines = set(exposition.text(families).splitlines())
    base = 'name="gw",namespace="ns",node="node",pod="pod"'
    net1 = f'interface="net1",{base},type="external"'
    nat = 'name="gw",namespace="ns",nat_type="snat",node="node",pod="pod",protocol="tcp"'
    prefix = "kube_ovn_vpc_egress_gateway_"
    for line in (
        f'observability_collector_up{{collector="conntrack",{base}}} 1',
        f'observability_collector_up{{collector="interface",{base}}} 0',
        f'observability_config_reload_total{{{base},result="success"}} 2',
        f'observability_conntrack_events_total{{event="new",{base}}} 1',
        f'observability_conntrack_events_total{{event="end",{base}}} 0',
        'observability_errors_total{collector="interface",name="gw",namespace="ns",node="node",operation="collect",'
        'pod="pod"} 3',
        f"observability_conntrack_cache_entries{{{base}}} 1",
        f"observability_conntrack_cache_capacity{{{base}}} 65536",
        f"observability_conntrack_cache_evictions_total{{{base}}} 0",
        f'observability_log_records_total{{event="start",{base}}} 4',
        f'observability_log_drops_total{{{base},reason="rate_limit"}} 5',
        f"observability_conntrack_accounting_available{{{base}}} 1",
        f"interface_rx_bytes_total{{{net1}}} 1",
        f"interface_rx_packets_total{{{net1}}} 2",
        f"interface_tx_bytes_total{{{net1}}} 5",
        f"interface_tx_packets_total{{{net1}}} 6",
        f'interface_errors_total{{direction="rx",{net1}}} 3',
        f'interface_drops_total{{direction="rx",{net1}}} 4',
        f'interface_errors_total{{direction="tx",{net1}}} 7',
        f'interface_drops_total{{direction="tx",{net1}}} 8',
        f'conntrack_nat_flows_active{{address_family="ipv4",{nat}}} 1',
        f'conntrack_nat_flows_started_total{{address_family="ipv4",{nat}}} 1',
        f'conntrack_nat_flows_ended_total{{address_family="ipv4",{nat}}} 0',
        f'conntrack_nat_packets_total{{address_family="ipv4",direction="original",{nat}}} 1',
        f'conntrack_nat_bytes_total{{address_family="ipv4",direction="reply",{nat}}} 128',
    ):
        assert prefix + line in lines
    assert {name for name, _, _, _ in families} == {
        prefix + name
        for name in (
            *("observability_" + name for name in (
                "collector_up", "config_reload_total", "conntrack_events_total", "errors_total",
                "conntrack_cache_entries", "conntrack_cache_capacity", "conntrack_cache_evictions_total",
                "log_records_total", "log_drops_total", "conntrack_accounting_available",
            )),
            *(f"interface_{way}_{unit}_total" for way in ("rx", "tx") for unit in ("bytes", "packets")),
            "interface_drops_total",
            "interface_errors_total",
            *(f"conntrack_nat_flows_{what}" for what in ("active", "started_total", "ended_total")),
            "conntrack_nat_packets_total",
            "conntrack_nat_bytes_total",
        )
    }  # fmt: skip
    without = metrics.families(Identity("ns", "gw", "pod", "node"), tally, table, sums, False)
    assert not any("conntrack_nat" in name for name, _, _, _ in without)


# The command line


def test_options_in_all_manners_of_go() -> None:
    assert options.parse([]) == Options()
    assert options.parse(["--config", "/c", "-network-status=/n", "--listen-address=127.0.0.1:1", "--v=3"]) == Options(
        "/c", "/n", "127.0.0.1:1"
    )
    assert options.parse(["-v", "5", "--logtostderr", "-vmodule", "a=1", "--health-check"]).health_check
    assert not options.parse(["--health-check=false"]).health_check
    assert options.parse(["--listen-address", ":1", "--", "--config"]).listen_address == ":1"


@pytest.mark.parametrize("argv", [["--unknown"], ["--config"], ["-v"], ["--config="], ["---config", "/c"]])
def test_options_that_go_would_refuse(argv: list[str]) -> None:
    if argv == ["--config="]:
        assert options.parse(argv).config == ""
        return
    with pytest.raises(ValueError):
        options.parse(argv)


def test_the_program_says_what_it_lacks(tmp_path: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NATGW_PYTHON": sys.executable}
        return subprocess.run([PROGRAM, *argv], capture_output=True, text=True, env=environment, check=False)

    missing = run("--config", str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
    tmp_path.joinpath("bad").write_text("{}")
    bad = run("--config", str(tmp_path / "bad"))
    assert (bad.returncode, "required" in bad.stderr) == (1, True)
    assert run("--nonsense").returncode == 2
    assert (missing.stdout, bad.stdout) == ("", "")


# The health check


@pytest.mark.parametrize(("reply", "well"), [(b"200 OK", True), (b"503 Service Unavailable", False), (b"", False)])
def test_health_check(reply: bytes, well: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(probe, "check", lambda: real(server.getsockname()))
        monkeypatch.setattr(probe, "TIMEOUT", 60.0)

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                assert peer.recv(4096).startswith(b"GET /healthz HTTP/1.")
                peer.sendall(b"HTTP/1.1 " + reply + b"\r\n\r\n" if reply else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        assert probe.main([]) == (0 if well else 1)
        thread.join(60)


real = probe.check


def test_health_check_without_an_observer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    address = ("127.0.0.1", free_port())
    monkeypatch.setattr(probe, "check", lambda: real(address))
    assert probe.main([]) == 1
    assert "refused" in capsys.readouterr().err


# All together, without a look at connections


class World:
    """An observer of interfaces in this process; its time is the test's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1_000_000
        self.configure(interfaceMetrics={"enabled": True})
        path.joinpath("status").write_text(json.dumps(STATUS).replace("eth0", "lo").replace("net1", "lo"))
        wanted = Options(str(path / "config.json"), str(path / "status"))
        pod = {"POD_NAME": "pod", "NODE_NAME": "node"}
        self.observer = Observer(Loop(lambda: self.now), wanted, pod, lambda data: True)

    def configure(self, name: str = "gateway", **observability: object) -> None:
        document = {"namespace": "ns", "name": name, "externalNetwork": "ns/external", "observability": observability}
        self.path.joinpath("config.json").write_text(json.dumps(document))

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1_000_000)
        self.observer.tick(self.now)

    def value(self, name: str, *labels: str) -> int | None:
        for line in self.observer.metrics().splitlines():
            if line.startswith(f"{metrics.PREFIX}{name}{{") and all(label in line for label in labels):
                return int(line.rpartition(" ")[2])
        return None

    def reloads(self) -> tuple[int | None, int | None]:
        name = "observability_config_reload_total"
        return self.value(name, 'result="success"'), self.value(name, 'result="error"')


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_configuration_is_read_again_every_two_seconds(world: World) -> None:
    assert world.reloads() == (1, None)
    world.wait(2)
    assert world.reloads() == (1, None), "nothing is new"
    world.configure()
    world.wait(1.9)
    assert world.value("interface_rx_bytes_total", 'type="external"') is not None
    world.wait(0.1)
    assert world.reloads() == (2, None)
    assert world.value("interface_rx_bytes_total", 'type="external"') is None
    assert world.value("observability_collector_up", '"interface"') == 0


def test_a_bad_configuration_is_counted_and_the_old_one_kept(world: World) -> None:
    config = world.path / "config.json"
    good = config.read_text()
    for number, bad in enumerate(("{", "{}", good.replace('"gateway"', '"other"'), good.replace("true", "3")), 1):
        config.write_text(bad)
        world.wait(2)
        assert world.reloads() == (1, number)
    config.unlink()
    world.wait(2)
    world.wait(2)
    assert world.reloads() == (1, 6)
    assert world.value("observability_collector_up", '"interface"') == 1
    assert world.value("interface_rx_bytes_total", 'name="gateway"') is not None
    config.write_text(good)
    world.wait(2)
    assert world.reloads() == (1, 6), "it is the one in use"


def test_interfaces_that_come_later_are_found(world: World) -> None:
    status = world.path / "status"
    named = status.read_text()
    status.unlink()
    for trouble in (None, "[]", named.replace('"lo"', '"no-such-0"', 1)):
        if trouble is not None:
            status.write_text(trouble)
        assert world.value("observability_collector_up", '"interface"') == 0
    status.write_text(named)
    assert world.value("observability_collector_up", '"interface"') == 1
    assert world.value("observability_errors_total", '"interface"', '"collect"') == 3
    status.write_text("no longer")
    assert world.value("observability_collector_up", '"interface"') == 1, "the names are known"


def test_pages(world: World) -> None:
    def get(path: str) -> str:
        return (world.observer.respond(f"GET {path} HTTP/1.1\r\n\r\n".encode()) or b"").decode()

    assert get("/healthz").endswith("\r\n\r\nok\n")
    assert get("/").startswith("HTTP/1.1 404")
    text = get("/metrics").partition("\r\n\r\n")[2]
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z_]+\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\} \d+', line)


def test_main_asks_for_health_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "check", lambda: "HTTP/1.1 200 OK")
    assert observer.main(["-health-check=T"]) == 0
