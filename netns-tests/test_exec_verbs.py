"""Every verb of nat-gateway.sh on the real kernel: what it leaves there, again and again, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from netns import Namespace, carried, require, run, veth

SCRIPT = Path(__file__).resolve().parent.parent / "image" / "rootfs" / "kube-ovn" / "nat-gateway.sh"
TIMEOUT = 90.0  # seconds; what takes that long hangs, for after 60 s a verb says that it got no answer
Result = tuple[int, str, str]
OK: Result = (0, "", "")
NOT_INITIALIZED: Result = (1, "", "nat gateway not initialized\n")
ETH_P_ALL, ETH_P_ARP = 0x0003, 0x0806


@dataclass
class Gateway:
    """A gateway's namespace with ``eth0`` (VPC) and the macvlan ``net1``, and the world outside of it."""

    inside: Namespace
    outside: Namespace
    path: Path
    variant: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "NATGW_IPTABLES": self.variant,
            "NATGW_RUN_DIR": str(self.path / "run"),
            "NATGW_STATE_DIR": str(self.path / "state"),
            "NATGW_ENV_FILE": str(self.path / "nat-gateway.env"),
            "XTABLES_LOCKFILE": str(self.path / "xtables.lock"),  # nobody else on this machine holds it
        }

    def verb(self, line: str, *, where: Namespace | None = None, **environment: str) -> Result:
        """One call as the controllers up to 1.16 make it; it ends when nobody holds its outputs any more."""
        done = subprocess.run(
            ["ip", "netns", "exec", (where or self.inside).name, "/bin/bash", "-c", f"bash {SCRIPT} {line}"],
            env=self.environment | environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def nat(self) -> str:
        """The nat table as upstream's e2e tests read it."""
        return self.inside.run(f"iptables-{self.variant}-save", "-t", "nat")

    def kernel(self) -> str:
        """All that a verb may change: tables without counters and times, addresses, routes, ARP."""
        tables = self.inside.run(f"iptables-{self.variant}-save")
        kept = [re.sub(r" \[\d+:\d+\]$", "", line) for line in tables.splitlines() if not line.startswith("#")]
        shown = [self.inside.run("ip", "-o", "-4", *what) for what in (("addr",), ("route", "show", "table", "all"))]
        flags = re.findall(r"<(.*)>", self.inside.run("ip", "-o", "link", "show", "dev", "net1"))
        return "\n".join([*kept, *shown, *flags])

    def addresses(self) -> str:
        return self.inside.run("ip", "-o", "-4", "addr", "show", "dev", "net1")

    @property
    def pid(self) -> int:
        return int((self.path / "run" / "natgw.pid").read_text())

    def kill(self) -> None:
        """End the daemon and its keeper as their container's end does, and wait until they are gone."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            daemon = self.pid
            keeper = int(Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[1])
            for pid in (keeper, daemon):
                process = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], TIMEOUT)
                finally:
                    os.close(process)


@pytest.fixture(params=["legacy", "nft"])
def gateway(request: pytest.FixtureRequest, make_netns: Callable[[], Namespace]) -> Iterator[Gateway]:
    require("ip", "bash", "iptables-legacy-save", "iptables-nft-save")
    inside, outside = make_netns(), make_netns()
    veth(inside, "eth0", outside, "tenant0")
    veth(outside, "phys0", outside, "wire0")
    run("ip", "-n", outside.name, "link", "add", "link", "phys0", "name", "net1", "type", "macvlan", "mode", "bridge")
    run("ip", "-n", outside.name, "link", "set", "net1", "netns", inside.name)
    inside.run("ip", "addr", "add", "10.0.1.254/24", "dev", "eth0")
    inside.run("ip", "addr", "add", "172.18.0.9/16", "dev", "net1")
    inside.run("ip", "link", "set", "net1", "up")
    carried(inside, "net1")
    # pytest's own directories may be too deep for the name of a socket.
    with tempfile.TemporaryDirectory(prefix="natgw-", ignore_cleanup_errors=True) as directory:
        gateway = Gateway(inside, outside, Path(directory), request.param)
        try:
            yield gateway
        finally:
            gateway.kill()


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


ADDS = (
    "init",
    "subnet-route-add 10.0.2.0/24,10.0.1.1 10.0.3.0/24,10.0.1.1",
    "eip-add 172.18.0.20/16",
    "eip-add 172.18.0.21/16,172.18.0.1",
    "floating-ip-add 172.18.0.20,10.0.1.5",
    "dnat-add 172.18.0.21,80,tcp,10.0.1.7,8080",
    "dnat-add 172.18.0.21,53,UDP,10.0.1.7,53",
    "snat-add 172.18.0.22,10.0.0.0/16",
    "snat-add 172.18.0.22,10.0.1.0/24,--random-fully",
    "snat-add 172.18.0.23,10.0.1.9",
    "ext-subnet-route-add 172.18.0.0/16,172.18.0.1",
)
DELETES = (
    "ext-subnet-route-del 172.18.0.0/16,172.18.0.1",
    "snat-del 172.18.0.23,10.0.1.9/32",
    "snat-del 172.18.0.22,10.0.1.0/24",
    "snat-del 172.18.0.22,10.0.0.0/16",
    "dnat-del 172.18.0.21,53,UDP",
    "dnat-del 172.18.0.21,80,tcp,10.0.1.7,8080",
    "floating-ip-del 172.18.0.20,10.0.1.5",
    "eip-del 172.18.0.21/16",
    "eip-del 172.18.0.20/16",
    "subnet-route-del 10.0.2.0/24",
    "subnet-route-del 10.0.3.0/24",
)


def test_every_verb_and_every_verb_again(gateway: Gateway) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
        after = gateway.kernel()
        assert gateway.verb(line) == OK, f"{line}, again"
        assert gateway.kernel() == after, f"{line}, again"
    full = gateway.kernel()
    for line in ADDS:
        assert gateway.verb(line) == OK, f"{line}, redone"
    assert gateway.kernel() == full
    for line in DELETES:
        assert gateway.verb(line) == OK, line
        after = gateway.kernel()
        assert gateway.verb(line) == OK, f"{line}, again"
        assert gateway.kernel() == after, f"{line}, again"
    for verb in ("floating-ip-del ,", "dnat-del ,,,,", "snat-del ,", "eip-del", "subnet-route-del ''"):
        assert gateway.verb(verb) == OK, verb
    assert gateway.kernel() == after
    rules = [line for line in gateway.nat().splitlines() if re.search(r"--to-(source|destination)", line)]
    assert rules == []
    assert "172.18.0.9/16" in gateway.addresses()
    assert "172.18.0.2" not in gateway.addresses()


def test_what_upstreams_tests_look_for(gateway: Gateway) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
    nat = gateway.nat()
    assert ":HAIRPIN_SNAT" in nat
    for eip in ("172.18.0.20", "172.18.0.21"):
        assert re.search(
            rf"-A HAIRPIN_SNAT -o \b.*\b -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst \b{eip}\b"
            rf" -j SNAT --to-source \b{eip}\b",
            nat,
        )
    for pattern in (
        r"-A EXCLUSIVE_DNAT -d \b172.18.0.20/32\b .* --to-destination \b10.0.1.5\b",
        r"-A EXCLUSIVE_SNAT -s \b10.0.1.5/32\b .* --to-source \b172.18.0.20\b",
        r"-A SHARED_DNAT -d \b172.18.0.21/32\b -p tcp .* --dport 80 -j DNAT --to-destination \b10.0.1.7:8080\b",
        r"-A SHARED_DNAT -d \b172.18.0.21/32\b -p udp .* --dport 53 -j DNAT --to-destination \b10.0.1.7:53\b",
        r"-A SHARED_SNAT\b.*-s 10.0.1.0/24\b.*--to-source 172.18.0.22\b.*--random-fully",
    ):
        assert re.search(pattern, nat), pattern
    ordered = [line for line in nat.splitlines() if line.startswith("-A SHARED_SNAT ")]
    assert [re.findall(r"-s (\S+)", line) for line in ordered] == [["10.0.1.9/32"], ["10.0.1.0/24"], ["10.0.0.0/16"]]
    assert all(" -o net1 " in line for line in ordered)
    mangle = gateway.inside.run(f"iptables-{gateway.variant}-save", "-t", "mangle")
    assert re.search(r"-A VPC_MARK -i eth0 -j MARK --set-x?mark 0x1/0x1", mangle)
    routes = gateway.inside.run("ip", "route")
    assert re.search(r"default via 172.18.0.1 dev net1 .*onlink", routes)
    assert re.search(r"10.0.2.0/24 via 10.0.1.1 dev eth0", routes)


def test_conflicts_fail_with_one_line_that_names_what_stands(gateway: Gateway) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
    before = gateway.kernel()
    for line, standing in (
        ("floating-ip-add 172.18.0.20,10.0.1.6", "172.18.0.20 -> 10.0.1.5"),
        ("floating-ip-add 172.18.0.24,10.0.1.8 172.18.0.20,10.0.1.6", "172.18.0.20 -> 10.0.1.5"),
        ("dnat-add 172.18.0.21,80,tcp,10.0.1.8,8080", "172.18.0.21:80/tcp -> 10.0.1.7:8080"),
        ("dnat-add 172.18.0.21,80,TCP,10.0.1.7,8081", "172.18.0.21:80/tcp -> 10.0.1.7:8080"),
    ):
        code, out, err = gateway.verb(line)
        assert (code, err) == (1, ""), line
        assert standing in one_line(out)
        assert gateway.kernel() == before, line


def test_what_is_no_conflict(gateway: Gateway) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
    before = gateway.kernel()
    assert gateway.verb("snat-add 172.18.0.22,10.0.0.0/16,--random-fully") == OK
    assert gateway.verb("snat-add 172.18.0.22,10.0.1.0/24") == OK
    assert gateway.kernel() == before, "whether --random-fully is asked for is decided once"
    for line in (
        "floating-ip-add 172.18.0.24,10.0.1.5",  # an internal address may have two
        "dnat-add 172.18.0.20,80,tcp,10.0.1.8,80",  # an EIP may have a floating IP and port mappings
        "snat-add 172.18.0.20,10.0.1.0/24",  # a prefix may have several EIPs
    ):
        assert gateway.verb(line) == OK, line


def test_before_init(gateway: Gateway) -> None:
    version = gateway.verb("get-iptables-version")
    assert (version[0], version[2]) == (0, "")
    assert re.fullmatch(r"get-iptables-version\niptables v[0-9]+(\.[0-9]+)+ \((legacy|nf_tables)\)\n", version[1])
    before = gateway.kernel()
    for line in (*ADDS[1:], *DELETES):
        assert gateway.verb(line, GATEWAY_V4="172.18.0.1") == NOT_INITIALIZED, line
    assert gateway.kernel() == before
    assert gateway.verb("help")[::2] == (0, "")
    code, out, err = gateway.verb("no-such-verb")
    assert (code, err) == (1, "")
    assert out.startswith("Unknown command")


def test_init_of_an_interface_that_is_not_there(gateway: Gateway) -> None:
    code, out, err = gateway.verb("init eth0,net7")
    assert (code, out) == (1, "")
    assert "net7" in one_line(err)
    assert not (gateway.path / "nat-gateway.env").exists()
    assert gateway.verb("eip-add 172.18.0.20/16") == NOT_INITIALIZED
    assert gateway.verb("init") == OK
    assert (gateway.path / "nat-gateway.env").read_text() == "VPC_INTERFACE=eth0\nEXTERNAL_INTERFACE=net1\n"


def test_init_with_names_and_with_a_route(gateway: Gateway) -> None:
    gateway.inside.run("ip", "link", "set", "eth0", "down")
    gateway.inside.run("ip", "link", "set", "eth0", "name", "lan0")
    gateway.inside.run("ip", "link", "set", "lan0", "up")
    assert gateway.verb("init lan0,net1") == OK
    assert (gateway.path / "nat-gateway.env").read_text() == "VPC_INTERFACE=lan0\nEXTERNAL_INTERFACE=net1\n"
    assert gateway.verb("init 10.96.0.0/12,10.0.1.1") == OK
    assert "10.96.0.0/12 via 10.0.1.1 dev lan0" in gateway.inside.run("ip", "route")
    assert gateway.verb("eip-add 172.18.0.20/16") == OK
    assert "-A HAIRPIN_SNAT -o lan0 " in gateway.nat()


def test_what_the_kernel_refuses_is_told_and_undone(gateway: Gateway) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
    before = gateway.kernel()
    code, out, err = gateway.verb("subnet-route-add 10.0.4.0/24,10.0.1.1 10.0.5.0/24,10.77.0.1")
    assert (code, out) == (1, "")
    assert "10.0.5.0/24" in one_line(err)
    assert "unreachable" in err
    assert gateway.kernel() == before
    assert gateway.verb("subnet-route-add 10.0.4.0/24,10.0.1.1") == OK


def test_malformed_rules_change_nothing(gateway: Gateway) -> None:
    assert gateway.verb("init") == OK
    before = gateway.kernel()
    for line, field in (
        ("eip-add 172.18.0.20/16 172.18.0.300/16", "address"),
        ("floating-ip-add 172.18.0.20", "internalIp"),
        ("dnat-add 172.18.0.20,0,tcp,10.0.1.5,80", "externalPort"),
        ("snat-add 172.18.0.20,10.0.1.0/40", "internalCIDR"),
    ):
        code, out, err = gateway.verb(line)
        assert (code, out) == (1, ""), line
        assert field in one_line(err)
    assert gateway.kernel() == before


def test_the_gateway_of_the_environment(gateway: Gateway) -> None:
    assert gateway.verb("init", GATEWAY_V4="172.18.0.1", GATEWAY_V6="") == OK
    assert gateway.verb("eip-add 172.18.0.20/16", GATEWAY_V4="172.18.0.1", GATEWAY_V6="") == OK
    assert "default via 172.18.0.1 dev net1" in gateway.inside.run("ip", "route")
    assert gateway.verb("eip-add 172.18.0.20/16", GATEWAY_V4="172.18.0.2") == OK
    assert "default via 172.18.0.2 dev net1" in gateway.inside.run("ip", "route")
    assert gateway.verb("eip-add 172.18.0.20/16", GATEWAY_V4="") == OK
    assert "default via 172.18.0.2 dev net1" in gateway.inside.run("ip", "route")


def test_eip_add_returns_at_once_with_its_announcement_on_the_wire(gateway: Gateway) -> None:
    assert gateway.verb("init") == OK
    # Who hears everything is shown what is sent, too, and that before the call returns that sends it.
    with gateway.inside.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.bind(("net1", ETH_P_ALL))
        wire.setblocking(False)
        took = []
        for eip in ("172.18.0.20", "172.18.0.21", "172.18.0.22"):
            begun = time.monotonic()
            assert gateway.verb(f"eip-add {eip}/16") == OK
            took.append(time.monotonic() - begun)
            heard = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.append(wire.recv(2048))
            address = socket.inet_aton(eip)
            # RFC 5227: an announcement names the address as sender's and as target's.
            assert any(
                frame[12:14] == ETH_P_ARP.to_bytes(2) and frame[28:32] == frame[38:42] == address for frame in heard
            )
    # Again: these may be paced, but nobody waits for them.
    again = []
    for _ in range(3):
        begun = time.monotonic()
        assert gateway.verb("eip-add 172.18.0.20/16") == OK
        again.append(time.monotonic() - begun)
    assert max(min(took), min(again)) < 2  # seconds, which the two repeats of each take


@pytest.mark.parametrize("lost", ["", "run", "state", "run state"], ids=["nothing", "run", "state", "both"])
def test_a_daemon_that_was_killed_comes_back_with_the_next_verb(gateway: Gateway, lost: str) -> None:
    for line in ADDS:
        assert gateway.verb(line) == OK, line
    before = gateway.kernel()
    first = gateway.pid
    gateway.kill()
    for name in lost.split():
        shutil.rmtree(gateway.path / name)
    assert gateway.kernel() == before, "the kernel goes on without it"
    assert gateway.verb("dnat-add 172.18.0.21,80,tcp,10.0.1.7,8080") == OK
    assert gateway.pid != first
    assert gateway.kernel() == before
    code, out, _ = gateway.verb("dnat-add 172.18.0.21,80,tcp,10.0.1.8,8080")
    assert code == 1
    assert "10.0.1.7:8080" in out


def test_the_daemon_holds_nothing_of_the_exec_that_started_it(gateway: Gateway) -> None:
    assert gateway.verb("init") == OK  # it returned: nobody holds its outputs
    held = [os.readlink(f"/proc/{gateway.pid}/fd/{number}") for number in range(3)]
    assert held == ["/dev/null", "/dev/null", str(gateway.path / "run" / "natgw.log")]
    assert os.readlink(f"/proc/{gateway.pid}/cwd") == "/"


def test_a_caller_from_another_namespace(gateway: Gateway) -> None:
    assert gateway.verb("init") == OK
    code, out, err = gateway.verb("eip-add 172.18.0.20/16", where=gateway.outside)
    assert (code, out) == (1, "")
    assert "NATGW_RUN_DIR" in one_line(err)
    assert "172.18.0.20" not in gateway.addresses()


def test_many_verbs_at_once(gateway: Gateway) -> None:
    """Controllers up to 1.14 take no turns."""
    assert gateway.verb("init") == OK
    calls = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                gateway.inside.name,
                "bash",
                str(SCRIPT),
                "floating-ip-add",
                f"172.18.1.{n},10.0.1.{n}",
            ],
            env=gateway.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(1, 41)
    ]
    assert {(*call.communicate(timeout=TIMEOUT), call.returncode) for call in calls} == {("", "", 0)}
    assert gateway.nat().count("-A EXCLUSIVE_DNAT ") == 40
