"""``natgw lab``: the laptop lab on the command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lab import lifecycle
from lab.check import Refused
from lab.controller import Call, ExecFailed, Outcome, Pod
from lab.manifests import read
from lab.plan import plan
from lab.probes import Result
from lab.record import Book, LabError
from lab.world import World

FAILED, REFUSED = 1, 2
"""Exit codes: something did not go as it must; the input or the machine does not allow it."""

app = typer.Typer(
    name="lab",
    help="Kube-OVN manifests, built in network namespaces of this machine and tried with real traffic.",
    no_args_is_help=True,
)
_WIDE = 160  # columns where there is no terminal to ask: a table in a log must not be folded to 80
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
_err = Console(stderr=True, highlight=False)

Name = Annotated[str, typer.Option("--name", help="Labs of different names stand side by side.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _stop(message: str, code: int = REFUSED) -> typer.Exit:
    _err.print(escape(message), style="red", soft_wrap=True)
    return typer.Exit(code)


def _world(files: Sequence[Path], name: str) -> tuple[World, tuple[str, ...]]:
    """The planned world; prints every reason and exits when the manifests are refused."""
    try:
        texts = [
            (str(path), sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")) for path in files
        ]
    except OSError as error:
        raise _stop(f"{error.filename}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _stop(f"not UTF-8 text: {error}") from None
    manifests = read(texts)
    try:
        return plan(manifests, name)
    except Refused as refused:
        _print_notes(manifests.notes)
        for reason in refused.reasons:
            _err.print(f"[red]refused[/]  {escape(reason)}", soft_wrap=True)
        raise typer.Exit(REFUSED) from None


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _err.print(f"[yellow]note[/]     {escape(note)}", soft_wrap=True)


def _tell(pod: Pod, call: Call, outcome: Outcome) -> None:
    """One exec, as a line that can be pasted into a shell, and how it ended."""
    verdict = "[green]ok[/]" if outcome.error is None else f"[red]{escape(outcome.error)}[/]"
    _err.print(f"[dim]{escape(shlex.join(pod.argv(call)))}[/]", soft_wrap=True)
    _err.print(f"         {escape(pod.gateway.name)}: {escape(str(call))}: {verdict}", soft_wrap=True)


@app.command()
def up(
    files: Annotated[list[Path], typer.Option("--file", "-f", help="Kube-OVN manifests; '-' is standard input.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More manifests.")] = None,
    *,
    name: Name = "lab",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the manifests and say what would be built.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every exec call.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build what the manifests describe and drive its gateways as Kube-OVN's controller does."""
    try:
        book = Book(name)
        world, notes = _world([*files, *(more or [])], name)
        _print_notes(notes)
        observations: tuple[Result, ...] = ()
        if not dry_run:
            observations = lifecycle.up(world, notes, book, _tell if verbose else lifecycle.untold)
    except LabError as error:
        raise _stop(str(error)) from None
    except ExecFailed as error:
        _err.print(f"[red]failed[/]   {escape(str(error))}", soft_wrap=True)
        raise _stop(
            f"The lab stands as it is, for a look: ip netns exec {_netns_of(world, error)} bash. "
            f"natgw lab down --name {name} removes it.",
            FAILED,
        ) from None
    if as_json:
        _print_json({"world": world.model_dump(mode="json"), "notes": notes, "observations": _rows(observations)})
    else:
        _print_world(world, dry_run)
    if not all(result.ok for result in observations):
        _print_results([result for result in observations if not result.ok], as_json=False)
        raise typer.Exit(FAILED)


@app.command()
def down(name: Name = "lab", as_json: AsJson = False) -> None:
    """Take a lab down; nothing of it stays, also when its building was cut short."""
    try:
        ended = lifecycle.down(Book(name))
    except LabError as error:
        raise _stop(str(error), FAILED) from None
    if as_json:
        _print_json({"name": name, "ended": ended})
    else:
        _out.print(f"Lab {name} is gone ({len(ended)} processes ended).")


