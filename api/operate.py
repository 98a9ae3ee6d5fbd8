"""The commands of ``natgw`` that watch a gateway: events. They change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from api.client import Client, Failed, NotRunning
from api.cliparts import FAILED, NOT_RUNNING, AsJson, ask, stop


def add_commands(app: typer.Typer) -> None:
    """Add all of them to ``natgw``."""
    app.command()(events)
    app.command()(console)


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
