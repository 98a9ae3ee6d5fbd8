"""All verbs work with CAP_NET_ADMIN and CAP_NET_RAW alone, a read-only /proc/sys and the example's seccomp profile."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from confined import BITS, PROFILE, confinement, status
from netns import require
from test_adoption import EVERYTHING
from traffic import ping, tcp
from world import INTERNET, Gateway, World, parent, wait_for

FIP, PORTS, SPREAD = "192.168.0.50", "192.168.0.51", "192.168.0.55"
FAREWELL = f"""
    qos-del egress,net1,3,matchall,,,,50,50 ingress,eth0,2,u32,ip,src,10.0.1.0/24,10,10
    eip-ingress-qos-del {FIP}
    eip-egress-qos-del {FIP}
    snat-del {PORTS},10.0.0.0/16 {SPREAD},10.0.2.0/24
    nft-dnat-map-del {SPREAD},80,tcp
    dnat-del {PORTS},8888,tcp {PORTS},53,udp
    floating-ip-del {FIP}
    eip-del {FIP}/24 {PORTS}/24 {SPREAD}/24
    subnet-route-del 10.0.2.0/24
"""


class Confined(Gateway):
    """A gateway in whose pod nothing has more than it needs."""

    def exec_argv(self, argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return super().exec_argv((*confinement(), *argv), environment)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("setpriv", "unshare", "tc", "nft")
    with World() as made:
        yield made


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_every_verb_works_with_no_more_than_is_needed(world: World, variant: str) -> None:
    gateway = Confined(world, variant=variant, environment={"NATGW_INPUT": "protect"})
    try:
        gateway.attach()
        gateway.verb("init")
        for line in EVERYTHING.strip().splitlines():
            gateway.verb(*line.split())
        for pid in (gateway.pid, parent(gateway.pid)):
            said = status(pid)
            assert [int(said[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [BITS] * 3
            assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1")
        assert not _may_write(gateway.pid)
        assert gateway.run("cat", "/proc/sys/net/ipv4/conf/net1/promote_secondaries") == "1\n"
        works(world)
        wait_for(lambda: gateway.get("/v1/traffic")["collector"]["running"], "the flow watcher")
        gateway.kill_daemon()  # the keeper starts another, as confined
        wait_for(lambda: gateway.get("/v1/status")["ready"], "the next daemon")
        works(world)
        gateway.run(f"iptables-{variant}", "-w", "-t", "nat", "-F", "SHARED_DNAT")
        wait_for(lambda: len(gateway.rules("--dport 8888")) == 1, "what others deleted to be put back")
        for line in FAREWELL.strip().splitlines():
            gateway.verb(*line.split())
        gateway.kill(signal.SIGTERM)
    finally:
        world.close_sockets()
        gateway.remove()


def works(world: World) -> None:
    backend, web = world.vpc.a2.tcp_server(80), world.internet.tcp_server(80)
    tcp(world.internet, (PORTS, 8888), backend)
    assert tcp(world.vpc.b, (INTERNET, 80), web).source[0] == SPREAD
    assert tcp(world.vpc.a1, (INTERNET, 80), web).source[0] == FIP
    assert ping(world.internet, FIP, world.vpc.a1) == INTERNET
    world.close_sockets()


def _may_write(pid: int) -> bool:
    """Whether the process could write settings: what its mount namespace says of /proc/sys."""
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    (options,) = (line.split()[5] for line in mounts if line.split()[4] == "/proc/sys")
    return "ro" not in options.split(",")


# Kept apart: once loaded, a profile stays with its process.
_FORBIDDEN = """
import ctypes, os, sys
sys.path.insert(0, {directory!r})
from confined import load
from pathlib import Path
load(Path({profile!r}))
libc = ctypes.CDLL(None, use_errno=True)
number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name
for name, call in (
    ("unshare", lambda: libc.unshare(0x10000000)),
    ("mount", lambda: libc.mount(b"none", b"/", b"tmpfs", 0, None)),
    ("ptrace", lambda: libc.ptrace(16, os.getppid(), None, None)),
    ("setns", lambda: libc.setns(0, 0)),
    ("bpf", lambda: libc.syscall(number(b"bpf"), 0, None, 0)),
    ("a new user namespace", lambda: libc.syscall(number(b"clone"), 0x10000000 | 17, None, None, None, None)),
):
    ctypes.set_errno(0)
    if call() != -1 or ctypes.get_errno() != 1:
        sys.exit(name + " is possible: " + os.strerror(ctypes.get_errno()))
"""


def test_the_profile_keeps_out_what_breaks_out() -> None:
    script = _FORBIDDEN.format(directory=str(Path(__file__).parent), profile=str(PROFILE))
    done = subprocess.run(["python3", "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
