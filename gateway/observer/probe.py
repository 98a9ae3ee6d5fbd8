"""``vpc-egress-gateway-observer --health-check``: whether the observer of this pod answers.

Every ten seconds in a container with a fiftieth of a CPU, so this imports next to nothing.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

ADDRESS = ("127.0.0.1", 10666)
TIMEOUT = 1.0
"""Seconds."""


def check(address: tuple[str, int] = ADDRESS) -> str:
    """The first line of the answer. Raises OSError."""
    with socket.create_connection(address, TIMEOUT) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b""
        while b"\n" not in answer and (chunk := connection.recv(4096)):
            answer += chunk
    return answer.split(b"\r\n")[0].decode("ascii", "replace")


def main(argv: Sequence[str]) -> int:
    """Ends with 0 when the observer is well, else with 1 and the reason on stderr. The arguments are of no concern."""
    try:
        status = check()
    except OSError as error:
        status = error.strerror or str(error)
    if status.split(" ")[1:2] == ["200"]:
        return 0
    print(f"vpc-egress-gateway-observer: health check failed: {status or 'no answer'}", file=sys.stderr)
    return 1
