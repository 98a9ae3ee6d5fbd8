"""Edits of the nft variant's chains in this process: one transaction over netlink, whatever the length of a chain.

``iptables-nft-restore`` lists a whole chain before it inserts into it or deletes from it (84 ms at 10,000 rules), and
asks the resolver for every UDP port; the kernel itself names each rule by a handle, which never comes twice. The
handles of a chain are listed once, and those of our own rules come back with the transaction (NLM_F_ECHO). A
transaction names the generation that it was made for, so that the kernel refuses it if anybody else wrote in the
meantime.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping, Sequence

from gateway.kernel.netlink import NLM_F_CREATE, Message, Netlink, attribute
from gateway.kernel.nft_messages import (
    DELRULE,
    GETRULE,
    NETLINK_NETFILTER,
    NEWRULE,
    RULE_EXPRESSIONS,
    RULE_HANDLE,
    RULE_POSITION,
    begin,
    end,
    in_chain,
    nested,
)
from gateway.kernel.nft_rules import expressions
from gateway.kernel.nft_tables import Listing, handle_of, listing
from gateway.ports import Moved, Refused
from rules.ruleset import BUILTIN, ChainEdit, ChainRef, DeleteRule, InsertRule, ReplaceRules, Rules

_NLM_F_ECHO, _NLM_F_APPEND = 0x8, 0x800
_ERESTART = 85  # another generation than the one that was named
MOST = 1000
"""Single edits at once. Their answers (3 kB each, as the kernel counts) fit the socket's buffer."""

Chains = Mapping[ChainRef, Rules]


class _Unspoken(Exception):
    """A rule of which this process knows no expressions."""


class Handles:
    """The kernel's names of the rules of our chains, in order, as far as they were asked for."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._known: dict[ChainRef, list[int]] = {}

    def forget(self) -> None:
        """Ask again: somebody else wrote, or the tool did."""
        self._known.clear()

    def commit(
        self,
        table: str,
        standing: Chains,
        edits: Sequence[ChainEdit],
        generation: int,
        along: Sequence[Message] = (),
    ) -> bool:
        """Make the edits as one transaction; False (and nothing happened) if they are of a kind for the tool.

        What else shall be part of the transaction is given ``along``.

        Raises Moved if the kernel's generation is another one than that, or its chains are not ``standing``, and
        Refused where the kernel does not take them.
        """
        if not all(edit.ref in standing and _spoken(edit) for edit in edits):
            return False
        anew = {edit.ref for edit in edits if isinstance(edit, ReplaceRules)}
        single = [edit for edit in edits if edit.ref not in anew]
        if len(single) > MOST or len(single) + len(anew) != len(edits):
            return False
        handles: dict[ChainRef, list[int]] = {}
        messages: list[Message] = []
        for edit in single:
            if edit.ref not in handles:
                handles[edit.ref] = list(self._handles(edit.ref, standing[edit.ref]))
            message = _message(edit, handles[edit.ref], placeholder=-len(messages) - 1)
            if message is None:
                return False
            messages.append(message)
        messages += along
        rewritten = (message for edit in edits if isinstance(edit, ReplaceRules) for message in _rewritten(edit))
        try:
            echoed = self._netlink.transact(begin(generation), messages, end(), unanswered=rewritten)
        except _Unspoken:  # nothing is sent before all is written
            return False
        except OSError as error:
            self.forget()
            if error.errno == errno.ENOENT and any(edit.ref.chain in BUILTIN[table] for edit in edits):
                return False  # built-in chains are made when the first rule comes, by the tool
            if error.errno in (_ERESTART, errno.ENOENT):
                raise Moved(table) from error
            raise Refused(f"edit table {table}", error.strerror or str(error), retryable=True) from error
        for ref, listed in handles.items():
            self._known[ref] = [handle if handle > 0 else _handle(echoed[-handle - 1]) for handle in listed]
        for ref in anew:
            self._known.pop(ref, None)
        return True

    def read(self, table: str) -> Listing | None:
        """The table as ``nft_tables.listing`` reads it; its handles are known from then on. Raises Refused.

        None also where somebody writes all the time, for the tool has more patience.
        """
        found = None
        try:
            found = listing(self._netlink, table)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise Refused(f"list table ip {table}", error.strerror or str(error), retryable=True) from error
        self._known = {ref: listed for ref, listed in self._known.items() if ref.table != table}
        if found is not None:
            self._known |= found.handles
        return found

    def _handles(self, ref: ChainRef, rules: Rules) -> list[int]:
        """The handles of a chain that holds these rules; raises Moved if it does not hold as many."""
        known = self._known.get(ref)
        if known is None:
            try:
                known = self._netlink.listed(Message(GETRULE, 0, in_chain(ref.table, ref.chain)), _handle)
            except OSError as error:
                raise Moved(ref.table) from error
        if len(known) != len(rules):
            self.forget()
            raise Moved(ref.table)
        return known


def _spoken(edit: ChainEdit) -> bool:
    match edit:
        case DeleteRule() | ReplaceRules():  # of whose many rules it is known when they are written
            return True
        case InsertRule():
            return expressions(edit.rule) is not None
    return False


def _message(edit: ChainEdit, handles: list[int], placeholder: int) -> Message | None:
    """One edit; ``handles`` are changed as the chain is. None for a place between two rules of this transaction."""
    where = in_chain(edit.ref.table, edit.ref.chain)
    match edit:
        case DeleteRule(_, index, _):
            handle = handles.pop(index)
            return Message(DELRULE, 0, where + _long(RULE_HANDLE, handle)) if handle > 0 else None
        case InsertRule(_, index, rule):
            behind = handles[index] if index < len(handles) else None
            handles.insert(index, placeholder)
            what = where + nested(RULE_EXPRESSIONS, expressions(rule) or b"")
            if behind is None:  # at the end
                return Message(NEWRULE, NLM_F_CREATE | _NLM_F_APPEND | _NLM_F_ECHO, what)
            if behind > 0:
                return Message(NEWRULE, NLM_F_CREATE | _NLM_F_ECHO, what + _long(RULE_POSITION, behind))
    return None


def _rewritten(edit: ReplaceRules) -> Iterator[Message]:
    """A chain flushed and filled anew; raises _Unspoken at a rule that is for the tool."""
    where = in_chain(edit.ref.table, edit.ref.chain)
    yield Message(DELRULE, 0, where)
    for rule in edit.rules:
        said = expressions(rule)
        if said is None:
            raise _Unspoken
        yield Message(NEWRULE, NLM_F_CREATE | _NLM_F_APPEND, where + nested(RULE_EXPRESSIONS, said))


def _long(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">Q", value))


def _handle(said: memoryview | None) -> int:
    """The handle of a rule that the kernel told of."""
    handle = handle_of(said) if said is not None else 0
    if not handle:
        raise Refused("edit an nft chain", "the kernel did not tell the new rule's handle", retryable=True)
    return handle
