"""A whole speaker: sessions, sockets and the control face in one loop; and the program ``bfdd-beacon``."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from gateway.bfd import control
from gateway.bfd.commands import STATE_NAMES, Commands, diag_name
from gateway.bfd.session import SessionConfig, StateChange
from gateway.bfd.speaker import Speaker
from gateway.bfd.table import Entry, SessionTable
from gateway.bfd.udp import Network, UdpNetwork, canonical, wildcards
from gateway.small.loop import Loop, on_signals
from gateway.small.server import Server, line_protocol, same_user_or_root

STDOUT = 1


def random() -> float:
    """A number in [0, 1) from the kernel; the random module would cost a megabyte."""
    return int.from_bytes(os.urandom(6), "big") / 2**48


def log(line: str) -> None:
    """Write a line with the time of day to stdout, where a container's log comes from.

    Nobody must be able to stop the timers by not reading our log: a pipe that select calls writable takes a line
    without blocking, and what does not fit is lost.
    """
    seconds = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    with suppress(OSError):
        if select.select([], [STDOUT], [], 0)[1]:
            os.write(STDOUT, f"{stamp}.{int(seconds % 1 * 1000):03d}Z {line}\n".encode()[: select.PIPE_BUF])


class Beacon:
    """A speaker with its control face. Raises OSError when an address or a channel cannot be had."""

    def __init__(self, loop: Loop, network: Network, defaults: SessionConfig, channels: Sequence[str]) -> None:
        self.loop = loop
        self.table = SessionTable(defaults, network.locals_for, random)
        self.observers: list[Callable[[Entry, StateChange], None]] = []
        """Told of every change of state."""
        self.speaker = Speaker(self.table, network, loop, self._changed, self._send_failed)
        self.commands = Commands(self.table, self.speaker.did, loop.stop)
        self._servers = [
            Server(loop, control.listen(channel), line_protocol(self._command), same_user_or_root)
            for channel in channels
        ]

    def close(self) -> None:
        """Fall silent and close every socket."""
        for server in self._servers:
            server.close()
        self.speaker.close()

    def _command(self, line: str) -> str:
        if self.commands.log_types["command"]:
            log(f"command: {line}")
        return self.commands.execute(line, self.loop.clock())

    def _changed(self, entry: Entry, change: StateChange) -> None:
        if self.commands.log_types["session"]:
            log(
                f"session {entry.id} local={entry.local} remote={entry.remote}: {STATE_NAMES[change.old]} -> "
                f"{STATE_NAMES[change.new]} <{diag_name(change.diag)}>"
            )

        for observer in self.observers:
            observer(entry, change)

    def _send_failed(self, entry: Entry, error: OSError) -> None:
        log(f"session {entry.id} local={entry.local} remote={entry.remote}: cannot send: {error.strerror}")


def parse(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The listen addresses and control channels of ``bfdd-beacon``'s options. Raises ValueError."""
    addresses: list[str] = []
    channels: list[str] = []
    for option in argv:
        name, _, value = option.partition("=")
        if name == "--listen":
            address = canonical(value)
            if address is None:
                raise ValueError(f"not an IPv4 or IPv6 address: {value}")
            addresses.append(address)
        elif name == "--control" and value:
            channels.append(value)
        elif name not in ("--nofork", "--tee"):
            raise ValueError(f"unknown option {option}")
    if not addresses or addresses == ["::"]:
        addresses = wildcards()
    return addresses, channels or [control.DEFAULT_CHANNEL, control.ALTERNATE_CHANNEL]


def main(argv: Sequence[str]) -> int:
    """``bfdd-beacon [--nofork] [--tee] [--listen=ADDRESS]… [--control=ADDRESS:PORT]…``.

    It always stays in the foreground and logs to stdout: ``--nofork`` and ``--tee`` are what its callers ask for.
    """
    loop = Loop()
    try:
        addresses, channels = parse(argv)
        beacon = Beacon(loop, UdpNetwork(addresses), SessionConfig(), channels)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        print(f"bfdd-beacon: {reason}", file=sys.stderr)
        return 1
    on_signals(loop, loop.stop)
    log(f"listening on {', '.join(addresses)}")
    loop.run()
    beacon.close()
    return 0
