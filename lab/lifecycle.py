"""A lab's life: up, test, status, down. Effects, in the order that lets `down` undo whatever was begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab import egressrun, netns
from lab.controller import SCRIPT, Call, ExecFailed, Outcome, Pod, creation_calls, drive, drive_snats, object_calls
from lab.probes import Probe, Result, before_first_eip, judge, probes
from lab.record import Book, LabError, Record
from lab.topology import steps, sysctls
from lab.world import GatewayPlan, World

PEER = Path(__file__).resolve().parent / "peer.py"
_ANSWER_SECONDS = 5.0  # an answer comes at once; this much is waited for one before it counts as missing
_SILENCE_SECONDS = 1.0  # how long nobody must have answered
_PROGRAMS = {"ip": "iproute2", "sysctl": "procps", "setsid": "util-linux", "bash": "bash"}

Told = Callable[[Pod, Call, Outcome], None]


def untold(pod: Pod, call: Call, outcome: Outcome) -> None:
    return None


def up(
    world: World, notes: Sequence[str], book: Book, told: Told = untold, script: Path = SCRIPT
) -> tuple[Result, ...]:
    """Build the world and drive its gateways. Returns what was observed before the first EIPs.

    Raises LabError when it cannot be built (what was begun is removed again) and ExecFailed when a gateway fails a
    call (the lab is left for a look; `down` removes it).
    """
    netns.require(_PROGRAMS)
    if not script.is_file():
        raise LabError(f"There is no {script}: gateways are driven through it.")
    names = list(world.namespaces())
    taken = [name for name in names if netns.exists(name)]
    if taken and not book.exists():
        raise LabError(f"Namespace {taken[0]} exists already and no lab of this machine's records owns it.")
    record = Record(phase="building", world=world, notes=tuple(notes))
    book.claim(record)
    with book.locked():
        try:
            _build(world, book)
            pods = [Pod(gw, book.gateway_directory(gw.name), script) for gw in world.gateways]
            for pod in pods:
                drive(pod, creation_calls(pod.gateway), told)
            observations = _observe(world)
            for pod in pods:
                drive(pod, object_calls(pod.gateway), told)
                drive_snats(pod, told)
            egressrun.start(world, book)
        except ExecFailed:
            raise
        except BaseException:
            _remove(world, book)
            raise
        book.write(record.model_copy(update={"phase": "up", "observations": observations}))
    return observations


def _build(world: World, book: Book) -> None:
    book.make_gateway_directories(world)
    for name in world.namespaces():
        netns.add(name)
    for name, settings in sysctls(world).items():
        netns.sysctl(name, settings)
    for step in steps(world):
        netns.batch(step.netns, step.lines)
    _start_servers(world)


def _start_servers(world: World) -> None:
    """An echo server in every host, detached; returns when all their ports are open."""
    started = []
    for host in (*world.hosts, world.internet):
        ports = [f"{listen.protocol}:{listen.port}" for listen in host.listens]
        serve = ["setsid", "--fork", sys.executable, "-I", "-S", str(PEER), "serve", host.label, *ports]
        argv = netns.inside(host.netns, serve)
        started.append(
            (
                host,
                subprocess.Popen(
                    netns.inside(host.netns, argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
                ),
            )
        )
    words = []
    for host, process in started:
        with process:
            assert process.stdout is not None
            words.append((host, process.stdout.readline().strip()))
    for host, word in words:
        if word != "ready":
            raise LabError(f"The echo server of {host.label} did not start: {word or 'it said nothing'}.")


def _observe(world: World) -> tuple[Result, ...]:
    """What only holds before the first EIP: no ARP on net1, and with noDefaultEIP no address there."""
    always = os.environ.get("NATGW_ARP") == "on"
    bare = tuple(_without_address(gw) for gw in world.gateways if gw.external is None)
    return (*bare, *run_probes(before_first_eip(world, always), "up"))


def _without_address(gw: GatewayPlan) -> Result:
    addresses = _addresses(gw)
    return Result(
        what=f"{gw.name}: noDefaultEIP", source=gw.name, target=f"addresses of {gw.external_interface}",
        expected="none", seen=", ".join(addresses) or "none", ok=not addresses, during="up",
    )  # fmt: skip


def _addresses(gw: GatewayPlan) -> list[str]:
    """The IPv4 addresses on the external interface."""
    done = subprocess.run(
        ["ip", "-n", gw.netns, "-j", "-4", "addr", "show", "dev", gw.external_interface],
        capture_output=True,
        text=True,
        check=True,
    )
    links: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return [f"{info['local']}/{info['prefixlen']}" for link in links for info in link.get("addr_info", [])]


def run_probes(tried: Sequence[Probe], during: Literal["up", "test"] = "test") -> list[Result]:
    """Try them all, each namespace's at once, and judge what was seen. In the order given."""
    by_netns: dict[str, list[int]] = defaultdict(list)
    for index, probe in enumerate(tried):
        by_netns[probe.netns].append(index)
    replies: dict[int, dict[str, str]] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        groups = [(indexes, pool.submit(_ask, name, [tried[i] for i in indexes])) for name, indexes in by_netns.items()]
        for indexes, answers in groups:
            replies.update(zip(indexes, answers.result(), strict=True))
    return [judge(probe, replies[index], during) for index, probe in enumerate(tried)]


