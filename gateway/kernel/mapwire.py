"""nf_tables' netlink messages of which the driver of the maps has need: bytes in, values out, no socket.

Numbers: ``nft_messages``. A key of several fields is the fields one after the other, each filled up to four bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway.kernel import nft_messages as nf
from gateway.kernel.extensions import PROTOCOL_NAMES, PROTOCOLS
from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attribute, attributes, text
from gateway.kernel.nft_messages import NFGENMSG, NFPROTO_UNSPEC, head, in_chain, named
from rules.maps import TABLE, EntryKey, Ports
from rules.nft import Endpoint

_NESTED = 0x8000  # NLA_F_NESTED
_COMMENT = 0  # a type within the user data of a rule, as nft lays it out
# An element: its own header, key and data, each with two more headers (length and type); addresses and ports are bytes.
_PLAIN = struct.Struct("=4H2H4s4H4s")
_PORTS = struct.Struct("=4H2H4sB3x2s2x4H4s2s2x")
_PLAIN_KEY = struct.Struct("=4H2H4s")
_PORTS_KEY = struct.Struct("=4H2H4sB3x2s2x")
_KEY_LENGTHS, _DATA_LENGTHS = (4, 12), (4, 8)  # plain, with ports
_PORTS_MAP = Ports().map
_ELEMENTS_A_MESSAGE = 1000  # an attribute is shorter than 64 KiB


class ChainSeen(NamedTuple):
    """A base chain of type nat."""

    family: int
    table: str
    name: str
    hook: int
    priority: int


class Strange(Exception):
    """Something in our table is not what it must be."""


def drop_table() -> Message:
    """Takes our table away."""
    return Message(nf.DELTABLE, 0, NFGENMSG + named(nf.TABLE_NAME, TABLE))


def add_entries(name: str, entries: Iterable[tuple[EntryKey, Endpoint]]) -> Iterator[Message]:
    """Entries for one map; one that is there already is refused (EEXIST)."""
    elements = (_element(name, key, target) for key, target in entries)
    return (Message(nf.NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, listed) for listed in _listed(name, elements))


def drop_entries(name: str, keys: Iterable[EntryKey]) -> Iterator[Message]:
    """Takes entries out of one map; one that is not there is refused (ENOENT)."""
    return (Message(nf.DELSETELEM, 0, listed) for listed in _listed(name, (_element(name, key) for key in keys)))


def get_entry(key: EntryKey) -> Message:
    """Asks for one entry."""
    return Message(nf.GETSETELEM, 0, next(_listed(key.map, iter([_element(key.map, key)]))))


def _in_map(name: str) -> bytes:
    return NFGENMSG + named(nf.SET_ELEM_LIST_TABLE, TABLE) + named(nf.SET_ELEM_LIST_SET, name)


def _listed(name: str, elements: Iterator[bytes]) -> Iterator[bytes]:
    begun, listed = _in_map(name), list(elements)
    for start in range(0, len(listed), _ELEMENTS_A_MESSAGE):
        some = b"".join(listed[start : start + _ELEMENTS_A_MESSAGE])
        yield begun + attribute(nf.SET_ELEM_LIST_ELEMENTS | _NESTED, some)


def _headers(length: int, key: int, data: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The headers before an element's key, and those before its data."""
    before = (length, nf.LIST_ELEM | _NESTED, key + 8, nf.SET_ELEM_KEY | _NESTED, key + 4, nf.DATA_VALUE)
    return before, (data + 8, nf.SET_ELEM_DATA | _NESTED, data + 4, nf.DATA_VALUE)


_PLAIN_HEADERS = _headers(_PLAIN.size, 4, 4)
_PORTS_HEADERS = _headers(_PORTS.size, 12, 8)


