"""The observer of an egress gateway's pod on the real kernel, run as by Kubernetes: user 65534, CAP_NET_ADMIN only.

A client's connections go through a namespace that masquerades them to a server, as through an egress gateway.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import Namespace, require, veth

from gateway.observer import ctnetlink, source
from gateway.observer.flow import Flow
from gateway.observer.metrics import PREFIX, Tally
from gateway.observer.output import Complaints
from gateway.observer.source import ConntrackSource, Pace
from gateway.observer.table import FlowTable
from gateway.small.loop import Loop, monotonic_us
from gateway.watcher.accounts import ACTIVE_OUT, NEW_OUT, PACKETS_OUT, TOTAL
from gateway.watcher.ledger import Ledger

CHECKOUT = Path(__file__).parent.parent
CLIENT, INSIDE = ("10.90.1.2", "fd90:1::2"), ("10.90.1.1", "fd90:1::1")
SERVER, OUTSIDE = ("10.90.2.2", "fd90:2::2"), ("10.90.2.1", "fd90:2::1")
PORT = 7777
PATIENCE = 20.0  # seconds to wait for what must come, on a busy machine
ONLY_NET_ADMIN = [f"--{kind}={'-all,+net_admin'}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
NOTHING = [f"--{kind}=-all" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
BASE = {"namespace": "ns1", "name": "gw", "externalNetwork": "ns1/external"}
EVERYTHING = {
    "interfaceMetrics": {"enabled": True},
    "conntrack": {"metrics": {"enabled": True}, "log": {"enabled": True}},
}
STATUS = [{"name": "kube-ovn", "interface": "eth0", "default": True}, {"name": "ns1/external", "interface": "net1"}]


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> Any:
    """What the condition returns once that is true."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return result


class EgressPath:
    """Client, gateway and server, with IPv4 and IPv6."""

    def __init__(self, make_netns: Callable[[], Namespace]) -> None:
        require("ip", "iptables", "ip6tables", "conntrack", "setpriv", "curl", "sysctl")
        self.client, self.gateway, self.server = make_netns(), make_netns(), make_netns()
        veth(self.client, "eth0", self.gateway, "eth0")
        veth(self.gateway, "net1", self.server, "eth0")
        for place, device, addresses in (
            (self.client, "eth0", CLIENT),
            (self.gateway, "eth0", INSIDE),
            (self.gateway, "net1", OUTSIDE),
            (self.server, "eth0", SERVER),
        ):
            place.run("ip", "address", "add", f"{addresses[0]}/24", "dev", device)
            place.run("ip", "address", "add", f"{addresses[1]}/64", "dev", device, "nodad")
        self.client.run("ip", "route", "add", "default", "via", INSIDE[0])
        self.client.run("ip", "route", "add", "default", "via", INSIDE[1])
        settings = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.netfilter.nf_conntrack_acct")
        # No connection ends by itself while a test looks on.
        forever = ("net.netfilter.nf_conntrack_udp_timeout", "net.netfilter.nf_conntrack_udp_timeout_stream")
        values = (*(f"{name}=1" for name in settings), *(f"{name}=3600" for name in forever))
        self.gateway.run("sysctl", "-qw", *values)
        for tool in ("iptables", "ip6tables"):
            self.gateway.run(tool, "-w", "-t", "nat", "-A", "POSTROUTING", "-o", "net1", "-j", "MASQUERADE")
        self.sockets: list[socket.socket] = []

    def socket(self, place: Namespace, kind: int, ipv6: bool = False) -> socket.socket:
        with place.entered():
            made = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, kind)
        made.settimeout(PATIENCE)
        self.sockets.append(made)
        return made

    def udp(self, ipv6: bool = False) -> tuple[str, int, str, int]:
        """Ask and be answered; the connection: who asked, from which port, whom, at which port."""
        server = self.socket(self.server, socket.SOCK_DGRAM, ipv6)
        server.bind((SERVER[ipv6], PORT))
        client = self.socket(self.client, socket.SOCK_DGRAM, ipv6)
        client.connect((SERVER[ipv6], PORT))
        client.send(b"hello")
        data, sender = server.recvfrom(100)
        server.sendto(data * 2, sender)
        assert (sender[0], client.recv(100)) == (OUTSIDE[ipv6], b"hellohello")
        server.close()
        return (*client.getsockname()[:2], *client.getpeername()[:2])

    def tcp(self, ipv6: bool = False) -> tuple[str, int, str, int]:
        """The same over TCP; the connection stays open."""
        server = self.socket(self.server, socket.SOCK_STREAM, ipv6)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((SERVER[ipv6], PORT))
        server.listen()
        client = self.socket(self.client, socket.SOCK_STREAM, ipv6)
        client.connect((SERVER[ipv6], PORT))
        peer, sender = server.accept()
        self.sockets.append(peer)
        assert sender[0] == OUTSIDE[ipv6]
        server.close()
        return (*client.getsockname()[:2], *client.getpeername()[:2])

    def close(self) -> None:
        for made in self.sockets:
            made.close()


