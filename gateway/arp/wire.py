"""The raw sockets of one link: AF_PACKET, packet(7).

One socket sends, another listens, because their lives differ. The sending one is bound to nothing and
names the interface with every frame, so it outlives the link and may be used in any thread. The listening
one is bound to a link: the kernel keeps that over ``ip link set … down`` and ``up`` (reporting ENETDOWN
once), but when the link is deleted the socket is dead for ever and another must be opened.
"""

from __future__ import annotations

import socket

from gateway.arp.frame import ETHERTYPE_ARP

_RECEIVE_BUFFER = 1 << 17
"""Bytes of kernel memory, some 150 frames: in an ARP storm the rest is lost, and a conflict is seen again."""
_SNAPLEN = 128


class ArpSender:
    """Sends frames out of the interface that has the name at that moment. Implements ``gateway.ports.Sender``."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        # Protocol 0: a socket that is never handed a received frame.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)

    def send(self, frame: bytes) -> None:
        """Hand one frame to the link; OSError with ENODEV or ENETDOWN if it is not there or not up."""
        self._socket.sendto(frame, (self._interface, ETHERTYPE_ARP))

    def close(self) -> None:
        """Give the descriptor back; twice is once."""
        self._socket.close()


class ArpListener:
    """Receives the ARP frames that arrive on one link (not those the host sends); non-blocking."""

    def __init__(self, interface: str) -> None:
        # Protocol 0 until bind(): else frames of every link would be queued in between.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.bind((interface, ETHERTYPE_ARP))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """The next frame, cut at 128 bytes; None when there is none now. OSError once when the link goes down."""
        try:
            return self._socket.recv(_SNAPLEN)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Give the descriptor back; twice is once."""
        self._socket.close()
