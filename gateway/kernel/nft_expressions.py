"""The expressions of which nf_tables' rules are made, as bytes: those that iptables' rules and our maps' both have.

Numbers: linux/netfilter/nf_tables.h (NFTA_*, NFT_META_*, NFT_PAYLOAD_*). One register is enough for all of them.
"""

from __future__ import annotations

from gateway.kernel.netlink import attribute
from gateway.kernel.nft_messages import LIST_ELEM, named, nested, number

REGISTER = 1  # NFT_REG_1, of 16 bytes
META_MARK, META_IIFNAME, META_OIFNAME, META_L4PROTO = 3, 6, 7, 16
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
SOURCE_AT, DESTINATION_AT = 12, 16  # in an IPv4 header


def expression(name: str, data: bytes) -> bytes:
    """One expression of a rule, of any kind."""
    return nested(LIST_ELEM, named(1, name), nested(2, data))


def meta(key: int) -> bytes:
    """Load what the kernel knows of a packet besides its bytes."""
    return expression("meta", number(2, key) + number(1, REGISTER))


def payload(base: int, offset: int, length: int) -> bytes:
    """Load bytes of a packet."""
    return expression("payload", number(1, REGISTER) + number(2, base) + number(3, offset) + number(4, length))


def equals(value: bytes) -> bytes:
    """Go on if the register holds this."""
    return expression("cmp", number(1, REGISTER) + number(2, 0) + nested(3, attribute(1, value)))


def masked(mask: bytes) -> bytes:
    """Keep only these bits of the register."""
    sides = nested(4, attribute(1, mask)) + nested(5, attribute(1, bytes(len(mask))))
    registers = number(1, REGISTER) + number(2, REGISTER)
    return expression("bitwise", registers + number(3, len(mask)) + number(6, 0) + sides)
