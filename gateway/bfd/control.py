"""How ``bfdd-control`` and its like reach a beacon: a unix socket in the abstract namespace, and the client itself.

OpenBFDD listens on 127.0.0.1 port 957, which needs a capability and lets every process of the network namespace command
it. An abstract socket needs neither capability nor a writable directory (the containers that run this have a read-only
view of most), leaves nothing behind, is as private to the network namespace as the port was, and tells who asks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence

DEFAULT_RUN_DIR = "/run/natgw"
DEFAULT_CHANNEL = "127.0.0.1:957"
ALTERNATE_CHANNEL = "127.0.0.1:958"
TIMEOUT = 5.0
"""Seconds that a whole request may take."""


def run_dir() -> str:
    """Where instances are told apart: ``NATGW_RUN_DIR``."""
    return os.environ.get("NATGW_RUN_DIR") or DEFAULT_RUN_DIR


def supervisor_directory(environment: Mapping[str, str]) -> str:
    """Where the supervisor of a pod has its socket and its state file."""
    run = environment.get("NATGW_RUN_DIR")
    return f"{run}/bfdd-supervisor" if run else "/var/run/kube-ovn/bfdd-supervisor"


def supervisor_socket(environment: Mapping[str, str]) -> str:
    """The socket that probes ask."""
    return environment.get("BFDD_SUPERVISOR_SOCKET") or supervisor_directory(environment) + "/control.sock"


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


def ask_patiently(name: str, line: str, patience: float) -> str:
    """``ask``, trying again for ``patience`` seconds while nobody listens yet. Raises OSError."""
    end = time.monotonic() + patience
    while True:
        try:
            return ask(name, line)
        except ConnectionRefusedError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def main(argv: Sequence[str]) -> int:
    """``bfdd-control [--control=ADDRESS:PORT | --altport] [--wait=SECONDS] COMMAND``, or ``… load FILE``.

    ``load`` obeys every line of a file that is neither empty nor a comment, and ends at the first failure. Ends with 1
    when the beacon cannot be reached, says nothing, or could not complete the request; a command that the beacon
    refuses ends with 0, as OpenBFDD's does.
    """
    channel, patience = DEFAULT_CHANNEL, 0.0
    words = list(argv)
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        if name == "--altport":
            channel = ALTERNATE_CHANNEL
        elif name == "--control":
            channel = value
        elif name == "--wait" and value.isdecimal():
            patience = float(value)
        else:
            print(f"bfdd-control: unknown option {name}", file=sys.stderr)
            return 1
    if not words:
        print("usage: bfdd-control [--control=ADDRESS:PORT | --altport] [--wait=SECONDS] COMMAND", file=sys.stderr)
        return 1
    try:
        for line in _lines(words):
            reply = ask_patiently(address(channel), line, patience)
            print(reply, end="", flush=True)
            if not reply or reply.startswith("Unable to complete "):
                return 1
    except OSError as error:
        print(f"bfdd-control: {channel}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _lines(words: Sequence[str]) -> list[str]:
    if words[0] != "load" or len(words) != 2:
        return [" ".join(words)]
    with open(words[1]) as file:
        stripped = [line.strip() for line in file]
    return [line for line in stripped if line and not line.startswith("#")]
