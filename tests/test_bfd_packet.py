"""The BFD codec: RFC 5880 section 4.1 and the discard rules of 6.8.6 that need no session."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.contrib.bfd import BFD

from gateway.bfd.packet import ControlPacket, Diag, Discard, State, decode

UINT32 = st.integers(0, 2**32 - 1)
PLAIN: dict[str, Any] = {
    "state": State.UP,
    "detect_mult": 3,
    "my_discriminator": 0x11223344,
    "your_discriminator": 0x55667788,
    "desired_min_tx": 100_000,
    "required_min_rx": 50_000,
}


@st.composite
def packets(draw: st.DrawFn) -> ControlPacket:
    poll = draw(st.booleans())
    return ControlPacket(
        state=draw(st.sampled_from(State)),
        diag=draw(st.integers(0, 31)),
        poll=poll,
        final=not poll and draw(st.booleans()),
        control_plane_independent=draw(st.booleans()),
        demand=draw(st.booleans()),
        detect_mult=draw(st.integers(1, 255)),
        my_discriminator=draw(st.integers(1, 2**32 - 1)),
        your_discriminator=draw(UINT32),
        desired_min_tx=draw(UINT32),
        required_min_rx=draw(UINT32),
        required_min_echo_rx=draw(UINT32),
        auth=draw(st.one_of(st.just(b""), st.binary(min_size=2, max_size=231))),
    )


@given(packets())
def test_decode_is_the_inverse_of_encode(packet: ControlPacket) -> None:
    assert decode(packet.encode()) == packet


@given(packets())
def test_bytes_after_the_length_field_are_not_part_of_the_packet(packet: ControlPacket) -> None:
    assert decode(packet.encode() + b"padding") == packet


def test_the_wire_format_is_that_of_the_rfc() -> None:
    packet = ControlPacket(**PLAIN | {"diag": Diag.PATH_DOWN, "poll": True, "required_min_echo_rx": 7})
    assert packet.encode().hex(" ", 4) == "25e00318 11223344 55667788 000186a0 0000c350 00000007"


def scapy_fields(packet: ControlPacket) -> dict[str, Any]:
    """The same packet in the names of scapy's decoder; its flags are the letters PFCADM, most significant first."""
    bits = (packet.poll, packet.final, packet.control_plane_independent, bool(packet.auth), packet.demand, False)
    return {
        "version": 1,
        "diag": packet.diag,
        "sta": packet.state,
        "flags": int("".join("1" if bit else "0" for bit in bits), 2),
        "detect_mult": packet.detect_mult,
        "len": 24 + len(packet.auth),
        "my_discriminator": packet.my_discriminator,
        "your_discriminator": packet.your_discriminator,
        "min_tx_interval": packet.desired_min_tx,
        "min_rx_interval": packet.required_min_rx,
        "echo_rx_interval": packet.required_min_echo_rx,
    }


@given(packets())
def test_an_independent_decoder_reads_what_we_send(packet: ControlPacket) -> None:
    theirs = BFD(packet.encode()[:24])
    assert {name: int(getattr(theirs, name)) for name in scapy_fields(packet)} == scapy_fields(packet)


@given(packets().filter(lambda packet: not packet.auth))
def test_we_read_what_an_independent_encoder_sends(packet: ControlPacket) -> None:
    assert decode(bytes(BFD(**scapy_fields(packet)))) == packet


def changed(offset: int, value: int) -> bytes:
    raw = bytearray(ControlPacket(**PLAIN).encode())
    raw[offset] = value
    return bytes(raw)


UP_BITS = State.UP << 6
DISCARDED = {
    "version 0": (changed(0, 0 << 5), Discard.VERSION),
    "version 2": (changed(0, 2 << 5), Discard.VERSION),
    "length 23": (changed(3, 23), Discard.LENGTH),
    "length over payload": (changed(3, 25), Discard.LENGTH),
    "authenticated, length 24": (changed(1, UP_BITS | 0x04), Discard.LENGTH),
    "authenticated, length 25": (bytes([0x20, UP_BITS | 0x04, 3, 25]) + bytes(range(1, 30)), Discard.LENGTH),
    "payload too short for a header": (changed(3, 24)[:23], Discard.LENGTH),
    "empty payload": (b"", Discard.LENGTH),
    "detect mult 0": (changed(2, 0), Discard.DETECT_MULT),
    "multipoint": (changed(1, UP_BITS | 0x01), Discard.MULTIPOINT),
    "my discriminator 0": (
        ControlPacket(**PLAIN).encode()[:4] + bytes(4) + ControlPacket(**PLAIN).encode()[8:],
        Discard.MY_DISCRIMINATOR,
    ),
}


@pytest.mark.parametrize(("payload", "reason"), DISCARDED.values(), ids=DISCARDED.keys())
def test_discard_rules(payload: bytes, reason: Discard) -> None:
    assert decode(payload) is reason


def test_the_packet_the_discard_cases_are_made_from_is_accepted() -> None:
    assert decode(changed(3, 24)) == ControlPacket(**PLAIN)


def test_authenticated_packet_of_minimum_length_is_decoded() -> None:
    packet = decode(bytes([0x20, UP_BITS | 0x04, 3, 26]) + bytes(range(1, 23)))
    assert isinstance(packet, ControlPacket)
    assert packet.auth == bytes([21, 22])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diag", -1),
        ("diag", 32),
        ("detect_mult", 0),
        ("detect_mult", 256),
        ("my_discriminator", 0),
        ("my_discriminator", 2**32),
        ("your_discriminator", -1),
        ("your_discriminator", 2**32),
        ("desired_min_tx", 2**32),
        ("required_min_rx", -1),
        ("required_min_echo_rx", 2**32),
        ("auth", b"x"),
        ("auth", bytes(232)),
    ],
)
def test_fields_that_do_not_fit_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError):
        ControlPacket(**PLAIN | {name: value})


def test_poll_and_final_together_are_never_sent() -> None:
    with pytest.raises(ValueError, match="both Poll and Final"):
        ControlPacket(**PLAIN | {"poll": True, "final": True}).encode()


@settings(max_examples=2000)
@given(st.binary(max_size=64))
def test_random_bytes_never_crash_the_decoder(payload: bytes) -> None:
    assert isinstance(decode(payload), (ControlPacket, Discard))


def test_damaged_packets_never_crash_the_decoder() -> None:
    rng = random.Random(5880)
    for _ in range(5000):
        raw = bytearray(ControlPacket(**PLAIN).encode() + bytes(rng.randrange(6)))
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        packet = decode(bytes(raw))
        if isinstance(packet, ControlPacket) and not (packet.poll and packet.final):
            assert decode(packet.encode()) == packet
