"""An in-memory kernel that rejects what the real one rejects; shipped, for tests and dry thinking.

It keeps the semantics that have bitten: deleting a primary address takes its secondaries along unless
promote_secondaries is set, a next hop must be on-link, switching ARP empties the neighbour table, and a
table edit is all or nothing. ``faults`` injects failures between any two kernel steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network

from gateway.ports import LinksReading, Refused, Variant
from rules.apply import Rejected, apply_commands, apply_edits, switched
from rules.flows import Flow, FlowFilter
from rules.nft import NftCommand, NftTable
from rules.ruleset import BUILTIN, ChainEdit, ChainRef, Rules, Ruleset
from rules.state import (
    AddAddress,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeletePolicyRule,
    DeleteRoute,
    LinkState,
    LinkStep,
    PolicyRule,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetPromoteSecondaries,
    SetUp,
)
from rules.tc import IfbKey, Objects, TcStep, apply_tc, tc_text

Fault = Callable[[str], None]


@dataclass
class FakeKernel:
    """One namespace. ``faults`` is called with a description before each step and may raise."""

    links: dict[str, LinkState] = field(default_factory=dict)
    addresses: dict[AddressKey, bool] = field(default_factory=dict)
    routes: dict[RouteKey, RouteEntry] = field(default_factory=dict)
    chains: dict[ChainRef, Rules] = field(default_factory=dict)
    policy_rules: set[PolicyRule] = field(default_factory=set)
    conntrack: list[Flow] = field(default_factory=list)
    nft: NftTable = field(default_factory=NftTable)
    tc: Objects = field(default_factory=dict)
    faults: Fault | None = None
    writes: int = 0

    def __post_init__(self) -> None:
        for table, names in BUILTIN.items():
            for name in names:
                self.chains.setdefault(ChainRef(table, name), ())

    @classmethod
    def gateway_pod(cls, vpc: str = "eth0", external: str = "net1") -> FakeKernel:
        """A namespace as Kube-OVN's CNI leaves it: both interfaces up, addressed, default by the external one."""
        kernel = cls()
        for index, (name, address) in enumerate(((vpc, "10.0.1.254/24"), (external, "192.168.0.11/24")), start=2):
            kernel.links[name] = LinkState(index, f"02:00:00:00:00:{index:02x}", True, True, 1400, False)
            kernel.addresses[AddressKey(name, address)] = False
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

    def read(self, tables: Collection[str]) -> Ruleset:
        return Ruleset({ref: rules for ref, rules in self.kernel.chains.items() if ref.table in tables})

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        step = f"edit table {table}"
        self.kernel.step(step)
        try:
            self.kernel.chains = apply_edits(table, self.kernel.chains, edits)
        except Rejected as error:
            raise Refused(step, str(error), retryable=False) from error


@dataclass
class FakeLinks:
    """``Links`` over a FakeKernel."""

    kernel: FakeKernel

    def read(self) -> LinksReading:
        kernel = self.kernel
        rules = frozenset(kernel.policy_rules)
        return LinksReading(dict(kernel.links), dict(kernel.addresses), dict(kernel.routes), rules)

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
                self._link(rule.interface, step)
                self.kernel.policy_rules.add(rule)
            case DeletePolicyRule(rule):
                self.kernel.policy_rules.discard(rule)
            case SetArp(interface) | SetPromoteSecondaries(interface) | SetUp(interface):
                self.kernel.links[interface] = switched(self._link(interface, step), step)
                if step == SetUp(interface, False):
                    routes = self.kernel.routes.items()
                    self.kernel.routes = {key: entry for key, entry in routes if entry.interface != interface}

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
class FakeShaper:
    """``Shaper`` over a FakeKernel."""

    kernel: FakeKernel

    def read(self) -> Objects:
        return dict(self.kernel.tc)

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

    def delete(self, flows: Iterable[Flow]) -> int:
        gone = [flow for flow in dict.fromkeys(flows) if flow in self.kernel.conntrack]
        for flow in gone:
            self.kernel.step("delete a tracked connection")
            self.kernel.conntrack.remove(flow)
        return len(gone)
