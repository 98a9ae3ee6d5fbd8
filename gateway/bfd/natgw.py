"""``natgw drain|undrain|status|metrics`` in a pod that speaks BFD: ask the supervisor that runs there.

The pod's container has a few MiB and no NAT daemon, so this stands on the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.bfd import control

FAILED, USAGE, NOT_RUNNING = 1, 2, 3
WORDS = ("drain", "undrain", "status", "metrics")
OPTIONS = ("--json", "--wait")


def concerns(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether these arguments of ``natgw`` are for here: words of BFD always, the others where a supervisor is and
    no NAT daemon."""
    word = argv[0] if argv else ""
    if word in ("drain", "undrain"):
        return True
    daemon = environment.get("NATGW_RUN_DIR") or control.DEFAULT_RUN_DIR
    return (
        word in WORDS
        and os.path.exists(control.supervisor_socket(environment))
        and not Path(daemon, "api.sock").exists()
    )


def main(argv: Sequence[str]) -> int:
    """``drain [--wait]``, ``undrain``, ``status [--json]``, ``metrics``. Exit codes as all of natgw: 0 done, 1 failed,
    2 wrong usage, 3 nobody to ask.

    ``drain`` sends the traffic elsewhere and leaves the gateway forwarding; with ``--wait`` it returns when the traffic
    has moved.
    """
    words = [word for word in argv if word not in OPTIONS]
    options = [word for word in argv if word in OPTIONS]
    if len(words) != 1 or words[0] not in WORDS:
        print("usage: natgw drain [--wait] | undrain | status [--json] | metrics", file=sys.stderr)
        return USAGE
    try:
        reply = _ask(words[0])
        while words[0] == "drain" and "--wait" in options and reply["status"]["Drain"]["Phase"] not in ("done", "none"):
            time.sleep(0.2)
            reply = _ask("status")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"natgw: no BFD supervisor answers on {control.supervisor_socket(os.environ)}: {reason}", file=sys.stderr)
        return NOT_RUNNING
    if reply["error"]:
        print(f"natgw: {reply['error']}", file=sys.stderr)
        return FAILED
    if words[0] == "metrics":
        print(reply["metrics"], end="")
    elif "--json" in options:
        print(json.dumps(reply["status"], indent=2))
    else:
        print("\n".join(lines(reply["status"])))
    return 0


def _ask(word: str) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(control.ask(control.supervisor_socket(os.environ), word))
    return reply


def lines(status: Mapping[str, Any]) -> list[str]:
    """A status for people."""
    told = [f"ready       {'yes' if status['Ready'] else 'no'}"]
    for session in status["Sessions"]:
        pair = session["Pair"]
        told.append(f"session     {pair['Local']} - {pair['Remote']}: {session['State'] or 'none'}")
    health = status["Health"]
    if health is None:
        told.append("health      not watched")
    else:
        told.append(f"health      {'good' if health['Healthy'] else 'bad: ' + health['Reason']}")
        for name, probe in health["Probes"].items():
            told.append(f"  {name:<14}{probe['Verdict']}: {probe['Detail']}")
    drain = status["Drain"]
    moved = "" if drain["MovedAfter"] is None else f", traffic had moved after {drain['MovedAfter']:.1f} s"
    told.append(f"drain       {drain['Phase']}{moved}")
    return told
