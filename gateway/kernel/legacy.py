"""The legacy variant of iptables: a table is read whole, changed in memory and put back whole.

A few edits go through libiptc in this process, in a fraction of a millisecond where the table is small; many go
through one ``iptables-legacy-restore``: python-iptables takes 0.1 ms for each rule that it builds. Reading goes
through ``iptables-legacy-save``, which takes 10 ms for 10,000 rules where python-iptables takes 0.8 s.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from gateway.kernel import restore
from gateway.kernel.libiptc import LegacyTable, TableError
from gateway.ports import Refused, Variant
from rules.iptables import render_restore
from rules.ruleset import AnyRule, ChainEdit, Foreign, InsertRule, ReplaceRules, Ruleset

FEW_RULES = 20  # so many python-iptables builds in the time that it takes to start a program
_LOCK_POLL = 0.01  # seconds


class LegacyFirewall:
    """``gateway.ports.Firewall`` for the legacy variant, in the thread's network namespace."""

    variant: Variant = "legacy"

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; reading one loads it."""
        return restore.read(self.variant, tables)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one change; raises Refused, and nothing has changed then.

        Refused is retryable if somebody held the xtables lock all the time, or changed the table in spite of it.
        """
        if _few(edits):
            _edit_in_process(table, edits)
        else:
            restore.edit(self.variant, table, edits)


def _few(edits: Sequence[ChainEdit]) -> bool:
    """Whether the edits write few rules, and only such as python-iptables can build."""
    rules: list[AnyRule] = []
    for edit in edits:
        match edit:
            case InsertRule(_, _, rule):
                rules.append(rule)
            case ReplaceRules():
                rules += edit.rules
    return len(rules) <= FEW_RULES and not any(isinstance(rule, Foreign) for rule in rules)


def _edit_in_process(table: str, edits: Sequence[ChainEdit]) -> None:
    step = f"edit table {table}"
    try:
        # What could not be written as text shall not be written at all; and errors are told in the tool's words.
        lines = [render_restore(table, [edit]).splitlines()[1] for edit in edits]
    except ValueError as error:
        raise Refused(step, str(error), retryable=False) from error
    with _xtables_lock(step):
        try:
            with LegacyTable(table) as copy:
                for edit, line in zip(edits, lines, strict=True):
                    step = f"edit table {table}: {line}"
                    copy.apply(edit)
                step = f"edit table {table}"
                copy.commit()
        except TableError as error:
            raise Refused(step, str(error), retryable=error.retryable) from error


@contextmanager
def _xtables_lock(step: str) -> Iterator[None]:
    """The lock that iptables takes (its file: iptables(8), XTABLES_LOCKFILE); raises Refused if others keep it."""
    path = os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock")
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(step, f"{path}: {error.strerror}", retryable=False) from error
    try:
        deadline = time.monotonic() + restore.LOCK_SECONDS
        while not _locked(lock):
            if time.monotonic() > deadline:
                words = f"another program has held the xtables lock for {restore.LOCK_SECONDS} s"
                raise Refused(step, words, retryable=True)
            time.sleep(_LOCK_POLL)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True
