"""The two intervals that a session announces, the values its timers go by, and the Poll Sequence between the two.

RFC 5880 sections 6.5 and 6.8.3; the quoted sentences are theirs. Times and intervals are integer microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Poll:
    """A Poll Sequence: the intervals it announces, and when the Poll bit was first and last sent."""

    desired_min_tx: int
    required_min_rx: int
    first_sent: int | None = None
    last_sent: int = 0


class Intervals:
    """bfd.DesiredMinTxInterval and bfd.RequiredMinRxInterval of one session, and how changes of them take effect."""

    def __init__(self, desired_min_tx: int, required_min_rx: int) -> None:
        self.desired_min_tx = desired_min_tx
        self.required_min_rx = required_min_rx
        self.tx_in_use = desired_min_tx
        """What our transmissions go by; differs from ``desired_min_tx`` while a Poll Sequence is due or under way."""
        self.rx_in_use = required_min_rx
        """What our Detection Time goes by, likewise."""
        self.poll_due = False
        self.poll_not_before = 0
        self._poll: _Poll | None = None

    @property
    def polling(self) -> bool:
        """A Poll Sequence is in progress: periodic packets carry the Poll bit."""
        return self._poll is not None

    def set(self, desired_min_tx: int, required_min_rx: int, up: bool) -> None:
        """Change the two variables; ``up`` says whether bfd.SessionState is Up."""
        changed = (desired_min_tx, required_min_rx) != (self.desired_min_tx, self.required_min_rx)
        self.desired_min_tx, self.required_min_rx = desired_min_tx, required_min_rx
        if up:
            # "If bfd.DesiredMinTxInterval is increased and bfd.SessionState is Up, the actual transmission interval
            # used MUST NOT change until the Poll Sequence described above has terminated."
            self.tx_in_use = min(self.tx_in_use, desired_min_tx)
            # "If bfd.RequiredMinRxInterval is reduced and bfd.SessionState is Up, the previous value of
            # bfd.RequiredMinRxInterval MUST be used when calculating the Detection Time for the remote system until
            # the Poll Sequence described above has terminated."
            self.rx_in_use = max(self.rx_in_use, required_min_rx)
        else:
            # "In any case other than those explicitly called out above, timing parameter changes MUST be effected
            # immediately"
            self.tx_in_use, self.rx_in_use = desired_min_tx, required_min_rx
        if changed:
            # "If either bfd.DesiredMinTxInterval is changed or bfd.RequiredMinRxInterval is changed, a Poll Sequence
            # MUST be initiated"
            self.poll_due = True

    def begin_poll(self, now: int, remote_known: bool) -> None:
        """Begin the Poll Sequence that is due, unless one is under way or the last one could be confused with it.

        While the peer's discriminator is not known there is nobody to ask: the peer reads our intervals in the first
        packet that it takes from us.
        """
        if not self.poll_due or self._poll is not None or now < self.poll_not_before:
            return
        self.poll_due = False
        if remote_known:
            self._poll = _Poll(self.desired_min_tx, self.required_min_rx)

    def poll_sent(self, now: int) -> None:
        """A packet with the Poll bit goes out."""
        poll = self._poll
        if poll is not None:
            poll.first_sent = now if poll.first_sent is None else poll.first_sent
            poll.last_sent = now

    def end_poll(self, now: int, up: bool) -> None:
        """A packet with the Final bit came in.

        6.8.6: "If a Poll Sequence is being transmitted by the local system and the Final (F) bit in the received packet
        is set, the Poll Sequence MUST be terminated."
        """
        poll = self._poll
        if poll is None or poll.first_sent is None:
            return
        self._poll = None
        if up:
            # The Final answers for what the first Poll announced; what was changed since has a Poll of its own due.
            self.tx_in_use = min(poll.desired_min_tx, self.desired_min_tx)
            self.rx_in_use = max(poll.required_min_rx, self.required_min_rx)
        # "if multiple changes are made that require the use of a Poll Sequence, there are three choices: ... 2)
        # sufficient time must have transpired since the Poll Sequence was completed to disambiguate the situation (at
        # least a round trip time since the last Poll was transmitted) prior to the initiation of another Poll Sequence"
        # The time from the first Poll to the Final is at least a round trip.
        self.poll_not_before = poll.last_sent + (now - poll.first_sent)

    def abandon_poll(self) -> None:
        """Nobody is left to answer."""
        self._poll = None
        self.poll_due = False
