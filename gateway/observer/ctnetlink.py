"""The kernel's messages about connections (linux/netfilter/nfnetlink_conntrack.h), read fast and from nobody trusted.

An event tells of one connection and there are thousands a second, so the usual message, of a protocol with ports, is
taken apart by one ``struct``; every other goes attribute by attribute.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from gateway.observer.flow import DNAT, SNAT, Counters, Endpoints, Flow

EVENT_GROUPS = 0b111
"""The multicast groups NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY."""
LIFE_GROUPS = 0b101
"""Those of the beginning and the end only: a TCP connection has four or five updates in between."""
END_GROUP = 0b100
"""That of the end."""

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_CT_NEW, _CT_GET, _CT_DELETE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_CREATE = 0x001, 0x300, 0x400

_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS = 1, 2, 3
_CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY, _CTA_ID, _CTA_ZONE = 9, 10, 12, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_COUNTERS_PACKETS, _CTA_COUNTERS_BYTES = 1, 2
_IPS_SRC_NAT, _IPS_DST_NAT = 1 << 4, 1 << 5
_NLA_F_NESTED, _NLA_TYPE_MASK = 0x8000, 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_NFGEN = 4  # struct nfgenmsg: family, version, resource
_NLA = struct.Struct("=HH")  # length, type
_U16, _U32 = struct.Struct(">H"), struct.Struct(">I")

NEW, UPDATE, DESTROY, DUMPED, DONE, FAILED = "new", "update", "destroy", "dumped", "done", "failed"
EVENTS = (NEW, UPDATE, DESTROY)


class Malformed(ValueError):
    """A message that the kernel would not have sent."""


class Message(NamedTuple):
    """What a message is: an event (NEW, UPDATE, DESTROY), a part of a dump (DUMPED), its end (DONE) or a refusal.

    ``code`` is the errno of a refusal. The flow is in the buffer between ``start`` and ``end``.
    """

    kind: str
    start: int
    end: int
    code: int = 0


def dump_request(sequence: int) -> bytes:
    """Ask for all connections of both families."""
    header = _HEADER.pack(_HEADER.size + _NFGEN, _CT_GET, _NLM_F_REQUEST | _NLM_F_DUMP, sequence, 0)
    return header + struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)


def messages(buffer: memoryview, size: int, sequence: int = 0) -> Iterator[Message]:
    """The messages of a datagram: of events when ``sequence`` is 0, else of the dump that was asked for with it.

    Raises Malformed.
    """
    position = 0
    while position + _HEADER.size <= size:
        length, kind, flags, number, _ = _HEADER.unpack_from(buffer, position)
        start, end = position + _HEADER.size, position + length
        if length < _HEADER.size or end > size:
            raise Malformed(f"a message of {length} bytes in {size - position}")
        position = (end + 3) & ~3
        if number != sequence:
            continue
        if kind == _CT_NEW:
            yield Message(DUMPED if sequence else NEW if flags & _NLM_F_CREATE else UPDATE, start, end)
        elif kind == _CT_DELETE:
            yield Message(DESTROY, start, end)
        elif kind in (_NLMSG_ERROR, _NLMSG_DONE):
            code = -int(struct.unpack_from("=i", buffer, start)[0]) if end - start >= 4 else 0
            if kind == _NLMSG_DONE and code <= 0:
                yield Message(DONE, start, end)
            else:
                yield Message(FAILED, start, end, code if code > 0 else errno.EPROTO)


def translated_flow(buffer: memoryview, start: int, end: int) -> Flow | None:
    """The flow of a message's body; None for a connection that is not translated. Raises Malformed."""
    try:
        for usual in _USUAL:
            if start + usual.size <= end:
                found = usual.endpoints(buffer, start)
                if found is not None:
                    return _flow(found, buffer, start + usual.size, end)
        return _flow(_endpoints(buffer, start, end), buffer, start + _NFGEN, end)
    except (struct.error, KeyError, IndexError) as error:
        raise Malformed(f"a message about a connection that lacks something: {error!r}") from error


