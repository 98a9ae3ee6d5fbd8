"""How ``bfdd-control`` and its like reach a beacon: a unix socket in the abstract namespace, and the client itself.

OpenBFDD listens on 127.0.0.1 port 957, which needs a capability and lets every process of the network namespace command
it. An abstract socket needs neither capability nor a writable directory (the containers that run this have a read-only
view of most), leaves nothing behind, is as private to the network namespace as the port was, and tells who asks.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

DEFAULT_RUN_DIR = "/run/natgw"
DEFAULT_CHANNEL = "127.0.0.1:957"
ALTERNATE_CHANNEL = "127.0.0.1:958"
TIMEOUT = 5.0
"""Seconds that a whole request may take."""


def run_dir() -> str:
    """Where instances are told apart: ``NATGW_RUN_DIR``."""
    return os.environ.get("NATGW_RUN_DIR") or DEFAULT_RUN_DIR


def address(channel: str = DEFAULT_CHANNEL) -> str:
    """The name of the abstract socket for a channel, which is what ``--control`` names."""
    return f"\0natgw-bfdd {channel} {run_dir()}"


def listen(channel: str = DEFAULT_CHANNEL) -> socket.socket:
    """A listening socket for a channel. Raises OSError when another beacon has it."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.bind(address(channel))
        listening.listen()
    except OSError as error:
        listening.close()
        raise OSError(
            error.errno, f"cannot open the control channel {channel} of {run_dir()}: {error.strerror}"
        ) from None
    return listening


def ask(name: str, line: str, timeout: float = TIMEOUT) -> str:
    """Send one line to the unix socket ``name`` and return the whole reply. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(timeout)
        channel.connect(name)
        channel.sendall(line.encode() + b"\n")
        reply = b""
        while chunk := channel.recv(65536):
            reply += chunk
    return reply.decode("utf-8", "replace")


def main(argv: Sequence[str]) -> int:
    """``bfdd-control [--control=ADDRESS:PORT | --altport] COMMAND …``.

    Ends with 1 when the beacon cannot be reached, says nothing, or could not complete the request; a command that the
    beacon refuses ends with 0, as OpenBFDD's does.
    """
    channel = DEFAULT_CHANNEL
    words = list(argv)
    while words and words[0].startswith("--"):
        option = words.pop(0)
        if option == "--altport":
            channel = ALTERNATE_CHANNEL
        elif option.startswith("--control="):
            channel = option.removeprefix("--control=")
        else:
            print(f"bfdd-control: unknown option {option}", file=sys.stderr)
            return 1
    if not words:
        print("usage: bfdd-control [--control=ADDRESS:PORT | --altport] COMMAND", file=sys.stderr)
        return 1
    try:
        reply = ask(address(channel), " ".join(words))
    except OSError as error:
        print(f"bfdd-control: cannot reach bfdd-beacon on {channel}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(reply, end="")
    return 1 if not reply or reply.startswith("Unable to complete ") else 0
