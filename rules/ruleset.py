"""What a netfilter program is. Rules are data; text appears only in the renderers.

The vocabulary is what the gateway writes, plus ``Foreign``: a rule somebody else wrote, kept as the text
the kernel's tools printed and never interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Family = Literal[4, 6]
"""A version of IP: each has tables, chains and rules of its own."""
FAMILIES: tuple[Family, ...] = (4, 6)


@dataclass(frozen=True, slots=True)
class Source:
    """``-s``: source prefix, always with its length (10.0.1.5/32)."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Destination:
    """``-d``: destination prefix, always with its length."""

    prefix: str


@dataclass(frozen=True, slots=True)
class InInterface:
    """``-i``: the interface a packet came in by."""

    name: str


@dataclass(frozen=True, slots=True)
class OutInterface:
    """``-o``: the interface a packet will leave by."""

    name: str


@dataclass(frozen=True, slots=True)
class DestinationPort:
    """``-p tcp -m tcp --dport 80``: protocol (tcp, udp or sctp) and destination port."""

    protocol: str
    port: int


@dataclass(frozen=True, slots=True)
class Protocol:
    """``-p icmp``: a protocol, whatever its ports (icmp, ipv6-icmp)."""

    name: str


@dataclass(frozen=True, slots=True)
class States:
    """``-m conntrack --ctstate RELATED,ESTABLISHED``: what belongs to a connection that stands."""

    names: str


@dataclass(frozen=True, slots=True)
class Mark:
    """``-m mark --mark value/mask``: the packet's mark under a mask."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class Conntrack:
    """``-m conntrack --ctstate S --ctorigdst A``: state and original destination of the connection."""

    state: str
    orig_dst: str


Match = Source | Destination | InInterface | OutInterface | DestinationPort | Mark | Conntrack | Protocol | States


@dataclass(frozen=True, slots=True)
class Jump:
    """``-j CHAIN``: continue in a chain of ours and come back at its end."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:
    """``-g CHAIN``: continue in a chain of ours; its end is the end of this chain, too."""

    chain: str


@dataclass(frozen=True, slots=True)
class Dnat:
    """``-j DNAT --to-destination``: new destination address, and port where one is named."""

    address: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Snat:
    """``-j SNAT --to-source``: new source address, the port chosen at random where asked."""

    address: str
    random_fully: bool = False


@dataclass(frozen=True, slots=True)
class Masquerade:
    """``-j MASQUERADE``: the address of the interface by which a packet leaves becomes its source."""

    random_fully: bool = False


@dataclass(frozen=True, slots=True)
class Return:
    """``-j RETURN``: back to the chain that jumped here; in a built-in chain, the end of the table."""


@dataclass(frozen=True, slots=True)
class SetMark:
    """``-j MARK --set-xmark value/mask``: mark = (mark & ~mask) ^ value."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class Drop:
    """``-j DROP``: the packet ends here."""


Target = Jump | Goto | Dnat | Snat | Masquerade | SetMark | Drop | Return


@dataclass(frozen=True, slots=True)
class Rule:
    """All matches must hold, then the target acts. Matches stand in the order iptables-save prints them."""

    matches: tuple[Match, ...]
    target: Target


@dataclass(frozen=True, slots=True)
class Foreign:
    """A rule outside our vocabulary, as iptables-save prints it after ``-A CHAIN``."""

    text: str


AnyRule = Rule | Foreign


class ChainRef(NamedTuple):
    """A chain by its table (nat, mangle), its name, and the version of IP whose packets it sees."""

    table: str
    chain: str
    family: Family = 4


Rules = tuple[AnyRule, ...]


@dataclass(frozen=True)
class Ruleset:
    """The chains of one or more tables: built-in and user-defined ones, each with its rules in order."""

    chains: Mapping[ChainRef, Rules] = field(default_factory=dict)


# Edits of one table, applied in order and committed as one atomic replacement of that table.


@dataclass(frozen=True, slots=True)
class NewChain:
    """Create an empty user-defined chain."""

    ref: ChainRef


@dataclass(frozen=True, slots=True)
class DeleteChain:
    """Flush and delete a user-defined chain; nothing may jump to it any more."""

    ref: ChainRef


@dataclass(frozen=True, slots=True)
class InsertRule:
    """Put a rule before the one at ``index`` (from 0; the chain's length appends)."""

    ref: ChainRef
    index: int
    rule: AnyRule


@dataclass(frozen=True, slots=True)
class DeleteRule:
    """Take out the rule at ``index`` (from 0), which is ``rule``."""

    ref: ChainRef
    index: int
    rule: AnyRule


@dataclass(frozen=True, slots=True)
class ReplaceRules:
    """Flush a chain and fill it anew: cheaper than many single edits."""

    ref: ChainRef
    rules: Rules


ChainEdit = NewChain | DeleteChain | InsertRule | DeleteRule | ReplaceRules

HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
"""The built-in chains in the order of the kernel's numbers for their hooks (linux/netfilter.h: NF_INET_*)."""
BUILTIN = {"nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"), "mangle": HOOKS}
