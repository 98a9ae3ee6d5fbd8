"""The state machine of RFC 5880 section 6.8 as one table.

``TRANSITIONS`` is total: it has a row for every state and every stimulus. The quoted sentences are those of the RFC.
"""

from __future__ import annotations

from enum import Enum, auto

from gateway.bfd.packet import Diag, State


class Stimulus(Enum):
    """What can move a session from one state to another."""

    RECEIVED_ADMIN_DOWN = auto()
    RECEIVED_DOWN = auto()
    RECEIVED_INIT = auto()
    RECEIVED_UP = auto()
    DETECTION_TIME_EXPIRED = auto()
    FAIL = auto()
    DISABLE = auto()
    ENABLE = auto()


RECEIVED = {
    State.ADMIN_DOWN: Stimulus.RECEIVED_ADMIN_DOWN,
    State.DOWN: Stimulus.RECEIVED_DOWN,
    State.INIT: Stimulus.RECEIVED_INIT,
    State.UP: Stimulus.RECEIVED_UP,
}

# The state machine. A row is (state, stimulus): (new state, new bfd.LocalDiag), and None leaves bfd.LocalDiag as it is.
# FAIL and DISABLE bring their own diagnostic, the reason of whoever asks for them.
# Coming Up clears the diagnostic, because 6.8.1 calls it "the reason for the most recent change in the local session
# state"; on the way there it still tells the peer why the session failed before.
TRANSITIONS: dict[tuple[State, Stimulus], tuple[State, Diag | None]] = {
    # 6.8.6: "If received state is AdminDown: If bfd.SessionState is not Down: Set bfd.LocalDiag to 3 (Neighbor signaled
    # session down), Set bfd.SessionState to Down."
    (State.DOWN, Stimulus.RECEIVED_ADMIN_DOWN): (State.DOWN, None),
    (State.INIT, Stimulus.RECEIVED_ADMIN_DOWN): (State.DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    (State.UP, Stimulus.RECEIVED_ADMIN_DOWN): (State.DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    # "If bfd.SessionState is Down: If received State is Down: Set bfd.SessionState to Init. Else if received State is
    # Init: Set bfd.SessionState to Up."
    (State.DOWN, Stimulus.RECEIVED_DOWN): (State.INIT, None),
    (State.DOWN, Stimulus.RECEIVED_INIT): (State.UP, Diag.NONE),
    (State.DOWN, Stimulus.RECEIVED_UP): (State.DOWN, None),
    # "Else if bfd.SessionState is Init: If received State is Init or Up: Set bfd.SessionState to Up."
    (State.INIT, Stimulus.RECEIVED_DOWN): (State.INIT, None),
    (State.INIT, Stimulus.RECEIVED_INIT): (State.UP, Diag.NONE),
    (State.INIT, Stimulus.RECEIVED_UP): (State.UP, Diag.NONE),
    # "Else (bfd.SessionState is Up): If received State is Down: Set bfd.LocalDiag to 3 (Neighbor signaled session
    # down), Set bfd.SessionState to Down."
    (State.UP, Stimulus.RECEIVED_DOWN): (State.DOWN, Diag.NEIGHBOR_SIGNALED_DOWN),
    (State.UP, Stimulus.RECEIVED_INIT): (State.UP, None),
    (State.UP, Stimulus.RECEIVED_UP): (State.UP, None),
    # "If bfd.SessionState is AdminDown: Discard the packet."
    (State.ADMIN_DOWN, Stimulus.RECEIVED_ADMIN_DOWN): (State.ADMIN_DOWN, None),
    (State.ADMIN_DOWN, Stimulus.RECEIVED_DOWN): (State.ADMIN_DOWN, None),
    (State.ADMIN_DOWN, Stimulus.RECEIVED_INIT): (State.ADMIN_DOWN, None),
    (State.ADMIN_DOWN, Stimulus.RECEIVED_UP): (State.ADMIN_DOWN, None),
    # 6.8.4: "If Demand mode is not active, and a period of time equal to the Detection Time passes without receiving a
    # BFD Control packet from the remote system, and bfd.SessionState is Init or Up, the session has gone down -- the
    # local system MUST set bfd.SessionState to Down and bfd.LocalDiag to 1 (Control Detection Time Expired)."
    (State.ADMIN_DOWN, Stimulus.DETECTION_TIME_EXPIRED): (State.ADMIN_DOWN, None),
    (State.DOWN, Stimulus.DETECTION_TIME_EXPIRED): (State.DOWN, None),
    (State.INIT, Stimulus.DETECTION_TIME_EXPIRED): (State.DOWN, Diag.DETECTION_TIME_EXPIRED),
    (State.UP, Stimulus.DETECTION_TIME_EXPIRED): (State.DOWN, Diag.DETECTION_TIME_EXPIRED),
    # A failure that we know of ourselves. 6.8.15: "the local system MUST set bfd.LocalDiag to 4 (Forwarding Plane
    # Reset), and set bfd.SessionState to Down."
    (State.ADMIN_DOWN, Stimulus.FAIL): (State.ADMIN_DOWN, None),
    (State.DOWN, Stimulus.FAIL): (State.DOWN, None),
    (State.INIT, Stimulus.FAIL): (State.DOWN, None),
    (State.UP, Stimulus.FAIL): (State.DOWN, None),
    # 6.8.16: "If enabling session: Set bfd.SessionState to Down. Else: Set bfd.SessionState to AdminDown, Set
    # bfd.LocalDiag to an appropriate value, Cease the transmission of BFD Echo packets."
    (State.ADMIN_DOWN, Stimulus.DISABLE): (State.ADMIN_DOWN, None),
    (State.DOWN, Stimulus.DISABLE): (State.ADMIN_DOWN, None),
    (State.INIT, Stimulus.DISABLE): (State.ADMIN_DOWN, None),
    (State.UP, Stimulus.DISABLE): (State.ADMIN_DOWN, None),
    (State.ADMIN_DOWN, Stimulus.ENABLE): (State.DOWN, None),
    (State.DOWN, Stimulus.ENABLE): (State.DOWN, None),
    (State.INIT, Stimulus.ENABLE): (State.INIT, None),
    (State.UP, Stimulus.ENABLE): (State.UP, None),
}
