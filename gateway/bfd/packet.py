"""The BFD Control packet of RFC 5880, section 4.1: bytes to values and back, with the checks that need no session.

Intervals are unsigned 32-bit counts of microseconds, as on the wire.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

VERSION = 1
HEADER_LENGTH = 24
MINIMUM_AUTHENTICATED_LENGTH = 26
MAXIMUM_LENGTH = 255
UINT32_MAX = 0xFFFF_FFFF

_HEADER = struct.Struct("!BBBBIIIII")

_POLL, _FINAL, _CPI, _AUTH, _DEMAND, _MULTIPOINT = 0x20, 0x10, 0x08, 0x04, 0x02, 0x01


class State(IntEnum):
    """The State (Sta) field, RFC 5880 section 4.1."""

    ADMIN_DOWN = 0
    DOWN = 1
    INIT = 2
    UP = 3


class Diag(IntEnum):
    """Diagnostic codes of RFC 5880 section 4.1; a peer may send any value from 0 to 31."""

    NONE = 0
    DETECTION_TIME_EXPIRED = 1
    ECHO_FAILED = 2
    NEIGHBOR_SIGNALED_DOWN = 3
    FORWARDING_PLANE_RESET = 4
    PATH_DOWN = 5
    CONCATENATED_PATH_DOWN = 6
    ADMINISTRATIVELY_DOWN = 7
    REVERSE_CONCATENATED_PATH_DOWN = 8


class Discard(Enum):
    """Why a received packet was thrown away; the value is the name under which it is counted."""

    TTL = "ttl"
    VERSION = "version"
    LENGTH = "length"
    DETECT_MULT = "detect_mult"
    MULTIPOINT = "multipoint"
    MY_DISCRIMINATOR = "my_discriminator"
    STATE_WITHOUT_DISCRIMINATOR = "state_without_discriminator"
    NO_SESSION = "no_session"
    AUTHENTICATION = "authentication"
    STALE_DISCRIMINATOR = "stale_discriminator"
    ADMIN_DOWN = "admin_down"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPacket:
    """One BFD Control packet.

    ``auth`` holds the Authentication Section as it came, and is empty when the A bit is clear. Raises ValueError when a
    field does not fit its bits, or is one that RFC 5880 forbids to send.
    """

    state: State
    diag: int = Diag.NONE
    poll: bool = False
    final: bool = False
    control_plane_independent: bool = False
    demand: bool = False
    detect_mult: int
    my_discriminator: int
    your_discriminator: int
    desired_min_tx: int
    required_min_rx: int
    required_min_echo_rx: int = 0
    auth: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.diag <= 31:
            raise ValueError(f"diagnostic {self.diag} does not fit 5 bits")
        if not 1 <= self.detect_mult <= 255:
            raise ValueError(f"detection multiplier {self.detect_mult} is not 1 to 255")
        if not 1 <= self.my_discriminator <= UINT32_MAX:
            raise ValueError(f"my discriminator {self.my_discriminator} is not a nonzero 32-bit number")
        for name in ("your_discriminator", "desired_min_tx", "required_min_rx", "required_min_echo_rx"):
            value: int = getattr(self, name)
            if not 0 <= value <= UINT32_MAX:
                raise ValueError(f"{name} {value} does not fit 32 bits")
        if self.auth and not MINIMUM_AUTHENTICATED_LENGTH <= HEADER_LENGTH + len(self.auth) <= MAXIMUM_LENGTH:
            raise ValueError(f"an authentication section of {len(self.auth)} bytes does not fit")

    def encode(self) -> bytes:
        """The packet as it goes into the UDP payload. Raises ValueError when both Poll and Final are set."""
        # RFC 5880 6.5: "A BFD Control packet MUST NOT have both the Poll (P) and Final (F) bits set."
        if self.poll and self.final:
            raise ValueError("a packet cannot have both Poll and Final set")
        flags = (
            self.state << 6
            | (_POLL if self.poll else 0)
            | (_FINAL if self.final else 0)
            | (_CPI if self.control_plane_independent else 0)
            | (_AUTH if self.auth else 0)
            | (_DEMAND if self.demand else 0)
        )
        header = _HEADER.pack(
            VERSION << 5 | self.diag,
            flags,
            self.detect_mult,
            HEADER_LENGTH + len(self.auth),
            self.my_discriminator,
            self.your_discriminator,
            self.desired_min_tx,
            self.required_min_rx,
            self.required_min_echo_rx,
        )
        return header + self.auth


def decode(payload: bytes) -> ControlPacket | Discard:
    """The packet in a UDP payload, or the rule of RFC 5880 section 6.8.6 that says to discard it.

    The rules are applied in the order of the RFC, as far as they need nothing but the packet itself; those that need a
    session stand in ``table`` and ``session``.
    """
    if len(payload) < HEADER_LENGTH:
        # Too short to hold the Length field's minimum, whatever that field says.
        return Discard.LENGTH
    version_diag, flags, detect_mult, length, mine, yours, tx, rx, echo = _HEADER.unpack_from(payload)
    authenticated = bool(flags & _AUTH)
    rules = (
        # "If the version number is not correct (1), the packet MUST be discarded."
        (version_diag >> 5 != VERSION, Discard.VERSION),
        # "If the Length field is less than the minimum correct value (24 if the A bit is clear, or 26 if the A bit is
        # set), the packet MUST be discarded."
        (length < (MINIMUM_AUTHENTICATED_LENGTH if authenticated else HEADER_LENGTH), Discard.LENGTH),
        # "If the Length field is greater than the payload of the encapsulating protocol, the packet MUST be discarded."
        (length > len(payload), Discard.LENGTH),
        # "If the Detect Mult field is zero, the packet MUST be discarded."
        (detect_mult == 0, Discard.DETECT_MULT),
        # "If the Multipoint (M) bit is nonzero, the packet MUST be discarded."
        (flags & _MULTIPOINT, Discard.MULTIPOINT),
        # "If the My Discriminator field is zero, the packet MUST be discarded."
        (mine == 0, Discard.MY_DISCRIMINATOR),
    )
    for broken, reason in rules:
        if broken:
            return reason
    return ControlPacket(
        state=State(flags >> 6),
        diag=version_diag & 0x1F,
        poll=bool(flags & _POLL),
        final=bool(flags & _FINAL),
        control_plane_independent=bool(flags & _CPI),
        demand=bool(flags & _DEMAND),
        detect_mult=detect_mult,
        my_discriminator=mine,
        your_discriminator=yours,
        desired_min_tx=tx,
        required_min_rx=rx,
        required_min_echo_rx=echo,
        auth=payload[HEADER_LENGTH:length] if authenticated else b"",
    )
