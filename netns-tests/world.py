"""A small world of namespaces around real gateways: VPCs with tenants, an external network, the Internet.

::

    a1 10.0.1.11 ──┐                           ┌─────────┐              ┌─ rival 192.168.0.99
    a2 10.0.1.12 ──┼─ VPC router ── 10.0.1.254 ┤ gateway ├ net1 ─ wire ─┤
    b  10.0.2.13 ──┘  10.0.x.1            eth0 └─────────┘ macvlan      └─ router 192.168.0.1 ── internet 203.0.113.2

Tenants have the VPC router as their default gateway, and the VPC router has the NAT gateway (its lanIp). The
external router knows nothing of tenants' networks: an answer finds its way back only if its packet was translated.
Every gateway runs the real daemon, started and driven by the real ``nat-gateway.sh``, with directories of its own.
"""

from __future__ import annotations

import contextlib
import difflib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from netns import Namespace, carried, require, veth
from traffic import PATIENCE, Host

SCRIPT = Path(__file__).parent.parent / "image/rootfs/kube-ovn/nat-gateway.sh"

INTERNET = "203.0.113.2"
ROUTER, RIVAL = "192.168.0.1", "192.168.0.99"
OWN = "192.168.0.11"  # the gateway's own external address
A1, A2, B = "10.0.1.11", "10.0.1.12", "10.0.2.13"

PROGRAMS = ("ip", "bash", "conntrack", "iptables-legacy-save", "iptables-nft-save")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """For state that has no event to wait on: look again until it holds; fail after a while, saying what lacks."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)


def set_sysctl(namespace: Namespace, values: dict[str, int]) -> None:
    """Write values under /proc/sys/net of the namespace; the names are like ``ipv4/ip_forward``."""
    with namespace.entered():
        for name, value in values.items():
            Path("/proc/sys/net", name).write_text(str(value))


QUIET = {"ipv6/conf/all/disable_ipv6": 1, "ipv6/conf/default/disable_ipv6": 1}
LOOSE = {"ipv4/conf/all/rp_filter": 0, "ipv4/conf/default/rp_filter": 0}
# OVN's logical routers forward and send no redirects.
ROUTES = {"ipv4/ip_forward": 1, "ipv4/conf/all/send_redirects": 0, "ipv4/conf/default/send_redirects": 0}


class World:
    """The external network, the Internet, and as many VPCs and gateways as a test makes. Use it with ``with``."""

    def __init__(self) -> None:
        require(*PROGRAMS)
        self._undo = contextlib.ExitStack()
        self._hosts: list[Host] = []
        try:
            self._build()
            self.vpc = self.make_vpc()
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _build(self) -> None:
        self.external = self._host("ext")
        self.router = self._host("rt", routes=True)
        self.internet = self._host("inet")
        self.rival = self._host("rival")
        veth(self.external, "r0", self.router, "eth0")
        veth(self.external, "v0", self.rival, "eth0")
        veth(self.external, "p1", self.external, "parent")  # a bridge port cannot carry macvlans
        veth(self.router, "eth1", self.internet, "eth0")
        self.external.ip(
            "link add br0 address 02:00:c0:a8:00:fe type bridge",
            "link set br0 up",
            *(f"link set {port} master br0" for port in ("r0", "v0", "p1")),
        )
        self.router.ip(f"addr add {ROUTER}/24 dev eth0", "addr add 203.0.113.1/24 dev eth1")
        self.internet.ip(f"addr add {INTERNET}/24 dev eth0", "route add default via 203.0.113.1")
        self.rival.ip(f"addr add {RIVAL}/24 dev eth0", f"route add default via {ROUTER}")

    def _host(self, role: str, *, routes: bool = False) -> Host:
        host = Host(role)
        self._undo.callback(host.remove)
        self._hosts.append(host)
        set_sysctl(host, QUIET | LOOSE | (ROUTES if routes else {}))
        return host

    def make_vpc(self) -> Vpc:
        """One more VPC; all have the same addresses."""
        return Vpc(self._host("vpc", routes=True), self._host("a1"), self._host("a2"), self._host("b"))

    def plug(self, **options: Any) -> Gateway:
        """A gateway between a VPC and the external network, not yet initialised; the options are ``Gateway``'s."""
        gateway = Gateway(self, **options)
        self._undo.callback(gateway.remove)
        gateway.attach()
        return gateway

    @contextlib.contextmanager
    def gateway(self, **options: Any) -> Iterator[Gateway]:
        """An initialised gateway; removed afterwards, and the sockets on the hosts closed."""
        gateway = self.plug(**options)
        try:
            gateway.verb("init")
            yield gateway
        finally:
            self.close_sockets()
            gateway.remove()

    def close_sockets(self) -> None:
        """Close what a test opened on the hosts."""
        for host in self._hosts:
            host.close_sockets()

    def external_mac(self, address: str) -> str | None:
        """The hardware address to which the external router would send what is for this address."""
        found = self.router.ip_json("neigh", "show", address, "dev", "eth0")
        return found[0].get("lladdr") if found else None


