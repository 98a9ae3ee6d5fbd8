"""What rtnetlink tells of changes: everything since the last question, or that it is not known any more."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

from gateway.kernel.netlink import messages, receive_buffer

_DATAGRAM = 1 << 16


class Subscription:
    """A subscription to groups of rtnetlink (linux/rtnetlink.h) in the network namespace of who first asks.

    What a request brings about is told by the time that it is acknowledged.
    """

    def __init__(self, groups: Collection[int]) -> None:
        self._groups = sum(1 << (group - 1) for group in groups)
        self._socket: socket.socket | None = None

    def messages(self) -> list[tuple[int, memoryview]] | None:
        """(type, body) of each message since the last call; None where any may be missing, as at first."""
        told: list[tuple[int, memoryview]] = []
        try:
            if self._socket is None:
                self._socket = self._opened()
                return None
            while True:
                told += messages(self._socket.recv(_DATAGRAM))
        except BlockingIOError:
            return told
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more happened than fits
                self.close()
            return None

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _opened(self) -> socket.socket:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        made = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            receive_buffer(made)
            made.bind((0, self._groups))
        except OSError:
            made.close()
            raise
        return made
