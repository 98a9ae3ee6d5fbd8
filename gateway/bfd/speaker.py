"""The thin shell around the sessions: sockets, a clock, and who is told of changes."""

from __future__ import annotations

from collections.abc import Callable

from gateway.bfd.session import StateChange
from gateway.bfd.table import Entry, Happened, SessionTable
from gateway.bfd.udp import Listener, Network, Sender
from gateway.small.loop import Loop

BATCH = 64
"""Datagrams taken from one socket before timers are served again, so that a flood cannot silence us."""


class Speaker:
    """Carries packets between a ``SessionTable`` and a ``Network``, as a participant of ``loop``.

    ``on_change`` hears of every change of state, ``on_error`` of the first failure to send in a row. Raises OSError
    when an address cannot be listened on.
    """

    def __init__(
        self,
        table: SessionTable,
        network: Network,
        loop: Loop,
        on_change: Callable[[Entry, StateChange], None],
        on_error: Callable[[Entry, OSError], None],
    ) -> None:
        self.table = table
        self.send_errors = 0
        self._network = network
        self._loop = loop
        self._on_change = on_change
        self._on_error = on_error
        self._listeners: list[Listener] = []
        self._senders: dict[int, Sender] = {}
        self._failing: set[int] = set()
        self._listen()
        loop.add(self)

    def next_timer(self) -> int | None:
        """When the earliest session wants its turn."""
        return self.table.next_timer()

    def tick(self, now: int) -> None:
        """Take what has arrived, then let the sessions look at the time.

        In this order, and with the time taken before: if this process was kept from running for longer than a detection
        time, the packets that prove the peer alive wait in the socket and must be heard first.
        """
        for listener in self._listeners:
            for _ in range(BATCH):
                datagram = listener.receive()
                if datagram is None:
                    break
                self.did(self.table.receive(datagram.payload, datagram.local, datagram.remote, datagram.ttl, now))
        for happened in self.table.tick(now):
            self.did(happened)
        self._drop_senders()

    def did(self, happened: Happened | None) -> None:
        """Do what a session asks for, after whatever happened to it."""
        if happened is None:
            return
        packet, change = happened.output.packet, happened.output.change
        if packet is not None:
            self._send(happened.entry, packet.encode())
        if change is not None:
            self._on_change(happened.entry, change)

    def nudge(self, entry: Entry) -> None:
        """Send an empty datagram to the peer's BFD port: no packet of the protocol, but it may wake its receiver."""
        self._send(entry, b"")

    @property
    def listening(self) -> bool:
        """The sockets are open."""
        return bool(self._listeners)

    def rebuild(self) -> None:
        """Open every socket anew, as a restart of the process would. Raises OSError."""
        self.close()
        self._listen()

    def close(self) -> None:
        """Close all sockets. Peers are not told: OVN moves traffic sooner when it hears nothing than when it hears
        AdminDown, whose effect it may delay by seconds."""
        for listener in self._listeners:
            self._loop.forget(listener.fileno())
            listener.close()
        self._listeners = []
        for sender in self._senders.values():
            sender.close()
        self._senders = {}

    def _listen(self) -> None:
        self._listeners = self._network.listeners()
        for listener in self._listeners:
            # Waking up is all that is needed: ``tick`` reads every listener in every turn.
            self._loop.watch(listener.fileno(), lambda: None)

    def _send(self, entry: Entry, payload: bytes) -> None:
        try:
            sender = self._senders.get(entry.id)
            if sender is None:
                sender = self._senders[entry.id] = self._network.sender(entry.local, entry.remote)
            sender.send(payload)
        except OSError as error:
            # No route, no address, no buffer: the next periodic packet tries again.
            self.send_errors += 1
            if entry.id not in self._failing:
                self._failing.add(entry.id)
                self._on_error(entry, error)
        else:
            self._failing.discard(entry.id)

    def _drop_senders(self) -> None:
        for session_id in [known for known in self._senders if self.table.get(known) is None]:
            self._senders.pop(session_id).close()
            self._failing.discard(session_id)
