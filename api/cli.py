"""``natgw``: the gateway on the command line. All but ``serve`` and ``lab`` talk to the daemon's Unix socket."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from api import operate
from api.cliparts import CHANGES, FAILED, AsJson, ask, print_json, read_state, request, stop

CODES = """
Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage, and from `plan` that there is something to
do; 3 no daemon is running.
"""

BFD = """
In a pod that speaks BFD: `natgw drain [--wait]` sends the traffic to the other gateways, `natgw undrain` takes it
again; `status` and `metrics` tell of the sessions and of the gateway's health.
"""

LAB = "Kube-OVN manifests, built in network namespaces of this machine and tried with real traffic."

app = typer.Typer(
    name="natgw",
    help=f"A NAT gateway for a VPC: EIPs, floating IPs, DNAT, SNAT and routes.\n\n{BFD}\n\n{CODES}",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

File = Annotated[
    str, typer.Option("--file", "-f", metavar="FILE", help="The desired state, JSON or YAML; - is standard input.")
]


def main() -> None:
    """The console script."""
    from gateway.bfd import natgw  # noqa: PLC0415 -- whoever imports this module needs nothing of the gateway

    if natgw.concerns(sys.argv[1:], os.environ):
        sys.exit(natgw.main(sys.argv[1:]))
    mount_lab(sys.argv[1:])
    app(prog_name="natgw")


def mount_lab(arguments: list[str]) -> None:
    """``natgw lab`` with its own subcommands; loaded only where it is meant, so that the rest starts quickly."""
    completing = any(name.startswith("_NATGW") for name in os.environ)
    if completing or "lab" in arguments:
        from lab.cli import app as lab  # noqa: PLC0415 -- see above

        app.add_typer(lab, name="lab")
    else:
        # Named in the help all the same; whoever calls it has it in the arguments and comes by the other branch.
        app.add_typer(typer.Typer(), name="lab", help=LAB)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 -- slow to import, and needed here only

        typer.echo(version("vpc-nat-gateway"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Option(envvar="NATGW_RUN_DIR", help="Where the daemon's sockets are.")] = Path(
        "/run/natgw"
    ),
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    context.obj = run_dir


@app.command()
def serve(context: typer.Context) -> None:
    """Run the daemon of this network namespace until SIGTERM.

    The environment configures it (NATGW_RUN_DIR, NATGW_STATE_DIR, NATGW_IPTABLES, NATGW_ARP, NATGW_LISTEN, ...);
    the verbs of nat-gateway.sh start it of their own accord.
    """
    from api.main import main as daemon  # noqa: PLC0415 -- everything else works without the kernel's drivers

    os.environ["NATGW_RUN_DIR"] = str(context.obj)
    raise typer.Exit(daemon())


@app.command()
def export(
    context: typer.Context,
    output: Annotated[str, typer.Option("--output", "-o", metavar="json|yaml", help="The format.")] = "json",
) -> None:
    """Print the whole desired state; `natgw apply` takes it back.

    Example: natgw export -o yaml > gateway.yaml
    """
    if output not in ("json", "yaml"):
        raise typer.BadParameter(f"{output} is neither json nor yaml", param_hint="--output")
    said = ask(context, "GET", "/v1/gateway")
    if output == "json":
        print_json(said)
        return
    import yaml  # noqa: PLC0415 -- not needed for JSON

    typer.echo(yaml.safe_dump(said, sort_keys=False), nl=False)


@app.command()
def apply(context: typer.Context, file: File, as_json: AsJson = False) -> None:
    """Make the gateway exactly what FILE says, in one transaction: all of it, or nothing changes.

    Example: natgw apply -f gateway.yaml
    """
    said = ask(context, "PUT", "/v1/gateway", read_state(file))
    if as_json:
        print_json(said)
    else:
        from api import show  # noqa: PLC0415 -- rich is not needed for JSON

        show.show_result(said)


@app.command()
def plan(context: typer.Context, file: File, as_json: AsJson = False) -> None:
    """Say what `apply` would do, step by step, and change nothing.

    Exit code 0: nothing to do. 2: there is something to do.

    Example: natgw plan -f gateway.yaml
    """
    said = ask(context, "PUT", "/v1/gateway?dryRun=true", read_state(file))
    if as_json:
        print_json(said)
    else:
        from api import show  # noqa: PLC0415 -- rich is not needed for JSON

        show.show_plan(said)
    if said["changed"]:
        raise typer.Exit(CHANGES)


operate.add_commands(app)


@app.command()
def metrics(context: typer.Context) -> None:
    """Print everything that is counted, in Prometheus' text format: for collectors that can only exec.

    Over HTTP it is GET /metrics; docs/metrics.md explains each.
    """
    from gateway.watcher import scrape  # noqa: PLC0415 -- whoever imports this module needs nothing of the gateway

    os.environ["NATGW_RUN_DIR"] = str(context.obj)
    raise typer.Exit(scrape.main(()))


@app.command()
def who(
    address: Annotated[str, typer.Argument(metavar="ADDRESS[:PORT]", help="An external address, as a peer saw it.")],
    at: Annotated[
        str,
        typer.Option(
            "--at",
            metavar="TIME",
            help="10:02 (of today, the whole minute), 10:02:30, or with a date: 2026-03-01T10:02.",
        ),
    ],
    path: Annotated[
        Path, typer.Option("--log", envvar="NATGW_FLOW_LOG", metavar="FILE", help="The flow log, where it is a file.")
    ] = Path("stdout"),
    as_json: AsJson = False,
) -> None:
    """Say which inside address was behind an external one at a time, from the flow log (NATGW_FLOW_LOG).

    Needs no daemon. Exit code 1 where there was no such connection.

    Example: natgw who 203.0.113.7:40211 --at 10:02
    """
    from api import who as log  # noqa: PLC0415 -- needed here only

    try:
        wanted = log.asked(address, at, datetime.now().astimezone())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    paths = log.files(path)
    if not paths:
        stop(f"there is no flow log {path}: it is written where NATGW_FLOW_LOG names a file", FAILED)
    try:
        found = log.search(log.read(paths), wanted)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}", FAILED)
    if as_json:
        print_json([log.document(each) for each in found])
    elif found:
        typer.echo("\n".join(log.table(found)))
    if not found:
        stop(f"nobody was behind {address} then, says {path}", FAILED)


@app.command()
def api(context: typer.Context, method: str, path: str) -> None:
    """The HTTP face for callers that can only exec: the body comes on stdin, the answer's body goes to stdout.

    Exit code 0 for a 2xx, else 1. GET, HEAD and DELETE read no body.

    Example: echo '{"address": "192.168.0.10/24"}' | natgw api PUT /v1/eips/192.168.0.10
    """
    method = method.upper()
    if not path.startswith("/"):
        raise typer.BadParameter(f"{path} does not begin with /", param_hint="PATH")
    body = None if method in ("GET", "HEAD", "DELETE") else sys.stdin.buffer.read()
    answer = request(context, method, path, body)
    text = answer.body.decode(errors="replace")
    typer.echo(text, nl=bool(text) and not text.endswith("\n"))
    if not answer.ok:
        raise typer.Exit(FAILED)


if __name__ == "__main__":
    main()
