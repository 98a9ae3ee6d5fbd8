"""The place where things are measured: a gateway between a tenants' side and the outside, nothing else in the way.

::

    tenants ── east ═ eth0 ─ gateway ─ net1 ═ west ── outside
    10.0.0.0/8 via 10.255.0.1                172.18.0.0/16, the Internet via 172.18.0.1

The gateway's two interfaces are polled by kernel threads of their own (threaded NAPI), which are bound to one
processor while generators run on another. So what a packet costs inside the gateway is that thread's CPU time, whoever
else uses the machine, and the generator is not in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from netns import require, run, veth
from traffic import Host
from world import LOOSE, QUIET, SCRIPT, end, set_sysctl, wait_for

from api.client import Client

ROUTER, OWN = "172.18.0.1", "172.18.0.2"
TENANT_ROUTER, LAN_IP = "10.255.0.1", "10.255.0.254"
PROGRAMS = ("ip", "bash", "ethtool", "nft", "conntrack", "iptables-legacy-save", "iptables-nft-save")

Spec = dict[str, Any]


class Bed:
    """Three namespaces and the two cables between them; with ``polled`` the gateway's ends have kernel threads."""

    def __init__(self, *, polled: bool = True) -> None:
        require(*PROGRAMS)
        self._undo = contextlib.ExitStack()
        self.gateway, self.tenants, self.outside = (self._host(role) for role in ("gw", "east", "west"))
        try:
            self._cable()
            self.pollers = self._poll() if polled else {}
        except BaseException:
            self.remove()
            raise

    def _host(self, role: str) -> Host:
        host = Host(f"bench-{role}")
        self._undo.callback(host.remove)
        set_sysctl(host, QUIET | LOOSE)
        return host

    def _cable(self) -> None:
        veth(self.tenants, "east", self.gateway, "eth0")
        veth(self.outside, "west", self.gateway, "net1")
        self.tenants.ip(f"addr add {TENANT_ROUTER}/24 dev east", f"route add default via {LAN_IP}")
        self.outside.ip(f"addr add {ROUTER}/16 dev west", f"route add 10.0.0.0/8 via {OWN}")
        # Forwarding is the pod's postStart hook. With rp_filter 0 the kernel looks every packet's source up among the
        # addresses, in a hash table of 256 lists: with 10,000 EIPs that would be what is measured.
        set_sysctl(self.gateway, {"ipv4/ip_forward": 1, "ipv4/conf/all/rp_filter": 2})
        self.gateway.ip(
            f"addr add {LAN_IP}/24 dev eth0",
            f"addr add {OWN}/16 dev net1",
            f"route add default via {ROUTER} dev net1",
            f"route add 10.0.0.0/8 via {TENANT_ROUTER} dev eth0",
        )

    def _poll(self) -> dict[str, int]:
        """Give both interfaces a polling thread; its process id by interface."""
        found = {}
        for name, peer, far in (("eth0", self.tenants, "east"), ("net1", self.outside, "west")):
            # A veth uses NAPI where it may merge what it receives, and that only where the other end does not.
            self.gateway.run("ethtool", "-K", name, "gro", "on")
            peer.run("ethtool", "-K", far, "tso", "off")
            before = _pollers()
            with self.gateway.entered():  # /sys shows the namespace of whoever mounts it: `ip netns exec` does
                self.gateway.run("sh", "-c", f"echo 1 >/sys/class/net/{name}/threaded")
            wait_for(lambda before=before: bool(_pollers() - before), f"a polling thread of {name}")
            (found[name],) = _pollers() - before
        return found

    def remove(self) -> None:
        self._undo.close()


def _pollers() -> set[int]:
    """Process ids of all polling threads of network devices."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (entry / "comm").read_text().startswith("napi/"):
                    found.add(int(entry.name))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process or kernel thread so far, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) returns


class Gateway:
    """The daemon of a bed's gateway namespace and those who drive it: ``bash nat-gateway.sh``, and HTTP."""

    def __init__(self, bed: Bed, *, variant: str = "legacy", environment: dict[str, str] | None = None) -> None:
        self.bed, self.host, self.variant = bed, bed.gateway, variant
        self._top = Path(tempfile.mkdtemp(prefix="natgw-"))
        self.run_dir = self._top / "run"
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
            "NATGW_RUN_DIR": str(self.run_dir),
            "NATGW_STATE_DIR": str(self._top / "state"),
            "NATGW_ENV_FILE": str(self._top / "nat-gateway.env"),
            "NATGW_IPTABLES": variant,
            "GATEWAY_V4": ROUTER,
            **(environment or {}),
        }

    def verb(self, *words: str) -> str:
        """One call of the script in the namespace that the calling thread is in; it must succeed in silence."""
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if (done.returncode, done.stderr) != (0, ""):
            raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def start(self) -> None:
        with self.host.entered():
            self.verb("init")

    def put(self, spec: Spec) -> dict[str, Any]:
        """Make the gateway exactly this."""
        return self.request("PUT", "/v1/gateway", json.dumps(spec).encode())

    def request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """The answer's document; RuntimeError where it is no success."""
        answer = Client(self.run_dir).request(method, path, body)
        if not answer.ok:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.body[:400]!r}")
        found: dict[str, Any] = answer.json()
        return found

    @property
    def pid(self) -> int:
        return int((self.run_dir / "natgw.pid").read_text())

    def kill(self) -> None:
        """Kill the daemon alone and wait for its end; its keeper starts another."""
        end(self.pid)

    def stop(self) -> None:
        """Kill the daemon and its keeper; what the kernel holds stays."""
        shutil.rmtree(self.run_dir, ignore_errors=True)  # first: no daemon is started again without it
        for word in run("ip", "netns", "pids", self.host.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)
        wait_for(lambda: not run("ip", "netns", "pids", self.host.name), "the daemon's end")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._top, ignore_errors=True)


def settle(gateways: Iterable[Gateway], quiet: float) -> None:
    """Wait until nothing is announced any more: for that many seconds no frame has left on its own."""

    def sent() -> list[int]:
        links = (one.host.ip_json("-s", "link", "show", "net1")[0] for one in gateways)
        return [link["stats64"]["tx"]["packets"] for link in links]

    since, before = time.monotonic(), sent()
    while time.monotonic() < since + quiet:
        time.sleep(0.1)
        if (now := sent()) != before:
            since, before = time.monotonic(), now


@contextlib.contextmanager
def gateway(*, polled: bool = True, variant: str = "legacy", **environment: str) -> Iterator[Gateway]:
    """An initialised gateway on a bed of its own."""
    bed = Bed(polled=polled)
    made = Gateway(bed, variant=variant, environment=environment)
    try:
        made.start()
        yield made
    finally:
        made.remove()
        bed.remove()
