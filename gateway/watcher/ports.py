"""Which source ports of an EIP translated connections hold, and where to: what runs out when ports run out. Pure."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple, TypeVar

from gateway.observer.flow import Flow, protocol_name

K = TypeVar("K")

_PLACE = struct.Struct(">BH")
_WITH_PORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP)


class Busiest(NamedTuple):
    """The destination that most connections go to."""

    protocol: str
    address: str
    port: int
    in_use: int


class PortUse:
    """The ports of one EIP. A port is taken once for each connection that has it, towards different destinations."""

    def __init__(self) -> None:
        self._ports: dict[int, int] = {}
        """Connections by protocol and port."""
        self._destinations: dict[bytes, int] = {}
        """Connections by the other end: protocol, port and address in one, for there may be very many."""

    def __len__(self) -> int:
        """Different ports in use, each protocol's own."""
        return len(self._ports)

    def take(self, flow: Flow) -> None:
        """A connection that begins."""
        if flow.protocol in _WITH_PORTS:
            ends = flow.translated
            port = flow.protocol << 16 | ends.source_port
            self._ports[port] = self._ports.get(port, 0) + 1
            place = _PLACE.pack(flow.protocol, ends.destination_port) + ends.destination
            self._destinations[place] = self._destinations.get(place, 0) + 1

    def release(self, flow: Flow) -> None:
        """A connection that has ended; it was taken before."""
        if flow.protocol in _WITH_PORTS:
            ends = flow.translated
            _one_less(self._ports, flow.protocol << 16 | ends.source_port)
            _one_less(self._destinations, _PLACE.pack(flow.protocol, ends.destination_port) + ends.destination)

    def busiest(self) -> Busiest | None:
        """The destination with most connections, None without any."""
        if not self._destinations:
            return None
        place, in_use = max(self._destinations.items(), key=lambda item: item[1])
        (protocol, port), address = _PLACE.unpack_from(place), place[_PLACE.size :]
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        return Busiest(protocol_name(protocol), socket.inet_ntop(family, address), port, in_use)


def _one_less(counts: dict[K, int], key: K) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
