"""Rules of the nft variant of iptables read from nf_tables expressions: the inverse of ``nft_rules``.

What is read is written again and compared, so nothing that stands in an expression is overlooked: what is not exactly
ours is nobody's here, and the tool is asked to print it.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from gateway.kernel.extensions import ORDER, PROTOCOL_NAMES, acted, tracking
from gateway.kernel.netlink import attributes, text
from gateway.kernel.nft_expressions import (
    DESTINATION_AT,
    META_IIFNAME,
    META_L4PROTO,
    META_MARK,
    META_OIFNAME,
    NETWORK_HEADER,
    SOURCE_AT,
    TRANSPORT_HEADER,
)
from gateway.kernel.nft_rules import (
    DROP,
    GOTO,
    JUMP,
    MANY,
    PORT_AT,
    RETURN,
    acting,
    counted,
    host,
    matched,
    port_is,
    protocol_is,
)
from rules.ruleset import (
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
    Target,
)

_EMPTY = memoryview(b"")
_HOST: Literal["little", "big"] = sys.byteorder


def rule(raw: bytes) -> Rule | None:
    """The rule of which the kernel tells these expressions, whatever its counter says; None if it is none of ours."""
    found = _USUAL(raw)
    if found is None:
        return _unusual(raw)
    protocol, source, destination, port, last = found.groups()
    target = _target_of(last)
    if target is None or (protocol is None) != (port is None):
        return _unusual(raw)
    matches: list[Match] = []
    if source is not None:
        matches.append(_source(source))
    if destination is not None:
        matches.append(_destination(destination))
    if port is not None:
        name = PROTOCOL_NAMES.get(protocol[0])
        if name is None:
            return None
        matches.append(DestinationPort(name, port[0] << 8 | port[1]))
    return Rule(tuple(matches), target)


def _unusual(raw: bytes) -> Rule | None:
    counter = _COUNTERS(raw)
    if counter is None:
        return None
    matches, target = _matches_of(raw[: counter.start()]), _target_of(raw[counter.end() :])
    return None if matches is None or target is None else Rule(matches, target)


@lru_cache(MANY)
def _source(address: bytes) -> Source:
    return Source(f"{socket.inet_ntoa(address)}/32")


@lru_cache(MANY)
def _destination(address: bytes) -> Destination:
    return Destination(f"{socket.inet_ntoa(address)}/32")


@lru_cache(MANY)
def _matches_of(head: bytes) -> tuple[Match, ...] | None:
    found: list[Match] = []
    loaded: tuple[object, ...] = ()
    protocol = mask = b""
    for name, data in _listed(head):
        value = bytes(attributes(data.get(3, _EMPTY)).get(1, b""))
        if name in ("meta", "payload"):
            loaded = (name, *(_number(data.get(kind, _EMPTY)) for kind in ((2,) if name == "meta" else (2, 3))))
            mask = b""
        elif name == "bitwise":
            mask = bytes(attributes(data.get(4, _EMPTY)).get(1, b""))
        elif name == "match":
            found.append(tracking(bytes(data.get(3, b""))))
        elif name == "cmp" and loaded == ("meta", META_L4PROTO):
            protocol = value
        elif name == "cmp":
            found += filter(None, [_compared(loaded, value, mask, protocol)])
    if protocol == bytes([socket.IPPROTO_ICMP]):
        found.append(Protocol("icmp"))
    found.sort(key=lambda match: ORDER.index(type(match)))
    matches = tuple(found)
    return matches if matched(matches) == head else None


def _compared(loaded: tuple[object, ...], value: bytes, mask: bytes, protocol: bytes) -> Match | None:
    match loaded:
        case ("meta", int(key)) if key in (META_IIFNAME, META_OIFNAME):
            name = value.rstrip(b"\0").decode(errors="replace")
            return InInterface(name) if key == META_IIFNAME else OutInterface(name)
        case ("meta", int(key)) if key == META_MARK:
            return Mark(*(int.from_bytes(part, _HOST) for part in (value, mask or b"\xff" * 4)))
        case ("payload", int(base), int(offset)) if (base, offset) == (TRANSPORT_HEADER, PORT_AT):
            kind = PROTOCOL_NAMES.get(protocol[0]) if protocol else None
            return DestinationPort(kind, int.from_bytes(value, "big")) if kind else None
        case ("payload", int(base), int(offset)) if base == NETWORK_HEADER and len(value) <= 4:
            length = int.from_bytes(mask, "big").bit_count() if mask else 8 * len(value)
            prefix = f"{socket.inet_ntoa(value.ljust(4, bytes(1)))}/{length}"
            return Source(prefix) if offset == SOURCE_AT else Destination(prefix)
    return None


@lru_cache(MANY)
def _target_of(last: bytes) -> Target | None:
    listed = list(_listed(last))
    if len(listed) != 1:
        return None
    ((name, data),) = listed
    target = None
    if name == "immediate":
        target = _verdict_of(data)
    elif name == "target":
        target = acted(text(data.get(1, _EMPTY)), bytes(data.get(3, b"")))
    return target if target is not None and acting(target) == last else None


def _verdict_of(data: dict[int, memoryview]) -> Target | None:
    said = attributes(attributes(data.get(2, _EMPTY)).get(2, _EMPTY))
    chain = text(said.get(2, _EMPTY))
    made: dict[int, Target] = {JUMP: Jump(chain), GOTO: Goto(chain), RETURN: Return(), DROP: Drop()}
    return made.get(int.from_bytes(said.get(1, b"\x7f"), "big", signed=True))


def _listed(expressions: bytes) -> Iterator[tuple[str, dict[int, memoryview]]]:
    """Name and attributes of each expression."""
    view, at = memoryview(expressions), 0
    while at + 4 <= len(view):
        length = max(4, int.from_bytes(view[at : at + 2], _HOST))
        said = attributes(view[at + 4 : at + length])
        yield text(said.get(1, _EMPTY)), attributes(said.get(2, _EMPTY))
        at += (length + 3) & ~3


def _number(value: memoryview) -> int:
    return int.from_bytes(value, "big")


def _pattern(made: bytes, *holes: bytes, group: bytes = b"(%s)") -> bytes:
    """A regular expression for such bytes, whatever stands in the holes."""
    found = re.escape(made)
    for hole in holes:
        found = found.replace(re.escape(hole), group % b".{%d}" % len(hole))
    return found


_ONE, _TWO, _FOUR, _EIGHT, _OTHER = b"\xa5", b"\xb7\xe3", b"\xc9\xd1\xef\x9d", b"\xbbPACKETS", b"\xbbOCTETS\xbb"
_COUNTER_PATTERN = _pattern(counted(_EIGHT, _OTHER), _EIGHT, _OTHER, group=b"%s")
_COUNTERS = re.compile(_COUNTER_PATTERN, re.DOTALL).search
_USUAL = re.compile(
    b"(?:%s)?(?:%s)?(?:%s)?(?:%s)?%s(.*)"
    % (
        _pattern(protocol_is(_ONE), _ONE),
        _pattern(host(SOURCE_AT, _FOUR), _FOUR),
        _pattern(host(DESTINATION_AT, _FOUR), _FOUR),
        _pattern(port_is(_TWO), _TWO),
        _COUNTER_PATTERN,
    ),
    re.DOTALL,
).fullmatch
"""What is by far the most of all rules: addresses of hosts, and a port."""
