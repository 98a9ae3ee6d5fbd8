"""Rules of the legacy variant as entries of the kernel's table, and read from these.

An entry (``struct ipt_entry``, linux/netfilter_ipv4/ip_tables.h) is a header about addresses, interfaces and protocol,
then matches, then a target. Building one here takes 10 us, where python-iptables takes 100; reading one takes 4, where
its text takes 16. What is not spoken here is left to the tools. What is read is written again and compared, part by
part, so that nothing that stands in an entry is overlooked.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from ipaddress import IPv4Network

from gateway.kernel.extensions import (
    PROTOCOL_NAMES,
    PROTOCOLS,
    Extension,
    acted,
    action,
    in_order,
    printable_match,
    tracked,
    tracking,
)
from rules.iptables import PORT_MAX
from rules.ruleset import (
    AnyRule,
    Conntrack,
    Destination,
    DestinationPort,
    Drop,
    Goto,
    InInterface,
    Jump,
    Mark,
    Match,
    OutInterface,
    Protocol,
    Return,
    Rule,
    Source,
    States,
    Target,
)

_IP = struct.Struct("=4s4s4s4s16s16s16s16sHBB")
"""Source, destination, their masks, interfaces in and out, their masks, protocol, flags, inverted flags."""
_AFTER_IP = struct.Struct("=IHHI16x")  # nfcache, offset of the target, length of the entry, comefrom, counters
_HEADER = _IP.size + _AFTER_IP.size
_OFFSETS, _OFFSETS_AT = struct.Struct("=HH"), _IP.size + 4  # of the target, and the length
_EXTENSION = struct.Struct("=H29sB")  # size, name, revision
_GOTO = 2  # a flag of the header
_RETURN, _DROP = -5, -1
_MANY = 1 << 13

Named = Callable[[int], str | None]
"""The chain that begins at an offset of the table."""


# --- writing ---------------------------------------------------------------------------------------------------------


def entry(rule: AnyRule) -> bytes | None:
    """The rule as libiptc takes it; None for one that is not spoken here, or leads to a chain, which libiptc finds."""
    if not isinstance(rule, Rule) or not in_order(tuple(map(type, rule.matches))):
        return None
    header, matches, target = _header(rule), _extensions(rule), _target(rule.target)
    if header is None or matches is None or target is None:
        return None
    at = _HEADER + len(matches)
    return b"".join((header, _AFTER_IP.pack(0, at, at + len(target), 0), matches, target))


def _header(rule: Rule) -> bytes | None:
    about = tuple(_about(match) for match in rule.matches)
    return None if None in about else _ip(tuple(filter(None, about)), isinstance(rule.target, Goto))


def _about(match: Match) -> Match | str | None:
    """What the header says of a match; None where that cannot be written."""
    match match:
        case DestinationPort(protocol, _):
            return protocol if protocol in PROTOCOLS else None
        case Protocol("icmp"):
            return match
        case Protocol():
            return None
        case Source() | Destination() | InInterface() | OutInterface():
            return match
    return ""


@lru_cache(_MANY)
def _ip(about: tuple[Match | str, ...], goto: bool) -> bytes | None:
    addresses, interfaces, protocol = {}, {}, 0
    for one in about:
        match one:
            case Source(prefix) | Destination(prefix):
                network = _network(prefix)
                if network is None:
                    return None
                addresses[type(one)] = network
            case InInterface(name) | OutInterface(name) if printable_match(one):
                text = name.encode() + b"\0"
                interfaces[type(one)] = (text, b"\xff" * len(text))
            case Protocol():
                protocol = socket.IPPROTO_ICMP
            case str():
                protocol = PROTOCOLS[one]
            case _:
                return None
    none = (b"", b"")
    (src, smask), (dst, dmask) = addresses.get(Source, none), addresses.get(Destination, none)
    (into, imask), (out, omask) = interfaces.get(InInterface, none), interfaces.get(OutInterface, none)
    return _IP.pack(src, dst, smask, dmask, into, out, imask, omask, protocol, _GOTO if goto else 0, 0)


def _network(prefix: str) -> tuple[bytes, bytes] | None:
    try:
        network = IPv4Network(prefix)
    except ValueError:
        return None
    if str(network) != prefix or not network.prefixlen:
        return None
    return network.network_address.packed, network.netmask.packed


def _extensions(rule: Rule) -> bytes | None:
    found: list[bytes] = []
    for match in rule.matches:
        written = _match(match)
        if written is None:
            return None
        found.append(written)
    return b"".join(found)


@lru_cache(_MANY)
def _match(match: Match) -> bytes | None:
    """What is an extension of a match; empty where the header says it all, None where it is not spoken here."""
    match match:
        case DestinationPort("tcp", port) if 0 <= port <= PORT_MAX:
            # struct xt_tcp: source ports, destination ports, option, flags
            return _written(Extension("tcp", 0, struct.pack("=HHHH8x", 0, PORT_MAX, port, port)))
        case DestinationPort("udp", port) if 0 <= port <= PORT_MAX:
            return _written(Extension("udp", 0, struct.pack("=HHHH8x", 0, PORT_MAX, port, port)))
        case Mark(value, mask) if printable_match(match):
            return _written(Extension("mark", 1, struct.pack("=II8x", value, mask)))
        case Conntrack() | States():
            tracks = tracked(match)
            return _written(tracks) if tracks else None
        case DestinationPort() | Mark():
            return None
    return b""


@lru_cache(_MANY)
def _target(target: Target) -> bytes | None:
    match target:
        case Return():
            return _standard("RETURN")
        case Drop():
            return _standard("DROP")
    done = action(target)
    return _written(done) if done else None


def _standard(name: str) -> bytes:
    return _written(Extension(name, 0, bytes(8)))


def _written(what: Extension) -> bytes:
    return _EXTENSION.pack(_EXTENSION.size + len(what.data), what.name.encode(), what.revision) + what.data


# --- reading ---------------------------------------------------------------------------------------------------------


def offsets(table: bytes, at: int) -> tuple[int, int]:
    """Where the target of the entry at ``at`` begins, and how long the entry is; (0, 0) if there is none."""
    if at + _HEADER > len(table):
        return 0, 0
    target, length = _OFFSETS.unpack_from(table, at + _OFFSETS_AT)
    return (target, length) if _HEADER <= target <= length - _EXTENSION.size else (0, 0)


def content(raw: bytes) -> bytes:
    """An entry without what the kernel keeps in it."""
    return raw[: _IP.size] + raw[_HEADER:]


def verdict(raw: bytes) -> int | None:
    """The number in a standard target; None where it is none."""
    standard = len(raw) == _EXTENSION.size + 8 and raw[2 : _EXTENSION.size] == bytes(_EXTENSION.size - 2)
    return int(struct.unpack_from("=i", raw, _EXTENSION.size)[0]) if standard else None


def heading(raw: bytes) -> str | None:
    """The name of the chain that begins behind an entry with this target; None where none does."""
    size, name, _ = _EXTENSION.unpack_from(raw)
    told = raw[_EXTENSION.size : size].split(b"\0")[0].decode(errors="replace")
    return told if name.rstrip(b"\0") == b"ERROR" else None


def rule(raw: bytes, target_at: int, named: Named) -> Rule | None:
    """The rule that an entry is, whatever its counters say; None if it is none of ours."""
    header = _header_of(raw[: _IP.size])
    if header is None:
        return None
    head, tail, protocol, goto = header
    found = _matches_of(protocol, raw[_HEADER:target_at])
    if found is None:
        return None
    last = raw[target_at:]
    number = verdict(last)
    target = _action_of(last) if number is None else _verdict_of(number, named, goto=goto)
    if target is None or goto != isinstance(target, Goto):
        return None
    return Rule((*head, *tail, *found), target)


def _verdict_of(number: int, named: Named, *, goto: bool) -> Target | None:
    if number in (_RETURN, _DROP):
        return Return() if number == _RETURN else Drop()
    chain = named(number)
    if chain is None:
        return None
    return Goto(chain) if goto else Jump(chain)


_Header = tuple[tuple[Match, ...], tuple[Match, ...], int, bool]


@lru_cache(_MANY)
def _header_of(raw: bytes) -> _Header | None:
    """Addresses, interfaces, the protocol's number, and whether a chain is gone to."""
    src, dst, smask, dmask, into, out, _, _, protocol, flags, _ = _IP.unpack(raw)
    prefixes = tuple(kind(_prefix(a, m)) for kind, a, m in ((Source, src, smask), (Destination, dst, dmask)) if any(m))
    names = ((kind, name.rstrip(b"\0")) for kind, name in ((InInterface, into), (OutInterface, out)))
    interfaces = tuple(kind(name.decode(errors="replace")) for kind, name in names if name)
    about: list[Match | str] = [*prefixes, *interfaces]
    if protocol == socket.IPPROTO_ICMP:
        about.append(Protocol("icmp"))
    if protocol in PROTOCOL_NAMES:
        about.append(PROTOCOL_NAMES[protocol])
    goto = bool(flags & _GOTO)
    return (prefixes, interfaces, protocol, goto) if _ip(tuple(about), goto) == raw else None


