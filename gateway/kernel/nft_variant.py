"""The nft variant of iptables: rules in nf_tables, read and written over netlink in this process.

What this process does not speak (rules of others, new chains) goes through iptables' own tools. Either way a change is
one nf_tables transaction, which the kernel takes whole or not at all; there is no lock to hold.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress

from gateway.kernel import restore
from gateway.kernel.generation import Generation
from gateway.kernel.netlink import Message
from gateway.kernel.nft_edits import Chains, Handles
from gateway.ports import Moved, Refused, Variant
from rules.ruleset import BUILTIN, ChainEdit, ChainRef, Ruleset


class NftVariantFirewall:
    """``gateway.ports.Firewall`` for the nft variant, in the thread's network namespace.

    Also a ``gateway.remembered.EvidentFirewall``; its evidence, the kernel's transaction counter, misses nothing.
    """

    variant: Variant = "nft"

    def __init__(self, generation: Generation | None = None) -> None:
        self._generation = generation or Generation()
        self._handles = Handles()

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; one that is not there has empty built-in chains."""
        return Ruleset({ref: rules for table in tables for ref, rules in self._table(table).items()})

    def _table(self, table: str) -> Chains:
        found = self._handles.read(table)
        if found is not None:
            with suppress(Refused):  # what iptables cannot show it says better of the table
                unread = restore.chains(self.variant, table, found.chains, found.unread)
                return {ChainRef(table, chain): () for chain in BUILTIN[table]} | found.chains | unread
        return restore.read(self.variant, [table]).chains

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one transaction; raises Refused, and nothing has changed then."""
        self._handles.forget()
        with self._generation.own():
            restore.edit(self.variant, table, edits)

    def evidence(self, table: str) -> Hashable | None:
        """How many transactions of others there were."""
        return self._generation.others()

    def edit_if(self, table: str, standing: Chains, edits: Sequence[ChainEdit], evidence: Hashable) -> Hashable | None:
        """``edit``, if the evidence holds; see ``gateway.remembered``."""
        before = evidence
        if evidence is None or not self.edit_along(table, standing, edits, evidence, ()):
            before = self._generation.others()
            self.edit(table, edits)
        after = self._generation.others()
        return after if after == before else None

    def edit_along(
        self, table: str, standing: Chains, edits: Sequence[ChainEdit], evidence: Hashable, along: Sequence[Message]
    ) -> bool:
        """``edit_if`` without the tool, and messages given ``along``, as one transaction.

        False, and nothing has changed, where this process does not speak an edit or the kernel refuses one; raises
        Moved where the evidence does not hold.
        """
        generation = self._generation.number_if(evidence)
        if generation is None:
            raise Moved(table)
        try:
            with self._generation.own():
                return self._handles.commit(table, standing, edits, generation, along)
        except Moved:
            raise
        except Refused:
            return False  # the tool may know another way, and its words are those that people know
