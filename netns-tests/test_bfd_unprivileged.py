"""The supervisor as Kubernetes runs it: user 65534, not one capability, and little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netns import Namespace, require, veth

CHECKOUT = Path(__file__).parent.parent
PROGRAMS = CHECKOUT / "image" / "rootfs"
OURS, THEIRS = ("10.89.0.1", "fd89::1"), ("10.89.0.2", "fd89::2")

# The code is imported first and the user changed then, because a checkout may lie where only root can read.
AS_NOBODY = """
import os, sys
sys.path.append(sys.argv[1])
from gateway.bfd import supervisor
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(supervisor.main([]))
"""


def test_sessions_come_up_without_any_privilege(make_netns: Callable[[], Namespace]) -> None:
    require("ip", "sysctl")
    ours, theirs = make_netns(), make_netns()
    veth(ours, "va", theirs, "vb")
    for netns, device, addresses in ((ours, "va", OURS), (theirs, "vb", THEIRS)):
        netns.run("ip", "address", "add", f"{addresses[0]}/24", "dev", device)
        # With duplicate address detection: the speaker starts before its IPv6 address may be used.
        netns.run("ip", "address", "add", f"{addresses[1]}/64", "dev", device)
    with tempfile.TemporaryDirectory(prefix="bfd-") as run_dir:
        os.chmod(run_dir, 0o1777)
        ask = {
            **os.environ,
            "NATGW_RUN_DIR": run_dir,
            "NATGW_PYTHON": sys.executable,
        }
        pod = {
            **ask,
            "POD_IPS": ",".join(OURS),
            "BFD_PEER_IPS": ",".join(THEIRS),
            "BFD_MIN_TX": "100",
            "BFD_MIN_RX": "100",
        }

        def ask_for(word: str) -> subprocess.CompletedProcess[bytes]:
            program = PROGRAMS / "kube-ovn" / "kube-ovn-bfdd-supervisor"
            return subprocess.run([program, word], env=ask, capture_output=True, timeout=30, check=False)

        said: dict[str, Any] = {}
        inside = ("ip", "netns", "exec")
        # What the init script of a pod does for it as root: forwarding. The peer is its external gateway, too.
        for setting in ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"):
            ours.run("sysctl", "-q", "-w", setting)
        for family, gateway in (("-4", THEIRS[0]), ("-6", THEIRS[1])):
            ours.run("ip", family, "route", "add", "default", "via", gateway)
        quicken = [sys.executable, "-I", "-S", str(PROGRAMS / "kube-ovn/natgw_bfd.py"), "quicken"]
        assert ours.run(*quicken) == "neighbour timers are set on: va, va\n"
        supervisor = subprocess.Popen(
            [*inside, ours.name, sys.executable, "-I", "-S", "-c", AS_NOBODY, str(CHECKOUT)], env=pod
        )
        peer_env = {**pod, "NATGW_RUN_DIR": f"{run_dir}/peer", "POD_IPS": pod["BFD_PEER_IPS"]}
        peer = subprocess.Popen(
            [*inside, theirs.name, PROGRAMS / "kube-ovn" / "kube-ovn-bfdd-supervisor", "run"],
            env={**peer_env, "BFD_PEER_IPS": pod["POD_IPS"], "NATGW_BFD_HEALTH": "off"},
        )
        try:
            end = time.monotonic() + 60
            # On a busy machine a session of 300 ms comes and goes, and so does an answer of the external gateway.
            while ask_for("ready").returncode or not well(said := json.loads(ask_for("status").stdout)):
                assert supervisor.poll() is None, "the supervisor ended"
                assert time.monotonic() < end, f"not ready: {said}"
                time.sleep(0.1)
            status = Path(f"/proc/{supervisor.pid}/status").read_text()
            facts = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
            assert facts["Uid"].split() == ["65534"] * 4
            assert (facts["CapEff"], facts["CapPrm"]) == ("0" * 16, "0" * 16)
            assert int(facts["VmHWM"].split()[0]) <= 20 * 1024
        finally:
            for process in (supervisor, peer):
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(40) for process in (supervisor, peer)]
        assert codes == [0, 0]


def well(status: dict[str, Any]) -> bool:
    """Whether both sessions are Up, and every probe that concerns this pod passes."""
    return {name: probe["Verdict"] for name, probe in status["Health"]["Probes"].items()} == {
        **dict.fromkeys(("link_ipv4", "gateway_ipv4", "link_ipv6", "gateway_ipv6", "forwarding"), "pass"),
        "rules": "not applicable",
    } and [(session["Pair"]["Local"], session["State"]) for session in status["Sessions"]] == [
        (address, "Up") for address in OURS
    ]
