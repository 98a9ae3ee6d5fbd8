"""Edits of the nft variant's chains in this process: one transaction over netlink, whatever the length of a chain.

``iptables-nft-restore`` lists a whole chain before it inserts into it or deletes from it (84 ms at 10,000 rules);
the kernel itself names each rule by a handle, which never comes twice. The handles of a chain are listed once, and
those of our own rules come back with the transaction (NLM_F_ECHO). A transaction names the generation that it was made
for, so that the kernel refuses it if anybody else wrote in the meantime. Messages: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence

from gateway.kernel.generation import NETLINK_NETFILTER, NFGENMSG, NFNL_SUBSYS_NFTABLES
from gateway.kernel.netlink import NLM_F_CREATE, Message, Netlink, attribute, attributes
from gateway.kernel.nft_expressions import nested, number
from gateway.kernel.nft_rules import expressions
from gateway.ports import Moved, Refused
from rules.ruleset import ChainEdit, ChainRef, DeleteRule, InsertRule, Rules

_BATCH_BEGIN, _BATCH_END = 16, 17
_BATCH_GENID = 1
_NEWRULE, _GETRULE, _DELRULE = (NFNL_SUBSYS_NFTABLES | kind for kind in (6, 7, 8))
_TABLE, _CHAIN, _HANDLE, _EXPRESSIONS, _POSITION = 1, 2, 3, 4, 6
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NLM_F_ECHO, _NLM_F_APPEND = 0x8, 0x800
_ERESTART = 85  # another generation than the one that was named
_BATCH = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES >> 8)
MOST = 1000
"""Edits at once; more are the tool's. Their answers (3 kB each, as the kernel counts) fit the socket's buffer."""

Chains = Mapping[ChainRef, Rules]


class Handles:
    """The kernel's names of the rules of our chains, in order, as far as they were asked for."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._known: dict[ChainRef, list[int]] = {}

    def forget(self) -> None:
        """Ask again: somebody else wrote, or the tool did."""
        self._known.clear()

    def commit(self, table: str, standing: Chains, edits: Sequence[ChainEdit], generation: int) -> bool:
        """Make the edits as one transaction; False (and nothing happened) if they are of a kind for the tool.

        Raises Moved if the kernel's generation is another one than that, or its chains are not ``standing``, and
        Refused where the kernel does not take them.
        """
        if len(edits) > MOST or not all(map(_spoken, edits)):
            return False
        handles: dict[ChainRef, list[int]] = {}
        messages: list[Message] = []
        for edit in edits:
            if edit.ref not in handles:
                handles[edit.ref] = list(self._handles(edit.ref, standing.get(edit.ref, ())))
            message = _message(edit, handles[edit.ref], placeholder=-len(messages) - 1)
            if message is None:
                return False
            messages.append(message)
        begin = Message(_BATCH_BEGIN, 0, _BATCH + number(_BATCH_GENID, generation))
        try:
            echoed = self._netlink.transact(begin, messages, Message(_BATCH_END, 0, _BATCH))
        except OSError as error:
            self.forget()
            if error.errno in (_ERESTART, errno.ENOENT):
                raise Moved(table) from error
            raise Refused(f"edit table {table}", error.strerror or str(error), retryable=True) from error
        for ref, listed in handles.items():
            self._known[ref] = [handle if handle > 0 else _handle(echoed[-handle - 1]) for handle in listed]
        return True

    def raw(self, ref: ChainRef) -> list[bytes]:
        """The expressions of a chain's rules, as the kernel has them."""
        return [bytes(attributes(said, len(NFGENMSG))[_EXPRESSIONS]) for said in self._dump(ref)]

    def _dump(self, ref: ChainRef) -> list[memoryview]:
        what = attribute(_TABLE, ref.table.encode() + b"\0") + attribute(_CHAIN, ref.chain.encode() + b"\0")
        return self._netlink.dump(Message(_GETRULE, 0, NFGENMSG + what))

    def _handles(self, ref: ChainRef, rules: Rules) -> list[int]:
        """The handles of a chain that holds these rules; raises Moved if it does not hold as many."""
        known = self._known.get(ref)
        if known is None:
            try:
                known = [_handle(said) for said in self._dump(ref)]
            except OSError as error:
                raise Moved(ref.table) from error
        if len(known) != len(rules):
            self.forget()
            raise Moved(ref.table)
        return known


def _spoken(edit: ChainEdit) -> bool:
    return isinstance(edit, DeleteRule) or (isinstance(edit, InsertRule) and expressions(edit.rule) is not None)


def _message(edit: ChainEdit, handles: list[int], placeholder: int) -> Message | None:
    """One edit; ``handles`` are changed as the chain is. None for a place between two rules of this transaction."""
    where = attribute(_TABLE, edit.ref.table.encode() + b"\0") + attribute(_CHAIN, edit.ref.chain.encode() + b"\0")
    match edit:
        case DeleteRule(_, index, _):
            handle = handles.pop(index)
            return Message(_DELRULE, 0, NFGENMSG + where + _long(_HANDLE, handle)) if handle > 0 else None
        case InsertRule(_, index, rule):
            behind = handles[index] if index < len(handles) else None
            handles.insert(index, placeholder)
            what = NFGENMSG + where + nested(_EXPRESSIONS, expressions(rule) or b"")
            if behind is None:  # at the end
                return Message(_NEWRULE, NLM_F_CREATE | _NLM_F_APPEND | _NLM_F_ECHO, what)
            if behind > 0:
                return Message(_NEWRULE, NLM_F_CREATE | _NLM_F_ECHO, what + _long(_POSITION, behind))
    return None


def _long(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">Q", value))


def _handle(said: memoryview | None) -> int:
    """The handle of a rule that the kernel told of."""
    if said is None:
        raise Refused("edit an nft chain", "the kernel did not tell the new rule's handle", retryable=True)
    at, kind = len(NFGENMSG), 0
    while at + 4 <= len(said):  # it comes early, and 50,000 rules are long
        length, kind = _ATTRIBUTE.unpack_from(said, at)
        if kind & 0x3FFF == _HANDLE:
            return int.from_bytes(said[at + 4 : at + length], "big")
        at += (length + 3) & ~3
    raise Refused("edit an nft chain", "the kernel told of a rule without a handle", retryable=True)
