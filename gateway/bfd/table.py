"""All sessions of this process, and which of them a received packet belongs to (RFC 5880 6.8.6, RFC 5881).

Addresses are texts in their canonical form. A session is known by its pair of addresses and by its discriminator; its
``id`` is a number for people, never used twice. Times are integer microseconds.

Sessions exist for the peers that were allowed. They are created when a peer is allowed, and again when a packet of an
allowed peer finds none, so that a session that was removed by hand comes back with its peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.bfd.packet import ControlPacket, Discard, State, decode
from gateway.bfd.session import Output, Session, SessionConfig

MINIMUM_TTL = 254
"""RFC 5881 5 wants 255. Kube-OVN's dedicated BFD port routes once before a packet leaves it, so 254 arrives here."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A session and its addresses."""

    id: int
    local: str
    remote: str
    session: Session


@dataclass(frozen=True, slots=True)
class Happened:
    """What one session asks for: see ``Output``."""

    entry: Entry
    output: Output


class SessionTable:
    """``locals_for`` names the local addresses from which a peer is to be spoken to. ``random`` returns floats in
    [0, 1), for jitter and discriminators. ``minimum_ttl`` is 0 for multihop sessions (RFC 5883 has no such rule).
    """

    def __init__(
        self,
        defaults: SessionConfig,
        locals_for: Callable[[str], Iterable[str]],
        random: Callable[[], float],
        minimum_ttl: int = MINIMUM_TTL,
    ) -> None:
        self.minimum_ttl = minimum_ttl
        self.defaults = defaults
        """The configuration of sessions to come."""
        self.discarded: dict[Discard, int] = dict.fromkeys(Discard, 0)
        self._locals_for = locals_for
        self._random = random
        self._allowed: set[str] = set()
        self._entries: dict[int, Entry] = {}
        self._by_discriminator: dict[int, Entry] = {}
        self._by_pair: dict[tuple[str, str], Entry] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Entry]:
        """All sessions, oldest first."""
        return list(self._entries.values())

    def find(self, local: str, remote: str) -> Entry | None:
        """The session between two addresses."""
        return self._by_pair.get((local, remote))

    def get(self, session_id: int) -> Entry | None:
        """The session with this ``id``."""
        return self._entries.get(session_id)

    def allow(self, remote: str, now: int) -> None:
        """Speak with this peer from now on."""
        self._allowed.add(remote)
        for local in self._locals_for(remote):
            self.connect(local, remote, now)

    def block(self, remote: str) -> None:
        """Make no more sessions with this peer. Those that exist stay."""
        self._allowed.discard(remote)

    def connect(self, local: str, remote: str, now: int) -> Entry:
        """The session between two addresses, made if there is none."""
        entry = self.find(local, remote)
        if entry is None:
            entry = Entry(
                self._next_id, local, remote, Session(self.defaults, self._discriminator(), now, self._random)
            )
            self._next_id += 1
            self._entries[entry.id] = entry
            self._by_discriminator[entry.session.discriminator] = entry
            self._by_pair[local, remote] = entry
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget a session without a word to its peer."""
        del self._entries[entry.id]
        del self._by_discriminator[entry.session.discriminator]
        del self._by_pair[entry.local, entry.remote]

    def reset(self, entry: Entry, now: int) -> Entry:
        """Replace a session by a new one between the same addresses."""
        self.remove(entry)
        return self.connect(entry.local, entry.remote, now)

    def next_timer(self) -> int | None:
        """When ``tick`` has something to do."""
        timers = [entry.session.next_timer() for entry in self._entries.values()]
        return min((at for at in timers if at is not None), default=None)

    def tick(self, now: int) -> list[Happened]:
        """Do what is due in every session."""
        return [Happened(entry, entry.session.tick(now)) for entry in self._entries.values()]

    def receive(self, payload: bytes, local: str, remote: str, ttl: int, now: int) -> Happened | None:
        """Take the payload of a datagram that came from ``remote`` to ``local`` with this TTL or hop limit.

        None when no session is concerned. What is thrown away is counted in ``discarded``.
        """
        # RFC 5881 5: "If BFD authentication is not in use on a session, ... All received BFD Control packets that are
        # demultiplexed to the session MUST be discarded if the received TTL or Hop Limit is not equal to 255." We take
        # one less, see MINIMUM_TTL. The source port is not looked at: BIRD sends from below 49152.
        packet = decode(payload) if ttl >= self.minimum_ttl else Discard.TTL
        found = self._select(packet, local, remote, now) if isinstance(packet, ControlPacket) else packet
        if isinstance(found, Discard):
            self.discarded[found] += 1
            return None
        if found.output.discard is not None:
            self.discarded[found.output.discard] += 1
        return found

    def _select(self, packet: ControlPacket, local: str, remote: str, now: int) -> Happened | Discard:
        # "If the Your Discriminator field is nonzero, it MUST be used to select the session with which this BFD packet
        # is associated. If no session is found, the packet MUST be discarded."
        entry = self._by_discriminator.get(packet.your_discriminator)
        if entry is not None:
            return Happened(entry, entry.session.receive(packet, now))
        # "If the Your Discriminator field is zero and the State field is not Down or AdminDown, the packet MUST be
        # discarded."
        if packet.your_discriminator == 0 and packet.state not in (State.DOWN, State.ADMIN_DOWN):
            return Discard.STATE_WITHOUT_DISCRIMINATOR
        # "If the Your Discriminator field is zero, the session MUST be selected based on some combination of other
        # fields, possibly including source addressing information ... If a matching session is not found, a new session
        # MAY be created, or the packet MAY be discarded."
        entry = self.find(local, remote)
        if entry is None and remote in self._allowed and not packet.auth:
            entry = self.connect(local, remote, now)
        if entry is None:
            return Discard.NO_SESSION
        if packet.your_discriminator:
            return Happened(entry, entry.session.receive_stale(packet, now))
        return Happened(entry, entry.session.receive(packet, now))

    def _discriminator(self) -> int:
        # 6.8.1: "bfd.LocalDiscr ... It MUST be unique across all BFD sessions on this system, and nonzero. It SHOULD be
        # set to a random (but still unique) value to improve security."
        while True:
            discriminator = int(self._random() * 2**32)
            if discriminator and discriminator not in self._by_discriminator:
                return discriminator
