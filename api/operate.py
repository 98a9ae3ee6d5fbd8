"""The commands of ``natgw`` that look: status, top, explain, doctor, events, dump. They change nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from api.client import Client, Failed, NotRunning
from api.cliparts import CHANGES, FAILED, NOT_RUNNING, AsJson, ask, print_json, read_state, request, stop


def add_commands(app: typer.Typer) -> None:
    """Add all of them to ``natgw``."""
    app.command()(status)
    app.command()(top)
    app.command()(explain)
    app.command()(events)
    app.command()(console)
    app.command()(doctor)
    app.command()(dump)


def status(  # noqa: PLR0917 -- each is an argument or option of the command
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Only EIPs with these in them or in what they carry."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every two seconds, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="So many EIPs at a time.")] = 20,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Pass over so many EIPs.")] = 0,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare the kernel with the desired state, and say what was repaired last.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how the gateway is, and what each EIP carries now.

    Readiness, interfaces, ARP, next hops (as the kernel's ARP table knows them; nobody is asked), connections against
    the most there can be, address conflicts, warnings, the last error; EIPs with what hangs on them and their traffic.
    In the last column the source ports in use and, where it is worth a look, how near the busiest destination is to
    using all of them.

    Who is behind this EIP, with the traffic of each rule: natgw status 192.168.0.10

    Which EIPs serve this pod: natgw status 10.0.1.5

    With --diff only this: how the kernel differs from the desired state now, and what others had changed before it
    was repaired.
    """
    from api import overview, show  # noqa: PLC0415 -- rich is slow to import

    if diff:
        said = ask(context, "GET", "/v1/drift")
        print_json(said) if as_json else show.show_drift(said)
        return
    words = " ".join(search or ())

    def look() -> dict[str, Any]:
        return overview.gather(lambda path: ask(context, "GET", path), lambda path: _maybe(context, path))

    if as_json:
        print_json(overview.document(look(), words, limit, offset))
        return
    show.refreshed(lambda: overview.status(look(), words, limit, offset), watch)


