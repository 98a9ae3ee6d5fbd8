"""What passes an interface, frame by frame, with the time at which the kernel saw it."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scapy.layers.l2 import ARP, Ether
from traffic import PATIENCE, Host

BROADCAST = "ff:ff:ff:ff:ff:ff"
ETH_P_IP, ETH_P_ARP = 0x0800, 0x0806
_SO_TIMESTAMPNS = 35
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6


@dataclass(frozen=True)
class Frame:
    """One frame and when it passed, in Unix seconds."""

    at: float
    data: bytes

    @property
    def arp(self) -> ARP:
        arp: ARP = Ether(self.data)[ARP]
        return arp

    def announces(self) -> tuple[str, str]:
        """(address, hardware address) of an ARP announcement (RFC 5227, 2.3); fails if it is no such frame."""
        ether, arp = Ether(self.data), self.arp
        assert (ether.dst, ether.src) == (BROADCAST, arp.hwsrc)
        assert (arp.op, arp.psrc) == (1, arp.pdst), arp.summary()
        return arp.psrc, arp.hwsrc


class Capture:
    """Frames of one EtherType that arrive at an interface, or leave it, from now on.

    One that leaves is here when the call that sent it returns; one that arrives went through queues of the kernel's.
    """

    def __init__(self, host: Host, interface: str, ethertype: int = ETH_P_ARP) -> None:
        # Frames that leave are only shown to sockets that hear everything.
        self._filter = struct.pack("!H", ethertype)
        self._socket = host.open_socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 25)  # some seconds' worth at 100 Mbit/s
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, 0x0003))

    def next(self, patience: float = PATIENCE, wanted: Callable[[Frame], bool] = lambda frame: True) -> Frame | None:
        """The next frame that is wanted; None if none comes in time. What is there already is in time."""
        deadline = time.monotonic() + patience
        while True:
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data, control, _, _ = self._socket.recvmsg(2048, 64)
            except (TimeoutError, BlockingIOError):
                return None
            if data[12:14] == self._filter:
                ((_, _, stamp),) = control
                seconds, nanoseconds = struct.unpack("qq", stamp[:16])
                frame = Frame(seconds + nanoseconds / 1e9, data)
                if wanted(frame):
                    return frame

    @property
    def missed(self) -> int:
        """How many frames found no room since this was asked last."""
        _, dropped = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        return int(dropped)

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()

    def take(self, count: int, wanted: Callable[[Frame], bool] = lambda frame: True) -> list[Frame]:
        """The next ``count`` frames that are wanted; they must come."""
        frames: list[Frame] = []
        while len(frames) < count:
            frame = self.next(wanted=wanted)
            assert frame is not None, f"{len(frames)} frames came, {count} were expected"
            frames.append(frame)
        return frames

    def until(self, last: Callable[[Frame], bool]) -> list[Frame]:
        """All frames up to the one that is meant, which must come."""
        frames = self.take(1)
        while not last(frames[-1]):
            frames += self.take(1)
        return frames

    def rest(self, silence: float, wanted: Callable[[Frame], bool] = lambda frame: True) -> list[Frame]:
        """All wanted frames until none has come for that many seconds."""
        frames: list[Frame] = []
        while (frame := self.next(silence, wanted)) is not None:
            frames.append(frame)
        return frames


def gratuitous(mac: str) -> Callable[[Frame], bool]:
    """Frames with this Ethernet source address by which it announces or defends an address: nobody asked for them."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return lambda frame: frame.data[6:12] == raw and frame.arp.psrc == frame.arp.pdst


def send_arp(host: Host, interface: str, **fields: Any) -> None:
    """Broadcast one ARP frame from the interface; the fields are scapy's, hwsrc the interface's if not named."""
    mac = str(fields.setdefault("hwsrc", host.ip_json("link", "show", interface)[0]["address"]))
    sender = host.open_socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.sendto(bytes(Ether(dst=BROADCAST, src=mac) / ARP(**fields)), (interface, ETH_P_ARP))
    sender.close()
