"""Reading link messages: real bytes, what they mean for announcing, and damage."""

from __future__ import annotations

import contextlib
import errno
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.arp.link import Link, parse, read

UP, NOARP, LOWER_UP = 0x1, 0x80, 0x10000
MAC = bytes.fromhex("02aabbccdd01")
NET1 = Link(7, "net1", MAC, True, UP | LOWER_UP)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def described(link: Link, family: int = 0, device: int = 1) -> bytes:
    body = struct.pack("=BxHiII", family, device, link.index, link.flags, 0)
    # The kernel puts others in front and between: transmit queue length, MTU.
    body += attribute(3, link.name.encode() + b"\0") + attribute(13, bytes(4))
    body += attribute(1, link.mac) + attribute(4, struct.pack("=I", 1500))
    return message(17 if link.gone else 16, body)


def test_a_datagram_tells_of_links_in_order() -> None:
    others = [replace(NET1, flags=UP), replace(NET1, index=9, name="eth0"), replace(NET1, gone=True)]
    assert list(parse(b"".join(map(described, [NET1, *others])))) == [NET1, *others]


def test_messages_about_bridge_ports_are_not_about_links() -> None:
    assert list(parse(described(replace(NET1, gone=True), family=7) + described(NET1))) == [NET1]


def test_an_error_message_is_the_kernels_error() -> None:
    with pytest.raises(OSError, match="No such device") as caught:
        list(parse(message(2, struct.pack("=i", -errno.ENODEV) + bytes(16))))
    assert caught.value.errno == errno.ENODEV


def test_an_acknowledgement_is_no_error() -> None:
    assert list(parse(message(2, struct.pack("=i", 0) + bytes(16)) + described(NET1))) == [NET1]


@pytest.mark.parametrize(
    ("link", "can"),
    [
        (NET1, True),
        (replace(NET1, flags=UP | LOWER_UP | 0x40 | 0x1000 | 0x2), True),
        (replace(NET1, flags=UP), False),
        (replace(NET1, flags=LOWER_UP), False),
        (replace(NET1, flags=UP | LOWER_UP | NOARP), False),
        (replace(NET1, ethernet=False), False),
        (replace(NET1, mac=b""), False),
        (replace(NET1, gone=True), False),
    ],
    ids=["ready", "other flags", "no carrier", "down", "arp off", "not Ethernet", "no address", "gone"],
)
def test_which_links_can_announce(link: Link, can: bool) -> None:
    assert link.can_announce is can


def test_a_tunnel_is_not_ethernet() -> None:
    (link,) = parse(described(NET1, device=65534))
    assert not link.ethernet


@given(garbage=st.binary(max_size=300))
def test_garbage_is_no_link_and_nothing_else_is_raised(garbage: bytes) -> None:
    with contextlib.suppress(OSError):  # an error message may be among it
        list(parse(garbage))


@given(cut=st.integers(0, 200), position=st.integers(0, 95), value=st.integers(0, 255))
def test_damaged_messages_do_no_harm(cut: int, position: int, value: int) -> None:
    datagram = bytearray(described(NET1) + described(NET1))
    datagram[position] = value
    try:
        links = list(parse(bytes(datagram[:cut])))
    except OSError:
        return
    assert len(links) <= 2


def test_loopback_is_found_and_cannot_announce() -> None:
    link = read("lo")
    assert link is not None
    assert (link.name, link.index, link.ethernet, link.can_announce) == ("lo", 1, False, False)


@pytest.mark.parametrize("name", ["no-such-link", "a-name-of-seventeen"])
def test_a_link_that_is_not_there_is_none(name: str) -> None:
    assert read(name) is None
