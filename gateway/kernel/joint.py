"""Chains of the nft variant and the maps ahead of them in one nf_tables transaction.

Two would be as right, for the maps alone decide. But what a transaction deleted the kernel gives back only after a
grace period of RCU, which takes 5 to 15 ms, and what the next one deleted after another. Before it takes a rule with a
target of xtables, as DNAT and SNAT are, it waits for that (net/netfilter/nft_compat.c of Linux). So the change behind a
deletion waits for what is left of one grace period, and not of two.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from gateway.kernel.maps import KernelMaps
from gateway.kernel.netlink import Message
from gateway.kernel.nft_edits import Chains
from gateway.kernel.nft_variant import NftVariantFirewall
from gateway.ports import Remembering
from rules.maps import MapEdit
from rules.ruleset import ChainEdit


@dataclass(frozen=True)
class KernelJoint:
    """``gateway.ports.Joint``; all three share one ``Generation``."""

    firewall: NftVariantFirewall
    remembered: Remembering
    maps: KernelMaps

    def commit(self, table: str, chains: Sequence[ChainEdit], maps: Sequence[MapEdit]) -> bool:
        """One transaction, or False (and nothing has changed) where more than rules and a few entries change."""

        def carry(messages: Sequence[Message]) -> bool:
            def edit(standing: Chains, evidence: Hashable) -> bool:
                return self.firewall.edit_along(table, standing, chains, evidence, messages)

            return self.remembered.edit_by(table, chains, edit)

        return self.maps.commit_by(maps, carry)