def _prefix(address: bytes, mask: bytes) -> str:
    return f"{socket.inet_ntoa(address)}/{int.from_bytes(mask, 'big').bit_count()}"


@lru_cache(_MANY)
def _matches_of(protocol: int, raw: bytes) -> tuple[Match, ...] | None:
    found: list[Match] = [Protocol("icmp")] if protocol == socket.IPPROTO_ICMP else []
    for name, data in _listed(raw):
        if PROTOCOL_NAMES.get(protocol) == name:
            found.append(DestinationPort(name, int(struct.unpack_from("=4xH", data.ljust(6, b"\0"))[0])))
        elif name == "mark":
            found.append(Mark(*struct.unpack_from("=II", data.ljust(8, b"\0"))))
        elif name == "conntrack":
            found.append(tracking(data))
        else:
            return None
    ported = any(isinstance(match, DestinationPort) for match in found)
    if ported != (protocol in PROTOCOL_NAMES) or not in_order(tuple(map(type, found))):
        return None
    return tuple(found) if _extensions(Rule(tuple(found), Return())) == raw else None


@lru_cache(_MANY)
def _action_of(raw: bytes) -> Target | None:
    listed = list(_listed(raw))
    target = acted(*listed[0]) if len(listed) == 1 else None
    return target if target is not None and _target(target) == raw else None


def _listed(raw: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at + _EXTENSION.size <= len(raw):
        size, name, _ = _EXTENSION.unpack_from(raw, at)
        size = max(size, _EXTENSION.size)
        yield name.rstrip(b"\0").decode(errors="replace"), raw[at + _EXTENSION.size : at + size]
        at += size
