"""An in-memory kernel that rejects what the real one rejects; shipped, for tests and dry thinking.

It keeps the semantics that have bitten: deleting a primary address takes its secondaries along unless
promote_secondaries is set, a next hop must be on-link, switching ARP empties the neighbour table, and a
table edit is all or nothing. ``faults`` injects failures between any two kernel steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network

from gateway.ports import Hop, LinksReading, MapsReading, Moved, Refused, Remembering, Variant
from gateway.watch import Domain, Evidence
from rules.apply import Rejected, apply_commands, apply_device_step, apply_edits, apply_map_edits, switched
from rules.entries import Entries
from rules.flows import Flow, FlowFilter
from rules.maps import MapEdit, MapTable, only_entries
from rules.nft import NftCommand, NftTable
from rules.ruleset import BUILTIN, FAMILIES, ChainEdit, ChainRef, Family, Rules, Ruleset
from rules.state import (
    MAIN_TABLE,
    USUAL_PRIORITY,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    Device,
    DeviceStep,
    LinkState,
    LinkStep,
    PolicyRule,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
    Vrf,
)
from rules.tc import IfbKey, Key, Objects, TcStep, Value, apply_tc
from rules.tc_text import tc_text

Fault = Callable[[str], None]


@dataclass
class FakeKernel:
    """One namespace. ``faults`` is called with a description before each step and may raise."""

    links: dict[str, LinkState] = field(default_factory=dict)
    addresses: dict[AddressKey, bool] = field(default_factory=dict)
    routes: dict[RouteKey, RouteEntry] = field(default_factory=dict)
    chains: dict[ChainRef, Rules] = field(default_factory=dict)
    policy_rules: set[PolicyRule] = field(default_factory=set)
    sysctls: dict[str, int] = field(default_factory=dict)
    lacks: frozenset[type[Device]] = frozenset()
    """Kinds of devices that this kernel was built without."""
    conntrack: list[Flow] = field(default_factory=list)
    nft: NftTable = field(default_factory=NftTable)
    maps: MapTable = field(default_factory=MapTable)
    no_maps: str = "this kernel was made without"
    """Why it can have no maps ahead of the chains; empty: it can."""
    tc: Objects = field(default_factory=dict)
    at_once: bool = False
    """Whether one transaction can be about chains and maps, as in the nft variant of iptables."""
    faults: Fault | None = None
    unreadable: bool = False
    """Reading the chains is refused."""
    writes: int = 0

    def __post_init__(self) -> None:
        for table, names in BUILTIN.items():
            for name in names:
                for family in FAMILIES:
                    self.chains.setdefault(ChainRef(table, name, family), ())

    @classmethod
    def gateway_pod(cls, vpc: str = "eth0", external: str = "net1") -> FakeKernel:
        """A namespace as Kube-OVN's CNI leaves it: both interfaces up, addressed, default by the external one."""
        kernel = cls()
        for index, (name, address) in enumerate(((vpc, "10.0.1.254/24"), (external, "192.168.0.11/24")), start=2):
            kernel.links[name] = LinkState(index, f"02:00:00:00:00:{index:02x}", True, True, 1400, False)
            kernel.addresses[AddressKey(name, address)] = False
            kernel.sysctls[f"net/ipv4/conf/{name}/rp_filter"] = 1
        kernel.sysctls |= {"net/ipv4/ip_forward": 0, "net/ipv6/conf/all/forwarding": 0}
        kernel.routes[RouteKey("0.0.0.0/0")] = RouteEntry(external, "192.168.0.1", protocol=3)
        return kernel

    def step(self, what: str) -> None:
        """Count a kernel write and let a fault happen before it."""
        if self.faults:
            self.faults(what)
        self.writes += 1


@dataclass
class FakeFirewall:
    """``Firewall`` over a FakeKernel."""

    kernel: FakeKernel
    variant: Variant = "legacy"
    family: Family = 4

    def read(self, tables: Collection[str]) -> Ruleset:
        if self.kernel.unreadable:
            raise Refused("read the chains", "Operation not permitted", retryable=False)
        chains = self.kernel.chains.items()
        return Ruleset({ref: rules for ref, rules in chains if ref.table in tables and ref.family == self.family})

    def evidence(self, table: str) -> Hashable | None:
        """The table itself; see ``gateway.remembered``."""
        return tuple(self.read([table]).chains.items())

    def edit_if(
        self, table: str, standing: Mapping[ChainRef, Rules], edits: Sequence[ChainEdit], evidence: Hashable
    ) -> Hashable | None:
        """``edit``, if the evidence holds when it comes to it."""
        self.kernel.step(f"edit table {table}")
        if (evidence is not None and self.evidence(table) != evidence) or standing != self.read([table]).chains:
            raise Moved(table)
        self._edit(table, edits)
        return self.evidence(table)

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        self.kernel.step(f"edit table {table}")
        self._edit(table, edits)

    def _edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        try:
            self.kernel.chains = apply_edits(table, self.kernel.chains, edits, self.family)
        except Rejected as error:
            raise Refused(f"edit table {table}", str(error), retryable=False) from error


