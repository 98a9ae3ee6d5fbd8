"""What a daemon without a file finds in a namespace, as text that is kept beside the commands that led to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from world import Gateway

from api.http_models import plan_model
from gateway import transaction
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.generation import Generation
from gateway.kernel.legacy import LegacyFirewall
from gateway.kernel.links import KernelLinks
from gateway.kernel.maps import KernelMaps
from gateway.kernel.nft import KernelNft
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.kernel.shaper import KernelShaper
from gateway.transaction import Kernel
from rules.appliance import Spec, adopt
from rules.desired import Facts
from rules.state import EditTable, Plan

GOLDENS = Path(__file__).parent
Command = tuple[str, ...]


def adopted(gateway: Gateway) -> tuple[Spec, Plan]:
    """What would be adopted here, and what would be done first."""
    with gateway.entered():
        generation = Generation()
        firewall = LegacyFirewall() if gateway.variant == "legacy" else NftVariantFirewall(generation)
        maps = KernelMaps(gateway.variant, generation)
        kernel = Kernel(firewall, KernelLinks(), KernelFlows(), KernelNft(generation), KernelShaper(), maps=maps)
        actual = transaction.read(kernel)
        spec = adopt(actual)
        assert spec is not None
        return spec, transaction.plan(spec, Facts(), actual)


def edits(plan: Plan) -> int:
    """How many steps the log counts in a plan."""
    return sum(len(step.edits) if isinstance(step, EditTable) else 1 for step in plan.steps)


def agrees(name: str, commands: Iterable[Command], spec: Spec, plan: Plan) -> None:
    """Compare with the goldens of that name, or (NATGW_GOLDENS=write) write them."""
    found = {
        "left.txt": "".join(f"{' '.join(command)}\n" for command in commands),
        "spec.json": spec.model_dump_json(indent=2, by_alias=True) + "\n",
        "plan.txt": text_of(plan),
    }
    directory = GOLDENS / name
    if os.environ.get("NATGW_GOLDENS") == "write":
        directory.mkdir(exist_ok=True)
        for file, text in found.items():
            (directory / file).write_text(text)
    for file, text in found.items():
        assert text == (directory / file).read_text(), file


def text_of(plan: Plan) -> str:
    """A plan as lines, with the edits of a table and the commands of nft below their step."""
    lines = []
    for step in plan_model(plan).model_dump(mode="json")["steps"]:
        lines.append(step["text"])
        lines += [f"  {edit['text']}" for edit in step.get("edits", [])]
        lines += [f"  {command}" for command in step.get("commands", [])]
    return "".join(f"{line}\n" for line in lines)
