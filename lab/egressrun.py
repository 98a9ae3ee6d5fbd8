"""Egress gateways at work: the init script and the BFD supervisor of each replica, the router that watches them.

What Kube-OVN's controller and kubelet would start is started with the files that the image has, from the checkout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from lab import netns
from lab.egressplan import EgressPlan, Replica
from lab.egressprobes import Trial, judge, trials
from lab.probes import Result
from lab.record import Book, LabError
from lab.world import VpcPlan, World

ROOTFS = Path(__file__).resolve().parent.parent / "image" / "rootfs"
INIT = ROOTFS / "kube-ovn" / "init-vpc-egress-gateway.sh"
SUPERVISOR = ROOTFS / "kube-ovn" / "kube-ovn-bfdd-supervisor"
NEXTHOPS = Path(__file__).resolve().parent / "nexthops.py"
_INIT_SECONDS = 60.0
_PATIENCE = 30.0  # seconds until sessions must be up, or a dead one noticed, besides what their intervals need
_POLL = 0.05

Ask = Callable[[str, Sequence[dict[str, Any]]], list[dict[str, str]]]
"""Have tasks tried in a namespace (``lab.peer``)."""


def start(world: World, book: Book) -> None:
    """Make every replica a gateway, and start its supervisor and the routers' side; returns when sessions are up.

    Raises LabError.
    """
    for plan in world.egresses:
        for replica in plan.replicas:
            _init(plan, replica)
    for vpc in world.vpcs:
        mine = _watched(world, vpc.name)
        if mine:
            _watch(book, vpc, mine)
    for plan in world.egresses:
        for replica in plan.replicas if plan.bfd else ():
            supervise(book, plan, replica)
    for vpc in world.vpcs:
        await_hops(book, world, vpc.name, _all_hops(_watched(world, vpc.name)))


def _watched(world: World, vpc: str) -> list[EgressPlan]:
    return [plan for plan in world.egresses if plan.vpc == vpc and plan.bfd and plan.replicas]


def _all_hops(plans: Iterable[EgressPlan]) -> set[IPv4Address]:
    return {address for plan in plans for address in plan.internal_addresses}


def environment(plan: EgressPlan) -> dict[str, str]:
    """What the controller sets for the init container."""
    kept = sorted(str(source.cidr) for source in plan.sources if not source.snat)
    return {
        "INTERNAL_GATEWAY_IPV4": str(plan.internal_gateway),
        "EXTERNAL_GATEWAY_IPV4": str(plan.external_gateway),
        "NO_SNAT_SOURCES_IPV4": ",".join(kept),
    }


def _init(plan: EgressPlan, replica: Replica) -> None:
    argv = _inside(replica.netns, environment(plan), ["bash", str(INIT)])
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_INIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise LabError(f"{INIT.name} in {replica.name} took longer than {_INIT_SECONDS:.0f} s.") from None
    if done.returncode:
        raise LabError(f"{INIT.name} failed in {replica.name}: {' '.join(done.stderr.split())}")


def _inside(where: str, variables: dict[str, str], command: list[str]) -> list[str]:
    return netns.inside(where, ["env", *(f"{name}={value}" for name, value in variables.items()), *command])


def supervise(book: Book, plan: EgressPlan, replica: Replica) -> None:
    """Start a replica's supervisor, detached."""
    assert plan.bfd is not None
    directory = _directory(book, replica.name)
    variables = {
        "NATGW_RUN_DIR": str(directory),
        "POD_IPS": str(replica.internal.ip),
        "BFD_PEER_IPS": str(plan.bfd.peer),
        "BFD_MIN_TX": str(plan.bfd.min_tx),
        "BFD_MIN_RX": str(plan.bfd.min_rx),
        "BFD_MULTI": str(plan.bfd.multiplier),
    }
    _detached(_inside(replica.netns, variables, [str(SUPERVISOR), "run"]), directory / "supervisor.log")


