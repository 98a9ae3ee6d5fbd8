"""ARP frames: IPv4 over Ethernet, 42 bytes (RFC 826), to and from bytes.

What we send is the ARP Announcement of RFC 5227, 2.3: a broadcast *request* with the announced address
as sender and as target. Two choices in it, with their reasons:

* Requests only, no gratuitous replies. RFC 826 updates caches whatever the opcode; where an implementation
  does distinguish, it is the unasked reply that suffers (RFC 5227, 3; Junos, for one, ignores gratuitous
  replies unless told otherwise; ARP inspection in switches validates the target address of replies only).
  VRRP announces by requests too, so whatever stands beside a redundant router honours them. A second frame
  of the other kind would halve what the pacing lets through and reach nobody known.
* The target hardware address is zero, as RFC 5227, 2.1.1 says it SHOULD be and as every ordinary
  request has it. iputils' ``arping -U``, which Kube-OVN's own image calls, fills it with ff:ff:ff:ff:ff:ff;
  receivers ignore the field in requests, and the parser accepts either.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV4 = 0x0800
HARDWARE_ETHERNET = 1
REQUEST = 1
REPLY = 2
BROADCAST = b"\xff" * 6
ZERO = bytes(6)
UNSPECIFIED = IPv4Address(0)

# Ethernet: destination, source, type. ARP: hardware, protocol, their lengths, operation, sender, target.
_LAYOUT = struct.Struct("!6s6sHHHBBH6s4s6s4s")
LENGTH = _LAYOUT.size


class MalformedFrame(ValueError):
    """The bytes are not an ARP request or reply for IPv4 over Ethernet; the message says why."""


@dataclass(frozen=True, slots=True)
class ArpFrame:
    """One ARP request or reply with its Ethernet header; hardware addresses are 6 bytes."""

    destination: bytes
    source: bytes
    operation: int
    sender_mac: bytes
    sender_ip: IPv4Address
    target_mac: bytes
    target_ip: IPv4Address

    @property
    def is_probe(self) -> bool:
        """An ARP Probe (RFC 5227, 1.1): asks whether an address is free, says nothing about its holder."""
        return self.operation == REQUEST and self.sender_ip == UNSPECIFIED

    @property
    def is_announcement(self) -> bool:
        """Gratuitous, of either kind: the sender speaks of its own address unasked (RFC 5944, 4.6)."""
        return self.sender_ip == self.target_ip and self.sender_ip != UNSPECIFIED

    def encode(self) -> bytes:
        """The 42 bytes on the wire; the kernel's driver pads them to Ethernet's minimum."""
        return _LAYOUT.pack(
            self.destination,
            self.source,
            ETHERTYPE_ARP,
            HARDWARE_ETHERNET,
            ETHERTYPE_IPV4,
            6,
            4,
            self.operation,
            self.sender_mac,
            self.sender_ip.packed,
            self.target_mac,
            self.target_ip.packed,
        )


def announcement(mac: bytes, address: IPv4Address) -> bytes:
    """The ARP Announcement (RFC 5227, 2.3) by which ``mac`` claims ``address``."""
    if len(mac) != 6:
        raise ValueError(f"an Ethernet address has 6 bytes, not {len(mac)}")
    return ArpFrame(BROADCAST, mac, REQUEST, mac, address, ZERO, address).encode()


def request(mac: bytes, source: IPv4Address, target: IPv4Address) -> bytes:
    """The ordinary question who holds ``target`` (RFC 826), asked by ``mac`` as ``source``."""
    return ArpFrame(BROADCAST, mac, REQUEST, mac, source, ZERO, target).encode()


def parse(frame: bytes) -> ArpFrame:
    """Read a received frame; padding behind the 42 bytes is allowed. Raises MalformedFrame, nothing else."""
    if len(frame) < LENGTH:
        raise MalformedFrame(f"{len(frame)} bytes are fewer than the {LENGTH} of an ARP frame")
    fields = _LAYOUT.unpack_from(frame)
    destination, source, ethertype, hardware, protocol, hlen, plen, operation = fields[:8]
    sender_mac, sender_ip, target_mac, target_ip = fields[8:]
    if ethertype != ETHERTYPE_ARP:
        raise MalformedFrame(f"Ethernet type {ethertype:#06x} is not ARP")
    if (hardware, protocol, hlen, plen) != (HARDWARE_ETHERNET, ETHERTYPE_IPV4, 6, 4):
        raise MalformedFrame(f"not IPv4 over Ethernet: types {hardware}, {protocol:#06x}, lengths {hlen}, {plen}")
    if operation not in (REQUEST, REPLY):
        raise MalformedFrame(f"ARP operation {operation} is neither request nor reply")
    return ArpFrame(
        destination, source, operation, sender_mac, IPv4Address(sender_ip), target_mac, IPv4Address(target_ip)
    )


def format_mac(mac: bytes) -> str:
    """Colon-separated lower case hexadecimal, as ``ip link`` prints it."""
    return mac.hex(":")
