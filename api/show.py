"""The answers of the HTTP face as people read them."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

REFRESH_SECONDS = 2.0
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
    """The standard output; plain where it is no terminal, and unfolded unless COLUMNS says how wide it is."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


def marked(markup: str) -> Text:
    """A line with colours. ``:cd:`` is two digits of a MAC address, never a picture."""
    return Text.from_markup(markup, emoji=False, overflow="fold")


def head_lines(status: dict[str, Any]) -> Iterator[Text]:
    """How the gateway is, in a few lines: readiness, versions, counts, and what is wrong."""

    state = "[green]ready[/]" if status["ready"] else "[red]not ready[/]: " + escape("; ".join(status["pending"]))
    if not status["initialized"]:
        state = "[yellow]not initialized[/]"
    up = timedelta(seconds=int(status["uptimeSeconds"]))
    kernel = (status.get("surroundings") or {}).get("kernel")
    runs = f"iptables-{status['variant']}{_fastpath(status)}{f', kernel {escape(kernel)}' if kernel else ''}, up {up}"
    yield marked(f"[bold]vpc-nat-gateway {escape(status['version'])}[/]  {state}  {runs}")
    counts = ", ".join(f"{count:,} {kind}" for kind, count in status["counts"].items() if count)
    done = ", ".join(f"{count:,} {what}" for what, count in status["transactions"].items())
    yield marked(f"{counts or 'no objects'}; generation {status['generation']}; transactions: {done}")
    if drift := status.get("drift"):
        yield marked(f"drift: policy {drift['policy']}, {drift['repairs']:,} repairs; natgw status --diff compares")
    for conflict in status["conflicts"]:
        yield marked(
            f"[red]address conflict[/]: {conflict['address']} on {escape(conflict['interface'])} is also held by "
            f"{conflict['mac']}, seen {conflict['count']} times, last {_when(conflict['lastSeen'])}"
        )
    for warning in status.get("warnings", ()):
        yield marked(f"[yellow]warning[/]: {escape(warning)}")
    if error := status["lastError"]:
        yield marked(f"[red]last error[/] {_when(error['at'])}, {escape(error['by'])}: {escape(error['message'])}")


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


def _fastpath(status: dict[str, Any]) -> str:
    """Whether maps decide ahead of the chains, where the daemon says so."""
    fastpath = status.get("fastpath")
    if fastpath is None:
        return ""
    why = f" ({escape(fastpath['reason'])})" if fastpath["reason"] else ""
    return ", fastpath on" if fastpath["on"] else f", [yellow]fastpath off[/]{why}"


def ago(seconds: float) -> str:
    """A time that has passed, for people."""
    return "now" if seconds < 1 else f"{timedelta(seconds=int(seconds))} ago"


def refreshed(look: Callable[[], RenderableType], again: bool) -> None:
    """Print one look or, on a terminal, look again every two seconds until Ctrl-C."""
    out = console()
    if not again:
        out.print(look())
        return
    with suppress(KeyboardInterrupt), Live(look(), console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            live.update(look(), refresh=True)


def on_off(value: bool, yes: str, no: str) -> str:
    """The word for what is so; the other one in yellow."""
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
    """The story, sentence by sentence under its topics; what is missing and what would mend it; the end."""
    out = console()
    before = ""
    for line in explanation["story"]:
        if line["topic"] == "missing":
            continue
        topic = "" if line["topic"] == before else line["topic"]
        before = line["topic"]
        out.print(f"[cyan]{topic:<12}[/]{escape(line['text'])}", soft_wrap=True)
    if others := explanation["otherFlows"]:
        out.print(f"{'':<12}[dim]and {others} more connections with this end[/]")
    for fault in explanation["faults"]:
        mark = "[red]missing[/]     " if fault["breaks"] else "[yellow]note[/]        "
        out.print(f"{mark}{escape(fault['what'])}", soft_wrap=True)
        out.print(f"{'':<12}[green]mend:[/] {escape(fault['remedy'])}", soft_wrap=True)
    ends = "nothing is known that keeps it from working" if explanation["works"] else "it does not work"
    certain = "" if explanation["certain"] else "; uncertain: rules of others are taken as not matching"
    out.print(f"=> {explanation['verdict']}; {ends}{certain}", style="bold", markup=False, soft_wrap=True)


def show_findings(findings: list[dict[str, Any]], checks: int) -> None:
    """Each finding with what follows from it and what would mend it, the worst first."""
    out = console()
    for each in findings:
        colour = {"error": "red", "warning": "yellow"}.get(each["severity"], "cyan")
        out.print(
            f"[{colour}]{each['severity']:<8}[/] [bold]{escape(each['check'])}[/]: {escape(each['finding'])}",
            soft_wrap=True,
        )
        for name in ("consequence", "remedy"):
            if each[name]:
                out.print(f"{'':<9}{name}: {escape(each[name])}", soft_wrap=True)
    counted = Counter(each["severity"] for each in findings)
    named = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "info": ("worth knowing",) * 2}
    said = ", ".join(f"{counted[name]} {words[counted[name] > 1]}" for name, words in named.items() if counted[name])
    out.print(f"{checks} checks: {said or 'all is well'}", style="bold")


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
