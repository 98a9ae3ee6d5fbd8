"""The answers of the HTTP face as people read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDE = 200  # columns where there is no terminal: what is piped must not be folded

STYLES = {"+": "green", "-": "red", "~": "yellow"}
SIGNS = {
    "new-chain": "+",
    "insert-rule": "+",
    "delete-chain": "-",
    "delete-rule": "-",
    "add-address": "+",
    "delete-address": "-",
    "add": "+",
    "delete": "-",
    "replace-route": "+",
    "delete-route": "-",
    "add-policy-rule": "+",
    "delete-policy-rule": "-",
    "delete-tc": "-",
}


def console() -> Console:
    """The standard output; plain and unfolded where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def show_status(status: dict[str, Any]) -> None:
    """A table of the interfaces, and what else there is to know in a few lines."""
    out = console()
    state = "[green]ready[/]" if status["ready"] else "[red]not ready[/]: " + escape("; ".join(status["pending"]))
    if not status["initialized"]:
        state = "[yellow]not initialized[/]"
    up = timedelta(seconds=int(status["uptimeSeconds"]))
    out.print(f"[bold]vpc-nat-gateway {escape(status['version'])}[/]  {state}  iptables-{status['variant']}, up {up}")
    table = Table("interface", "side", "link", "ARP", "MAC", "MTU", box=None, pad_edge=False)
    for side, name in status["interfaces"].items():
        link = status["links"].get(name)
        seen = (
            [_on(link["up"], "up", "down"), _on(link["arp"], "on", "off"), link["mac"], str(link["mtu"])]
            if link
            else []
        )
        table.add_row(escape(name), side, *(seen or ["[red]missing[/]"]))
    out.print(table)
    out.print(", ".join(f"{count} {kind}" for kind, count in status["counts"].items()))
    done = ", ".join(f"{count} {what}" for what, count in status["transactions"].items())
    out.print(f"generation {status['generation']}; transactions: {done}")
    if reason := status.get("fastpath", {}).get("reason"):
        out.print(f"no maps ahead of the chains: {escape(reason)}", soft_wrap=True)
    for conflict in status["conflicts"]:
        out.print(
            f"[red]address conflict[/]: {conflict['address']} on {escape(conflict['interface'])} is also held by "
            f"{conflict['mac']}, seen {conflict['count']} times, last {_when(conflict['lastSeen'])}"
        )
    for warning in status.get("warnings", ()):
        out.print(f"[yellow]warning[/]: {escape(warning)}", soft_wrap=True)
    if error := status["lastError"]:
        out.print(f"[red]last error[/] {_when(error['at'])}, {escape(error['by'])}: {escape(error['message'])}")


def show_drift(report: dict[str, Any]) -> None:
    """What differs now, and what was found and repaired lately."""
    out, status = console(), report["status"]
    if not report["count"]:
        out.print("the kernel equals the desired state")
    for line in report["now"]:
        out.print(f"~ {line}", style="yellow", markup=False, soft_wrap=True)
    if report["count"] > len(report["now"]):
        out.print(f"and {report['count'] - len(report['now'])} more")
    out.print(f"policy {status['policy']}; {status['repairs']} repairs, {status['looks']} looks")
    if status["nextRepairInSeconds"] is not None:
        wait = f"{status['nextRepairInSeconds']:.0f} s"
        out.print(f"[red]another program keeps changing what is ours[/]: the next repair waits {wait}")
    for entry in report["history"]:
        done = f"repaired in {entry['seconds'] * 1000:.1f} ms" if entry["repaired"] else "not repaired"
        out.print(f"{_when(entry['at'])}, noticed by {escape(entry['noticedBy'])}, {done}:", soft_wrap=True)
        for line in entry["differences"]:
            out.print(f"  {line}", markup=False, soft_wrap=True)
        if entry["count"] > len(entry["differences"]):
            out.print(f"  and {entry['count'] - len(entry['differences'])} more")


def _on(value: bool, yes: str, no: str) -> str:
    return yes if value else f"[yellow]{no}[/]"


def _when(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def show_plan(result: dict[str, Any]) -> None:
    """The steps in their order, one line each, marked + for what comes, - for what goes, ~ for what changes."""
    out = console()
    lines = list(_lines(result["plan"]["steps"]))
    if not result["changed"]:
        out.print("nothing to do")
    elif not lines:
        out.print("no step in the kernel; the desired state itself changes")
    for sign, text in lines:
        out.print(f"{sign} {text}", style=STYLES[sign], markup=False, soft_wrap=True)


def _lines(steps: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for step in steps:
        if step["step"] == "edit-nft":
            yield from ((SIGNS.get(line.partition(" ")[0], "~"), f"nft {line}") for line in step["commands"])
            continue
        if step["step"] != "edit-table":
            yield SIGNS.get(step["step"], "~"), step["text"]
            continue
        for edit in step["edits"]:
            yield SIGNS.get(edit["edit"], "~"), edit["text"]
            if edit["edit"] == "replace-rules":
                yield from (("+", f"iptables -t {step['table']} -A {edit['chain']} {rule}") for rule in edit["rules"])


def show_result(result: dict[str, Any]) -> None:
    """What a change did, in one line."""
    if not result["changed"]:
        console().print("nothing to do")
        return
    steps = sum(len(step.get("edits", "1")) for step in result["plan"]["steps"])
    said = [f"applied: {steps} steps in {result['seconds'] * 1000:.0f} ms"]
    if result["announced"]:
        said.append(f"announced {', '.join(result['announced'])}")
    if result["flowsDeleted"]:
        said.append(f"{result['flowsDeleted']} connections ended")
    console().print("; ".join(said), soft_wrap=True)


def show_explanation(explanation: dict[str, Any]) -> None:
    """The walk, a numbered line a step; what comes of it last."""
    out = console()
    text = explanation["text"]
    for number, line in enumerate(text, start=1):
        out.print(f"{number:>2}  {line}", markup=False, soft_wrap=True)
    out.print(f"=> {explanation['verdict']}", style="bold", markup=False)


_KINDS = {"change": "green", "repair": "yellow", "drift": "yellow", "refused": "red", "conflict": "red"}


def show_event(out: Console, event: dict[str, Any]) -> None:
    """When, of what kind, at whose request, what; one line."""
    kind = f"[{_KINDS.get(event['kind'], 'cyan')}]{escape(event['kind']):<8}[/]"
    known = (f"{name} {event[field]}" for name, field in _WHENCE.items() if event.get(field) is not None)
    whence = ", ".join(known)
    took = "" if event["seconds"] is None else f"  {event['seconds'] * 1000:.1f} ms"
    by = escape(event["by"]) + (f" ({escape(whence)})" if whence else "")
    out.print(f"{_when(event['at'])}  {kind} {escape(event['what'])}  [dim]{by}{took}[/]", soft_wrap=True)


_WHENCE = {"pid": "pid", "uid": "uid", "from": "client"}


def problem_lines(problem: dict[str, Any]) -> Iterator[str]:
    """A problem document as lines for stderr: one for each wrong field, else one."""
    if problem.get("errors"):
        yield from (f"{error['field']}: {error['message']}" for error in problem["errors"])
        return
    line = str(problem.get("detail", problem))
    if "restored" in problem:
        line += " (everything is as it was before" if problem["restored"] else " (it could not be undone"
        line += "; a retry may succeed)" if problem["retryable"] else ")"
    yield line
