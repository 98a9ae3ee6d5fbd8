"""What the commands of ``natgw`` share: asking the daemon, and ending with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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


def read_state(file: str) -> bytes:
    """The state in a file as JSON, whether it was written as JSON or as YAML."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        stop(f"{file}: {error.strerror}", FAILED)
    except UnicodeDecodeError:
        stop(f"{file}: not UTF-8 text", FAILED)
    try:
        return json.dumps(_parse(file, text)).encode()
    except TypeError as error:
        stop(f"{file}: JSON has no form for a value in it: {error}", FAILED)


def _parse(file: str, text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            stop(f"{file}: not JSON: {error}", FAILED)
    import yaml  # noqa: PLC0415 -- not needed for JSON

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        stop(f"{file}: not YAML: {' '.join(str(error).split())}", FAILED)
