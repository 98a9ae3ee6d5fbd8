"""How sessions are taken from their peers when traffic has to go elsewhere: silence first, the reason afterwards.

OVN writes what BFD tells it to its database at once when a detection time has expired, but as much as five seconds
late when a peer says Down or AdminDown soon after any other session changed; and a rolling update is just that, one
session after the other. So a session that is to go sends nothing for a detection time, and then says AdminDown and why.
The bound is the detection time, whatever happened before.

AdminDown and not Down, because a peer answers Down with Init, as the handshake wants it, and OVN uses the routes of a
session in Init as if it were Up. RFC 5880 6.8.18: "A system MAY choose to prevent a BFD session from being established.
... This can be done by holding the session in Down or AdminDown state, as appropriate." A peer that does not take
AdminDown for a failure (RFC 5882 3.2) has seen the detection time expire before.

While it is silent, an empty datagram goes to the peer's BFD port every few milliseconds. It belongs to no session and
every BFD speaker throws it away, but it wakes OVN's BFD thread, which would otherwise sleep through its own timers when
no other peer speaks to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.bfd.packet import Diag, State
from gateway.bfd.speaker import Speaker
from gateway.bfd.table import Entry, Happened
from gateway.small.loop import Loop

NUDGE = 20_000
"""Microseconds between the datagrams that keep a peer awake."""


@dataclass(slots=True)
class _Silence:
    entry: Entry
    until: int
    next_nudge: int


class Withdrawal:
    """Takes sessions down and gives them back, as a participant of ``loop``."""

    def __init__(self, loop: Loop, speaker: Speaker) -> None:
        self._speaker = speaker
        self._silent: dict[int, _Silence] = {}
        loop.add(self)

    def take(self, entry: Entry, diag: Diag, now: int) -> None:
        """Take a session from its peer for this reason, and keep it."""
        self._silence(entry, now)
        self._speaker.did(Happened(entry, entry.session.disable(now, diag)))

    def taken(self, entry: Entry, diag: Diag) -> bool:
        """Whether the session is kept from its peer for this reason."""
        return entry.session.state is State.ADMIN_DOWN and entry.session.diag == diag

    def give(self, entry: Entry, now: int) -> None:
        """End ``take``."""
        self._speak(entry, now)
        self._speaker.did(Happened(entry, entry.session.enable(now)))

    @property
    def done(self) -> bool:
        """Every peer of a session that was taken down has noticed, or has had the time to."""
        return not self._silent

    def next_timer(self) -> int | None:
        """When the next datagram is due, or a silence ends."""
        return min((min(silence.until, silence.next_nudge) for silence in self._silent.values()), default=None)

    def tick(self, now: int) -> None:
        """Keep peers awake; speak again to those that have noticed."""
        for silence in list(self._silent.values()):
            entry = silence.entry
            if self._speaker.table.get(entry.id) is None:
                del self._silent[entry.id]
            elif now >= silence.until or entry.session.remote.state in (State.DOWN, State.ADMIN_DOWN):
                self._speak(entry, now)
            elif now >= silence.next_nudge:
                silence.next_nudge = now + NUDGE
                self._speaker.nudge(entry)

    def _silence(self, entry: Entry, now: int) -> None:
        session = entry.session
        if session.state is not State.UP or session.suspended:
            return
        # Twice, because a peer may be late, and our first word after the silence must not come before it notices.
        until = now + 2 * session.remote_detection_time
        session.suspend()
        self._silent[entry.id] = _Silence(entry, until, now)

    def _speak(self, entry: Entry, now: int) -> None:
        if self._silent.pop(entry.id, None) is not None:
            self._speaker.did(Happened(entry, entry.session.resume(now)))