class FlowReader:
    """Reads what ``translated_flow`` reads, most of it at once.

    Messages of one length are laid out in one or two ways. Where the values are is learned from one that was read
    whole; each other is compared with it in all but the values, that is to say: in the headers of all attributes.
    """

    def __init__(self) -> None:
        self._shapes: dict[int, list[_Shape]] = {}

    def read(self, buffer: memoryview, start: int, end: int) -> Flow | None:
        """The flow of a message's body; None for a connection that is not translated. Raises Malformed."""
        said = buffer[start:end]
        known = self._shapes.get(end - start, ())
        for shape in known:
            if shape.fits(said):
                return shape.flow(said)
        flow = translated_flow(buffer, start, end)
        if len(known) < _ALIKE and len(self._shapes) < _LAYOUTS and (learned := _Shape.of(said)) is not None:
            self._shapes[end - start] = [*known, learned]
        return flow


class _Shape:
    """The layout of a message's body: of a protocol with ports, of zone 0, with or without counters."""

    def __init__(self, layout: str, counters: slice | None, model: memoryview) -> None:
        self._struct = struct.Struct(layout)
        self._counters = counters
        values = self._struct.pack(*self._struct.unpack(b"\xff" * len(model)))
        self._mask = int.from_bytes(values, "big") ^ (1 << 8 * len(model)) - 1
        self._model = int.from_bytes(model, "big") & self._mask

    @classmethod
    def of(cls, said: memoryview) -> Self | None:
        """That of a body; None for one of another kind. Raises Malformed."""
        usual = next((one for one in _USUAL if one.size <= len(said) and one.endpoints(said, 0)), None)
        if usual is None:
            return None
        at = usual.size
        if said[at : at + 4] != _ID or said[at + 8 : at + 12] != _STATUS:
            return None
        layout, counters, values = f">{_NFGEN}x{usual.values}4xI4xI", None, 0
        attributes = list(_attributes(said, at + 16, len(said)))
        kinds = [kind for kind, _, _ in attributes]
        if len({*kinds, _CTA_ID, _CTA_STATUS, _CTA_ZONE}) < len(kinds) + 3:
            return None
        for what, begin, end in attributes:
            if what == _CTA_COUNTERS_ORIG:
                at = begin - _NLA.size
                both = said[at : at + _BOTH_COUNTERS.size]
                if len(both) < _BOTH_COUNTERS.size or _BOTH_COUNTERS.unpack(both) != _COUNTERS_HEADERS:
                    return None
                counters = slice(values, values + 4)
            if what in (_CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY):
                layout += "8xQ4xQ"
                values += 2
            else:
                layout += f"4x{(end - begin + 3) & ~3}s"
                values += 1
        return cls(layout, counters, said) if struct.calcsize(layout) == len(said) else None

    def fits(self, said: memoryview) -> bool:
        """Whether a body of this size is laid out so."""
        return int.from_bytes(said, "big") & self._mask == self._model

    def flow(self, said: memoryview) -> Flow | None:
        """The flow of a body that fits."""
        (source, destination, protocol, source_port, destination_port,
         replier, receiver, _, replier_port, receiver_port,
         identifier, status, *rest) = self._struct.unpack(said)  # fmt: skip
        original = Endpoints(source, destination, source_port, destination_port)
        translated = Endpoints(receiver, replier, receiver_port, replier_port)
        nat = _nat(status, original, translated)
        if not nat:
            return None
        counters = Counters(*rest[self._counters]) if self._counters else None
        return Flow(identifier, 0, protocol, nat, original, translated, counters)


