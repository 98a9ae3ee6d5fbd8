"""A whole speaker: sessions, sockets and the control face in one loop; and the program ``bfdd-beacon``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.bfd import control, healthwatch, turns
from gateway.bfd.commands import STATE_NAMES, Commands, diag_name
from gateway.bfd.drain import Drain, Phase
from gateway.bfd.session import SessionConfig, StateChange
from gateway.bfd.settings import HealthSettings, drain_grace
from gateway.bfd.speaker import Speaker
from gateway.bfd.table import MINIMUM_TTL, Entry, SessionTable
from gateway.bfd.udp import CONTROL_PORT, MULTIHOP_PORT, Network, UdpNetwork, canonical, wildcards
from gateway.bfd.withdrawal import Withdrawal
from gateway.small.log import log
from gateway.small.loop import Loop, on_signals
from gateway.small.server import Server, line_protocol, same_user_or_root


def random() -> float:
    """A number in [0, 1) from the kernel; the random module would cost a megabyte."""
    return int.from_bytes(os.urandom(6), "big") / 2**48


class Beacon:
    """A speaker with its control face. Raises OSError when an address or a channel cannot be had.

    ``grace`` is how long ``end`` may take while traffic moves elsewhere, in microseconds. On the port of multihop BFD
    (RFC 5883) any TTL is taken.
    """

    def __init__(
        self, loop: Loop, network: Network, defaults: SessionConfig, channels: Sequence[str], grace: int = 0
    ) -> None:
        self.loop = loop
        minimum_ttl = 0 if network.port == MULTIHOP_PORT else MINIMUM_TTL
        self.table = SessionTable(defaults, network.locals_for, random, minimum_ttl)
        self.observers: list[Callable[[Entry, StateChange], None]] = []
        """Told of every change of state."""
        self.speaker = Speaker(self.table, network, loop, self._changed, self._send_failed)
        self.withdrawal = Withdrawal(loop, self.speaker)
        self.drain = Drain(loop, self.speaker, self.withdrawal, grace=grace, done=self._drained)
        self._ending = False
        self.commands = Commands(self.table, self.speaker.did, loop.stop)
        self._servers = [
            Server(loop, control.listen(channel), line_protocol(self._command), same_user_or_root)
            for channel in channels
        ]

    def end(self) -> None:
        """Stop the loop once the traffic has moved elsewhere, or when asked a second time."""
        if self._ending or self.drain.phase is Phase.DONE:
            self.loop.stop()
            return
        self._ending = True
        log("ending: the traffic is sent elsewhere first")
        self.drain.begin()

    def _drained(self) -> None:
        said = self.drain.status()
        log(f"drained: peers told after {said['ToldAfter']} s, last packet forwarded after {said['MovedAfter']} s")
        if self._ending:
            self.loop.stop()

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


@dataclass
class Options:
    """What ``bfdd-beacon`` is asked for."""

    addresses: list[str]
    channels: list[str]
    health: bool = False
    port: int = CONTROL_PORT


def parse(argv: Sequence[str]) -> Options:
    """The options of ``bfdd-beacon``. Raises ValueError."""
    addresses: list[str] = []
    channels: list[str] = []
    health, port = False, CONTROL_PORT
    for option in argv:
        name, _, value = option.partition("=")
        if name == "--listen":
            address = canonical(value)
            if address is None:
                raise ValueError(f"not an IPv4 or IPv6 address: {value}")
            addresses.append(address)
        elif name == "--control" and value:
            channels.append(value)
        elif option == "--health":
            health = True
        elif option == "--multihop":
            port = MULTIHOP_PORT
        elif name not in ("--nofork", "--tee"):
            raise ValueError(f"unknown option {option}")
    if not addresses or addresses == ["::"]:
        addresses = wildcards()
    return Options(addresses, channels or [control.DEFAULT_CHANNEL, control.ALTERNATE_CHANNEL], health, port)


def main(argv: Sequence[str]) -> int:
    """``bfdd-beacon [--nofork] [--tee] [--health] [--multihop] [--listen=ADDRESS]… [--control=ADDRESS:PORT]…``.

    It always stays in the foreground and logs to stdout: ``--nofork`` and ``--tee`` are what its callers ask for.
    With ``--health`` sessions are Up only while this network namespace can do a gateway's job, with ``--multihop`` they
    are those of RFC 5883.
    """
    turns.ask_for_short_ones()
    loop = Loop()
    on_signals(loop, lambda: beacon.end())  # noqa: PLW0108 -- there is no beacon yet
    try:
        options = parse(argv)
        grace = drain_grace(os.environ)
        beacon = Beacon(loop, UdpNetwork(options.addresses, options.port), SessionConfig(), options.channels, grace)
        if options.health:
            own = [address for address in options.addresses if address not in wildcards()] or ["0.0.0.0"]
            settings = HealthSettings.read(os.environ)
            healthwatch.watch(loop, beacon.table, beacon.withdrawal, addresses=own, settings=settings, log=log)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        print(f"bfdd-beacon: {reason}", file=sys.stderr)
        return 1
    log(f"listening on {', '.join(options.addresses)}")
    loop.run()
    beacon.close()
    return 0
