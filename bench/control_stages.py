#!/usr/bin/env python3
"""Where the time of one verb goes, by the number of port mappings: needs root.

    bench/control_stages.py [--sizes 10,1000,10000,50000] [--variants legacy,nft] [--verbs 15]

Makes a network namespace with an eth0 and a net1, runs the writer on its real kernel in this process, puts N port
mappings there as one change, and then times single adds and deletes stage by stage (medians, ms). ``--daemon``
measures the same verbs from outside instead: through ``bash nat-gateway.sh`` and a daemon of their own, with the
memory that it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "image/rootfs/kube-ovn/nat-gateway.sh"


def state(dnats: int) -> dict[str, Any]:
    """A gateway with that many port mappings: 500 for each EIP."""
    eips = [f"192.168.{8 + i // 250}.{i % 250 + 2}" for i in range(max(1, -(-dnats // 500)))]
    return {
        "gatewayV4": "192.168.0.1",
        "eips": [{"address": f"{eip}/16"} for eip in eips],
        "dnats": [
            {
                "eip": eips[i // 500],
                "externalPort": 10000 + i % 500,
                "protocol": "tcp",
                "internalIp": f"10.{1 + i // 62500}.{i // 250 % 250}.{i % 250 + 2}",
                "internalPort": 80,
            }
            for i in range(dnats)
        ],
        "snats": [{"eip": eips[0], "internalCIDR": "10.1.0.0/16"}],
    }


@contextlib.contextmanager
def namespace() -> Iterator[str]:
    """A namespace as a gateway's pod has it; its name."""
    name = f"control-{os.getpid()}-{secrets.token_hex(2)}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "tenant")
        ip("-n", name, "link", "add", "parent", "type", "veth", "peer", "name", "wire")
        ip("-n", name, "link", "add", "net1", "link", "parent", "type", "macvlan", "mode", "bridge")
        for link in ("lo", "eth0", "tenant", "parent", "wire", "net1"):
            ip("-n", name, "link", "set", link, "up")
        ip("-n", name, "addr", "add", "10.0.0.1/16", "dev", "eth0")
        ip("-n", name, "addr", "add", "192.168.0.11/16", "dev", "net1")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        Path(f"/run/{name}.lock").unlink(missing_ok=True)


STAGES: dict[str, list[float]] = defaultdict(list)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with what it takes booked under a name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            STAGES[name].append((time.perf_counter() - begun) * 1000)

    return wrapper


def inside(variant: str, sizes: list[int], verbs: int) -> None:
    """Time the writer's stages; runs in the namespace."""
    from api.main import SystemClock  # noqa: PLC0415
    from gateway import transaction  # noqa: PLC0415
    from gateway.kernel.conntrack import KernelFlows  # noqa: PLC0415
    from gateway.kernel.generation import Generation  # noqa: PLC0415
    from gateway.kernel.legacy import LegacyFirewall  # noqa: PLC0415
    from gateway.kernel.links import KernelLinks  # noqa: PLC0415
    from gateway.kernel.nft import KernelNft  # noqa: PLC0415
    from gateway.kernel.nft_variant import NftVariantFirewall  # noqa: PLC0415
    from gateway.kernel.shaper import KernelShaper  # noqa: PLC0415
    from gateway.remembered import RememberedFirewall  # noqa: PLC0415
    from gateway.service import Service  # noqa: PLC0415
    from gateway.store import Store  # noqa: PLC0415
    from rules import commands as c  # noqa: PLC0415
    from rules.desired import Facts  # noqa: PLC0415
    from rules.edit import edit_all  # noqa: PLC0415
    from rules.spec import GatewaySpec  # noqa: PLC0415
    from tests.gateway_kit import RecordingAnnouncer  # noqa: PLC0415

    generation = Generation()
    driver = LegacyFirewall() if variant == "legacy" else NftVariantFirewall(generation)
    for method in ("read", "edit", "edit_if"):
        setattr_of(driver, method, timed(f"driver.{method}", getattr(driver, method)))
    firewall = RememberedFirewall(driver)
    rest = KernelLinks(), KernelFlows(), KernelNft(generation), KernelShaper()
    kernel = transaction.Kernel(firewall, *rest, memory=firewall)
    for port in ("firewall", "links", "nft", "shaper"):
        for method in ("read", "edit", "commit"):
            if hasattr(driver := getattr(kernel, port), method):
                setattr_of(driver, method, timed(f"{port}.{method}", getattr(driver, method)))
    end = kernel.flows.end
    setattr_of(kernel.flows, "end", timed("flows.end", lambda filters, stale: iter(list(end(filters, stale)))))
    for stage in ("plan", "delta", "desired"):
        setattr(transaction, stage, timed(stage, getattr(transaction, stage)))
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        setattr_of(store, "save", timed("store.save", store.save))
        service = Service(kernel, RecordingAnnouncer(), store, SystemClock(), facts=Facts())
        service.start().result()
        for size in sizes:
            wanted = GatewaySpec.model_validate(state(size))
            begun = time.perf_counter()
            service.change(lambda _, wanted=wanted: wanted, by="put").result()  # type: ignore[misc]
            whole = (time.perf_counter() - begun) * 1000
            STAGES.clear()
            for i in range(verbs):
                add = c.DnatAdd(
                    eip="192.168.8.2", external_port=20000 + i, protocol="tcp", internal_ip="10.0.9.9", internal_port=1
                )
                delete = c.DnatDel(eip="192.168.8.2", external_port=20000 + i, protocol="tcp")
                for word, command in (("ADD", add), ("DEL", delete)):
                    change = timed(f"{word} edit", lambda spec, command=command: edit_all(spec, [command]))
                    timed(f"{word} in all", lambda change=change: service.change(change, by="x").result())()
            stages = {name: round(statistics.median(times), 2) for name, times in sorted(STAGES.items())}
            calls = {name: len(times) / (2 * verbs) for name, times in STAGES.items() if len(times) > 2 * verbs}
            print(json.dumps({"variant": variant, "dnats": size, "put": round(whole), "ms": stages, "calls": calls}))
        service.close()


