"""``kube-ovn-bfdd-supervisor live|ready|status``: ask the supervisor that runs.

Probes run every few seconds in a container with a fifth of a CPU, so this imports next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from gateway.bfd import control


def main(argv: Sequence[str]) -> int:
    """One word. Ends with 0, or with 1 when the answer is no or there is none; prints a status as a line of JSON."""
    if len(argv) != 1 or argv[0] not in ("live", "ready", "status"):
        print("usage: kube-ovn-bfdd-supervisor run|live|ready|status", file=sys.stderr)
        return 1
    (word,) = argv
    try:
        reply = json.loads(control.ask(control.supervisor_socket(os.environ), word))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"kube-ovn-bfdd-supervisor {word}: {reason}", file=sys.stderr)
        return 1
    if word == "status":
        print(json.dumps(reply["status"]))
        return 0
    if reply["error"]:
        print(f"kube-ovn-bfdd-supervisor {word}: {reply['error']}", file=sys.stderr)
        return 1
    return 0
