"""The connection tracking table over ctnetlink: which entries are meant, and their deletion.

The kernel picks the entries where it can (CTA_FILTER, Linux 5.8; CTA_STATUS_MASK, 5.15); older ones send all
and the filters are applied here, as they are in any case. Of each entry only the two tuples and the zone are
read. Messages: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pyroute2.netlink import NETLINK_NETFILTER
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

from gateway.kernel.netlink import Message, Netlink, attribute, attributes, body
from gateway.ports import Refused
from rules.flows import Flow, FlowFilter

log = logging.getLogger(__name__)

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ZONE = 1, 2, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
_CTA_IP_V4_SRC, _CTA_IP_V4_DST = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_F_IP_SRC, _F_IP_DST, _F_PROTO_NUM, _F_DST_PORT = 1 << 0, 1 << 1, 1 << 3, 1 << 5  # CTA_FILTER_F_CTA_…
_IPS_NAT_MASK = 0x30  # IPS_SRC_NAT | IPS_DST_NAT
_NLA_F_NESTED = 0x8000
_NFGEN = struct.pack("=BBH", socket.AF_INET, 0, 0)  # family, version, resource
_NLA = struct.Struct("=HH")  # length, type

# What a dump costs, in entries decoded here (2.5 µs): the kernel walks its whole hash table, which many namespaces
# share, and looks at each entry of this one.
_WALK = 4000
_LOOKS_PER_DECODED = 12

_AT_ONCE = 512
"""Entries looked at between two breaths: some milliseconds."""

# Where the kernel keeps the namespace's figures.
_PROC = Path("/proc/sys/net/netfilter")


@dataclass(frozen=True, slots=True)
class KernelFlow(Flow):
    """A Flow with its original tuple in the kernel's own form, which tells ICMP flows apart, too."""

    original: bytes = b""


