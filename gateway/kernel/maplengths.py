"""One more or one fewer prefix length among the maps: a map and the rule that asks it, as netlink messages.

The first source translation of a length brings a map and a rule, the last one takes them away, so this belongs to
everyday verbs; nft, which writes whole tables, takes 10 ms and more for it. The messages are byte for byte those that
nft sends, so that tools list what they are used to. Bytes and values only.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from gateway.kernel import nft_messages as nf
from gateway.kernel.mapwire import comment, commented
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
    payload,
)
from gateway.kernel.nft_messages import NFGENMSG, in_chain, named, nested, number
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

_SET_IS_A_MAP = 8
_IPV4_ADDRESS, _IPV4_LENGTH = 7, 4  # as nft numbers its types
_BIG_ENDIAN = 2
# By what nft remembers how to print a map: byte order of keys and of data, and that the data are not merged.
_PRINTED = b"".join(struct.pack("=BBI", kind, 4, value) for kind, value in ((0, _BIG_ENDIAN), (1, _BIG_ENDIAN), (6, 0)))
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
    handles = (bytes(attributes(said, len(NFGENMSG))[nf.RULE_HANDLE]) for said in listed)
    return _messages(edit, sorted(asked(edit.chains) - standing.maps), dict(zip(have, handles, strict=True)))


def _messages(edit: WriteChains, fresh: Sequence[str], handles: Mapping[MapRule, bytes]) -> Iterator[Message]:
    for at, name in enumerate(fresh, start=1):
        yield Message(nf.NEWSET, NLM_F_CREATE, _map(name, at))
    wanted, chain = edit.chains[POSTROUTING], in_chain(TABLE, POSTROUTING)
    for at, rule in enumerate(wanted):
        if isinstance(rule, PrefixSnat) and rule not in handles:
            ahead_of = next(handles[other] for other in wanted[at:] if other in handles)  # the last rule stays
            said = nested(nf.RULE_EXPRESSIONS, _expressions(rule))
            said += attribute(nf.RULE_USERDATA, commented(label(rule))) + attribute(nf.RULE_POSITION, ahead_of)
            yield Message(nf.NEWRULE, NLM_F_CREATE, chain + said)
    for rule in handles.keys() - set(wanted):
        yield Message(nf.DELRULE, 0, chain + attribute(nf.RULE_HANDLE, handles[rule]))
    for name in edit.unasked:
        yield Message(nf.DELSET, 0, NFGENMSG + named(nf.SET_TABLE, TABLE) + named(nf.SET_NAME, name))


def _map(name: str, number_in_transaction: int) -> bytes:
    kinds = number(nf.SET_KEY_TYPE, _IPV4_ADDRESS) + number(nf.SET_KEY_LEN, _IPV4_LENGTH)
    kinds += number(nf.SET_DATA_TYPE, _IPV4_ADDRESS) + number(nf.SET_DATA_LEN, _IPV4_LENGTH)
    names = NFGENMSG + named(nf.SET_TABLE, TABLE) + named(nf.SET_NAME, name) + number(nf.SET_FLAGS, _SET_IS_A_MAP)
    return names + kinds + number(nf.SET_ID, number_in_transaction) + attribute(nf.SET_USERDATA, _PRINTED)


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
            expression("lookup", named(1, rule.map) + asked_for),
            expression("nat", how + (number(7, _RANDOM_FULLY) if rule.random_fully else b"")),
        )
    )
