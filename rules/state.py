"""What is wanted of the kernel and what it says it has, in one vocabulary.

``Desired`` is a set of statements ("this chain holds these rules", "this address is up", "this route is
not there"); whatever it does not mention is somebody else's and is left alone. ``Actual`` is one reading
of the kernel. ``Plan`` is what makes the second satisfy the first, in an order that never opens a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rules.nft import NftCommand, NftTable
from rules.ruleset import ChainEdit, ChainRef, Rule, Rules, Ruleset
from rules.tc import Objects, Statements, TcStep

# Marks by which our own objects are known after a restart without memory.
ROUTE_PROTOCOL = 223  # rtm_protocol; unassigned in iproute2's rt_protos
ADDRESS_PROTOCOL = 223  # IFA_PROTO, kernels >= 5.18
ADDRESS_LABEL_SUFFIX = ":eip"  # IFA_LABEL, every kernel, where the interface name leaves room

# Routing tables by number: the main one, and the one that decides for what an lb-svc pod forwards.
MAIN_TABLE = 254
BALANCER_TABLE = 100


class AddressKey(NamedTuple):
    """An address on an interface: ``("net1", "192.168.0.10/24")``."""

    interface: str
    address: str


class RouteKey(NamedTuple):
    """A route by prefix and table, ``("10.0.2.0/24", 254)``; ``0.0.0.0/0`` and ``::/0`` are the defaults."""

    prefix: str
    table: int = MAIN_TABLE


class PolicyRule(NamedTuple):
    """What came in by an interface is routed by a table (``iif net1 lookup 100``), at whatever priority."""

    interface: str
    table: int


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """Where a route leads. ``protocol`` is the rtm_protocol number that says who made it."""

    interface: str
    via: str | None
    onlink: bool = False
    protocol: int = ROUTE_PROTOCOL


@dataclass(frozen=True)
class Desired:
    """Statements about the kernel. None as a value means: is not there; for ``nft``: nothing is said."""

    chains: Mapping[ChainRef, Rules | None] = field(default_factory=dict)
    hooks: Mapping[tuple[ChainRef, Rule], bool] = field(default_factory=dict)
    addresses: Mapping[AddressKey, bool] = field(default_factory=dict)
    routes: Mapping[RouteKey, RouteEntry | None] = field(default_factory=dict)
    arp: Mapping[str, bool] = field(default_factory=dict)
    promote_secondaries: Mapping[str, bool] = field(default_factory=dict)
    nft: NftTable | None = None
    up: Mapping[str, bool] = field(default_factory=dict)
    policy_rules: Mapping[PolicyRule, bool] = field(default_factory=dict)
    tc: Statements = field(default_factory=dict)


@dataclass(frozen=True)
class LinkState:
    """One interface as the kernel describes it. ``arp`` is False while IFF_NOARP is set."""

    index: int
    mac: str
    up: bool
    arp: bool
    mtu: int
    promote_secondaries: bool


@dataclass(frozen=True)
class Actual:
    """One reading of the kernel.

    Links by name, addresses (True: ours), routes, netfilter chains, the table of share-type DNAT, and the rules that
    choose a routing table by the interface.
    """

    ruleset: Ruleset = field(default_factory=Ruleset)
    links: Mapping[str, LinkState] = field(default_factory=dict)
    addresses: Mapping[AddressKey, bool] = field(default_factory=dict)
    routes: Mapping[RouteKey, RouteEntry] = field(default_factory=dict)
    nft: NftTable = field(default_factory=NftTable)
    policy_rules: frozenset[PolicyRule] = frozenset()
    tc: Objects = field(default_factory=dict)


# Steps of a plan.


@dataclass(frozen=True, slots=True)
class EditTable:
    """Edits of one netfilter table, committed as one."""

    table: str
    edits: tuple[ChainEdit, ...]


@dataclass(frozen=True, slots=True)
class EditNft:
    """Commands for the table of share-type DNAT, committed as one."""

    commands: tuple[NftCommand, ...]


@dataclass(frozen=True, slots=True)
class AddAddress:
    key: AddressKey


@dataclass(frozen=True, slots=True)
class DeleteAddress:
    key: AddressKey


@dataclass(frozen=True, slots=True)
class ReplaceRoute:
    key: RouteKey
    entry: RouteEntry


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    key: RouteKey
    entry: RouteEntry


@dataclass(frozen=True, slots=True)
class SetArp:
    """Switch ARP on an interface; doing so empties the interface's neighbour table."""

    interface: str
    on: bool


@dataclass(frozen=True, slots=True)
class SetPromoteSecondaries:
    """Let a secondary address take the place of a deleted primary instead of vanishing with it."""

    interface: str
    on: bool


@dataclass(frozen=True, slots=True)
class SetUp:
    """Bring an interface up or down; going down takes its routes along."""

    interface: str
    on: bool


@dataclass(frozen=True, slots=True)
class AddPolicyRule:
    key: PolicyRule


@dataclass(frozen=True, slots=True)
class DeletePolicyRule:
    key: PolicyRule


RoutingStep = ReplaceRoute | DeleteRoute | AddPolicyRule | DeletePolicyRule
Switch = SetArp | SetPromoteSecondaries | SetUp
LinkStep = AddAddress | DeleteAddress | RoutingStep | Switch
Step = EditTable | EditNft | LinkStep | TcStep


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they must happen; empty when the kernel is as wanted."""

    steps: tuple[Step, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)