class KernelFlows:
    """``gateway.ports.Flows`` on the real kernel; for one thread, in whose network namespace it opens its socket."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._kernel_filters = True

    def close(self) -> None:
        """Give the socket back."""
        self._netlink.close()

    def count(self) -> int:
        """How many entries there are; raises Refused."""
        return _figure("nf_conntrack_count")

    def maximum(self) -> int:
        """How many entries there may be; raises Refused."""
        return _figure("nf_conntrack_max")

    def matching(self, filters: Iterable[FlowFilter]) -> list[Flow]:
        """Entries that match any of the filters, each once; raises Refused."""
        return _once(flow for flow in self._found(filters, self._netlink) if flow)

    def end(self, filters: Iterable[FlowFilter], stale: Callable[[Flow], bool]) -> Iterator[int]:
        """Delete the entries that match any of the filters and are ``stale``, and yield how many went, again and again.

        Between two of these lie some hundred entries: nothing of a table of hundreds of thousands is kept here. Raises
        Refused. One that matches two filters may be met twice; it goes once.
        """
        with closing(Netlink(NETLINK_NETFILTER)) as reading:  # its own: deletions and others' requests come in between
            doomed: list[Flow] = []
            for number, flow in enumerate(self._found(filters, reading), start=1):
                if flow and stale(flow):
                    doomed.append(flow)
                if number % _AT_ONCE == 0:
                    yield self.delete(doomed)
                    doomed = []
            yield self.delete(doomed)

    def _found(self, filters: Iterable[FlowFilter], reading: Netlink) -> Iterator[KernelFlow | None]:
        """Entries that match any of the filters, some twice; None for each that was read and is not meant."""
        wanted = list(dict.fromkeys(filters))
        entries = self.count() if wanted else 0
        if not entries:
            return
        try:
            if self._kernel_filters and _worth_filtering(wanted, entries):
                try:
                    for each in wanted:
                        yield from _dump(reading, [each], _filtered(each))
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                    log.warning("the kernel cannot filter its connection tracking table (%s): reading all of it", error)
                    self._kernel_filters = False
                else:
                    return
            yield from _dump(reading, wanted, _all())
        except OSError as error:
            raise _refused("read the connection tracking table", error) from error

    def delete(self, flows: Iterable[Flow]) -> int:
        """Delete these entries; returns how many were still there.

        Raises Refused, after all have been tried, if the kernel would not let go of one that is there.
        """
        requests = [Message(_DELETE, 0, _deletion(flow)) for flow in flows]
        try:
            refused = self._netlink.refusals(requests)
        except OSError as error:
            raise _refused("delete flows", error) from error
        for answer in refused:
            if answer.code != errno.ENOENT:
                raise Refused("delete flows", answer.words, retryable=answer.code in (errno.EBUSY, errno.EAGAIN))
        return len(requests) - len(refused)


def _dump(reading: Netlink, wanted: Sequence[FlowFilter], request: Message) -> Iterator[KernelFlow | None]:
    sieve = _Sieve(wanted)
    for said in reading.stream(request):
        entry = _entry(said)
        if entry is None or not (candidates := sieve.candidates(entry)):
            yield None
            continue
        flow = _flow(entry)
        yield flow if any(each.matches(flow) for each in candidates) else None


def _refused(step: str, error: OSError) -> Refused:
    passing = (errno.EAGAIN, errno.EBUSY, errno.ENOBUFS, errno.ENOMEM)
    return Refused(
        step, error.strerror or str(error), retryable=isinstance(error, TimeoutError) or error.errno in passing
    )


def _figure(name: str) -> int:
    try:
        return int((_PROC / name).read_text())
    except OSError as error:
        raise Refused(f"read {name}", error.strerror or str(error), retryable=False) from error


def _once(flows: Iterable[KernelFlow]) -> list[Flow]:
    return list({(flow.zone, flow.original): flow for flow in flows}.values())


# What to ask for.


def _worth_filtering(wanted: Sequence[FlowFilter], entries: int) -> bool:
    """Whether one dump for each filter costs less than one of everything."""
    one_by_one = len(wanted) * (_WALK + entries // _LOOKS_PER_DECODED)
    everything = _WALK + entries // _LOOKS_PER_DECODED + entries
    return all(map(_selective, wanted)) and one_by_one < everything


def _selective(wanted: FlowFilter) -> bool:
    """Whether the kernel can narrow the search: it matches exact values and the status, not prefixes."""
    exact = (wanted.orig_src, wanted.orig_dst, wanted.reply_src, wanted.reply_dst, wanted.protocol)
    return wanted.untranslated or any(value is not None for value in exact)


def _all() -> Message:
    return Message(_GET, 0, _NFGEN)


def _filtered(wanted: FlowFilter) -> Message:
    """A dump of what has the filter's exact values; ports only mean something with their protocol."""
    ip: list[tuple[str, object]] = []
    proto: list[tuple[str, object]] = []
    orig_flags = reply_flags = 0
    attrs: list[tuple[str, object]] = []
    if wanted.orig_src is not None:
        ip.append(("CTA_IP_V4_SRC", wanted.orig_src))
        orig_flags |= _F_IP_SRC
    if wanted.orig_dst is not None:
        ip.append(("CTA_IP_V4_DST", wanted.orig_dst))
        orig_flags |= _F_IP_DST
    if wanted.protocol is not None:
        proto.append(("CTA_PROTO_NUM", wanted.protocol))
        orig_flags |= _F_PROTO_NUM
        if wanted.orig_dport is not None and wanted.protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            proto.append(("CTA_PROTO_DST_PORT", wanted.orig_dport))
            orig_flags |= _F_DST_PORT
    if orig_flags:
        attrs.append(("CTA_TUPLE_ORIG", _nest(CTA_TUPLE_IP=_nest_of(ip), CTA_TUPLE_PROTO=_nest_of(proto))))
    reply: list[tuple[str, object]] = []
    if wanted.reply_src is not None:
        reply.append(("CTA_IP_V4_SRC", wanted.reply_src))
        reply_flags |= _F_IP_SRC
    if wanted.reply_dst is not None:
        reply.append(("CTA_IP_V4_DST", wanted.reply_dst))
        reply_flags |= _F_IP_DST
    if reply:
        attrs.append(("CTA_TUPLE_REPLY", _nest(CTA_TUPLE_IP=_nest_of(reply))))
    if orig_flags or reply_flags:
        attrs.append(("CTA_FILTER", _nest(CTA_FILTER_ORIG_FLAGS=orig_flags, CTA_FILTER_REPLY_FLAGS=reply_flags)))
    if wanted.untranslated:
        attrs += [("CTA_STATUS", 0), ("CTA_STATUS_MASK", _IPS_NAT_MASK)]
    message = nfct_msg()
    message["nfgen_family"] = socket.AF_INET
    message["attrs"] = attrs
    return Message(_GET, 0, body(message))


