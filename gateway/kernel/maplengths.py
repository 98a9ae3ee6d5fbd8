"""One more or one fewer prefix length among the maps: a map and the rule that asks it, as netlink messages.

The first source translation of a length brings a map and a rule, the last one takes them away, so this belongs to
everyday verbs; nft, which writes whole tables, takes 10 ms and more for it. The messages are byte for byte those that
nft sends, so that tools list what they are used to. Bytes and values only; numbers: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from gateway.kernel.generation import NFGENMSG as GENERIC
from gateway.kernel.generation import NFNL_SUBSYS_NFTABLES as NFTABLES
from gateway.kernel.mapwire import comment
from gateway.kernel.netlink import NLM_F_CREATE, Message, attribute, attributes
from gateway.kernel.nft_expressions import (
    META_OIFNAME,
    NETWORK_HEADER,
    REGISTER,
    SOURCE_AT,
    equals,
    expression,
    masked,
    meta,
    nested,
    number,
    payload,
)
from rules.maps import (
    POSTROUTING,
    TABLE,
    MapRule,
    MapTable,
    PrefixSnat,
    WriteChains,
    alike_but_for_lengths,
    asked,
    label,
)

_NEWRULE, _DELRULE, _NEWSET, _DELSET = (NFTABLES | kind for kind in (6, 8, 9, 11))
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_POSITION, _RULE_USERDATA = 1, 2, 3, 4, 6, 7
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH, _SET_DATA_TYPE, _SET_DATA_LENGTH = range(1, 8)
_SET_ID, _SET_USERDATA = 10, 13
_SET_IS_A_MAP = 8
_IPV4_ADDRESS, _IPV4_LENGTH = 7, 4  # as nft numbers its types
_BIG_ENDIAN = 2
# By what nft remembers how to print a map: byte order of keys and of data, and that the data are not merged.
_PRINTED = b"".join(struct.pack("=BBI", kind, 4, value) for kind, value in ((0, _BIG_ENDIAN), (1, _BIG_ENDIAN), (6, 0)))
_COMMENT = 0
_NAME_LENGTH = 16  # IFNAMSIZ
_SOURCE, _RANDOM_FULLY = 0, 0x10  # NFT_NAT_SNAT, NF_NAT_RANGE_PROTO_RANDOM_FULLY


def is_all(edit: WriteChains, standing: MapTable) -> bool:
    """Whether nothing but prefix lengths comes or goes with this edit of a table that stands."""
    gone = set(edit.unasked)
    return not standing.damaged and alike_but_for_lengths(edit.chains, standing.chains) and gone <= standing.maps


def messages(edit: WriteChains, standing: MapTable, listed: Sequence[memoryview]) -> Iterator[Message] | None:
    """The edit; ``listed`` are the rules of the chain in question as the kernel tells them.

    None where these are not those of ``standing``, where they stand in another order, or where other maps stand, too.
    """
    have, want = standing.chains[POSTROUTING], edit.chains[POSTROUTING]
    if len(set(have)) < len(have) or [rule for rule in have if rule in want] != [rule for rule in want if rule in have]:
        return None
    if standing.maps != asked(standing.chains) or [comment(said) for said in listed] != list(map(label, have)):
        return None
    handles = (bytes(attributes(said, len(GENERIC))[_RULE_HANDLE]) for said in listed)
    return _messages(edit, sorted(asked(edit.chains) - standing.maps), dict(zip(have, handles, strict=True)))


def _messages(edit: WriteChains, fresh: Sequence[str], handles: Mapping[MapRule, bytes]) -> Iterator[Message]:
    for at, name in enumerate(fresh, start=1):
        yield Message(_NEWSET, NLM_F_CREATE, _map(name, at))
    wanted = edit.chains[POSTROUTING]
    for at, rule in enumerate(wanted):
        if isinstance(rule, PrefixSnat) and rule not in handles:
            ahead_of = next(handles[other] for other in wanted[at:] if other in handles)  # the last rule stays
            said = nested(_RULE_EXPRESSIONS, _expressions(rule)) + attribute(_RULE_USERDATA, _commented(label(rule)))
            yield _about_rule(_NEWRULE, NLM_F_CREATE, said + attribute(_RULE_POSITION, ahead_of))
    for rule in handles.keys() - set(wanted):
        yield _about_rule(_DELRULE, 0, attribute(_RULE_HANDLE, handles[rule]))
    for name in edit.unasked:
        yield Message(_DELSET, 0, GENERIC + _name(_SET_TABLE, TABLE) + _name(_SET_NAME, name))


def _map(name: str, number_in_transaction: int) -> bytes:
    kinds = number(_SET_KEY_TYPE, _IPV4_ADDRESS) + number(_SET_KEY_LENGTH, _IPV4_LENGTH)
    kinds += number(_SET_DATA_TYPE, _IPV4_ADDRESS) + number(_SET_DATA_LENGTH, _IPV4_LENGTH)
    names = GENERIC + _name(_SET_TABLE, TABLE) + _name(_SET_NAME, name) + number(_SET_FLAGS, _SET_IS_A_MAP)
    return names + kinds + number(_SET_ID, number_in_transaction) + attribute(_SET_USERDATA, _PRINTED)


def _about_rule(kind: int, flags: int, said: bytes) -> Message:
    where = _name(_RULE_TABLE, TABLE) + _name(_RULE_CHAIN, POSTROUTING)
    return Message(kind, flags, GENERIC + where + said)


def _expressions(rule: PrefixSnat) -> bytes:
    """``oifname I snat ip to ip saddr & MASK map @NAME [fully-random]``."""
    mask = 0xFFFFFFFF << (32 - rule.length) & 0xFFFFFFFF
    asked_for = number(2, REGISTER) + number(3, REGISTER) + number(5, 0)
    how = number(1, _SOURCE) + number(2, socket.AF_INET) + number(3, REGISTER)
    return b"".join(
        (
            meta(META_OIFNAME),
            equals(rule.interface.encode().ljust(_NAME_LENGTH, b"\0")),
            payload(NETWORK_HEADER, SOURCE_AT, _IPV4_LENGTH),
            masked(mask.to_bytes(_IPV4_LENGTH, "big")),
            expression("lookup", _name(1, rule.map) + asked_for),
            expression("nat", how + (number(7, _RANDOM_FULLY) if rule.random_fully else b"")),
        )
    )


def _commented(words: str) -> bytes:
    text = words.encode() + b"\0"
    return bytes((_COMMENT, len(text))) + text


def _name(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")
