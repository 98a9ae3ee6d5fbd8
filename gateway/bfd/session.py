"""One BFD session: the asynchronous mode of RFC 5880 section 6, without sockets and without a clock.

Every entry point takes the time (``now``, integer microseconds of a monotonic clock) and returns an ``Output``: at most
one packet to send and at most one change of state. ``next_timer`` says when ``tick`` wants to be called; being late is
safe, being early does nothing.

The quoted sentences are those of RFC 5880, with their section. Where we leave it or choose among what it allows:

* We always take the Active role (RFC 5881 section 3 demands it of both sides). OVN's BFD thread falls asleep beside a
  silent neighbor, so a passive speaker may wait for ever.
* DesiredMinTxInterval is at least a second in Down and AdminDown, as section 6.8.3 demands, but not in Init, where the
  RFC demands it too. OVN decides when to send its next packet, goes to sleep until then, and misses the moment unless
  something wakes it: with a second between our packets the handshake with it ran into OVN's detection time again and
  again (8 s until Up were measured). Init needs a neighbor that was heard just now and ends after its detection time,
  so the few packets more are as negligible as the RFC wants them.
* RequiredMinRxInterval stays as configured in every state, which the RFC leaves open: OVN plans its next packet by the
  value that it saw last and does not plan anew when a Poll Sequence lowers it, so a peer that asks for slow packets
  while Down (as FRR does) is hit by its own detection time when it comes Up.
* Demand mode is never asked for (bfd.DemandMode is 0), and obeyed when the peer asks for it. The echo function is not
  used and not offered. Authentication is not in use (bfd.AuthType is 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.bfd.intervals import Intervals
from gateway.bfd.packet import UINT32_MAX, ControlPacket, Diag, Discard, State
from gateway.bfd.transitions import RECEIVED, TRANSITIONS, Stimulus

SLOW_INTERVAL = 1_000_000
"""The least DesiredMinTxInterval while a session is not Up, microseconds (RFC 5880 6.8.3)."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What the operator chooses for a session: intervals in microseconds and the detection multiplier.

    ``required_min_rx`` of zero, by which a system asks for no periodic packets at all, is refused: nothing could be
    detected then. Raises ValueError for values out of bounds.
    """

    desired_min_tx: int = 1_000_000
    required_min_rx: int = 1_000_000
    detect_mult: int = 3

    def __post_init__(self) -> None:
        for name in ("desired_min_tx", "required_min_rx"):
            value: int = getattr(self, name)
            if not 1 <= value <= UINT32_MAX:
                raise ValueError(f"{name} {value} is not 1 to {UINT32_MAX} microseconds")
        # 6.8.1: "bfd.DetectMult ... This variable MUST be a nonzero integer"
        if not 1 <= self.detect_mult <= 255:
            raise ValueError(f"detect_mult {self.detect_mult} is not 1 to 255")


@dataclass(frozen=True, slots=True)
class StateChange:
    """The session went from ``old`` to ``new``; ``diag`` is bfd.LocalDiag after the change, ``at`` is microseconds."""

    old: State
    new: State
    diag: int
    at: int


@dataclass(frozen=True, slots=True)
class Output:
    """What a call asks its caller to do: send ``packet``, tell of ``change``, count ``discard``."""

    packet: ControlPacket | None = None
    change: StateChange | None = None
    discard: Discard | None = None


@dataclass(slots=True)
class Remote:
    """What is known of the peer; the values before its first packet are those of section 6.8.1."""

    # "bfd.RemoteDiscr ... This MUST be initialized to zero."
    discriminator: int = 0
    # "bfd.RemoteSessionState ... This variable MUST be initialized to Down."
    state: State = State.DOWN
    diag: int = Diag.NONE
    # "bfd.RemoteDemandMode ... This variable MUST be initialized to zero."
    demand: bool = False
    # "bfd.RemoteMinRxInterval ... This variable MUST be initialized to 1."
    min_rx: int = 1
    min_tx: int = 0
    detect_mult: int = 0


class Session:
    """The state of one session and the procedures of RFC 5880 section 6.8 on it.

    ``random`` returns floats in [0, 1) and decides the jitter. ``discriminator`` is nonzero and unique in this process.
    """

    def __init__(self, config: SessionConfig, discriminator: int, now: int, random: Callable[[], float]) -> None:
        # 6.8.1: "bfd.SessionState ... This variable MUST be initialized to Down."
        self.state = State.DOWN
        self.discriminator = discriminator
        # 6.8.1: "bfd.LocalDiag ... This MUST be initialized to zero (No Diagnostic)."
        self.diag: int = Diag.NONE
        self.remote = Remote()
        self.config = config
        # 6.8.1: "bfd.DesiredMinTxInterval ... This MUST be initialized to a value of at least one second"
        self.intervals = Intervals(max(config.desired_min_tx, SLOW_INTERVAL), config.required_min_rx)
        self.held: Diag | None = None
        self.suspended = False
        self.changed_at = now
        self.packets_sent = 0
        self.packets_received = 0
        self._random = random
        self._interval = 0
        self._last_sent: int | None = None
        self._next_sent: int | None = now
        self._last_received: int | None = None
        self._last_contents: ControlPacket | None = None

    # What can be asked of a session

    @property
    def transmit_interval(self) -> int:
        """Microseconds between periodic packets, before jitter.

        6.8.7: "The transmit interval MUST be recalculated whenever bfd.DesiredMinTxInterval changes, or whenever
        bfd.RemoteMinRxInterval changes, and is equal to the greater of those two values."
        """
        return max(self.intervals.tx_in_use, self.remote.min_rx)

    @property
    def detection_time(self) -> int:
        """Microseconds of silence that take the session down; 0 while nothing is known of the peer.

        6.8.4: "In Asynchronous mode, the Detection Time calculated in the local system is equal to the value of Detect
        Mult received from the remote system, multiplied by the agreed transmit interval of the remote system (the
        greater of bfd.RequiredMinRxInterval and the last received Desired Min TX Interval)."
        """
        return self.remote.detect_mult * max(self.intervals.rx_in_use, self.remote.min_tx)

    @property
    def remote_detection_time(self) -> int:
        """Microseconds of our silence after which the peer takes the session down, at most.

        The peer calculates it from what we announce; the greater of the two sides' intervals is what we send by.
        """
        return self.config.detect_mult * self.transmit_interval

    @property
    def remote_demand_active(self) -> bool:
        """6.8.6: "If bfd.RemoteDemandMode is 1, bfd.SessionState is Up, and bfd.RemoteSessionState is Up, Demand mode
        is active on the remote system"."""
        return self.remote.demand and self.state is State.UP and self.remote.state is State.UP

    def next_timer(self) -> int | None:
        """When ``tick`` has something to do, microseconds; None when only a packet or a caller can bring it about."""
        timers = [at for at in (self._next_sent, self._deadline()) if at is not None]
        intervals = self.intervals
        if intervals.poll_due and not intervals.polling and self._next_sent is None and not self.suspended:
            timers.append(intervals.poll_not_before)
        return min(timers, default=None)

    # What can happen to a session

    def receive(self, packet: ControlPacket, now: int) -> Output:
        """Take a packet that belongs to this session; ``packet.your_discriminator`` is ours, or zero.

        The order of the steps is that of section 6.8.6.
        """
        # "If the A bit is set and no authentication is in use (bfd.AuthType is zero), the packet MUST be discarded."
        # The opposite rule, for a clear A bit where authentication is in use, has no case here.
        if packet.auth:
            return Output(discard=Discard.AUTHENTICATION)
        # "Set bfd.RemoteDiscr to the value of My Discriminator. Set bfd.RemoteState to the value of the State (Sta)
        # field. Set bfd.RemoteDemandMode to the value of the Demand (D) bit. Set bfd.RemoteMinRxInterval to the value
        # of Required Min RX Interval."
        self._learn(packet, now)
        # "If a Poll Sequence is being transmitted by the local system and the Final (F) bit in the received packet is
        # set, the Poll Sequence MUST be terminated."
        if packet.final:
            self.intervals.end_poll(now, self.state is State.UP)
        # "If bfd.SessionState is AdminDown, discard the packet"
        if self.state is State.ADMIN_DOWN:
            self._plan(now)
            return Output(discard=Discard.ADMIN_DOWN)
        self.packets_received += 1
        change = self._move(RECEIVED[packet.state], now)
        # "If the Poll (P) bit is set, send a BFD Control packet to the remote system with the Poll (P) bit clear, and
        # the Final (F) bit set"
        return self._output(now, change, final=packet.poll)

    def receive_stale(self, packet: ControlPacket, now: int) -> Output:
        """Take a packet from our peer that is meant for a session we no longer know, as after our restart.

        6.8.6: "If the Your Discriminator field is nonzero, it MUST be used to select the session with which this BFD
        packet is associated. If no session is found, the packet MUST be discarded." It is discarded, but while we are
        Down we learn from it how to address and pace the peer. OVN ignores whatever does not carry its discriminator,
        and its own packets may carry our old one for ever: without this the two would never speak again. Nothing is
        given away: a forger whom this would help could as well send a packet with a zero Your Discriminator.
        """
        if packet.auth:
            return Output(discard=Discard.AUTHENTICATION)
        if self.state is not State.DOWN:
            return Output(discard=Discard.STALE_DISCRIMINATOR)
        self._learn(replace(packet, state=self.remote.state), now)
        return replace(self._output(now, None), discard=Discard.STALE_DISCRIMINATOR)

    def tick(self, now: int) -> Output:
        """Do what is due at ``now``: notice silence, send the periodic packet."""
        change = None
        deadline = self._deadline()
        if deadline is not None and deadline <= now:
            self._forget_remote()
            change = self._move(Stimulus.DETECTION_TIME_EXPIRED, now)
        return self._output(now, change)

    def configure(self, config: SessionConfig, now: int) -> Output:
        """Change intervals and multiplier at any time; a session that is Up stays Up.

        6.8.12: "When it is desired to change the detect multiplier, the value of bfd.DetectMult can be changed to any
        nonzero value. The new value will be transmitted with the next BFD Control packet, and the use of a Poll
        Sequence is not necessary."
        """
        self.config = config
        self._set_intervals()
        return self._output(now, None)

    def disable(self, now: int, diag: Diag = Diag.ADMINISTRATIVELY_DOWN) -> Output:
        """Go to AdminDown and stay there, still sending.

        6.8.16: "BFD Control packets MAY be transmitted indefinitely after transitioning to AdminDown state in order to
        maintain session state in each system".
        """
        return self._output(now, self._move(Stimulus.DISABLE, now, diag))

    def enable(self, now: int) -> Output:
        """Leave AdminDown."""
        return self._output(now, self._move(Stimulus.ENABLE, now, self.held))

    def hold(self, now: int, diag: Diag = Diag.PATH_DOWN) -> Output:
        """Go Down for the reason ``diag`` and stay there until ``release``, whatever the peer says.

        6.8.18: "A system MAY choose to prevent a BFD session from being established. ... This can be done by holding
        the session in Down or AdminDown state, as appropriate."
        """
        self.held = diag
        return self._output(now, self._move(Stimulus.FAIL, now, diag))

    def release(self, now: int) -> Output:
        """End ``hold``: the session may come Up again."""
        self.held = None
        return self._output(now, None)

    def forwarding_plane_reset(self, now: int) -> Output:
        """Take the session Down once, because what the peer believes of our forwarding is no longer true (6.8.15)."""
        return self._output(now, self._move(Stimulus.FAIL, now, Diag.FORWARDING_PLANE_RESET))

    def signal(self, now: int, diag: Diag) -> Output:
        """Tell the peer ``diag`` without taking the session down.

        6.8.17: "A system MAY signal one of these failure states by simply setting bfd.LocalDiag to the appropriate
        diagnostic code. Note that the BFD session is not taken down."
        """
        self.diag = diag
        return self._output(now, None)

    def suspend(self) -> None:
        """Send nothing more, while still listening: to the peer this looks as if we had died."""
        self.suspended = True
        self._next_sent = None

    def resume(self, now: int) -> Output:
        """End ``suspend``."""
        self.suspended = False
        return self._output(now, None)

    # States

    def _move(self, stimulus: Stimulus, now: int, reason: Diag | None = None) -> StateChange | None:
        old = self.state
        new, diag = TRANSITIONS[old, stimulus]
        if self.held is not None and new in (State.INIT, State.UP):
            new, diag = State.DOWN, None
        diag = diag if reason is None else reason
        # In AdminDown the reason is the administrator's, whatever else fails meanwhile.
        if diag is not None and (new is not State.ADMIN_DOWN or stimulus is Stimulus.DISABLE):
            self.diag = diag
        if new is old:
            return None
        self.state = new
        self.changed_at = now
        self._set_intervals()
        return StateChange(old, new, self.diag, now)

    def _set_intervals(self) -> None:
        # 6.8.3: "When bfd.SessionState is not Up, the system MUST set bfd.DesiredMinTxInterval to a value of not less
        # than one second (1,000,000 microseconds). This is intended to ensure that the bandwidth consumed by BFD
        # sessions that are not Up is negligible, particularly in the case where a neighbor may not be running BFD."
        # Not so in Init, see the top of this file.
        slowest = SLOW_INTERVAL if self.state in (State.DOWN, State.ADMIN_DOWN) else 0
        self.intervals.set(
            max(self.config.desired_min_tx, slowest), self.config.required_min_rx, up=self.state is State.UP
        )

    def _learn(self, packet: ControlPacket, now: int) -> None:
        self.remote = Remote(
            discriminator=packet.my_discriminator,
            state=packet.state,
            diag=packet.diag,
            demand=packet.demand,
            min_rx=packet.required_min_rx,
            min_tx=packet.desired_min_tx,
            detect_mult=packet.detect_mult,
        )
        # "If the packet was not discarded, it has been received for purposes of the Detection Time expiration rules in
        # section 6.8.4." One discarded for AdminDown is counted too: nothing can expire in that state but what we
        # know of the peer.
        self._last_received = now

    def _forget_remote(self) -> None:
        # 6.8.1: "If a period of a Detection Time passes without the receipt of a valid, authenticated BFD packet from
        # the remote system, this variable [bfd.RemoteDiscr] MUST be set to zero."
        # 6.8.18: "If the remote system does not receive any BFD Control packets for a Detection Time, it SHOULD reset
        # bfd.RemoteMinRxInterval to its initial value of 1 ... and then can transmit at its own rate."
        self.remote = Remote(state=self.remote.state)
        self._last_received = None
        self.intervals.abandon_poll()

    def _deadline(self) -> int | None:
        return None if self._last_received is None else self._last_received + self.detection_time

    # Transmission

    def _contents(self) -> ControlPacket:
        """The packet of section 6.8.7 with Poll and Final clear."""
        return ControlPacket(
            state=self.state,
            diag=self.diag,
            # "Demand (D) Set to bfd.DemandMode if bfd.SessionState is Up and bfd.RemoteSessionState is Up. Otherwise,
            # it is set to 0." bfd.DemandMode is 0.
            demand=False,
            detect_mult=self.config.detect_mult,
            my_discriminator=self.discriminator,
            your_discriminator=self.remote.discriminator,
            desired_min_tx=self.intervals.desired_min_tx,
            required_min_rx=self.intervals.required_min_rx,
            # "If this field is set to zero, the local system is unwilling or unable to loop back BFD Echo packets"
            required_min_echo_rx=0,
        )

    def _output(self, now: int, change: StateChange | None, final: bool = False) -> Output:
        """Send what must be sent now and plan the next periodic packet."""
        contents = self._contents()
        differs = contents != self._last_contents
        if differs and self.remote_demand_active:
            # 6.6: "If Demand mode is active on either or both systems, a Poll Sequence MUST be initiated whenever the
            # contents of the next BFD Control packet to be sent would be different than the contents of the previous
            # packet, with the exception of the Poll (P) and Final (F) bits."
            self.intervals.poll_due = True
        self.intervals.begin_poll(now, remote_known=self.remote.discriminator != 0)
        self._plan(now)
        if self.suspended:
            return Output(change=change)
        if final:
            # 6.8.7: "If a BFD Control packet is received with the Poll (P) bit set to 1, the receiving system MUST
            # transmit a BFD Control packet with the Poll (P) bit clear and the Final (F) bit set as soon as
            # practicable, without respect to the transmission timer or any other transmission limitations, without
            # respect to the session state, and without respect to whether Demand mode is active on either system."
            return Output(self._sent(replace(contents, final=True), contents), change)
        # 6.8.7: "A BFD Control packet SHOULD be transmitted during the interval between periodic Control packet
        # transmissions when the contents of that packet would differ from that in the previously transmitted packet
        # (other than the Poll and Final bits) in order to more rapidly communicate a change in state."
        if not differs and (self._next_sent is None or self._next_sent > now):
            return Output(change=change)
        self.intervals.poll_sent(now)
        self._last_sent = now
        self._next_sent = now + self._jittered() if self._periodic() else None
        # 6.5: "the Poll Sequence MUST be performed by setting the Poll (P) bit on those scheduled periodic
        # transmissions; additional packets MUST NOT be sent."
        return Output(self._sent(replace(contents, poll=self.intervals.polling), contents), change)

    def _sent(self, packet: ControlPacket, contents: ControlPacket) -> ControlPacket:
        self._last_contents = contents
        self.packets_sent += 1
        return packet

    def _periodic(self) -> bool:
        # 6.8.7: "A system MUST NOT periodically transmit BFD Control packets if bfd.RemoteMinRxInterval is zero."
        if self.suspended or self.remote.min_rx == 0:
            return False
        # 6.8.7: "A system MUST NOT periodically transmit BFD Control packets if Demand mode is active on the remote
        # system (bfd.RemoteDemandMode is 1, bfd.SessionState is Up, and bfd.RemoteSessionState is Up) and a Poll
        # Sequence is not being transmitted."
        return not self.remote_demand_active or self.intervals.polling

    def _plan(self, now: int) -> None:
        """Move the next periodic packet to where the intervals in force want it."""
        if not self._periodic():
            self._next_sent = None
            return
        # 6.8.3: "the local system cannot wait longer than the new interval between the previous packet transmission
        # and the next one." The same holds the other way: a longer interval counts from the previous packet too.
        if self._next_sent is None or self._interval != self.transmit_interval:
            since = now if self._last_sent is None else self._last_sent + self._jittered()
            self._next_sent = max(now, since)
        self._interval = self.transmit_interval

    def _jittered(self) -> int:
        # 6.8.7: "The periodic transmission of BFD Control packets MUST be jittered on a per-packet basis by up to 25%,
        # that is, the interval MUST be reduced by a random value of 0 to 25%"
        # "If bfd.DetectMult is equal to 1, the interval between transmitted BFD Control packets MUST be no more than
        # 90% of the negotiated transmission interval, and MUST be no less than 75% of the negotiated transmission
        # interval."
        least = 0.10 if self.config.detect_mult == 1 else 0.0
        return max(1, int(self.transmit_interval * (1 - least - (0.25 - least) * self._random())))