class Glance:
    """Reads no more of a message than which connection it is and what the kernel counted.

    In a dump nearly every message tells of a connection that is known, and messages of one length are laid out alike:
    where identifier and counters are is learned from one that was read whole, and looked at again in each by the
    headers in front of them.
    """

    def __init__(self) -> None:
        self._layouts: dict[int, struct.Struct] = {}

    def learn(self, buffer: memoryview, start: int, end: int) -> None:
        """Remember how messages of this length are laid out, if they have a zone of 0 and both counters."""
        if end - start in self._layouts or len(self._layouts) >= _LAYOUTS:
            return
        places = {kind: begin - _NLA.size - start for kind, begin, _ in _attributes(buffer, start + _NFGEN, end)}
        order = [places.get(kind, -1) for kind in (_CTA_ID, _CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY)]
        if _CTA_ZONE in places or -1 in order or order != sorted(order):
            return
        ident, sent, received = order
        counters = "4s4sQ4sQ"
        layout = struct.Struct(f">{ident}x4sI{sent - ident - 8}x{counters}{received - sent - 28}x{counters}")
        if layout.size <= end - start:
            self._layouts[end - start] = layout

    def at(self, buffer: memoryview, start: int, end: int) -> tuple[int, Counters] | None:
        """The identifier and the counters; None for a message of another layout."""
        layout = self._layouts.get(end - start)
        if layout is None:
            return None
        a, identifier, b, c, op, d, ob, e, f, rp, g, rb = layout.unpack_from(buffer, start)
        return (identifier, Counters(op, ob, rp, rb)) if (a, b, c, d, e, f, g) == _GLANCED else None


_LAYOUTS, _ALIKE = 64, 4
_COUNTED = (_NLA.pack(12, _CTA_COUNTERS_PACKETS), _NLA.pack(12, _CTA_COUNTERS_BYTES))
_GLANCED = (
    _NLA.pack(8, _CTA_ID),
    *(_NLA.pack(28, _CTA_COUNTERS_ORIG | _NLA_F_NESTED), *_COUNTED),
    *(_NLA.pack(28, _CTA_COUNTERS_REPLY | _NLA_F_NESTED), *_COUNTED),
)
_ID, _STATUS = _NLA.pack(8, _CTA_ID), _NLA.pack(8, _CTA_STATUS)
_BOTH_COUNTERS = struct.Struct("4s4s8x4s8x4s4s8x4s8x")
_COUNTERS_HEADERS = _GLANCED[1:]

_Found = tuple[int, Endpoints, Endpoints]
"""Protocol, the original and the translated endpoints."""


class _Usual:
    """The layout of a message of a protocol with ports, up to the end of its two tuples."""

    def __init__(self, family: int, width: int, source: int, destination: int) -> None:
        one = f"12s{width}s4s{width}s8sB3x4sH2x4sH2x"
        self._family = family
        self._struct = struct.Struct(f">B3x{one}{one}")
        self._headers = [
            (
                _NLA.pack(4 + 4 + 2 * (4 + width) + 4 + 24, kind | _NLA_F_NESTED)
                + _NLA.pack(4 + 2 * (4 + width), _CTA_TUPLE_IP | _NLA_F_NESTED)
                + _NLA.pack(4 + width, source),
                _NLA.pack(4 + width, destination),
                _NLA.pack(4 + 24, _CTA_TUPLE_PROTO | _NLA_F_NESTED) + _NLA.pack(4 + 1, _CTA_PROTO_NUM),
                _NLA.pack(4 + 2, _CTA_PROTO_SRC_PORT),
                _NLA.pack(4 + 2, _CTA_PROTO_DST_PORT),
            )
            for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY)
        ]
        self.size = self._struct.size
        self.values = 2 * f"12x{width}s4x{width}s8xB7xH6xH2x"
        """The layout of the two tuples without their headers."""

    def endpoints(self, buffer: memoryview, start: int) -> _Found | None:
        """What the message says, or None when it is laid out differently."""
        if buffer[start] != self._family:
            return None
        (_, a, osrc, b, odst, c, protocol, d, osport, e, odport,
         f, rsrc, g, rdst, h, _, i, rsport, j, rdport) = self._struct.unpack_from(buffer, start)  # fmt: skip
        original, reply = self._headers
        if (a, b, c, d, e) != original or (f, g, h, i, j) != reply:
            return None
        return protocol, Endpoints(osrc, odst, osport, odport), Endpoints(rdst, rsrc, rdport, rsport)


_USUAL = (
    _Usual(socket.AF_INET, 4, _CTA_IP_V4_SRC, _CTA_IP_V4_DST),
    _Usual(socket.AF_INET6, 16, _CTA_IP_V6_SRC, _CTA_IP_V6_DST),
)


