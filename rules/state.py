"""What is wanted of the kernel and what it says it has, in one vocabulary.

``Desired`` is a set of statements ("this chain holds these rules", "this address is up", "this route is
not there"); whatever it does not mention is somebody else's and is left alone. ``Actual`` is one reading
of the kernel. ``Plan`` is what makes the second satisfy the first, in an order that never opens a gap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rules.maps import MapEdit, MapTable
from rules.nft import NftCommand, NftTable
from rules.ruleset import ChainEdit, ChainRef, Family, Rule, Rules, Ruleset
from rules.tc import Objects, Statements, TcStep

# Marks by which our own objects are known after a restart without memory.
ROUTE_PROTOCOL = 223  # rtm_protocol; unassigned in iproute2's rt_protos
ADDRESS_PROTOCOL = 223  # IFA_PROTO, kernels >= 5.18
ADDRESS_LABEL_SUFFIX = ":eip"  # IFA_LABEL, every kernel, where the interface name leaves room

# Routing tables by number: the main one, the one that is asked last (and is empty unless somebody uses it), and the
# one that decides for what an lb-svc pod forwards.
MAIN_TABLE = 254
DEFAULT_TABLE = 253
BALANCER_TABLE = 100
USUAL_PRIORITY = 32764  # of a rule that names none: ahead of the main table's rule


class AddressKey(NamedTuple):
    """An address on an interface: ``("net1", "192.168.0.10/24")``."""

    interface: str
    address: str


class RouteKey(NamedTuple):
    """A route by prefix and table, ``("10.0.2.0/24", 254)``; ``0.0.0.0/0`` and ``::/0`` are the defaults."""

    prefix: str
    table: int = MAIN_TABLE


class PolicyRule(NamedTuple):
    """A rule of the routing policy: which packets are routed by which table (``iif net1 lookup 100``).

    ``interface`` is the one that a packet came in by (``lo``: it is our own). As a statement, a rule without a
    priority holds at whatever priority. A rule of the kernel that says more than these fields can keeps its whole
    message in ``foreign``, in hexadecimal: enough to delete it and to put it back.
    """

    interface: str | None
    table: int
    priority: int | None = None
    source: str | None = None
    family: Family = 4
    foreign: str = ""

    def is_in(self, rules: Collection[PolicyRule]) -> bool:
        """Whether the statement holds where these rules stand."""
        return self in rules or (self.priority is None and any(map(self.matches, rules)))

    def matches(self, other: PolicyRule) -> bool:
        """Whether the kernel would delete the other one if it were asked to delete this one."""
        return self == (other if self.priority is not None else other._replace(priority=None))


@dataclass(frozen=True, slots=True)
class Vrf:
    """A virtual router: what its ports receive is looked up in ``table``."""

    table: int


@dataclass(frozen=True, slots=True)
class Bridge:
    """A switch in software."""


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A tunnel for Ethernet frames over UDP (RFC 7348), sent from the address ``local``."""

    vni: int
    local: str
    port: int = 4789


Device = Vrf | Bridge | Vxlan


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """Where a route leads. ``protocol`` is the rtm_protocol number that says who made it."""

    interface: str
    via: str | None
    onlink: bool = False
    protocol: int = ROUTE_PROTOCOL


@dataclass(frozen=True)
class Desired:
    """Statements about the kernel. None as a value means: is not there; for ``nft`` and ``maps``: nothing is said.

    ``hooks`` are rules of built-in chains, wherever they stand; ``heads`` say what such a chain begins with.
    ``sysctls`` go by their paths below /proc/sys; ``masters`` say which device an interface is a port of.
    Chains in ``later`` are only not spoken of yet, for maps decide ahead of them.
    """

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
    heads: Mapping[ChainRef, Rules] = field(default_factory=dict)
    sysctls: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, Device | None] = field(default_factory=dict)
    masters: Mapping[str, str | None] = field(default_factory=dict)
    maps: MapTable | None = None
    later: frozenset[ChainRef] = frozenset()


@dataclass(frozen=True)
class LinkState:
    """One interface as the kernel describes it.

    ``arp`` is False while IFF_NOARP is set; ``device`` is what it is, where that is one of the kinds that we make.
    """

    index: int
    mac: str
    up: bool
    arp: bool
    mtu: int
    promote_secondaries: bool
    master: str | None = None
    device: Device | None = None


@dataclass(frozen=True)
class Actual:
    """One reading of the kernel.

    Links by name, addresses (True: ours), routes, netfilter chains, the table of share-type DNAT, and the rules that
    choose a routing table by the interface. ``no_maps`` says why no maps can stand ahead of the chains; it is empty
    where they can.
    """

    ruleset: Ruleset = field(default_factory=Ruleset)
    links: Mapping[str, LinkState] = field(default_factory=dict)
    addresses: Mapping[AddressKey, bool] = field(default_factory=dict)
    routes: Mapping[RouteKey, RouteEntry] = field(default_factory=dict)
    nft: NftTable = field(default_factory=NftTable)
    policy_rules: frozenset[PolicyRule] = frozenset()
    tc: Objects = field(default_factory=dict)
    sysctls: Mapping[str, int] = field(default_factory=dict)
    maps: MapTable = field(default_factory=MapTable)
    no_maps: str = "not looked for"


# Steps of a plan.


@dataclass(frozen=True, slots=True)
class EditTable:
    """Edits of one netfilter table, committed as one."""

    table: str
    edits: tuple[ChainEdit, ...]
    family: Family = 4


@dataclass(frozen=True, slots=True)
class EditNft:
    """Commands for the table of share-type DNAT, committed as one."""

    commands: tuple[NftCommand, ...]


@dataclass(frozen=True, slots=True)
class EditMaps:
    """Edits of the table of maps, committed as one."""

    edits: tuple[MapEdit, ...]


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


@dataclass(frozen=True, slots=True)
class SetSysctl:
    """Write a setting; ``name`` is its path below /proc/sys."""

    name: str
    value: int


@dataclass(frozen=True, slots=True)
class AddDevice:
    """Make an interface."""

    interface: str
    device: Device


@dataclass(frozen=True, slots=True)
class DeleteDevice:
    interface: str


@dataclass(frozen=True, slots=True)
class SetMaster:
    """Make an interface a port of another one (None: of none); routes through it may go with that."""

    interface: str
    master: str | None


RoutingStep = ReplaceRoute | DeleteRoute | AddPolicyRule | DeletePolicyRule
Switch = SetArp | SetPromoteSecondaries | SetUp
DeviceStep = AddDevice | DeleteDevice | SetMaster
LinkStep = AddAddress | DeleteAddress | RoutingStep | Switch | DeviceStep | SetSysctl
Step = EditTable | EditNft | EditMaps | LinkStep | TcStep


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they must happen; empty when the kernel is as wanted."""

    steps: tuple[Step, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)