def _element(name: str, key: EntryKey, target: Endpoint | None = None) -> bytes:
    address = socket.inet_aton(key.address)
    if name == _PORTS_MAP:
        before, between = _PORTS_HEADERS
        asked = (address, PROTOCOLS[key.protocol], key.port.to_bytes(2, "big"))
        if target is None:
            return _PORTS_KEY.pack(_PORTS_KEY.size, *before[1:], *asked)
        return _PORTS.pack(*before, *asked, *between, socket.inet_aton(target[0]), target[1].to_bytes(2, "big"))
    before, between = _PLAIN_HEADERS
    if target is None:
        return _PLAIN_KEY.pack(_PLAIN_KEY.size, *before[1:], address)
    return _PLAIN.pack(*before, address, *between, socket.inet_aton(target[0]))


TABLES = Message(nf.GETTABLE, 0, NFGENMSG)
CHAINS = Message(nf.GETCHAIN, 0, head(NFPROTO_UNSPEC))
MAPS = Message(nf.GETSET, 0, NFGENMSG + named(nf.SET_TABLE, TABLE))


def rules_of(family: int, table: str, chain: str) -> Message:
    """Asks for the rules of one chain."""
    return Message(nf.GETRULE, 0, in_chain(table, chain, family))


def entries_of(name: str) -> Message:
    """Asks for all entries of one map."""
    return Message(nf.GETSETELEM, 0, _in_map(name))


def table_name(said: memoryview) -> str:
    """What a table is called."""
    return text(attributes(said, len(NFGENMSG))[nf.TABLE_NAME])


def nat_chain(said: memoryview) -> ChainSeen | None:
    """The chain described, if it is a base chain of type nat."""
    found = attributes(said, len(NFGENMSG))
    if nf.CHAIN_HOOK not in found or text(found.get(nf.CHAIN_TYPE, memoryview(b""))) != "nat":
        return None
    hook = attributes(found[nf.CHAIN_HOOK])
    number, priority = (struct.unpack("!i", hook[kind])[0] for kind in (nf.HOOK_HOOKNUM, nf.HOOK_PRIORITY))
    return ChainSeen(said[0], text(found[nf.CHAIN_TABLE]), text(found[nf.CHAIN_NAME]), number, priority)


def comment(said: memoryview) -> str:
    """A rule's comment; empty where it has none."""
    data = bytes(attributes(said, len(NFGENMSG)).get(nf.RULE_USERDATA, b""))
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == _COMMENT:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""


def commented(words: str) -> bytes:
    """The user data of a rule with this comment."""
    text = words.encode() + b"\0"
    return bytes((_COMMENT, len(text))) + text


def map_name(said: memoryview) -> tuple[str, bool]:
    """What a set or map of our table is called, and whether it could be one of our maps by its lengths."""
    found = attributes(said, len(NFGENMSG))
    name = text(found[nf.SET_NAME])
    lengths = tuple(int.from_bytes(found.get(kind, b""), "big") for kind in (nf.SET_KEY_LEN, nf.SET_DATA_LEN))
    ports = name == _PORTS_MAP
    wanted = (_KEY_LENGTHS[ports], _DATA_LENGTHS[ports])
    return name, lengths == wanted


def entries(name: str, said: memoryview) -> Iterator[tuple[EntryKey, Endpoint]]:
    """The entries in one message of a listing. Raises Strange where one is not of the kind that we write."""
    listed = attributes(said, len(NFGENMSG)).get(nf.SET_ELEM_LIST_ELEMENTS, memoryview(b""))
    layout = _PORTS if name == _PORTS_MAP else _PLAIN
    if len(listed) % layout.size:
        raise Strange(f"entries of another kind in the map {name}")
    for fields in layout.iter_unpack(listed):
        if fields[0] != layout.size:  # which tells that nothing else is in it
            raise Strange(f"an entry of another kind in the map {name}")
        address = socket.inet_ntoa(fields[6])
        if layout is _PLAIN:
            yield EntryKey(name, address), (socket.inet_ntoa(fields[11]), 0)
        elif fields[7] not in PROTOCOL_NAMES:
            raise Strange(f"an entry of another protocol in the map {name}")
        else:
            key = EntryKey(name, address, PROTOCOL_NAMES[fields[7]], int.from_bytes(fields[8], "big"))
            yield key, (socket.inet_ntoa(fields[13]), int.from_bytes(fields[14], "big"))
