"""Collects what ``natgw doctor`` judges by: a composition root of its own, for it must work without a daemon.

It reads the kernel of the namespace it runs in, asks by ARP, and tries features in a namespace that is thrown away;
nothing is changed, and the stored spec is only read.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from api.client import Client, Failed, NotRunning
from api.settings import Settings
from api.state import stored_spec
from gateway import transaction
from gateway.arp.ask import holders
from gateway.kernel import features, listeners
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.generation import Generation
from gateway.kernel.links import KernelLinks
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.restore import RestoreFirewall
from gateway.kernel.shaper import KernelShaper
from gateway.kernel.surroundings import KernelSurroundings
from gateway.kernel.variant import choose
from gateway.ports import Refused
from gateway.store import FILES
from gateway.transaction import Kernel
from rules.appliance import Spec, adopt
from rules.desired import Facts as Decided
from rules.differences import differences
from rules.examination import Asked, Disk, Facts
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import GatewaySpec
from rules.state import Actual

MOST_ASKED = 256
"""Addresses that are asked for by ARP."""
PATIENCE = 1.0


def facts(environment: Mapping[str, str], *, ask: bool = True) -> Facts:
    """Everything that can be found out here and now; ``ask``: also from neighbours. Raises BadSetting, Refused."""
    settings = Settings.from_environment(environment)
    variant = choose(settings.iptables)
    generation = Generation()
    maps = KernelMaps(variant, generation)
    kernel = Kernel(
        RestoreFirewall(variant), KernelLinks(), KernelFlows(), KernelNft(generation), KernelShaper(), maps=maps
    )
    actual = transaction.read(kernel)
    status = _daemon(settings.run_dir, "/v1/status")
    spec = _spec(settings, actual, running=status is not None)
    silent = _silent(spec, actual) if ask else "as you wished"
    gateways, holding = _asked(spec, actual) if spec and not silent else ((), ())
    return Facts(
        spec=spec,
        actual=actual,
        around=KernelSurroundings(variant).read(),
        variant=variant,
        status=status,
        missing=_missing(settings, spec, actual, running=status is not None),
        gateways=gateways,
        holders=holding,
        silent=silent,
        features=features.tried(variant),
        listeners=listeners.listening(),
        disks=tuple(_disk(path) for path in (settings.state_dir, settings.run_dir)),
    )


def _daemon(run_dir: Path, path: str) -> Any:
    """What a daemon that runs says, or None."""
    try:
        answer = Client(run_dir).request("GET", path)
        return answer.json() if answer.ok else None
    except (NotRunning, Failed):
        return None


def _spec(settings: Settings, actual: Actual, *, running: bool) -> Spec | None:
    """What is wanted: by the daemon's word, else as it was stored, else as the kernel's own rules tell it."""
    if running:
        if said := _daemon(settings.run_dir, "/v1/gateway"):
            return GatewaySpec.model_validate(said)
        if said := _daemon(settings.run_dir, "/v1/load-balancer"):
            return LoadBalancerSpec.model_validate(said)
    for name in FILES.values():
        try:
            return stored_spec(json.loads((settings.state_dir / name).read_text()))
        except (OSError, ValueError, ValidationError):
            continue
    return adopt(actual)


def _missing(settings: Settings, spec: Spec | None, actual: Actual, *, running: bool) -> tuple[str, ...]:
    """How the kernel differs from the spec: by the daemon's comparison, else by our own.

    Ours knows nothing of the protection of INPUT, which is not in the spec; where it is on, nothing is compared.
    """
    if running:
        return tuple((_daemon(settings.run_dir, "/v1/drift") or {}).get("now", ()))
    if spec is None or settings.input is not None:
        return ()
    try:
        decided = Decided(settings.arp, fastpath=settings.fastpath)
        return differences(transaction.plan(spec, decided, actual), actual)
    except Refused as error:
        return (str(error),)


def _silent(spec: Spec | None, actual: Actual) -> str:
    """Why nobody can be asked, if so."""
    if spec is None:
        return "nothing is known of this gateway"
    link = actual.links.get(spec.interfaces.external)
    if link is not None and not link.arp:
        return f"ARP is off on {spec.interfaces.external} until there is an EIP"
    return ""


def _asked(spec: Spec, actual: Actual) -> tuple[tuple[Asked, ...], tuple[Asked, ...]]:
    """Next hops, and whoever else holds our addresses; all at once, within a second or two."""
    sides = spec.interfaces
    if isinstance(spec, GatewaySpec):
        hops = [(sides.external, spec.gateway_v4)] if spec.gateway_v4 else []
        hops += [(sides.vpc, each.next_hop_ip) for each in spec.routes if ":" not in each.next_hop_ip]
    else:
        hops = [(sides.external, eip.gateway) for eip in spec.eips] + [(sides.vpc, each.gateway) for each in spec.dnats]
    held = [
        (key.interface, key.address.partition("/")[0])
        for key in actual.addresses
        if key.interface in (sides.vpc, sides.external) and ":" not in key.address
    ]
    return asyncio.run(_ask_all(dict.fromkeys(hops), held[:MOST_ASKED]))


async def _ask_all(
    hops: Iterable[tuple[str, str]], held: Iterable[tuple[str, str]]
) -> tuple[tuple[Asked, ...], tuple[Asked, ...]]:
    hops, held = list(hops), list(held)
    wanted: dict[str, list[IPv4Address]] = {}
    for interface, address in chain(hops, held):
        wanted.setdefault(interface, []).append(IPv4Address(address))
    said = await asyncio.gather(*(holders(name, each, patience=PATIENCE) for name, each in wanted.items()))
    answers = dict(zip(wanted, said, strict=True))

    def told(pairs: Iterable[tuple[str, str]]) -> tuple[Asked, ...]:
        return tuple(Asked(name, ip, answers[name].get(IPv4Address(ip), ())) for name, ip in pairs)

    return told(hops), told(held)


def _disk(path: Path) -> Disk:
    """Whether a directory (or the one that it would be made in) can be written, and how much room there is."""
    there = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            room = os.statvfs(there)
    except OSError as error:
        return Disk(str(path), error.strerror or str(error))
    return Disk(str(path), free=room.f_bavail * room.f_frsize)