def _ask(name: str, tried: Iterable[Probe]) -> list[dict[str, str]]:
    tasks = [
        {
            "how": probe.how,
            "to": str(probe.to),
            "port": probe.port,
            "times": probe.times,
            "wait": _SILENCE_SECONDS if probe.expect.host is None else _ANSWER_SECONDS,
        }
        for probe in tried
    ]
    return _peer(name, tasks)


def _peer(name: str, tasks: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    argv = netns.inside(name, [sys.executable, "-I", "-S", str(PEER), "ask"])
    done = subprocess.run(argv, input=json.dumps(list(tasks)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"The client in {name} failed: {' '.join(done.stderr.split())}")
    replies: list[dict[str, str]] = json.loads(done.stdout)
    return replies


def try_out(book: Book) -> list[Result]:
    """Real traffic through a standing lab, after what was observed while it was built."""
    netns.require(_PROGRAMS)
    record = _standing(book)
    world = record.world
    results = [*record.observations, *_bare_gateways(world), *run_probes(probes(world))]
    if world.egresses:
        with book.locked():  # it stops and starts processes of the lab
            results += egressrun.try_out(world, book, _peer)
    return results


def _bare_gateways(world: World) -> list[Result]:
    """With noDefaultEIP the external interface carries the EIPs and nothing else."""
    results = []
    for gw in world.gateways:
        if gw.external is None:
            expected, seen = sorted(str(eip.address) for eip in gw.eips), sorted(_addresses(gw))
            results.append(
                Result(
                    what=f"{gw.name}: noDefaultEIP",
                    source=gw.name,
                    target=f"addresses of {gw.external_interface}",
                    expected=", ".join(expected) or "none",
                    seen=", ".join(seen) or "none",
                    ok=expected == seen,
                )
            )
    return results


def _standing(book: Book) -> Record:
    record = book.read()
    if record.phase != "up":
        raise LabError(f"Lab {book.name} was never finished: take it down (natgw lab down --name {book.name}).")
    return record


@dataclass(frozen=True)
class Part:
    """One namespace of a lab as `status` shows it."""

    kind: str
    name: str
    netns: str
    addresses: str
    exists: bool
    processes: tuple[str, ...]


def status(book: Book) -> tuple[Record, list[Part]]:
    """The record and every namespace with what runs in it. Raises LabError when there is no such lab."""
    record = book.read()
    world = record.world
    running: dict[str, list[str]] = defaultdict(list)
    for pid, name in netns.processes(world.namespaces()).items():
        running[name].append(f"{pid} {netns.command_of(pid)}")
    rows = [("gateway", gw.name, gw.netns, _gateway_addresses(gw)) for gw in world.gateways]
    rows += [
        ("host", host.label, host.netns, "; ".join(map(str, (host.address, *(nic.address for nic in host.nics)))))
        for host in (*world.hosts, world.internet)
    ]
    rows += [
        (
            "egress gateway",
            f"{plan.name} {replica.name}",
            replica.netns,
            f"eth0 {replica.internal}; net1 {replica.external}",
        )
        for plan in world.egresses
        for replica in plan.replicas
    ]
    rows += [("VPC router", v.name, v.netns, " ".join(str(lan.gateway) for lan in v.lans)) for v in world.vpcs]
    outside = " ".join(str(address) for segment in world.segments for address in segment.gateways)
    rows += [
        ("physical gateway", "phys", world.phys, outside),
        ("node", "node", world.node, ""),
        ("bridges", "hub", world.hub, ""),
    ]
    parts = [Part(*row, exists=netns.exists(row[2]), processes=tuple(running[row[2]])) for row in rows]
    return record, parts


def _gateway_addresses(gw: GatewayPlan) -> str:
    outside = gw.external_interface
    own = [f"{gw.management.interface} {gw.management.address}"] if gw.management else []
    own += [f"{gw.vpc_interface} {gw.lan}", f"{outside} {gw.external or 'without address of its own'}"]
    return "; ".join([*own, *(f"{eip.name} {eip.address.ip}" for eip in gw.eips)])


def down(book: Book) -> list[str]:
    """Remove the lab and everything of it. Returns the command lines of what was running in it.

    Raises LabError when there is no such lab, or when something of it resists; a second attempt is always safe.
    """
    netns.require(_PROGRAMS)
    with book.locked():
        if not book.file.exists():  # its builder died between claiming the name and writing: nothing was made
            book.erase()
            return []
        return _remove(book.read().world, book)


def _remove(world: World, book: Book) -> list[str]:
    names = list(world.namespaces())
    ended = netns.empty(names)
    for name in names:
        netns.remove(name)
    book.erase()
    return ended