def setattr_of(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def outside(variant: str, sizes: list[int], verbs: int) -> None:
    """Time verbs through the script, against a daemon in the namespace."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "NATGW_RUN_DIR": f"{directory}/run",
            "NATGW_STATE_DIR": f"{directory}/state",
            "NATGW_ENV_FILE": f"{directory}/env",
            "NATGW_IPTABLES": variant,
            "PYTHONPATH": str(ROOT),
            "GATEWAY_V4": "192.168.0.1",
        }

        def verb(*words: str) -> float:
            begun = time.perf_counter()
            subprocess.run(["bash", SCRIPT, *words], env=environment, check=True)
            return (time.perf_counter() - begun) * 1000

        verb("init")
        try:
            for size in sizes:
                begun = time.perf_counter()
                put(f"{directory}/run/api.sock", state(size))
                whole = time.perf_counter() - begun
                times: dict[str, list[float]] = defaultdict(list)
                for i in range(verbs):
                    times["dnat-add"].append(verb("dnat-add", f"192.168.8.2,{20000 + i},tcp,10.0.9.9,80"))
                    times["again"].append(verb("dnat-add", f"192.168.8.2,{20000 + i},tcp,10.0.9.9,80"))
                    times["eip-add"].append(verb("eip-add", f"192.168.0.{20 + i}/16"))
                    times["dnat-del"].append(verb("dnat-del", f"192.168.8.2,{20000 + i},tcp"))
                    times["eip-del"].append(verb("eip-del", f"192.168.0.{20 + i}/16"))
                medians = {name: round(statistics.median(t), 1) for name, t in times.items()}
                result = {"variant": variant, "dnats": size, "put": round(whole * 1000), "ms": medians}
                print(json.dumps(result | {"rss_mib": rss(Path(directory, "run/natgw.pid"))}), flush=True)
        finally:
            end(Path(directory, "run/natgw.pid"))


def put(path: str, document: object) -> None:
    """PUT the whole state."""
    connection = http.client.HTTPConnection("natgw", timeout=120)
    deadline = time.monotonic() + 10
    while True:
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(path)
            break
        except OSError:  # the HTTP face comes after the verbs
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.sock.settimeout(120)
    connection.request("PUT", "/v1/gateway", json.dumps(document), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status >= 300:
        raise RuntimeError(answer.read().decode())
    answer.read()


def rss(pid_file: Path) -> float:
    """Resident memory of the daemon, MiB."""
    status = Path(f"/proc/{pid_file.read_text().strip()}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


def end(pid_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, 15)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10,1000,10000,50000")
    parser.add_argument("--variants", default="legacy,nft")
    parser.add_argument("--verbs", type=int, default=15)
    parser.add_argument("--daemon", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    measure = outside if options.daemon else inside
    if options.inside:
        measure(options.inside, sizes, options.verbs)
        return
    for variant in options.variants.split(","):
        with namespace() as name:
            argv = [sys.executable, __file__, *sys.argv[1:], "--inside", variant]
            # A lock of their own, as in a container: others' iptables on this machine have nothing to do with it.
            lock = {"XTABLES_LOCKFILE": f"/run/{name}.lock"}
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | lock
            subprocess.run(["ip", "netns", "exec", name, *argv], check=True, env=environment)


if __name__ == "__main__":
    main()