@dataclass
class FakeLinks:
    """``Links`` over a FakeKernel."""

    kernel: FakeKernel

    def read(self) -> LinksReading:
        kernel = self.kernel
        rules = frozenset(kernel.policy_rules)
        links, addresses, routes = dict(kernel.links), dict(kernel.addresses), dict(kernel.routes)
        return LinksReading(links, addresses, routes, rules, dict(kernel.sysctls))

    def lookup(self, destination: str, within: str | None = None) -> Hop:
        """By the longest prefix among the subnets of the addresses and the routes of the main table.

        ``within`` a virtual router, or out of its port: among the subnets of its ports, and the routes of its table.
        """
        ip = ip_address(destination)
        step = f"route get {destination}"
        vrf = self._vrf_of(within) if within else None
        found: list[tuple[int, Hop]] = []
        for interface, address in self.kernel.addresses:
            own = ip_interface(address)
            if own.ip == ip:
                raise Refused(step, "not an address of another host", retryable=True)
            if ip in own.network and self.kernel.links[interface].master == vrf:
                found.append((own.network.prefixlen, Hop(interface, str(own.ip), None)))
        device = self.kernel.links[vrf].device if vrf else None
        table = device.table if isinstance(device, Vrf) else MAIN_TABLE
        for key, entry in self.kernel.routes.items():
            if key.table == table and ip in ip_network(key.prefix):
                own_ip = self._address_of(entry.interface, ip.version)
                found.append((ip_network(key.prefix).prefixlen, Hop(entry.interface, own_ip, entry.via)))
        if not found:
            raise Refused(step, "Network is unreachable", retryable=True)
        return max(found, key=lambda hop: hop[0])[1]

    def _vrf_of(self, interface: str) -> str | None:
        link = self.kernel.links[interface]
        return interface if isinstance(link.device, Vrf) else link.master

    def _address_of(self, interface: str, version: int) -> str | None:
        own = (ip_interface(key.address).ip for key in self.kernel.addresses if key.interface == interface)
        return next((str(ip) for ip in own if ip.version == version), None)

    def commit(self, steps: Sequence[LinkStep]) -> None:
        for step in steps:
            self.kernel.step(str(step))
            self._apply(step)

    def _apply(self, step: LinkStep) -> None:
        match step:
            case AddAddress(key):
                self._link(key.interface, step)
                self.kernel.addresses.setdefault(key, True)
            case DeleteAddress(key):
                self._delete_address(key)
            case ReplaceRoute(key, entry):
                if not self._link(entry.interface, step).up:
                    raise Refused(str(step), "Network is down", retryable=True)
                self._reachable(entry, step)
                self.kernel.routes[key] = entry
            case DeleteRoute(key, _):
                self.kernel.routes.pop(key, None)
            case AddPolicyRule(rule):
                priority = USUAL_PRIORITY if rule.priority is None else rule.priority
                self.kernel.policy_rules.add(rule._replace(priority=priority))
            case DeletePolicyRule(rule):
                self.kernel.policy_rules = {other for other in self.kernel.policy_rules if not rule.matches(other)}
            case AddDevice() | DeleteDevice() | SetMaster():
                self._change_device(step)
            case SetSysctl(name, value):
                if name not in self.kernel.sysctls:
                    raise Refused(str(step), "No such file or directory", retryable=False)
                self.kernel.sysctls[name] = value
            case SetArp(interface) | SetPromoteSecondaries(interface) | SetUp(interface):
                self.kernel.links[interface] = switched(self._link(interface, step), step)
                if step == SetUp(interface, False):
                    routes = self.kernel.routes.items()
                    self.kernel.routes = {key: entry for key, entry in routes if entry.interface != interface}

    def _change_device(self, step: DeviceStep) -> None:
        if isinstance(step, AddDevice) and type(step.device) in self.kernel.lacks:
            raise Refused(str(step), f"this kernel has no {type(step.device).__name__} devices", retryable=False)
        try:
            self.kernel.links = apply_device_step(self.kernel.links, step)
        except Rejected as error:
            raise Refused(str(step), str(error), retryable=True) from error
        # A port of a virtual router is switched off and on, and its routes go; those of a deleted device do too.
        routes = self.kernel.routes.items()
        self.kernel.routes = {key: entry for key, entry in routes if entry.interface != step.interface}

    def _link(self, name: str, step: LinkStep) -> LinkState:
        if name not in self.kernel.links:
            raise Refused(str(step), f"no such interface {name}", retryable=True)
        return self.kernel.links[name]

    def _delete_address(self, key: AddressKey) -> None:
        if key not in self.kernel.addresses:
            return
        network = ip_interface(key.address).network
        mine = [other for other in self.kernel.addresses if other.interface == key.interface]
        same = [other for other in mine if ip_interface(other.address).network == network]
        takes_all = same[0] == key and not self.kernel.links[key.interface].promote_secondaries
        for gone in same if takes_all else [key]:
            del self.kernel.addresses[gone]

    def _reachable(self, entry: RouteEntry, step: LinkStep) -> None:
        if entry.via is None or entry.onlink:
            return
        on_link = (ip_interface(k.address).network for k in self.kernel.addresses if k.interface == entry.interface)
        via = ip_address(entry.via)
        if not any(via in ip_network(network) for network in on_link):
            raise Refused(str(step), "Network is unreachable", retryable=True)


