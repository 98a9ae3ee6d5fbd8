"""nf_tables' netlink messages: their numbers, and how those parts are written that all drivers need.

Numbers bear the names that they have in linux/netfilter/nfnetlink.h and nf_tables.h, there with NFT_MSG_ or NFTA_ ahead
of them.
"""

from __future__ import annotations

import socket
import struct

from gateway.kernel.netlink import Message, attribute

NETLINK_NETFILTER = 12
NFPROTO_UNSPEC, NFPROTO_INET, NFPROTO_IPV4 = 0, 1, socket.AF_INET

_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END, _BATCH_GENID = 16, 17, 1  # NFNL_MSG_BATCH_*, NFNL_BATCH_GENID

# Types of messages, with the subsystem in them.
GETTABLE, DELTABLE, GETCHAIN = (_NFTABLES << 8 | kind for kind in (1, 2, 4))
NEWRULE, GETRULE, DELRULE = (_NFTABLES << 8 | kind for kind in (6, 7, 8))
NEWSET, GETSET, DELSET = (_NFTABLES << 8 | kind for kind in (9, 10, 11))
NEWSETELEM, GETSETELEM, DELSETELEM = (_NFTABLES << 8 | kind for kind in (12, 13, 14))
GETGEN = _NFTABLES << 8 | 16

# Types of attributes.
TABLE_NAME = 1
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_TYPE = 1, 3, 4, 7
HOOK_HOOKNUM, HOOK_PRIORITY = 1, 2
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS = 1, 2, 3, 4
RULE_POSITION, RULE_USERDATA = 6, 7
SET_TABLE, SET_NAME, SET_FLAGS = 1, 2, 3
SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN = 4, 5, 6, 7
SET_ID, SET_USERDATA = 10, 13
SET_ELEM_LIST_TABLE, SET_ELEM_LIST_SET, SET_ELEM_LIST_ELEMENTS = 1, 2, 3
SET_ELEM_KEY, SET_ELEM_DATA, DATA_VALUE = 1, 2, 1
LIST_ELEM = 1
GEN_ID = 1


def head(family: int = NFPROTO_IPV4, resource: int = 0) -> bytes:
    """``struct nfgenmsg``, with which every message begins."""
    return struct.pack("!BBH", family, 0, resource)


NFGENMSG = head()


def named(kind: int, name: str) -> bytes:
    """A string attribute: it ends with a zero."""
    return attribute(kind, name.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network byte order, as nf_tables wants its numbers."""
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute made of attributes, as the kernel tells it: without NLA_F_NESTED, which it does not ask for."""
    return attribute(kind, b"".join(inner))


def in_chain(table: str, chain: str, family: int = NFPROTO_IPV4) -> bytes:
    """How every message about rules of a chain begins."""
    return head(family) + named(RULE_TABLE, table) + named(RULE_CHAIN, chain)


def begin(generation: int | None = None) -> Message:
    """Begins a transaction; one for this generation alone, if it is named (else ERESTART)."""
    only = b"" if generation is None else number(_BATCH_GENID, generation)
    return Message(_BATCH_BEGIN, 0, head(NFPROTO_UNSPEC, _NFTABLES) + only)


def end() -> Message:
    """Ends a transaction."""
    return Message(_BATCH_END, 0, head(NFPROTO_UNSPEC, _NFTABLES))