def _watch(book: Book, vpc: VpcPlan, plans: Sequence[EgressPlan]) -> None:
    """Start the router's side: its speaker, and the routes that follow the sessions."""
    directory = _directory(book, f"vpc-{vpc.name}")
    config = {
        "beacon": str(ROOTFS / "usr" / "bin" / "bfdd-beacon"),
        "control": str(ROOTFS / "usr" / "bin" / "bfdd-control"),
        "local": str(vpc.bfd),
        "state": str(directory / "nexthops.json"),
        "gateways": [
            {
                "table": plan.table,
                "min_tx": plan.bfd.min_tx,
                "min_rx": plan.bfd.min_rx,
                "multiplier": plan.bfd.multiplier,
                "hops": {str(hop): vpc.router.device(hop) for hop in plan.internal_addresses},
            }
            for plan in plans
            if plan.bfd
        ],
    }
    command = [sys.executable, "-I", "-S", str(NEXTHOPS), json.dumps(config)]
    _detached(_inside(vpc.netns, {"NATGW_RUN_DIR": str(directory)}, command), directory / "nexthops.log")


def _directory(book: Book, name: str) -> Path:
    """Where a process of an egress gateway keeps its files."""
    directory = book.gateway_directory(f"veg-{name}")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _detached(argv: list[str], log: Path) -> None:
    with log.open("ab") as output:
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def await_hops(book: Book, world: World, vpc: str, wanted: set[IPv4Address]) -> None:
    """Return when the router of a VPC uses exactly these next hops. Raises LabError when it never does."""
    plans = _watched(world, vpc)
    if not plans:
        return
    state = _directory(book, f"vpc-{vpc}") / "nexthops.json"
    slowest = max(p.bfd.multiplier * max(p.bfd.min_tx, p.bfd.min_rx) / 1000 for p in plans if p.bfd)
    deadline = time.monotonic() + _PATIENCE + 2 * slowest
    while (seen := _hops(state)) != wanted:
        if time.monotonic() > deadline:
            want, got = (", ".join(map(str, sorted(hops))) or "none" for hops in (wanted, seen))
            raise LabError(
                f"The router of VPC {vpc} should send to {want} by now, and sends to {got}; see {state.parent}."
            )
        time.sleep(_POLL)


def _hops(state: Path) -> set[IPv4Address]:
    try:
        return set(map(IPv4Address, json.loads(state.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return set()


# --- tests ------------------------------------------------------------------------------------------------------


def try_out(world: World, book: Book, ask: Ask) -> list[Result]:
    """What tenants see of their egress gateways, also while one replica's supervisor is dead."""
    results = []
    for plan in world.egresses:
        results += _try(trials(world, plan, plan.replicas), ask)
        if plan.bfd and len(plan.replicas) > 1:
            results += _without_one(world, book, plan, ask)
    return results


def _without_one(world: World, book: Book, plan: EgressPlan, ask: Ask) -> list[Result]:
    """Kill the supervisor of the first replica, see the traffic move, bring it back, see it return."""
    victim, *left = plan.replicas
    others = _all_hops(_watched(world, plan.vpc)) - {victim.internal.ip}
    try:
        _kill(victim)
        await_hops(book, world, plan.vpc, others)
        moved = _try(trials(world, plan, left, f"supervisor of {victim.name} killed"), ask)
    finally:
        supervise(book, plan, victim)
    await_hops(book, world, plan.vpc, others | {victim.internal.ip})
    return [*moved, *_try(trials(world, plan, plan.replicas, f"supervisor of {victim.name} back"), ask)]


def _kill(replica: Replica) -> None:
    """End what runs in a replica's namespace as the kernel would end it: without a word to anybody."""
    for pid in netns.processes([replica.netns]):
        os.kill(pid, signal.SIGKILL)


def _try(tried: Iterable[Trial], ask: Ask) -> list[Result]:
    return [judge(trial, ask(trial.netns, trial.tasks())) for trial in tried]