def _nest(**attrs: object) -> dict[str, object]:
    return _nest_of(list(attrs.items()))


def _nest_of(attrs: list[tuple[str, object]]) -> dict[str, object]:
    return {"attrs": attrs}


def _deletion(flow: Flow) -> bytes:
    original = flow.original if isinstance(flow, KernelFlow) else _original(flow)
    message = _NFGEN + attribute(_CTA_TUPLE_ORIG | _NLA_F_NESTED, original)
    if flow.zone and _CTA_TUPLE_ZONE not in attributes(memoryview(original)):
        message += attribute(_CTA_ZONE, struct.pack("!H", flow.zone))
    return message


def _original(flow: Flow) -> bytes:
    """The original tuple of a protocol with ports."""
    ip = attribute(_CTA_IP_V4_SRC, socket.inet_aton(flow.orig_src))
    ip += attribute(_CTA_IP_V4_DST, socket.inet_aton(flow.orig_dst))
    proto = (
        attribute(_CTA_PROTO_NUM, bytes([flow.protocol]))
        + attribute(_CTA_PROTO_SRC_PORT, struct.pack("!H", flow.orig_sport))
        + attribute(_CTA_PROTO_DST_PORT, struct.pack("!H", flow.orig_dport))
    )
    return attribute(_CTA_TUPLE_IP | _NLA_F_NESTED, ip) + attribute(_CTA_TUPLE_PROTO | _NLA_F_NESTED, proto)


# What comes back.


class _Direction(NamedTuple):
    """One direction of a connection, in network byte order; ports are empty for protocols without them."""

    source: bytes
    destination: bytes
    protocol: int
    source_port: bytes
    destination_port: bytes


class _Entry(NamedTuple):
    """One connection; ``original`` is the payload of CTA_TUPLE_ORIG."""

    orig: _Direction
    reply: _Direction
    zone: int
    original: memoryview


class _Sieve:
    """Which filters an entry may match, found by an address that they name rather than by asking each."""

    def __init__(self, filters: Iterable[FlowFilter]) -> None:
        self._orig_dst: defaultdict[bytes, list[FlowFilter]] = defaultdict(list)
        self._orig_src: defaultdict[bytes, list[FlowFilter]] = defaultdict(list)
        self._reply_dst: defaultdict[bytes, list[FlowFilter]] = defaultdict(list)
        self._untranslated: list[FlowFilter] = []
        self._rest: list[FlowFilter] = []
        for each in filters:
            self._place(each).append(each)

    def _place(self, each: FlowFilter) -> list[FlowFilter]:
        if each.orig_dst is not None:
            return self._orig_dst[socket.inet_aton(each.orig_dst)]
        if each.orig_src is not None:
            return self._orig_src[socket.inet_aton(each.orig_src)]
        if each.reply_dst is not None:
            return self._reply_dst[socket.inet_aton(each.reply_dst)]
        return self._untranslated if each.untranslated else self._rest

    def candidates(self, entry: _Entry) -> list[FlowFilter]:
        orig, reply = entry.orig, entry.reply
        found = [
            *self._orig_dst.get(orig.destination, ()),
            *self._orig_src.get(orig.source, ()),
            *self._reply_dst.get(reply.destination, ()),
            *self._rest,
        ]
        if self._untranslated and reply.source == orig.destination and reply.destination == orig.source:
            found += self._untranslated
        return found


# Nearly every entry is of a protocol with ports and looks like this, so one look at fixed places reads it: the
# family's header; for each direction CTA_TUPLE with addresses, protocol number and ports, each behind its header.
_PORTS = struct.Struct("=4s 12s4s4s4s8sB3x4s2s2x4s2s2x 12s4s4s4s8sB3x4s2s2x4s2s2x")


