"""Nothing that arrives on UDP port 3784 can break the speaker: random bytes, and packets that are almost right.

``make fuzz`` sends a million; here it is some thousand.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from gateway.bfd.packet import ControlPacket, Diag, Discard, State, decode
from gateway.bfd.session import SessionConfig
from gateway.bfd.table import Happened, SessionTable

PACKETS = int(os.environ.get("NATGW_FUZZ_PACKETS", "6000"))
LOCAL, REMOTE, STRANGER = "10.0.1.5", "10.0.1.1", "10.0.1.66"
FAST = SessionConfig(desired_min_tx=50_000, required_min_rx=50_000, detect_mult=3)

Source = Callable[[random.Random, int], bytes]


def noise(rng: random.Random, ours: int) -> bytes:
    return rng.randbytes(rng.randrange(80))


def almost(rng: random.Random, ours: int) -> bytes:
    """A packet of the session as it might be, with up to three bytes changed, cut or followed by something."""
    packet = ControlPacket(
        state=rng.choice(list(State)),
        diag=rng.randrange(32),
        poll=rng.random() < 0.2,
        demand=rng.random() < 0.1,
        detect_mult=rng.randrange(1, 256),
        my_discriminator=rng.choice((7, 7, 7, rng.randrange(1, 2**32))),
        your_discriminator=rng.choice((ours, ours, 0, rng.randrange(2**32))),
        desired_min_tx=rng.choice((0, 1, 50_000, 2**32 - 1)),
        required_min_rx=rng.choice((0, 1, 50_000, 2**32 - 1)),
        auth=rng.randbytes(rng.randrange(2, 30)) if rng.random() < 0.1 else b"",
    )
    raw = bytearray(packet.encode())
    for _ in range(rng.choice((0, 0, 1, 3))):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw + rng.randbytes(rng.randrange(3)))


@pytest.mark.timeout(0 if PACKETS > 100_000 else 120)
@pytest.mark.parametrize("source", [noise, almost])
def test_whatever_arrives_the_speaker_goes_on(source: Source) -> None:
    rng = random.Random(f"{source.__name__} {PACKETS}")
    table = SessionTable(FAST, lambda remote: [LOCAL], rng.random)
    table.allow(REMOTE, 0)
    (entry,) = table.entries
    session, now, seen = entry.session, 0, set[State]()
    for number in range(PACKETS):
        # From a few packets a millisecond to one in two detection times.
        now += rng.choice((100, 1_000, 50_000, 300_000))
        before = sum(table.discarded.values())
        remote, ttl = rng.choice((REMOTE,) * 9 + (STRANGER,)), rng.choice((255,) * 9 + (64,))
        raw = source(rng, session.discriminator)
        happened = table.receive(raw, LOCAL, remote, ttl, now)
        thrown = sum(table.discarded.values()) - before
        assert thrown in (0, 1)
        if happened is None:
            assert thrown == 1, "what is not taken is counted"
        check(happened)
        for ticked in table.tick(now):
            check(ticked)
        seen.add(session.state)
        assert table.entries == [entry], "no packet makes or ends a session beside the one that was asked for"
        timer = table.next_timer()
        assert timer is None or timer > now, "nothing is left that would make the loop spin"
        assert timer is not None or session.remote.min_rx == 0 or session.remote_demand_active
        if number % 100 == 0:
            # What happens on the other side of the table meanwhile.
            check(Happened(entry, rng.choice((session.disable, session.enable, session.release))(now)))
            check(Happened(entry, session.enable(now)))
    assert set(table.discarded) == set(Discard)
    if source is almost:
        assert seen == set(State) - {State.ADMIN_DOWN}, "every state was tried"


def check(happened: Happened | None) -> None:
    """What the session wants to send is a packet that the RFC allows."""
    if happened is not None and happened.output.packet is not None:
        packet = happened.output.packet
        again = decode(packet.encode())
        assert again == packet
        assert packet.diag in Diag.__members__.values()
