"""nf_tables' netlink messages, as far as the driver of the maps speaks them: bytes in, values out, no socket.

Numbers and layouts: linux/netfilter/nfnetlink.h and nf_tables.h. A key of several fields is the fields one after
the other, each filled up to four bytes; numbers in attributes are big-endian.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway.kernel.generation import NFNL_SUBSYS_NFTABLES as NFTABLES
from gateway.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attributes, text
from rules.maps import TABLE, EntryKey, Ports
from rules.nft import Endpoint

IPV4, INET, ANY = socket.AF_INET, 1, 0  # NFPROTO_*
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GETTABLE, _DELTABLE, _GETCHAIN, _GETRULE, _GETSET, _NEWSETELEM, _GETSETELEM, _DELSETELEM = (
    NFTABLES | number for number in (1, 2, 4, 7, 10, 12, 13, 14)
)
_GENERIC = 4  # length of struct nfgenmsg
_NESTED = 0x8000
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_USERDATA = 1, 2, 7
_COMMENT = 0  # a type within the user data of a rule, as nft lays it out
_SET_TABLE, _SET_NAME, _SET_KEY_LENGTH, _SET_DATA_LENGTH = 1, 2, 5, 7
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEMENT = 1, 2, 3, 1
_ELEMENT_KEY, _ELEMENT_DATA, _DATA_VALUE = 1, 2, 1

_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}
_PORT_KEY = struct.Struct("!4sB3xH2x")
_PORT_TARGET = struct.Struct("!4sH2x")
# An element in a listing: its own header, key, data, each with two more; both lengths tell that nothing else is in it.
_PLAIN = struct.Struct("=H10x4s8x4s")
_PORT = struct.Struct("=H10x12s8x8s")
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


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _name(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _generic(family: int, resource: int = 0) -> bytes:
    return struct.pack("!BBH", family, 0, resource)


def begin() -> Message:
    """Begins a transaction."""
    return Message(_BATCH_BEGIN, 0, _generic(ANY, NFTABLES >> 8))


def end() -> Message:
    """Ends a transaction."""
    return Message(_BATCH_END, 0, _generic(ANY, NFTABLES >> 8))


def drop_table() -> Message:
    """Takes our table away."""
    return Message(_DELTABLE, 0, _generic(IPV4) + _name(_TABLE_NAME, TABLE))


def add_entries(name: str, entries: Iterable[tuple[EntryKey, Endpoint]]) -> Iterator[Message]:
    """Entries for one map; one that is there already is refused (EEXIST)."""
    elements = (_element(name, key, target) for key, target in entries)
    return (Message(_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, listed) for listed in _listed(name, elements))


def drop_entries(name: str, keys: Iterable[EntryKey]) -> Iterator[Message]:
    """Takes entries out of one map; one that is not there is refused (ENOENT)."""
    return (Message(_DELSETELEM, 0, listed) for listed in _listed(name, (_element(name, key) for key in keys)))


def get_entry(key: EntryKey) -> Message:
    """Asks for one entry."""
    return Message(_GETSETELEM, 0, next(_listed(key.map, iter([_element(key.map, key)]))))


def _listed(name: str, elements: Iterator[bytes]) -> Iterator[bytes]:
    head = _generic(IPV4) + _name(_LIST_TABLE, TABLE) + _name(_LIST_SET, name)
    listed = list(elements)
    for start in range(0, len(listed), _ELEMENTS_A_MESSAGE):
        yield head + _attribute(_LIST_ELEMENTS | _NESTED, b"".join(listed[start : start + _ELEMENTS_A_MESSAGE]))


def _element(name: str, key: EntryKey, target: Endpoint | None = None) -> bytes:
    address = socket.inet_aton(key.address)
    ports = name == Ports().map
    said = _value(_ELEMENT_KEY, _PORT_KEY.pack(address, _PROTOCOLS[key.protocol], key.port) if ports else address)
    if target is not None:
        to = socket.inet_aton(target[0])
        said += _value(_ELEMENT_DATA, _PORT_TARGET.pack(to, target[1]) if ports else to)
    return _attribute(_LIST_ELEMENT | _NESTED, said)


def _value(kind: int, value: bytes) -> bytes:
    return _attribute(kind | _NESTED, _attribute(_DATA_VALUE, value))


TABLES = Message(_GETTABLE, 0, _generic(IPV4))
CHAINS = Message(_GETCHAIN, 0, _generic(ANY))
MAPS = Message(_GETSET, 0, _generic(IPV4) + _name(_SET_TABLE, TABLE))


def rules_of(family: int, table: str, chain: str) -> Message:
    """Asks for the rules of one chain."""
    return Message(_GETRULE, 0, _generic(family) + _name(_RULE_TABLE, table) + _name(_RULE_CHAIN, chain))


def entries_of(name: str) -> Message:
    """Asks for all entries of one map."""
    return Message(_GETSETELEM, 0, _generic(IPV4) + _name(_LIST_TABLE, TABLE) + _name(_LIST_SET, name))


def table_name(said: memoryview) -> str:
    """What a table is called."""
    return text(attributes(said, _GENERIC)[_TABLE_NAME])


def nat_chain(said: memoryview) -> ChainSeen | None:
    """The chain described, if it is a base chain of type nat."""
    found = attributes(said, _GENERIC)
    if _CHAIN_HOOK not in found or text(found.get(_CHAIN_TYPE, memoryview(b""))) != "nat":
        return None
    hook = attributes(found[_CHAIN_HOOK])
    number, priority = (struct.unpack("!i", hook[kind])[0] for kind in (_HOOK_NUMBER, _HOOK_PRIORITY))
    return ChainSeen(said[0], text(found[_CHAIN_TABLE]), text(found[_CHAIN_NAME]), number, priority)


def comment(said: memoryview) -> str:
    """A rule's comment; empty where it has none."""
    data = bytes(attributes(said, _GENERIC).get(_RULE_USERDATA, b""))
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == _COMMENT:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""


def map_name(said: memoryview) -> tuple[str, bool]:
    """What a set or map of our table is called, and whether it could be one of our maps by its lengths."""
    found = attributes(said, _GENERIC)
    name = text(found[_SET_NAME])
    lengths = tuple(int.from_bytes(found.get(kind, b""), "big") for kind in (_SET_KEY_LENGTH, _SET_DATA_LENGTH))
    wanted = (_PORT_KEY.size, _PORT_TARGET.size) if name == Ports().map else (4, 4)
    return name, lengths == wanted


def entries(name: str, said: memoryview) -> Iterator[tuple[EntryKey, Endpoint]]:
    """The entries in one message of a listing. Raises Strange where one is not of the kind that we write."""
    listed = attributes(said, _GENERIC).get(_LIST_ELEMENTS, memoryview(b""))
    layout = _PORT if name == Ports().map else _PLAIN
    if len(listed) % layout.size:
        raise Strange(f"entries of another kind in the map {name}")
    for length, key, data in layout.iter_unpack(listed):
        if length != layout.size:
            raise Strange(f"an entry of another kind in the map {name}")
        if layout is _PLAIN:
            yield EntryKey(name, socket.inet_ntoa(key)), (socket.inet_ntoa(data), 0)
        else:
            address, protocol, port = _PORT_KEY.unpack(key)
            to, to_port = _PORT_TARGET.unpack(data)
            if protocol not in _PROTOCOL_NAMES:
                raise Strange(f"an entry of another protocol in the map {name}")
            found = EntryKey(name, socket.inet_ntoa(address), _PROTOCOL_NAMES[protocol], port)
            yield found, (socket.inet_ntoa(to), to_port)