def _entry(said: memoryview) -> _Entry | None:
    """One message of a dump; None for what is not IPv4."""
    return _ports_entry(said) or _any_entry(said)


def _headers(kind: int) -> tuple[bytes, ...]:
    """The headers of a tuple with ports, in the order of ``_PORTS``."""
    nested = _NLA.pack(20, _CTA_TUPLE_IP | _NLA_F_NESTED)
    return (
        _NLA.pack(52, kind | _NLA_F_NESTED) + nested + _NLA.pack(8, _CTA_IP_V4_SRC),
        _NLA.pack(8, _CTA_IP_V4_DST),
        _NLA.pack(28, _CTA_TUPLE_PROTO | _NLA_F_NESTED) + _NLA.pack(5, _CTA_PROTO_NUM),
        _NLA.pack(6, _CTA_PROTO_SRC_PORT),
        _NLA.pack(6, _CTA_PROTO_DST_PORT),
    )


_ORIG_HEADERS, _REPLY_HEADERS = _headers(_CTA_TUPLE_ORIG), _headers(_CTA_TUPLE_REPLY)


def _ports_entry(said: memoryview) -> _Entry | None:
    if len(said) < _PORTS.size:
        return None
    (_, a, osrc, b, odst, c, proto, d, osport, e, odport, f, rsrc, g, rdst, h, rproto, i, rsport, j, rdport) = (
        _PORTS.unpack_from(said)
    )
    if (a, b, c, d, e) != _ORIG_HEADERS or (f, g, h, i, j) != _REPLY_HEADERS:
        return None
    zone = 0
    if len(said) >= _PORTS.size + 8 and _NLA.unpack_from(said, _PORTS.size)[1] == _CTA_ZONE:
        zone = _number(said[_PORTS.size + 4 : _PORTS.size + 6])
    orig = _Direction(osrc, odst, proto, osport, odport)
    reply = _Direction(rsrc, rdst, rproto, rsport, rdport)
    return _Entry(orig, reply, zone, said[8:56])


def _any_entry(said: memoryview) -> _Entry | None:
    top = attributes(said, len(_NFGEN))
    if said[0] != socket.AF_INET or _CTA_TUPLE_ORIG not in top or _CTA_TUPLE_REPLY not in top:
        return None
    zone = top.get(_CTA_ZONE, attributes(top[_CTA_TUPLE_ORIG]).get(_CTA_TUPLE_ZONE))
    return _Entry(
        _direction(top[_CTA_TUPLE_ORIG]),
        _direction(top[_CTA_TUPLE_REPLY]),
        0 if zone is None else _number(zone),
        top[_CTA_TUPLE_ORIG],
    )


def _direction(nested: memoryview) -> _Direction:
    parts = attributes(nested)
    ip, proto = attributes(parts[_CTA_TUPLE_IP]), attributes(parts[_CTA_TUPLE_PROTO])
    return _Direction(
        bytes(ip[_CTA_IP_V4_SRC]),
        bytes(ip[_CTA_IP_V4_DST]),
        proto[_CTA_PROTO_NUM][0],
        bytes(proto.get(_CTA_PROTO_SRC_PORT, b"")),
        bytes(proto.get(_CTA_PROTO_DST_PORT, b"")),
    )


def _number(value: bytes | memoryview) -> int:
    return int.from_bytes(value, "big")


def _flow(entry: _Entry) -> KernelFlow:
    orig, reply = entry.orig, entry.reply
    return KernelFlow(
        protocol=orig.protocol,
        orig_src=socket.inet_ntoa(orig.source),
        orig_dst=socket.inet_ntoa(orig.destination),
        orig_sport=_number(orig.source_port),
        orig_dport=_number(orig.destination_port),
        reply_src=socket.inet_ntoa(reply.source),
        reply_dst=socket.inet_ntoa(reply.destination),
        reply_sport=_number(reply.source_port),
        reply_dport=_number(reply.destination_port),
        zone=entry.zone,
        original=bytes(entry.original),
    )
