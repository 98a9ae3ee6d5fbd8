"""What OVN does for egress gateways on a router: BFD with each next hop, and only those that are up in the routes.

Standard library only; runs as a script in the router's namespace, configured by one JSON object on its command line:

    {"beacon": path of bfdd-beacon, "control": path of bfdd-control, "local": address, "state": file,
     "gateways": [{"table": number, "min_tx": ms, "min_rx": ms, "multiplier": n, "hops": {address: device}}]}

The state file always holds the next hops in use, as JSON, and is replaced after the routes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

_SESSION = re.compile(r"remote=(\S+) state=(\S+)")


def commands(config: dict[str, Any]) -> list[str]:
    """What the speaker is told first: the intervals of each gateway's sessions, and the sessions."""
    lines = []
    for gateway in config["gateways"]:
        lines.append(f"session new set mintx {gateway['min_tx']} ms")
        lines.append(f"session new set minrx {gateway['min_rx']} ms")
        lines.append(f"session new set multi {gateway['multiplier']}")
        lines += [f"connect local {config['local']} remote {hop}" for hop in gateway["hops"]]
    return lines


def up(status: str) -> set[str]:
    """The peers whose sessions are up, of what ``bfdd-control status`` prints."""
    return {remote for remote, state in _SESSION.findall(status) if state == "Up"}


def route(table: int, hops: dict[str, str], alive: set[str]) -> str:
    """The ``ip`` command that leaves those next hops in the table; without any, there is no route."""
    ways = [f"nexthop via {hop} dev {device}" for hop, device in hops.items() if hop in alive]
    if not ways:
        return f"route flush table {table}"
    return f"route replace 0.0.0.0/0 table {table} {' '.join(ways)}"


class Router:
    """The speaker beside us, and the routes that follow it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._in_use: set[str] | None = None

    def run(self) -> None:
        """Go on until the speaker ends."""
        listen = f"--listen={self._config['local']}"
        argv = [self._config["beacon"], "--nofork", "--tee", listen]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as beacon:
            signal.signal(signal.SIGTERM, lambda *_: beacon.terminate())
            self._control("load", "/dev/stdin", text="\n".join(commands(self._config)) + "\n")
            self.follow()
            assert beacon.stdout is not None
            for line in beacon.stdout:  # it says every change of a session's state
                if "session" in line:
                    self.follow()

    def follow(self) -> None:
        """Make the routes follow the sessions."""
        alive = up(self._control("status"))
        if alive == self._in_use:
            return
        for gateway in self._config["gateways"]:
            subprocess.run(["ip", *route(gateway["table"], gateway["hops"], alive).split()], check=True)
        self._in_use = alive
        fresh = self._config["state"] + ".new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(sorted(alive), file)
        os.replace(fresh, self._config["state"])

    def _control(self, *words: str, text: str = "") -> str:
        argv = [self._config["control"], "--wait=5", *words]
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=True)
        return done.stdout


if __name__ == "__main__":
    Router(json.loads(sys.argv[1])).run()