@app.command()
def status(name: Name = "lab", as_json: AsJson = False) -> None:
    """Show a lab: its namespaces, addresses and what runs in them. Exits 1 when something of it is missing."""
    try:
        record, parts = lifecycle.status(Book(name))
    except LabError as error:
        raise _stop(str(error), FAILED) from None
    whole = record.phase == "up" and all(part.exists for part in parts)
    if as_json:
        _print_json({"name": name, "phase": record.phase, "whole": whole, "parts": [vars(part) for part in parts]})
    else:
        table = Table(title=f"lab {name}: {record.phase if whole or record.phase != 'up' else 'incomplete'}")
        for heading in ("what", "name", "namespace", "addresses", "running"):
            table.add_column(heading, overflow="fold")
        for part in parts:
            there = escape(part.netns) if part.exists else f"[red]{escape(part.netns)} (missing)[/]"
            table.add_row(part.kind, escape(part.name), there, escape(part.addresses), str(len(part.processes) or ""))
        _out.print(table)
    if not whole:
        raise typer.Exit(FAILED)


@app.command("test")
def try_out(name: Name = "lab", as_json: AsJson = False) -> None:
    """Send real traffic through a lab and compare what is seen with what the manifests say. Exits 1 on a mismatch."""
    try:
        results = lifecycle.try_out(Book(name))
    except LabError as error:
        raise _stop(str(error), FAILED) from None
    _print_results(results, as_json)
    if not all(result.ok for result in results):
        raise typer.Exit(FAILED)


def _netns_of(world: World, error: ExecFailed) -> str:
    return next(gw.netns for gw in world.gateways if gw.name == error.gateway)


def _print_world(world: World, dry_run: bool) -> None:
    table = Table(title=f"lab {world.lab}" + (" (not built)" if dry_run else ""))
    for heading in ("gateway", "VPC", "inside", "outside", "EIPs", "rules"):
        table.add_column(heading, overflow="fold")
    for gw in world.gateways:
        eips = "\n".join(f"{eip.name} {eip.address.ip}" for eip in gw.eips)
        rules = [f"{f.name}: {f.eip} <-> {f.internal}" for f in gw.fips]
        rules += [
            f"{d.name}: {d.eip}:{d.external_port}/{d.protocol} -> {d.internal}:{d.internal_port}" for d in gw.dnats
        ]
        for s in gw.shares:
            backends = ", ".join(f"{address}:{port}" for address, port in s.backends)
            rules.append(f"{s.name}: {s.eip}:{s.external_port}/{s.protocol} -> {backends}")
        rules += [f"{s.name}: {s.cidr} -> {s.eip}" for s in gw.snats]
        inside = f"{gw.vpc_interface} {gw.lan}"
        outside = f"{gw.external_interface} {gw.external or 'without address of its own'}"
        table.add_row(*map(escape, (gw.name, gw.vpc, inside, outside, eips, "\n".join(rules))))
    for egress in world.egresses:
        who = [f"{source.cidr}: {'SNAT' if source.snat else 'no SNAT'}" for source in egress.sources]
        watched = f"BFD with {egress.bfd.peer}" if egress.bfd else "not watched by BFD"
        for replica in egress.replicas:
            sides = (str(replica.internal), str(replica.external))
            table.add_row(
                *map(escape, (f"{egress.name} {replica.name}", egress.vpc, *sides, "", "\n".join([*who, watched])))
            )
    _out.print(table)
    hosts = ", ".join(f"{host.label} {host.ip} ({host.netns})" for host in (*world.hosts, world.internet))
    _out.print(f"hosts: {escape(hosts)}", soft_wrap=True)


def _rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [result.model_dump() for result in results]


def _print_results(results: Sequence[Result], as_json: bool) -> None:
    wrong = sum(not result.ok for result in results)
    if as_json:
        _print_json({"ok": wrong == 0, "tried": len(results), "wrong": wrong, "results": _rows(results)})
        return
    table = Table()
    for heading in ("what", "from", "tried", "expected", "seen", ""):
        table.add_column(heading, overflow="fold")
    for result in results:
        what = result.what + (" (during lab up)" if result.during == "up" else "")
        mark = "[green]ok[/]" if result.ok else "[bold red]WRONG[/]"
        table.add_row(*map(escape, (what, result.source, result.target, result.expected, result.seen)), mark)
    _out.print(table)
    _out.print(f"{len(results)} tried, {wrong} wrong" if wrong else f"{len(results)} tried, all as expected")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