def top(
    context: typer.Context,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="So many of each kind.")] = 10,
    once: Annotated[
        bool, typer.Option("--once", help="Look once; so it is also where the output is no terminal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the busiest EIPs, inner and outer addresses, and go on looking until Ctrl-C.

    Rates are those that the flow watcher measured last. "in" comes from the external network, "out" goes to it.

    For scripts: natgw top --once --json
    """

    def traffic() -> dict[str, Any]:
        said: dict[str, Any] = ask(context, "GET", "/v1/traffic")
        return said

    if as_json:
        said = traffic()
        kept = ("at", "intervalSeconds", "collector", "conntrack", "total")
        busiest = sorted(said["eips"], key=lambda each: -sum(each[way]["bytesPerSecond"] for way in ("in", "out")))
        lists = {name: said[name][:count] for name in ("topSources", "topDestinations")}
        print_json({name: said[name] for name in kept} | {"eips": busiest[:count]} | lists)
        return
    from api import overview, show  # noqa: PLC0415 -- rich is slow to import

    show.refreshed(lambda: overview.top(traffic(), count), not once and sys.stdout.isatty())


def _maybe(context: typer.Context, path: str) -> Any:
    """What the daemon says, or None where it has no such document."""
    answer = request(context, "GET", path)
    return answer.json() if answer.ok else None


def explain(  # noqa: PLR0917 -- each is an argument or option of the command
    context: typer.Context,
    protocol: Annotated[str, typer.Argument(metavar="PROTO", help="tcp, udp or icmp.")],
    source: Annotated[str, typer.Argument(metavar="SRC[:PORT]", help="Or with --flow one end of a live connection.")],
    destination: Annotated[str | None, typer.Argument(metavar="DST[:PORT]")] = None,
    in_interface: Annotated[
        str | None, typer.Option("--in", metavar="IFACE", help="Where it comes in; by default where SRC lies.")
    ] = None,
    flow: Annotated[bool, typer.Option("--flow", help="A live connection with this end, translated or not.")] = False,
    offline: Annotated[
        str | None, typer.Option("--offline", metavar="FILE", help="By a state file instead of the kernel; - is stdin.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what becomes of a connection, in order, and what keeps it from working.

    Where it arrives, which rules decide, what it becomes, which way it and its answers go, which limit holds it,
    whether neighbours are known; what is missing, and what would mend it. Nothing is sent, nobody is asked.

    Exit code 0: nothing is known that keeps it from working. 2: something does.

    --offline takes what `natgw dump` printed, the stored spec.json, or what `natgw export` printed; of the last two
    it takes everything to be as the spec wants it.

    A new connection from outside: natgw explain tcp 203.0.113.5:40000 192.168.0.10:8888

    A tenant's ping: natgw explain icmp 10.0.1.5 1.1.1.1

    Who is this now: natgw explain --flow tcp 192.168.0.10:40211
    """
    if flow == (destination is not None):
        raise typer.BadParameter("one of the two: DST, or --flow", param_hint="DST[:PORT]")
    question = {"protocol": protocol.lower()}
    question |= {"flow": source} if flow else {"src": source, "dst": destination or ""}
    if in_interface:
        question["in"] = in_interface
    if offline:
        said = _explained_offline(offline, question)
    else:
        said = ask(context, "GET", f"/v1/explain?{urlencode(question)}")
    if as_json:
        print_json(said)
    else:
        from api import show  # noqa: PLC0415 -- rich is not needed for JSON

        show.show_explanation(said)
    if not said["works"]:
        raise typer.Exit(CHANGES)


def _explained_offline(file: str, question: dict[str, str]) -> dict[str, Any]:
    """What the daemon would say if its kernel were as the file says."""
    # Slow to import, and needed here only.
    from pydantic import ValidationError  # noqa: PLC0415

    from api.explain import Question, endpoint  # noqa: PLC0415
    from api.explain import explain as walk  # noqa: PLC0415
    from api.state import offline  # noqa: PLC0415

    if "flow" in question:
        stop("a state file holds no live connections: ask by SRC and DST", FAILED)
    try:
        reading = offline(json.loads(read_state(file)))
        asked = Question(
            protocol=question["protocol"],
            source=endpoint(question["src"]),
            destination=endpoint(question["dst"]),
            in_interface=question.get("in"),
        )
    except ValidationError as error:
        stop("; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors()), FAILED)
    except ValueError as error:
        stop(f"{file}: {error}", FAILED)
    told: dict[str, Any] = walk(asked, reading).model_dump(mode="json")
    return told


def doctor(
    context: typer.Context,
    ask_neighbours: Annotated[
        bool, typer.Option("--ask/--no-ask", help="Ask next hops and other holders of our addresses by ARP.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Look at the namespace as a colleague would: what is wrong, what follows from it, what would mend it.

    Interfaces, forwarding, addresses, routes, rp_filter, promote_secondaries, MTU, the connection table, next hops
    (asked by ARP), other holders of EIPs and lanIp, rules of others and of the other iptables variant, drift, what
    the kernel lacks and what is done instead, listening sockets, disk. Works with and without a daemon; changes
    nothing.

    Exit code 0: all is well (or worth knowing at most). 1: warnings. 2: errors, that is, traffic does not flow.
    """
    from api.examine import facts  # noqa: PLC0415 -- it brings the kernel's drivers
    from gateway.ports import Refused  # noqa: PLC0415
    from rules.doctor import CHECKS, examine  # noqa: PLC0415

    try:
        found = examine(facts({**os.environ, "NATGW_RUN_DIR": str(context.obj)}, ask=ask_neighbours))
    except (Refused, ValueError) as error:
        stop(str(error), FAILED)
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
    else:
        from api import show  # noqa: PLC0415 -- rich is not needed for JSON

        show.show_findings([each.model_dump(mode="json") for each in found], len(CHECKS))
    worst = {each.severity for each in found}
    raise typer.Exit(2 if "error" in worst else 1 if "warning" in worst else 0)


def dump(context: typer.Context) -> None:
    """Print everything at once as JSON: what is wanted, and what the kernel has now.

    Rules, links, addresses, routes, neighbours, settings and the status. For a colleague, or for
    `natgw explain --offline`.

    Example: natgw dump > gateway.json
    """
    print_json(ask(context, "GET", "/v1/state"))


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many of the past, the newest.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Tell what happened: who asked for which change, what came of it, what the gateway repaired or noticed.

    The daemon keeps the last 2,048 events, while it lives. The log (natgw.log, NATGW_LOG=json for machines) has the
    same; over HTTP they are GET /v1/events, which also streams them.

    Example: natgw events --follow
    """
    from api import show  # noqa: PLC0415 -- rich is slow to import

    out = show.console()
    past = ask(context, "GET", f"/v1/events?{urlencode({'follow': 'false', 'limit': limit})}")
    for event in past:
        typer.echo(json.dumps(event)) if as_json else show.show_event(out, event)
    if not follow:
        return
    after = past[-1]["id"] if past else 0
    try:
        for event in _following(context, after):
            typer.echo(json.dumps(event)) if as_json else show.show_event(out, event)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _following(context: typer.Context, after: int) -> Iterator[dict[str, Any]]:
    """The events after the one with this number, for as long as the daemon lives."""
    try:
        with Client(context.obj).stream(f"/v1/events?after={after}") as lines:
            for line in lines:
                name, _, value = line.partition(": ")
                if name == "data" and "kind" in (event := json.loads(value)):
                    yield event
    except NotRunning as error:
        stop(str(error), NOT_RUNNING)
    except Failed as error:
        stop(str(error), FAILED)


def console(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On which port of 127.0.0.1; 0: any free one.")] = 0,
) -> None:
    """Show the gateway in a browser on this machine, until Ctrl-C: traffic, addresses, events. It only reads.

    Prints the address to open. For a gateway in a cluster set NATGW_LISTEN=127.0.0.1:8443 and NATGW_TOKEN_FILE,
    run `kubectl port-forward POD 8443`, and open http://127.0.0.1:8443/.

    Example: natgw console
    """
    import asyncio  # noqa: PLC0415 -- slow to import

    from api.consoleproxy import serve_console  # noqa: PLC0415

    ask(context, "GET", "/v1/status")  # whoever names a run directory without a daemon is told so
    try:
        asyncio.run(serve_console(context.obj / "api.sock", port, typer.echo))
    except OSError as error:
        stop(f"127.0.0.1:{port}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        raise typer.Exit from None
