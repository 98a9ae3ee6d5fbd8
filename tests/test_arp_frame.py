"""ARP frames: byte for byte as RFC 5227 draws them, as scapy reads them, and nothing but our error on garbage."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Ether

from gateway.arp.frame import BROADCAST, LENGTH, REPLY, REQUEST, ZERO, ArpFrame, MalformedFrame, announcement, parse

MAC = bytes.fromhex("02aabbccdd01")
OTHER = bytes.fromhex("02aabbccdd02")
EIP = IPv4Address("192.168.0.10")

macs = st.binary(min_size=6, max_size=6)
frames = st.builds(
    ArpFrame, macs, macs, st.sampled_from([REQUEST, REPLY]), macs, st.ip_addresses(v=4), macs, st.ip_addresses(v=4)
)


def test_an_announcement_is_these_42_bytes() -> None:
    assert announcement(MAC, EIP) == bytes.fromhex(
        "ffffffffffff 02aabbccdd01 08060001 0800 06 04 000102aabbccdd01 c0a8000a000000000000 c0a8000a"
    )


@given(mac=macs, address=st.ip_addresses(v=4))
def test_scapy_reads_an_announcement_as_a_gratuitous_request(mac: bytes, address: IPv4Address) -> None:
    packet = Ether(announcement(mac, address))
    arp = packet[ARP]
    assert (packet.dst, packet.src, packet.type) == ("ff:ff:ff:ff:ff:ff", mac.hex(":"), 0x0806)
    assert (arp.hwtype, arp.ptype, arp.hwlen, arp.plen, arp.op) == (1, 0x0800, 6, 4, 1)
    assert (arp.hwsrc, arp.psrc) == (mac.hex(":"), str(address))
    assert (arp.hwdst, arp.pdst) == ("00:00:00:00:00:00", str(address))
    assert not arp.payload


@given(frame=frames)
def test_scapy_and_we_write_and_read_the_same(frame: ArpFrame) -> None:
    theirs = Ether(dst=frame.destination.hex(":"), src=frame.source.hex(":"), type=0x0806) / ARP(
        op=frame.operation,
        hwsrc=frame.sender_mac.hex(":"),
        psrc=str(frame.sender_ip),
        hwdst=frame.target_mac.hex(":"),
        pdst=str(frame.target_ip),
    )
    assert frame.encode() == bytes(theirs)
    assert parse(bytes(theirs)) == frame


@given(frame=frames, padding=st.binary(max_size=90))
def test_padding_behind_the_frame_is_no_matter(frame: ArpFrame, padding: bytes) -> None:
    assert parse(frame.encode() + padding) == frame


def test_both_forms_of_target_hardware_address_are_announcements() -> None:
    for target in (ZERO, BROADCAST):
        assert parse(ArpFrame(BROADCAST, MAC, REQUEST, MAC, EIP, target, EIP).encode()).is_announcement
    assert parse(ArpFrame(BROADCAST, MAC, REPLY, MAC, EIP, MAC, EIP).encode()).is_announcement


def test_a_probe_is_no_announcement() -> None:
    probe = parse(ArpFrame(BROADCAST, OTHER, REQUEST, OTHER, IPv4Address(0), ZERO, EIP).encode())
    assert probe.is_probe
    assert not probe.is_announcement
    ordinary = parse(ArpFrame(BROADCAST, OTHER, REQUEST, OTHER, IPv4Address("192.168.0.2"), ZERO, EIP).encode())
    assert not ordinary.is_probe
    assert not ordinary.is_announcement


@given(garbage=st.binary(max_size=200))
def test_garbage_raises_our_error_only(garbage: bytes) -> None:
    with pytest.raises(MalformedFrame):
        parse(garbage)


@given(position=st.integers(0, LENGTH - 1), value=st.integers(0, 255), keep=st.integers(0, LENGTH))
def test_damaged_frames_are_read_or_refused(position: int, value: int, keep: int) -> None:
    damaged = bytearray(announcement(MAC, EIP))
    damaged[position] = value
    try:
        frame = parse(bytes(damaged[:keep]))
    except MalformedFrame:
        return
    assert keep == LENGTH
    assert frame.encode() == bytes(damaged)


@pytest.mark.parametrize(
    ("position", "value", "word"),
    [
        (13, 0x00, "not ARP"),  # Ethernet type: IPv4
        (15, 6, "IPv4 over Ethernet"),  # hardware: IEEE 802
        (16, 0x86, "IPv4 over Ethernet"),  # protocol
        (18, 8, "IPv4 over Ethernet"),  # hardware address length
        (19, 16, "IPv4 over Ethernet"),  # protocol address length
        (21, 3, "neither request nor reply"),  # RARP
    ],
)
def test_what_is_wrong_is_said(position: int, value: int, word: str) -> None:
    damaged = bytearray(announcement(MAC, EIP))
    damaged[position] = value
    with pytest.raises(MalformedFrame, match=word):
        parse(bytes(damaged))


def test_a_frame_one_byte_short_is_refused() -> None:
    with pytest.raises(MalformedFrame, match="41 bytes"):
        parse(announcement(MAC, EIP)[:-1])


def test_an_address_that_is_not_ethernet_is_refused() -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        announcement(bytes(8), EIP)