@dataclass
class FakeNft:
    """``Nft`` over a FakeKernel."""

    kernel: FakeKernel

    def read(self) -> NftTable:
        return self.kernel.nft

    def commit(self, commands: Sequence[NftCommand]) -> None:
        step = "edit table ip kube-ovn"
        self.kernel.step(step)
        try:
            self.kernel.nft = apply_commands(self.kernel.nft, commands)
        except Rejected as error:
            raise Refused(step, str(error), retryable=False) from error


@dataclass
class FakeMaps:
    """``Maps`` over a FakeKernel."""

    kernel: FakeKernel

    def read(self) -> MapsReading:
        return MapsReading(self.kernel.maps, self.kernel.no_maps)

    def share(self, table: MapTable) -> None:
        if self.kernel.maps == table:
            self.kernel.maps = table

    def commit(self, edits: Sequence[MapEdit]) -> None:
        step = "edit table ip natgw"
        self.kernel.step(step)
        try:
            self.kernel.maps = apply_map_edits(self.kernel.maps, edits)
        except Rejected as error:
            raise Refused(step, str(error), retryable=False) from error


@dataclass
class FakeJoint:
    """``Joint`` over a FakeKernel, for rules and entries."""

    kernel: FakeKernel
    remembered: Remembering

    def commit(self, table: str, chains: Sequence[ChainEdit], maps: Sequence[MapEdit]) -> bool:
        if not only_entries(maps):
            return False

        def both(standing: Mapping[ChainRef, Rules], evidence: Hashable) -> bool:
            step = f"edit tables {table} and natgw"
            self.kernel.step(step)
            if FakeFirewall(self.kernel).evidence(table) != evidence:
                raise Moved(table)
            try:
                made = apply_edits(table, self.kernel.chains, chains), apply_map_edits(self.kernel.maps, maps)
            except Rejected as error:
                raise Refused(step, str(error), retryable=False) from error
            self.kernel.chains, self.kernel.maps = made
            return True

        return self.remembered.edit_by(table, chains, both)


@dataclass
class FakeShaper:
    """``Shaper`` over a FakeKernel."""

    kernel: FakeKernel
    _read: Entries[Key, Value] = field(default_factory=Entries)

    def read(self) -> Objects:
        """A reading shares with the one before what is the same, as the real kernel's does."""
        found = Entries(self.kernel.tc)
        self._read = self._read.changed({key: now for key, _, now in self._read.differences(found)})
        return self._read

    def commit(self, steps: Sequence[TcStep]) -> None:
        for step in steps:
            self.kernel.step(tc_text(step))
            devices = {*self.kernel.links, *(key.device for key in self.kernel.tc if isinstance(key, IfbKey))}
            if step.key.device not in devices and not isinstance(step.key, IfbKey):
                raise Refused(tc_text(step), "No such device", retryable=True)
            try:
                self.kernel.tc = apply_tc(self.kernel.tc, step)
            except ValueError as error:
                raise Refused(tc_text(step), str(error), retryable=False) from error


@dataclass
class FakeFlows:
    """``Flows`` over a FakeKernel."""

    kernel: FakeKernel

    def matching(self, filters: Iterable[FlowFilter]) -> Iterable[Flow]:
        wanted = tuple(filters)
        return [flow for flow in self.kernel.conntrack if any(f.matches(flow) for f in wanted)]

    def end(self, filters: Iterable[FlowFilter], stale: Callable[[Flow], bool]) -> Iterator[int]:
        for flow in self.matching(filters):
            if stale(flow) and flow in self.kernel.conntrack:
                self.kernel.step("delete a tracked connection")
                self.kernel.conntrack.remove(flow)
                yield 1


def evidence(kernel: FakeKernel) -> Mapping[Domain, Evidence]:
    """What tells of a write to the kernel, whoever wrote: everything that it holds."""
    return {
        "chains": lambda: tuple(kernel.chains.items()),
        "links": lambda: tuple(tuple(held.items()) for held in (kernel.links, kernel.addresses, kernel.routes)),
        "maps": lambda: kernel.maps,
        "nft": lambda: kernel.nft,
        "tc": lambda: tuple(kernel.tc.items()),
    }
