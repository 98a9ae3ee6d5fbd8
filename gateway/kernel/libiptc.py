"""One legacy table through python-iptables: from reading it to one atomic commit.

Importing this module loads libxtables and libip4tc (50 ms). Three habits of python-iptables are kept out:
a rule looks a chain's name up in all tables, which loads those that were not (and puts their hooks into the way
of every packet); its final check re-reads every extension through a pipe that it puts in place of the process's
standard output; and deleting goes by content, so that of two equal rules always the first is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import iptc
from iptc import ip4tc

from gateway.kernel.ipt_entries import entry
from gateway.kernel.xtoptions import adapt
from rules.ruleset import (
    BUILTIN,
    AnyRule,
    ChainEdit,
    ChainRef,
    Conntrack,
    DeleteChain,
    DeleteRule,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Foreign,
    Goto,
    InInterface,
    InsertRule,
    Jump,
    Mark,
    Masquerade,
    Match,
    NewChain,
    OutInterface,
    Protocol,
    ReplaceRules,
    Return,
    Rule,
    SetMark,
    Snat,
    Source,
    States,
    Target,
)

adapt()

# Of libiptc's functions python-iptables binds all but the first; the others are wanted without what it adds to them.
_delete_by_number = ip4tc._libiptc.iptc_delete_num_entry
_append = ip4tc._libiptc.iptc_append_entry
_insert = ip4tc._libiptc.iptc_insert_entry

_AGAIN = "Resource temporarily unavailable"  # EAGAIN: the table is no longer the one that was read
_BYTES = re.compile(r"b'([^']*)'")  # python-iptables puts C strings into its messages as Python prints bytes


class TableError(Exception):
    """libiptc or the kernel refused; ``retryable`` if another process changed the table in the meantime."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.retryable = _AGAIN in words


class LegacyTable:
    """A legacy table as it is now, changed in memory until ``commit`` replaces the kernel's in one step.

    The caller holds the xtables lock from before ``with`` until after the commit: libiptc takes none, and would
    overwrite what another process wrote in between.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._table: Any = None

    def __enter__(self) -> LegacyTable:
        with _translated():
            # The object is one for each name and remembers the table as it last saw it.
            self._table = iptc.Table(self._name, autocommit=False)
            self._table.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        # What was not committed is forgotten.
        self._table.close()

    def apply(self, edit: ChainEdit, *, by_rule: bool = False) -> None:
        """Make one edit in memory; raises TableError. ``by_rule``: delete by what a rule says, not by its number."""
        table, chain = self._table, edit.ref.chain
        with _translated():
            match edit:
                case NewChain():
                    table.create_chain(chain)
                case DeleteChain():
                    table.flush_entries(chain)
                    table.delete_chain(chain)
                case InsertRule(_, index, rule) if made := entry(rule):
                    self._check(_insert(chain.encode(), made, index, table._handle), f"can't insert into {chain}")
                case InsertRule(_, index, rule):
                    table.insert_entry(chain, self._built(rule).rule, index)
                case DeleteRule(ref, index, rule):
                    self._delete(ref, index, rule, by_rule=by_rule)
                case ReplaceRules(_, rules):
                    table.flush_entries(chain)
                    for rule in rules:
                        self._append(chain, rule)

    def commit(self) -> None:
        """Replace the kernel's table with this one; raises TableError, and nothing has changed then."""
        with _translated():
            self._table.commit()

    def _append(self, chain: str, rule: AnyRule) -> None:
        if made := entry(rule):
            self._check(_append(chain.encode(), made, self._table._handle), f"can't append to {chain}")
        else:
            self._table.append_entry(chain, self._built(rule).rule)

    def _check(self, done: int, complaint: str) -> None:
        if done != 1:
            raise iptc.IPTCError(f"{complaint}: {self._table.strerror()}")

    def _delete(self, ref: ChainRef, index: int, rule: AnyRule, *, by_rule: bool) -> None:
        if ref.chain in BUILTIN[ref.table] or (by_rule and isinstance(rule, Rule)):
            # Others insert and delete here, too, and numbers shift: the rule itself is meant.
            built = self._built(rule)
            self._table.delete_entry(ref.chain, built.rule, built.mask)
        else:
            deleted = _delete_by_number(ref.chain.encode(), index, self._table._handle)
            self._check(deleted, f"can't delete rule {index} of {ref.chain}")

    def _built(self, rule: AnyRule) -> _Rule:
        if isinstance(rule, Foreign):
            raise TableError(f"cannot be built: {rule.text}")
        built = _Rule(self._table)
        for match in rule.matches:
            _add_match(built, match)
        _set_target(built, rule.target)
        return built


class _Rule(iptc.Rule):  # type: ignore[misc]  # python-iptables is untyped
    """A rule that knows the one table it is for; the base class would open every table there is."""

    def __init__(self, table: Any) -> None:
        self.tables = [table]
        super().__init__()

    tables: Any = None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (iptc.IPTCError, iptc.XTablesError, ValueError, AttributeError) as error:
        raise TableError(_BYTES.sub(r"\1", str(error))) from error


def _add_match(built: _Rule, match: Match) -> None:
    match match:
        case Source(prefix):
            built.src = prefix
        case Destination(prefix):
            built.dst = prefix
        case InInterface(name):
            built.in_interface = name
        case OutInterface(name):
            built.out_interface = name
        case DestinationPort(protocol, port):
            built.protocol = protocol
            _extension(built.create_match(protocol), dport=str(port))
        case Mark(value, mask):
            _extension(built.create_match("mark"), mark=f"{value:#x}/{mask:#x}")
        case Protocol(name):
            built.protocol = name
        case States(names):
            _extension(built.create_match("conntrack"), ctstate=names)
        case Conntrack(state, orig_dst):
            _extension(built.create_match("conntrack"), ctstate=state, ctorigdst=orig_dst)


def _set_target(built: _Rule, target: Target) -> None:
    match target:
        case Jump(chain):
            built.create_target(chain)
        case Goto(chain):
            built.create_target(chain, goto=True)
        case Drop():
            built.create_target("DROP")
        case Dnat(address, port):
            _extension(built.create_target("DNAT"), to_destination=address if port is None else f"{address}:{port}")
        case Snat(address, random_fully):
            options = {"random_fully": ""} if random_fully else {}
            _extension(built.create_target("SNAT"), to_source=address, **options)
        case Masquerade(random_fully):
            options = {"random_fully": ""} if random_fully else {}
            _extension(built.create_target("MASQUERADE"), **options)
        case Return():
            built.create_target("RETURN")
        case SetMark(value, mask):
            _extension(built.create_target("MARK"), set_xmark=f"{value:#x}/{mask:#x}")


def _extension(module: Any, **options: str) -> None:
    for name, value in options.items():
        module.set_parameter(name, value)
    # The check of the extension itself, which also completes it (--random-fully). It belongs here, before the
    # next rule's extension of that name takes the place in libxtables.
    module._final_check()
