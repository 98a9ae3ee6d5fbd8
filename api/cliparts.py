"""What the commands of ``natgw`` share: asking the daemon, and ending with a reason."""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

import typer

from api.client import Answer, Client, Failed, NotRunning

FAILED, CHANGES, NOT_RUNNING = 1, 2, 3

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the HTTP face says it.")]


def ask(context: typer.Context, method: str, path: str, body: bytes | None = None) -> Any:
    """What the answer to a request says that must succeed; else the reasons on stderr and the exit code."""
    answer = request(context, method, path, body)
    try:
        said = answer.json()
    except Failed as error:
        stop(str(error), FAILED)
    if not answer.ok:
        from api import show  # noqa: PLC0415 -- rich is not needed for JSON

        stop("\n".join(show.problem_lines(said)), FAILED)
    return said


def request(context: typer.Context, method: str, path: str, body: bytes | None = None) -> Answer:
    """The answer to one request, whatever it says; without a daemon, its exit code."""
    try:
        return Client(context.obj).request(method, path, body)
    except NotRunning as error:
        stop(str(error), NOT_RUNNING)
    except Failed as error:
        stop(str(error), FAILED)


def stop(message: str, code: int) -> NoReturn:
    """End with the lines on stderr and the exit code."""
    for line in message.splitlines():
        typer.secho(f"natgw: {line}", err=True)
    raise typer.Exit(code)


def print_json(said: Any) -> None:
    """A value as people read JSON."""
    typer.echo(json.dumps(said, indent=2))