def _flow(found: _Found, buffer: memoryview, start: int, end: int) -> Flow | None:
    """The flow with these endpoints and the attributes that follow."""
    protocol, original, translated = found
    identifier = zone = status = 0
    sent = received = None
    # As _attributes does it, for which there are too many of these.
    while start + 4 <= end:
        length, kind = _NLA.unpack_from(buffer, start)
        if length < 4 or start + length > end:
            raise Malformed(f"an attribute of {length} bytes in {end - start}")
        if kind == _CTA_ID:
            (identifier,) = _U32.unpack_from(buffer, start + 4)
        elif kind == _CTA_STATUS:
            (status,) = _U32.unpack_from(buffer, start + 4)
        elif kind == _CTA_ZONE:
            (zone,) = _U16.unpack_from(buffer, start + 4)
        elif kind & _NLA_TYPE_MASK == _CTA_COUNTERS_ORIG:
            sent = _counted(buffer, start + 4, start + length)
        elif kind & _NLA_TYPE_MASK == _CTA_COUNTERS_REPLY:
            received = _counted(buffer, start + 4, start + length)
        start += (length + 3) & ~3
    nat = _nat(status, original, translated)
    if not nat:
        return None
    counters = None if sent is None else Counters(*sent, *(received or (0, 0)))
    return Flow(identifier, zone, protocol, nat, original, translated, counters)


def _nat(status: int, original: Endpoints, translated: Endpoints) -> int:
    nat = 0
    if status & _IPS_SRC_NAT or original[0] != translated[0] or original[2] != translated[2]:
        nat |= SNAT
    if status & _IPS_DST_NAT or original[1] != translated[1] or original[3] != translated[3]:
        nat |= DNAT
    return nat


def _counted(buffer: memoryview, start: int, end: int) -> tuple[int, int]:
    found = _found(buffer, start, end)
    packets, octets = found[_CTA_COUNTERS_PACKETS], found[_CTA_COUNTERS_BYTES]
    return int.from_bytes(packets, "big"), int.from_bytes(octets, "big")


def _endpoints(buffer: memoryview, start: int, end: int) -> _Found:
    """The endpoints of a message of any layout."""
    top = _found(buffer, start + _NFGEN, end)
    protocol, original = _tuple(top[_CTA_TUPLE_ORIG])
    _, reply = _tuple(top[_CTA_TUPLE_REPLY])
    if len(original.source) != len(reply.source):
        raise Malformed("the tuples of a connection are of different families")
    return (
        protocol,
        original,
        Endpoints(reply.destination, reply.source, reply.destination_port, reply.source_port),
    )


def _tuple(nested: memoryview) -> tuple[int, Endpoints]:
    parts = _found(nested, 0, len(nested))
    ip = _found(parts[_CTA_TUPLE_IP], 0, len(parts[_CTA_TUPLE_IP]))
    proto = _found(parts[_CTA_TUPLE_PROTO], 0, len(parts[_CTA_TUPLE_PROTO]))
    four = _CTA_IP_V4_SRC in ip
    source = bytes(ip[_CTA_IP_V4_SRC if four else _CTA_IP_V6_SRC])
    destination = bytes(ip[_CTA_IP_V4_DST if four else _CTA_IP_V6_DST])
    if (len(source), len(destination)) != ((4, 4) if four else (16, 16)):
        raise Malformed("an address of a wrong size")
    source_port, destination_port = (
        int.from_bytes(proto.get(kind, b"")[:2], "big") for kind in (_CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT)
    )
    return proto[_CTA_PROTO_NUM][0], Endpoints(source, destination, source_port, destination_port)


def _found(buffer: memoryview, start: int, end: int) -> dict[int, memoryview]:
    return {kind: buffer[begin:stop] for kind, begin, stop in _attributes(buffer, start, end)}


def _attributes(buffer: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of the value of each attribute."""
    while start + _NLA.size <= end:
        length, kind = _NLA.unpack_from(buffer, start)
        if length < _NLA.size or start + length > end:
            raise Malformed(f"an attribute of {length} bytes in {end - start}")
        yield kind & _NLA_TYPE_MASK, start + _NLA.size, start + length
        start += (length + 3) & ~3