@pytest.fixture
def path(make_netns: Callable[[], Namespace]) -> Iterator[EgressPath]:
    made = EgressPath(make_netns)
    try:
        yield made
    finally:
        made.close()


class Container:
    """A place that user 65534 can read, with the observer in it."""

    def __init__(self, directory: Path, place: Namespace) -> None:
        self.directory = directory
        self.place = place
        directory.chmod(0o755)
        # A checkout may lie where only root can read.
        shutil.copytree(CHECKOUT / "image" / "rootfs", directory / "image" / "rootfs")
        for package in ("", "bfd", "observer", "small"):
            target = directory / "gateway" / package
            target.mkdir(exist_ok=True)
            for file in (CHECKOUT / "gateway" / package).glob("*.py"):
                shutil.copy(file, target)
        self.program = directory / "image" / "rootfs" / "kube-ovn" / "vpc-egress-gateway-observer"
        self.config, self.status = directory / "config.json", directory / "network-status"
        self.out, self.err = directory / "out", directory / "err"
        self.configure(EVERYTHING)
        self.status.write_text(json.dumps(STATUS))
        self.running: list[subprocess.Popen[bytes]] = []

    def configure(self, observability: dict[str, Any]) -> None:
        fresh = self.config.with_suffix(".next")
        fresh.write_text(json.dumps({**BASE, "observability": observability}))
        fresh.replace(self.config)

    def command(self, *arguments: str, privileges: list[str] = ONLY_NET_ADMIN) -> list[str]:
        return [
            *("ip", "netns", "exec", self.place.name),
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *privileges),
            *(str(self.program), *arguments),
        ]

    @property
    def environment(self) -> dict[str, str]:
        pod = {"POD_NAME": "gw-0", "NODE_NAME": "node-1", "NATGW_PYTHON": os.path.realpath(sys.executable)}
        return {**os.environ, **pod}

    def start(
        self, *arguments: str, privileges: list[str] = ONLY_NET_ADMIN, port: int = 10666
    ) -> subprocess.Popen[bytes]:
        """Start an observer and wait until it answers."""
        paths = ("--config", str(self.config), "--network-status", str(self.status))
        with self.out.open("ab") as out, self.err.open("ab") as err:
            process = subprocess.Popen(
                self.command(*paths, *arguments, privileges=privileges),
                env=self.environment,
                stdout=out,
                stderr=err,
            )
        self.running.append(process)

        def answers() -> bool:
            assert process.poll() is None, self.err.read_text()
            return self.get("/healthz", port) == "ok\n"

        until(answers)
        return process

    def get(self, path: str, port: int = 10666) -> str:
        """A page; nothing when it does not answer."""
        return self.place.run("curl", "-s", f"http://127.0.0.1:{port}{path}", check=False)

    def value(self, name: str, *labels: str, port: int = 10666) -> int | None:
        """The sum of the samples with these labels; None when there is none."""
        page: str = until(lambda: self.get("/metrics", port))
        found = [
            int(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith(f"{PREFIX}{name}{{") and all(label in line for label in labels)
        ]
        return sum(found) if found else None

    def watching(self, port: int = 10666) -> bool:
        return self.value("observability_collector_up", '"conntrack"', port=port) == 1

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def recorded(self, event: str, connection: tuple[str, int, str, int]) -> dict[str, Any] | None:
        names = ("sourceIP", "sourcePort", "destinationIP", "destinationPort")
        for record in self.records():
            if record["event"] == event and tuple(record["original"].get(name) for name in names) == connection:
                return record
        return None

    def stop(self) -> list[int]:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        try:
            return [process.wait(PATIENCE) for process in self.running]
        finally:
            for process in self.running:
                process.kill()


@pytest.fixture
def container(path: EgressPath) -> Iterator[Container]:
    with tempfile.TemporaryDirectory(prefix="observer-") as directory:
        made = Container(Path(directory), path.gateway)
        try:
            yield made
        finally:
            codes = made.stop()
        assert set(codes) <= {0}


def test_a_flow_from_start_to_forced_end(path: EgressPath, container: Container) -> None:
    process = container.start()
    until(container.watching)
    connections = {("tcp", ipv6): path.tcp(ipv6) for ipv6 in (False, True)}
    connections |= {("udp", ipv6): path.udp(ipv6) for ipv6 in (False, True)}
    for (protocol, ipv6), connection in connections.items():
        start = until(lambda connection=connection: container.recorded("start", connection))
        translated = {**start["original"], "sourceIP": OUTSIDE[ipv6], "sourcePort": start["translated"]["sourcePort"]}
        family = "ipv6" if ipv6 else "ipv4"
        assert start["translated"] == translated
        assert (start["protocol"], start["addressFamily"], start["natType"]) == (protocol, family, ["snat"])
        assert (start["namespace"], start["name"], start["pod"], start["node"]) == ("ns1", "gw", "gw-0", "node-1")
        assert "counters" not in start
        labels = (f'address_family="{family}"', f'protocol="{protocol}"', 'nat_type="snat"')
        assert container.value("conntrack_nat_flows_active", *labels) == 1
        assert container.value("conntrack_nat_flows_started_total", *labels) == 1
        path.gateway.run(
            *("conntrack", "-D", "-w", str(start["zone"]), "-p", protocol),
            *("-s", connection[0], "-d", connection[2], "--sport", str(connection[1]), "--dport", str(connection[3])),
            *(("-f", "ipv6") if ipv6 else ()),
        )
        end = until(lambda connection=connection: container.recorded("end", connection))
        assert end["conntrackID"] == start["conntrackID"]
        assert end["translated"] == start["translated"]
        if protocol == "udp":
            header = 48 if ipv6 else 28
            assert end["counters"] == {
                "originalPackets": 1,
                "originalBytes": header + 5,
                "replyPackets": 1,
                "replyBytes": header + 10,
            }
            assert container.value("conntrack_nat_bytes_total", *labels, 'direction="reply"') == header + 10
        assert container.value("conntrack_nat_flows_active", *labels) == 0
        assert container.value("conntrack_nat_flows_ended_total", *labels) == 1
    assert container.value("observability_log_records_total", 'event="end"') == 4
    assert container.value("observability_conntrack_accounting_available") == 1
    assert container.value("observability_errors_total") is None
    status = Path(f"/proc/{process.pid}/status").read_text()
    facts = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    assert facts["Uid"].split() == facts["Gid"].split() == ["65534"] * 4
    assert facts["CapEff"] == f"{1 << 12:016x}"
    assert int(facts["VmHWM"].split()[0]) <= 32 * 1024


def test_the_loss_of_interfaces_does_not_stop_the_other_collector(path: EgressPath, container: Container) -> None:
    container.start()
    external = ("interface_rx_bytes_total", 'interface="net1"', 'type="external"')
    before = container.value(*external)
    assert before is not None
    path.udp()
    assert (container.value(*external) or 0) >= before + 28 + 10
    assert container.value("interface_tx_packets_total", 'interface="eth0"', 'type="internal"')
    assert container.value("observability_collector_up", '"interface"') == 1
    container.start("--network-status", "/does-not-exist", "--listen-address", "127.0.0.1:10667", port=10667)
    until(lambda: container.watching(10667))
    assert container.value("observability_collector_up", '"interface"', port=10667) == 0
    assert (container.value("observability_errors_total", '"interface"', port=10667) or 0) >= 1


def test_configuration_changes_without_a_restart(path: EgressPath, container: Container) -> None:
    container.start("-v=3", "--logtostderr")
    until(container.watching)

    def reloads(result: str) -> int:
        return container.value("observability_config_reload_total", f'result="{result}"') or 0

    assert reloads("success") == 1
    limited = {"enabled": True, "events": ["end"], "rateLimit": {"recordsPerSecond": 1, "burst": 1}}
    container.configure({"conntrack": {"metrics": {"enabled": True}, "log": limited}})
    until(lambda: reloads("success") == 2)
    flood(path, 50)
    begun = time.monotonic()
    path.gateway.run("conntrack", "-D", "-p", "udp")
    until(lambda: container.value("conntrack_nat_flows_ended_total") == 50)
    written = until(lambda: container.value("observability_log_records_total"))
    # One at once, and one more for every second that it took over the ends.
    assert 1 <= written <= 1 + (time.monotonic() - begun)
    assert container.value("observability_log_drops_total", 'reason="rate_limit"') == 50 - written
    assert [record["event"] for record in container.records()] == ["end"] * written
    container.config.write_text("{ no JSON")
    until(lambda: reloads("error") >= 2)
    assert reloads("success") == 2
    assert container.watching(), "the old configuration stays"
    container.configure({"interfaceMetrics": {"enabled": True}})
    until(lambda: reloads("success") == 3)
    assert not container.watching()
    assert container.value("conntrack_nat_flows_active") is None
    container.configure(EVERYTHING)
    until(container.watching)


def test_without_the_capability_it_stays_and_says_so(path: EgressPath, container: Container) -> None:
    process = container.start(privileges=NOTHING)
    until(lambda: (container.value("observability_errors_total", '"conntrack"', '"session"') or 0) >= 2)
    assert not container.watching()
    assert container.value("observability_collector_up", '"interface"') == 1
    assert process.poll() is None
    assert container.err.read_text() == "conntrack: Operation not permitted\n"
    assert container.records() == []


def test_health_check(container: Container) -> None:
    def check() -> int:
        command = container.command("--health-check")
        return subprocess.run(command, env=container.environment, capture_output=True, check=False).returncode

    assert check() == 1
    container.start()
    until(lambda: check() == 0)  # it waits for an answer for a second


# The source of connections, in this process


class Watch:
    """A source in a namespace, with a clock that the test can put forward."""

    def __init__(self, place: Namespace, fed: source.Table | None = None, groups: int = ctnetlink.EVENT_GROUPS) -> None:
        self.skipped = 0
        self.loop = Loop(lambda: monotonic_us() + self.skipped)
        self.tally = Tally()
        self.happened: list[tuple[str, Flow]] = []
        self.table = FlowTable(lambda event, flow: self.happened.append((event, flow)))
        self.place = place
        self.source = ConntrackSource(
            self.loop, self.table if fed is None else fed, self.tally, Complaints(self.tally), groups=groups
        )
        with place.entered():
            self.source.open()
            self.until(lambda: self.tally.up["conntrack"])

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        with self.place.entered():
            while not condition():
                assert time.monotonic() < end, "it did not happen"
                # A turn waits for events; here something may come to pass without one.
                self.source.tick(self.loop.clock())
                self.loop.turn()

    def skip_to_next_dump(self) -> None:
        self.until(lambda: self.source._next_try is not None)
        due = self.source._next_try
        assert due is not None
        self.skipped += max(0, due - self.loop.clock())


def test_the_end_of_a_flow_from_before_is_noticed(path: EgressPath) -> None:
    """The kernel sends no event for the end of a connection that nobody heard begin."""
    connection = path.udp()
    watch = Watch(path.gateway)
    assert len(watch.table) == 1
    assert watch.happened == []
    path.gateway.run("conntrack", "-D", "-p", "udp")
    watch.skip_to_next_dump()
    watch.until(lambda: len(watch.table) == 0)
    ((event, flow),) = watch.happened
    assert (event, flow.original.source_port, flow.original.destination_port) == ("end", connection[1], connection[3])
    assert flow.counters is not None
    watch.source.close()


def test_beginnings_are_told_of_when_asked_for(path: EgressPath) -> None:
    watch = Watch(path.gateway, groups=ctnetlink.END_GROUP)
    heard = watch.table.events

    def ten_come_and_go(ended: int) -> None:
        flood(path, 10)
        path.gateway.run("conntrack", "-F")
        watch.until(lambda: heard["end"] == ended)

    ten_come_and_go(10)
    assert heard["new"] == 0
    watch.source.hear(ctnetlink.LIFE_GROUPS, Pace())
    ten_come_and_go(20)
    assert heard["new"] == 10
    watch.source.hear(ctnetlink.END_GROUP, Pace())
    ten_come_and_go(30)
    assert heard["new"] == 10
    assert watch.tally.errors == {}
    watch.source.close()


def test_lost_events_are_made_good_for(path: EgressPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_RECEIVE_BUFFER", 2048)
    watch = Watch(path.gateway)
    flood(path, 300)
    watch.until(lambda: watch.tally.errors["conntrack", "overrun"] > 0)
    watch.until(lambda: len(watch.table) == 300)
    path.gateway.run("conntrack", "-F")
    watch.until(lambda: len(watch.table) == 0)
    ended = [flow.identifier for event, flow in watch.happened if event == "end"]
    assert len(ended) == len(set(ended)) == 300
    assert watch.tally.up["conntrack"]
    watch.source.close()


def test_lost_ends_are_made_good_for_where_nobody_hears_beginnings(
    path: EgressPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_RECEIVE_BUFFER", 2048)
    ledger = Ledger(lambda event, flow: None)
    watch = Watch(path.gateway, ledger, ctnetlink.END_GROUP)
    flood(path, 300)
    watch.skip_to_next_dump()
    watch.until(lambda: len(ledger) == 300)
    path.gateway.run("conntrack", "-F")
    watch.until(lambda: watch.tally.errors["conntrack", "overrun"] > 0)
    watch.until(lambda: len(ledger) == 0)
    total = ledger.accounts.sums()[TOTAL]
    assert (total[NEW_OUT], total[ACTIVE_OUT], total[PACKETS_OUT]) == (300, 0, 300)
    assert ledger.events["new"] == 0
    assert ledger.events["end"] < 300
    watch.source.close()


def flood(path: EgressPath, connections: int) -> None:
    """So many new connections, each of one packet; the gateway has translated all of them when this returns."""
    client = path.socket(path.client, socket.SOCK_DGRAM)

    def refused() -> int:
        """Datagrams that have reached the server, where nobody listens."""
        with path.server.entered():
            names, values = [
                line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if "Udp: " in line
            ]
        return int(dict(zip(names, values, strict=True))["NoPorts"])

    before = refused()
    for number in range(connections):
        client.sendto(b"", (SERVER[0], 10000 + number))
        # A neighbour that is not known yet keeps a hundred packets for later, and a busy processor a thousand.
        if number % 100 == 0:
            until(lambda sent=number + 1: refused() == before + sent)
    until(lambda: refused() == before + connections)


def test_a_flood_is_followed_event_by_event(path: EgressPath, container: Container) -> None:
    container.configure({"conntrack": {"metrics": {"enabled": True}}})
    container.start()
    until(container.watching)
    flood(path, 20_000)
    # The kernel's identifiers are 32 bits of a hash: at every twentieth time two of so many connections share one.
    known = len(set(re.findall(r" id=(\d+)", path.gateway.run("conntrack", "-L", "-p", "udp", "-o", "id"))))
    assert known > 19_990
    until(lambda: container.value("conntrack_nat_flows_active", '"udp"') == known, 60)
    path.gateway.run("conntrack", "-F")
    until(lambda: container.value("conntrack_nat_flows_ended_total", '"udp"') == 20_000, 60)
    assert container.value("conntrack_nat_flows_active", '"udp"') == 0
    assert container.value("observability_errors_total", '"overrun"') is None
