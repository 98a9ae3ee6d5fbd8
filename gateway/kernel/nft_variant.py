"""The nft variant of iptables: rules in nf_tables, read and written through iptables-nft-save and -restore.

A restore is one nf_tables transaction, which the kernel takes whole or not at all and repeats by itself when
another one came between; there is no lock to hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gateway.kernel import restore
from gateway.kernel.generation import Generation
from gateway.ports import Variant
from rules.ruleset import ChainEdit, Ruleset


class NftVariantFirewall:
    """``gateway.ports.Firewall`` through the nft variant's tools, in the thread's network namespace."""

    variant: Variant = "nft"

    def __init__(self, generation: Generation | None = None) -> None:
        self._generation = generation or Generation()

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables; one that is not there has empty built-in chains."""
        return restore.read(self.variant, tables)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one transaction; raises Refused, and nothing has changed then."""
        with self._generation.ours():  # what others read of nf_tables beside these chains still holds
            restore.edit(self.variant, table, edits)
