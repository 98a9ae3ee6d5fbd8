"""``natgw metrics``: what ``/metrics`` says, for collectors that can only exec into the pod. Quick to start.

Such a collector starts a process for each scrape, so nothing is imported but what a request over a Unix socket takes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

FAILED, USAGE, NOT_RUNNING = 1, 2, 3
PATIENCE = 30.0
"""Seconds for the answer."""


def main(argv: Sequence[str]) -> int:
    """Print the metrics of the daemon of this run directory. Exit codes as all of natgw: 1 failed, 3 no daemon."""
    if argv:
        print("usage: natgw metrics", file=sys.stderr)
        return USAGE
    path = f"{os.environ.get('NATGW_RUN_DIR') or '/run/natgw'}/api.sock"
    try:
        head, body = _get(path, "/metrics")
    except (FileNotFoundError, ConnectionRefusedError):
        print(f"natgw: no gateway daemon answers on {path}", file=sys.stderr)
        return NOT_RUNNING
    except OSError as error:
        print(f"natgw: the daemon on {path} broke off: {error.strerror or error}", file=sys.stderr)
        return FAILED
    if head.split(b" ")[1:2] != [b"200"]:
        print(f"natgw: the daemon on {path} answered {head.decode(errors='replace')}", file=sys.stderr)
        return FAILED
    with suppress(BrokenPipeError):
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()
    return 0


def _get(socket_path: str, path: str) -> tuple[bytes, bytes]:
    """The first line and the body of an answer. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(socket_path)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 18), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], body