class Vpc:
    """A VPC router with two subnets and three tenants."""

    LAN_IP = "10.0.1.254"
    LAN_MAC = "02:00:0a:00:01:fe"

    def __init__(self, router: Host, a1: Host, a2: Host, b: Host) -> None:
        self.router, self.a1, self.a2, self.b = router, a1, a2, b
        self.tenants = (a1, a2, b)
        router.ip(
            # With an address of its own a bridge does not take over that of a port that comes.
            *(f"link add br{n} address 02:00:0a:00:0{n}:01 type bridge" for n in (1, 2)),
            *(f"link set {bridge} up" for bridge in ("br1", "br2")),
            "addr add 10.0.1.1/24 dev br1",
            "addr add 10.0.2.1/24 dev br2",
            f"route add default via {self.LAN_IP}",
        )
        for port, host, bridge, address in (("p1", a1, "br1", A1), ("p2", a2, "br1", A2), ("p3", b, "br2", B)):
            veth(router, port, host, "eth0")
            router.ip(f"link set {port} master {bridge}")
            host.ip(f"addr add {address}/24 dev eth0", f"route add default via {address.rpartition('.')[0]}.1")


class Gateway(Host):
    """A gateway's namespace, its directories, and what a controller and an operator do with it.

    ``variant`` is the iptables variant; ``own`` the address of net1 as the CNI gives it (None: noDefaultEIP, net1
    has neither address nor default route); ``environment`` is added to every call; ``state_dir`` is kept by
    whoever gave it; the gateway's own directories are made in ``place``. It has a lock of iptables' to itself, as a pod
    has: it waits for nobody on this machine who holds the common one.
    """

    script: Path = SCRIPT

    def __init__(
        self,
        world: World,
        *,
        vpc: Vpc | None = None,
        variant: str = "legacy",
        own: str | None = f"{OWN}/24",
        environment: dict[str, str] | None = None,
        state_dir: Path | None = None,
        place: Path | None = None,
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="natgw-", dir=place))
        self._lock = {"XTABLES_LOCKFILE": str(self._directory / "xtables.lock")}
        super().__init__("gw")
        self._world, self._vpc, self._own = world, vpc or world.vpc, own
        self.variant = variant
        self.run_dir = self._directory / "run"
        self.state_dir = state_dir or self._directory / "state"
        self.env_file = self._directory / "nat-gateway.env"
        self._settings = self._lock | {
            "NATGW_RUN_DIR": str(self.run_dir),
            "NATGW_STATE_DIR": str(self.state_dir),
            "NATGW_ENV_FILE": str(self.env_file),
            "NATGW_IPTABLES": variant,
        }
        self._environment = {"GATEWAY_V4": ROUTER, **(environment or {})}
        self._added: list[tuple[str, str]] = []
        self._clean = ""
        self.mac = ""

    # --- its place in the world ---------------------------------------------------------------------------

    def attach(self) -> None:
        """Plug eth0 and net1 in, as the CNI does before the first call."""
        world, vpc = self._world, self._vpc
        # The pod's postStart hook; and of what is refused everybody is told, however often that was lately.
        set_sysctl(self, {"ipv4/ip_forward": 1, "ipv4/icmp_ratelimit": 0})
        veth(vpc.router, "gw", self, "eth0")
        vpc.router.ip("link set gw master br1")
        self.ip(f"link set eth0 address {vpc.LAN_MAC}", f"addr add {vpc.LAN_IP}/24 dev eth0")
        name = f"m{self.name[-6:]}"
        world.external.ip(
            f"link add {name} link parent type macvlan mode bridge",
            f"link set {name} netns {self.name} name net1",
        )
        self.ip("link set net1 up")
        carried(self, "net1")
        if self._own:
            self.ip(f"addr add {self._own} dev net1", f"route add default via {ROUTER} dev net1")
        world.router.ip("neigh flush dev eth0")
        self.mac = self.link("net1")["address"]

    def remove(self) -> None:
        """End the daemon and whatever else runs here, unplug, delete; twice is once."""
        shutil.rmtree(self.run_dir, ignore_errors=True)  # first: no daemon is started again without it
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        try:
            with contextlib.ExitStack() as ending:  # all are killed before the end of any is waited for
                for word in listed.stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        ending.enter_context(ended(int(word)))
        finally:
            self.close_sockets()
            # A deleted namespace lives on for a moment; what it is plugged into must not.
            for where, name in ((self._vpc.router.name, "gw"), (self.name, "net1")):
                subprocess.run(["ip", "-n", where, "link", "del", name], check=False, capture_output=True)
            super().remove()
            shutil.rmtree(self._directory, ignore_errors=True)

    # --- the controller's side ----------------------------------------------------------------------------

    def exec(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One call of the script as a controller makes it, with pipes; it may fail."""
        return self.exec_argv(("bash", str(self.script), *words), self._environment | environment)

    def exec_argv(self, argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """What an exec into the pod runs, with the environment that the pod has."""
        values = (f"{name}={value}" for name, value in (self._settings | dict(environment)).items())
        return subprocess.run(
            ["ip", "netns", "exec", self.name, "env", *values, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,  # after 60 s the client gives up, and says why
            check=False,
        )

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """As everywhere; iptables' lock is that of this gateway."""
        return super().run(
            "env", *(f"{name}={value}" for name, value in self._lock.items()), *argv, stdin=stdin, check=check
        )

    def verb(self, *words: str, **environment: str) -> str:
        """One call that must succeed as a controller understands it (exit code 0, silent stderr); its stdout."""
        done = self.exec(*words, **environment)
        if (done.returncode, done.stderr) != (0, ""):
            pytest.fail(f"{words} ended with {done.returncode}: {done.stderr or done.stdout}\n{self.log()}")
        if words[0].endswith("-add"):
            self._added += [(words[0], rule) for rule in words[1:]]
        if words[0] == "init" and not self._clean:
            self._clean = self.saved()
        return done.stdout

    def cut(self, *words: str) -> None:
        """A verb after which no connection stands that it makes stale.

        That is so when it answers, but where the daemon took its two seconds for them (gateway/endings.py): then it
        says itself when it is so.
        """
        began = time.monotonic()
        self.verb(*words)
        if time.monotonic() - began > 2:
            wait_for(lambda: bool(self.status()["ready"]), "the end of stale connections")

    def reset(self) -> None:
        """Delete what verbs have added; afterwards the rules must be those that ``init`` left."""
        deletions: dict[str, list[str]] = {}
        for verb, rule in self._added:
            fields = {"dnat-add": 3, "nft-dnat-map-add": 3, "snat-add": 2, "qos-add": 9}
            identity = rule.split(",")[: fields.get(verb, 1)]
            deletions.setdefault(verb.removesuffix("-add") + "-del", []).append(",".join(identity))
        self._added.clear()
        for verb, rules in deletions.items():
            self.verb(verb, *rules)
        if (left := self.saved()) != self._clean:
            pytest.fail(f"after all deletions this stands:\n{left}\nafter init it was:\n{self._clean}")
        self.run("conntrack", "-F")
        self._world.router.ip("neigh flush dev eth0")

    # --- the operator's side ------------------------------------------------------------------------------

    def saved(self) -> str:
        """Both tables as iptables-save prints them, without times and counters."""
        text = "".join(self.run(f"iptables-{self.variant}-save", "-t", table) for table in ("mangle", "nat"))
        return re.sub(r"\[\d+:\d+\]", "[0:0]", re.sub(r"(?m)^#.*\n", "", text))

    def rules(self, *texts: str) -> list[str]:
        """The lines of ``saved`` that hold all the texts."""
        return [line for line in self.saved().splitlines() if all(text in line for text in texts)]

    def link(self, name: str) -> dict[str, Any]:
        """``ip -j link show`` of one interface."""
        found: dict[str, Any] = self.ip_json("link", "show", name)[0]
        return found

    def net1_addresses(self) -> list[str]:
        """The IPv4 addresses of net1, the primary first."""
        return [info["local"] for info in self.ip_json("-4", "addr", "show", "net1")[0]["addr_info"]]

    def default_routes(self) -> list[dict[str, Any]]:
        return self.ip_json("route", "show", "default")

    def flows(self, *words: str) -> list[str]:
        """The connection tracking entries that hold all the words (such as ``src=10.0.1.11``)."""
        lines = self.run("conntrack", "-L").splitlines()
        return [line for line in lines if set(words) <= set(line.split())]

    def get(self, path: str) -> Any:
        """A document of the HTTP face, which comes up shortly after the exec face."""
        answers: list[Any] = []

        def asked() -> bool:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                answers.append(self._ask(path))
            return bool(answers)

        wait_for(asked, f"an answer on {self.run_dir}/api.sock")
        return answers[0]

    def _ask(self, path: str) -> Any:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.settimeout(PATIENCE)
            connection.sock.connect(str(self.run_dir / "api.sock"))
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, body
        return json.loads(body)

    def status(self) -> dict[str, Any]:
        """``GET /v1/status``."""
        found: dict[str, Any] = self.get("/v1/status")
        return found

    def log(self) -> str:
        """What the daemon has logged."""
        path = self.run_dir / "natgw.log"
        return path.read_text() if path.exists() else "(no log)"

    def logged(self, text: str, times: int = 1) -> None:
        """Wait until the text is in the log so often: its lines are written by a thread that nobody waits for."""
        wait_for(lambda: self.log().count(text) >= times, f"{text!r} in the log, {times} times")

    @property
    def pid(self) -> int:
        return int((self.run_dir / "natgw.pid").read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the daemon for good, that is, until the next call: killed with its keeper, or told to stop."""
        daemon = self.pid
        if number == signal.SIGKILL:
            end(parent(daemon))
        end(daemon, number)

    def kill_daemon(self) -> None:
        """Kill the daemon alone; its keeper starts another."""
        end(self.pid)

    def renew_container(self) -> None:
        """What a new container in the same namespace finds: no daemon, and none of the files."""
        if (self.run_dir / "natgw.pid").exists():
            self.kill()
        for lost in (self.run_dir, self.state_dir):
            shutil.rmtree(lost, ignore_errors=True)
        self.env_file.unlink(missing_ok=True)

    def inside(self, *argv: str) -> str:
        """The stdout of a program that ran where the daemon runs, with the tools there; it must succeed."""
        return self.run(*argv)


def parent(pid: int) -> int:
    """Process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a process a signal that ends it, and wait for its end."""
    with ended(pid, number):
        pass


@contextlib.contextmanager
def ended(pid: int, number: int = signal.SIGKILL) -> Iterator[None]:
    """Send a process a signal that ends it; it has ended when this is left."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, number)
        yield
        readable, _, _ = select.select([descriptor], [], [], PATIENCE)
        assert readable, f"process {pid} did not end on signal {number}"
    finally:
        os.close(descriptor)


def identical(gateway: Gateway, call: Callable[[], object]) -> None:
    """Fail if the call changes anything that the kernel holds or the daemon counts as a change."""

    def look() -> str:
        # IPv4 alone: IPv6 addresses change by themselves, when duplicate address detection ends.
        states = (gateway.ip_text("-4", *words) for words in (("addr",), ("route",), ("rule",)))
        links = "\n".join(str(gateway.link(name)) for name in ("eth0", "net1"))
        return "\n".join([gateway.saved(), *states, links, f"generation {gateway.status()['generation']}"])

    before = look()
    call()
    after = look()
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=0)
    if before != after:
        pytest.fail("\n".join(["something has changed:", *changes]))
