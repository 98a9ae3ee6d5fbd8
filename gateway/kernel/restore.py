"""What both iptables variants share: reading with ``-save``, and editing one table with ``-restore --noflush``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.kernel.tool import run
from gateway.ports import Refused, Variant
from rules.iptables import parse_save, render_restore
from rules.ruleset import BUILTIN, AnyRule, ChainEdit, ChainRef, Family, Rules, Ruleset

LOCK_SECONDS = 5  # how long the tools wait for the xtables lock
_RESOURCE_PROBLEM = 4  # exit code of iptables: the lock, memory, or a table that changed under it
_INCOMPATIBLE = "is incompatible, use 'nft' tool."


@dataclass(frozen=True, slots=True)
class RestoreFirewall:
    """``gateway.ports.Firewall`` through the programs alone, of either variant and either version of IP."""

    variant: Variant
    family: Family = 4

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; one that is not there has empty built-in chains."""
        return read(self.variant, tables, self.family)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one change; raises Refused, and nothing has changed then."""
        edit(self.variant, table, edits, self.family)


def program(variant: str, family: Family, suffix: str = "") -> str:
    """What the tool is called: ``iptables-nft``, ``ip6tables-legacy-save`` …"""
    return f"{'iptables' if family == 4 else 'ip6tables'}-{variant}{suffix}"


def read(variant: str, tables: Collection[str], family: Family = 4) -> Ruleset:
    """The named tables as ``iptables-<variant>-save`` prints them; built-in chains are there in any case.

    Raises Refused where the tool fails, or where it says that it cannot show a table.
    """
    chains: dict[ChainRef, tuple[AnyRule, ...]] = {}
    for table in tables:
        chains.update({ChainRef(table, chain, family): () for chain in BUILTIN[table]})
        chains.update(parse_save(_saved(variant, table, family), family).chains)
    return Ruleset(chains)


def chains(
    variant: str, table: str, standing: Collection[ChainRef], asked: Collection[ChainRef]
) -> dict[ChainRef, Rules]:
    """The chains ``asked`` for, of the ``standing`` ones of a table, as ``iptables-<variant> -S`` prints them.

    Raises Refused where the tool fails.
    """
    if not asked:
        return {}
    declared = "".join(f":{ref.chain} - [0:0]\n" for ref in standing)
    listed = "".join(_listed(variant, table, ref.chain) for ref in asked)
    found = parse_save(f"*{table}\n{declared}{listed}").chains
    return {ref: found[ref] for ref in asked}


def _listed(variant: str, table: str, chain: str) -> str:
    argv = [program(variant, 4), "-t", table, "-S", chain]
    ended = run(argv)
    if ended.code:
        raise _refused(" ".join(argv), ended.code, ended.stderr)
    return ended.stdout.partition("\n")[2]  # the first line declares the chain


def _saved(variant: str, table: str, family: Family = 4) -> str:
    """What ``iptables-<variant>-save`` prints of a table; raises Refused as ``read`` does."""
    argv = [program(variant, family, "-save"), "-t", table]
    ended = run(argv)
    if ended.code:
        raise _refused(" ".join(argv), ended.code, ended.stderr)
    if _INCOMPATIBLE in ended.stdout:
        reason = f"the table {table} holds rules that iptables cannot show; they were written with nft"
        raise Refused(" ".join(argv), reason, retryable=False)
    return ended.stdout


def edit(variant: str, table: str, edits: Sequence[ChainEdit], family: Family = 4, *, lock: str | None = None) -> None:
    """Commit the edits of one table as one change; raises Refused, and nothing has changed then.

    ``lock`` is the file that the tool shall lock instead of the usual one (iptables 1.8.8 and later).
    """
    # A name or a rule that cannot be put into one line is a refusal like the kernel's own.
    try:
        text = render_restore(table, edits)
    except ValueError as error:
        raise Refused(f"edit table {table}", str(error), retryable=False) from error
    wait = ["-w", str(LOCK_SECONDS)] if variant == "legacy" else []  # the nft variant has no lock to wait for
    where = {"XTABLES_LOCKFILE": lock} if lock else {}
    ended = run([program(variant, family, "-restore"), "--noflush", *wait], stdin=text, environment=where)
    if ended.code:
        raise _refused(f"edit table {table}", ended.code, _with_line(ended.stderr, text))


def _with_line(stderr: str, text: str) -> str:
    """The complaint, and the line of the input that it speaks of: the legacy tool says no more than its number."""
    found = re.search(r"line (\d+) failed", stderr)
    return f"{stderr.rstrip()}: {text.splitlines()[int(found[1]) - 1]}" if found else stderr


def _refused(step: str, code: int, stderr: str) -> Refused:
    return Refused(step, _words(stderr) or f"exit code {code}", retryable=code == _RESOURCE_PROBLEM)


def _words(stderr: str) -> str:
    """The tool's complaint in one line, without what it always says."""
    lines = (line.strip() for line in stderr.splitlines())
    return "; ".join(line for line in lines if line and not line.startswith(("# Warning:", "Try `")))
