"""A small real OVN with two of our gateways behind its router, in namespaces: userspace datapath, no kernel module.

                      logical router r                       outside (a bridge)
    client 10.0.2.x ---[ls-client]-- r --[ls-gateways]-- gateway 10.0.1.11 | 172.30.0.11 --+-- 172.30.0.100 server
                                     10.0.1.1         \\- gateway 10.0.1.12 | 172.30.0.12 --/    203.0.113.10

The router has a default route by each gateway, with BFD. Each gateway masquerades, so the server sees which one a
packet took. OVN's and Open vSwitch's daemons are children of the test, and everything they write is in one directory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netns import Namespace, require, run, veth

ROOTFS = Path(__file__).parent.parent / "image" / "rootfs"
SUPERVISOR = ROOTFS / "kube-ovn" / "kube-ovn-bfdd-supervisor"
SCHEMAS = {
    "conf": "/usr/share/openvswitch/vswitch.ovsschema",
    "nb": "/usr/share/ovn/ovn-nb.ovsschema",
    "sb": "/usr/share/ovn/ovn-sb.ovsschema",
}
PROGRAMS = (
    *("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovn-northd", "ovn-controller", "ovn-nbctl"),
    *("ip", "ethtool", "nft", "sysctl"),
)
SERVER, SERVER_PORT = "203.0.113.10", 9000
# OVN's choice among equal routes looks at the addresses of a datagram, not at its ports; so the client has several.
CLIENTS = [f"10.0.2.{last}" for last in range(10, 34)]
ROUTER = "10.0.1.1"
PREFIX_6 = "fd00:1::"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Poll until the condition holds; the patience is for loaded machines, and for OVN, which may write 5 s late."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"after {seconds} s still not: {what}")
        time.sleep(0.02)


def listens(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        return asked.connect_ex(str(path)) == 0


class Gateway:
    """A gateway's namespace, and the supervisor that speaks BFD in it."""

    def __init__(self, number: int, run_dir: Path, timers: tuple[int, int], settings: dict[str, str]) -> None:
        self.inner, self.outer = f"10.0.1.1{number}", f"172.30.0.1{number}"
        self.mac = f"0a:00:00:00:01:1{number}"
        self.port = f"gw{number}"
        self.netns = Namespace()
        self.run_dir = run_dir / self.port
        self.log = run_dir / f"{self.port}.log"
        interval, multiplier = timers
        self._environment = {
            **os.environ,
            "NATGW_RUN_DIR": str(self.run_dir),
            "NATGW_PYTHON": sys.executable,
            "POD_IPS": self.inner,
            "BFD_PEER_IPS": ROUTER,
            "BFD_MIN_TX": str(interval),
            "BFD_MIN_RX": str(interval),
            "BFD_MULTI": str(multiplier),
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def add_ipv6(self) -> str:
        """Give the inner side an IPv6 address, from which the speaker speaks too, and return it."""
        address = f"{PREFIX_6}1{self.port[-1]}"
        self.netns.run("ip", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        self._environment["POD_IPS"] += f",{address}"
        self._environment["BFD_PEER_IPS"] += f",{PREFIX_6}1"
        return address

    def start(self, **settings: str) -> None:
        """Run the supervisor as its pod would."""
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.netns.name, SUPERVISOR, "run"],
                env={**self._environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self, how: signal.Signals) -> float:
        """Send a signal and return how many seconds the supervisor lived on."""
        assert self.process is not None
        begin = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(30)
        self.process = None
        return time.monotonic() - begin

    def kill_speaker(self) -> None:
        """Kill what speaks, as the kernel does where memory is short; the process above it lives."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait_until(lambda: children.read_text() != "", f"{self.port} has a speaker")
        (speaker,) = children.read_text().split()
        os.kill(int(speaker), signal.SIGKILL)
        wait_until(lambda: speaker not in children.read_text().split(), "it is gone")

    def natgw(self, *words: str) -> str:
        """What natgw prints in this gateway's container."""
        return subprocess.run(
            [ROOTFS / "usr/bin/natgw", *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=40,
        ).stdout

    def status(self) -> dict[str, dict[str, object]]:
        said: dict[str, dict[str, object]] = json.loads(self.natgw("status", "--json"))
        return said

    def ready(self) -> bool:
        """The supervisor answers, and every session is Up."""
        asked = subprocess.run([SUPERVISOR, "ready"], env=self._environment, capture_output=True, check=False)
        return asked.returncode == 0

    def told(self) -> list[str]:
        """The supervisor's log."""
        return self.log.read_text().splitlines()


class Ovn:
    """The whole world. ``timers`` are milliseconds and multiplier of both sides; ``settings`` the supervisors'."""

    def __init__(self, timers: tuple[int, int] = (100, 3), settings: dict[str, str] | None = None) -> None:
        require(*PROGRAMS)
        missing = [path for path in SCHEMAS.values() if not os.path.exists(path)]
        if missing:
            pytest.fail(f"this test needs OVN's schemas: {', '.join(missing)}")
        self.dir = Path(tempfile.mkdtemp(prefix="ovn-"))
        self._environment = os.environ | {
            f"{owner}_{what}": str(self.dir) for owner in ("OVS", "OVN") for what in ("RUNDIR", "LOGDIR", "DBDIR")
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._namespaces: list[Namespace] = []
        self.gateways: list[Gateway] = []
        self.timers = timers
        try:
            self.switch, self.outside, self.client, self.server = (self._namespace() for _ in range(4))
            for number in (1, 2):
                self.gateways.append(Gateway(number, self.dir, timers, settings or {}))
                self._namespaces.append(self.gateways[-1].netns)
            self._wire()
            self._start_daemons()
            self._configure()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process that was started here and remove the namespaces."""
        for gateway in self.gateways:
            if gateway.process is not None:
                gateway.end(signal.SIGKILL)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait(10)
        for namespace in self._namespaces:
            namespace.remove()
        shutil.rmtree(self.dir, ignore_errors=True)

    # What can be asked

    def nbctl(self, *words: str) -> str:
        """The output of ovn-nbctl."""
        return self._tool("ovn-nbctl", f"--db=unix:{self.dir}/db.sock", *words)

    def bfd(self) -> dict[str, str]:
        """The status of each session in OVN's database, by the gateway's address."""
        rows = self.nbctl("--format=csv", "--no-headings", "--columns=dst_ip,status", "list", "bfd")
        return dict(line.replace('"', "").split(",") for line in rows.split())

    def serving(self) -> set[str]:
        """The gateways that OVN's router uses."""
        return {address for address, status in self.bfd().items() if status == "up"}

    def wait_serving(self, *gateways: Gateway) -> None:
        """Wait until OVN's router uses these gateways and no others."""
        wanted = {gateway.inner for gateway in gateways}
        wait_until(lambda: self.serving() == wanted, f"OVN serves by {wanted} and nobody else: {self.bfd()}")

    # What can be done to it

    def silence(self) -> None:
        """Stop ovn-controller, which speaks BFD, without a word."""
        self._controller.send_signal(signal.SIGSTOP)

    def speak(self) -> None:
        """End ``silence``."""
        self._controller.send_signal(signal.SIGCONT)

    # How it is made

    def _namespace(self) -> Namespace:
        self._namespaces.append(Namespace())
        return self._namespaces[-1]

    def _wire(self) -> None:
        run("ip", "-n", self.outside.name, "link", "add", "external", "type", "bridge")
        run("ip", "-n", self.outside.name, "link", "set", "external", "up")
        self._plug_inside(self.client, "client", "0a:00:00:00:02:0a", f"{CLIENTS[0]}/24")
        for address in CLIENTS[1:]:
            self.client.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.client.run("ip", "route", "add", "default", "via", "10.0.2.1")
        self._plug_outside(self.server, "server", "172.30.0.100/24")
        self.server.run("ip", "address", "add", f"{SERVER}/32", "dev", "lo")
        for gateway in self.gateways:
            netns = gateway.netns
            for setting in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
                netns.run("sysctl", "-q", "-w", f"net.ipv4.{setting}")
            self._plug_inside(netns, gateway.port, gateway.mac, f"{gateway.inner}/24")
            self._plug_outside(netns, gateway.port, f"{gateway.outer}/24")
            netns.run("ip", "route", "add", "default", "via", "172.30.0.100")
            netns.run("ip", "route", "add", "10.0.2.0/24", "via", ROUTER)
            netns.run(
                "nft",
                "add table ip veg; add chain ip veg out { type nat hook postrouting priority 100; }; "
                "add rule ip veg out oifname net1 masquerade",
            )

    def _plug_inside(self, netns: Namespace, port: str, mac: str, address: str) -> None:
        veth(self.switch, f"p-{port}", netns, "eth0")
        netns.run("ip", "link", "set", "eth0", "address", mac)
        netns.run("ip", "address", "add", address, "dev", "eth0")
        # The userspace datapath hands on what it gets, so checksums have to be complete when it gets them.
        netns.run("ethtool", "-K", "eth0", "tx", "off")

    def _plug_outside(self, netns: Namespace, port: str, address: str) -> None:
        veth(self.outside, f"x-{port}", netns, "net1")
        self.outside.run("ip", "link", "set", f"x-{port}", "master", "external")
        netns.run("ip", "address", "add", address, "dev", "net1")

    def _start_daemons(self) -> None:
        for name, schema in SCHEMAS.items():
            run("ovsdb-tool", "create", f"{self.dir}/{name}.db", schema)
        socket_path = f"unix:{self.dir}/db.sock"
        # One server has the databases of Open vSwitch and both of OVN.
        databases = [f"{self.dir}/{name}.db" for name in SCHEMAS]
        self._daemon("ovsdb-server", f"--remote=p{socket_path}", *databases)
        wait_until(lambda: listens(self.dir / "db.sock"), "ovsdb-server listens")
        self._vsctl("--no-wait", "init")
        identity = {
            *("system-id=test", "hostname=test", f"ovn-remote={socket_path}"),
            *("ovn-encap-type=geneve", "ovn-encap-ip=127.0.0.1"),
        }
        identifiers = [f"external_ids:{one}" for one in sorted(identity)]
        self._vsctl("--no-wait", "set", "open_vswitch", ".", *identifiers)
        bridge = ["datapath_type=netdev", "fail-mode=secure"]
        self._vsctl("--no-wait", "add-br", "br-int", "--", "set", "bridge", "br-int", *bridge)
        self._daemon("ovs-vswitchd", "--disable-system", socket_path)
        self._daemon("ovn-northd", f"--ovnnb-db={socket_path}", f"--ovnsb-db={socket_path}")
        self.nbctl("init")
        self._controller = self._daemon("ovn-controller", socket_path)
        for port in ("client", *(gateway.port for gateway in self.gateways)):
            self._vsctl(
                *("add-port", "br-int", f"p-{port}", "--", "set", "interface", f"p-{port}"),
                f"external_ids:iface-id={port}",
            )

    def _configure(self) -> None:
        self.nbctl("lr-add", "r")
        for network, mac, address in (
            ("ls-gateways", "0a:00:00:00:01:01", f"{ROUTER}/24"),
            ("ls-client", "0a:00:00:00:02:01", "10.0.2.1/24"),
        ):
            router_port, switch_port = f"r-{network}", f"{network}-r"
            self.nbctl("ls-add", network)
            self.nbctl("lrp-add", "r", router_port, mac, address)
            self.nbctl("lsp-add", network, switch_port)
            self.nbctl("lsp-set-type", switch_port, "router")
            self.nbctl("lsp-set-addresses", switch_port, "router")
            self.nbctl("lsp-set-options", switch_port, f"router-port={router_port}")
        ports = [("ls-client", "client", f"0a:00:00:00:02:0a {' '.join(CLIENTS)}")]
        ports += [("ls-gateways", one.port, f"{one.mac} {one.inner}") for one in self.gateways]
        for network, port, addresses in ports:
            self.nbctl("lsp-add", network, port)
            self.nbctl("lsp-set-addresses", port, addresses)
        # OVN speaks BFD only on a port that is bound to a chassis.
        self.nbctl("lrp-set-gateway-chassis", "r-ls-gateways", "test", "10")
        for gateway in self.gateways:
            self._default_route("0.0.0.0/0", gateway.inner)
        self.nbctl("--wait=hv", "--timeout=60", "sync")

    def add_ipv6(self) -> None:
        """IPv6 beside IPv4 between router and gateways: addresses, sessions and default routes. Before they start."""
        networks = f'networks="{ROUTER}/24","{PREFIX_6}1/64"'
        self.nbctl("set", "logical_router_port", "r-ls-gateways", networks)
        for gateway in self.gateways:
            address = gateway.add_ipv6()
            self.nbctl("lsp-set-addresses", gateway.port, f"{gateway.mac} {gateway.inner} {address}")
            self._default_route("::/0", address)

    def _default_route(self, prefix: str, gateway: str) -> None:
        """An equal default route with BFD."""
        interval, multiplier = self.timers
        session = self.nbctl(
            *("create", "bfd", "logical_port=r-ls-gateways", f'dst_ip="{gateway}"'),
            *(f"min_tx={interval}", f"min_rx={interval}", f"detect_mult={multiplier}"),
        ).strip()
        self.nbctl(
            *("--id=@route", "create", "logical_router_static_route", f'ip_prefix="{prefix}"'),
            *(f'nexthop="{gateway}"', f"bfd={session}", "--", "add", "logical_router", "r"),
            *("static_routes", "@route"),
        )

    def _daemon(self, *argv: str) -> subprocess.Popen[bytes]:
        with open(self.dir / f"{argv[0]}.log", "ab") as output:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self.switch.name, *argv],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._daemons.append(started)
        return started

    def _vsctl(self, *words: str) -> str:
        return self._tool("ovs-vsctl", f"--db=unix:{self.dir}/db.sock", *words)

    def _tool(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout
