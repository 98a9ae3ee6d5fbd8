"""The lb-svc appliance: one Service's address on the external interface, its ports led to the Service's cluster IP.

Kube-OVN runs such a pod for a Service of type LoadBalancer. A packet for the address comes in by the external
interface and is translated to cluster IP and target port; table 100, which decides for what is forwarded, sends it to
the pod network's gateway, where the cluster IP is balanced over the Service's endpoints. It leaves as the pod itself
(MASQUERADE), so the answer comes back, and table 100 leads it out to the client.

The rules stand in the built-in chains, one by one, and bear no mark. The pod serves one Service and nothing else, so
every rule of exactly these shapes is taken for ours: a translation of one address's port in PREROUTING, and
MASQUERADE for one address in POSTROUTING. A MASQUERADE that no port needs any more goes with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from ipaddress import ip_interface
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from rules.desired import Facts
from rules.fields import IPv4, IPv4WithPrefix, Port
from rules.flows import IP_PROTOCOLS, Flow, FlowFilter
from rules.keyed import Keyed
from rules.ruleset import (
    ChainRef,
    Destination,
    DestinationPort,
    Dnat,
    Drop,
    Masquerade,
    OutInterface,
    Rule,
)
from rules.spec import Interfaces, Part
from rules.state import (
    BALANCER_TABLE,
    ROUTE_PROTOCOL,
    Actual,
    AddressKey,
    Desired,
    PolicyRule,
    RouteEntry,
    RouteKey,
)

PREROUTING = ChainRef("nat", "PREROUTING")
POSTROUTING = ChainRef("nat", "POSTROUTING")
FORWARD = ChainRef("mangle", "FORWARD")

_NUMBERS = IP_PROTOCOLS | {"sctp": 132}
_DEFAULT = RouteKey("0.0.0.0/0", BALANCER_TABLE)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


BalancedProtocol = Annotated[Literal["tcp", "udp", "sctp"], BeforeValidator(_lower)]


class BalancerEip(Part):
    """The Service's address, and the gateway by which its clients are reached."""

    address: IPv4WithPrefix = Field(examples=["192.168.0.30/24"])
    gateway: IPv4 = Field(examples=["192.168.0.1"])

    @property
    def ip(self) -> str:
        """The address without its prefix length."""
        return self.address.partition("/")[0]

    @property
    def network(self) -> str:
        """The external subnet."""
        return str(ip_interface(self.address).network)


class BalancerDnat(Part):
    """A port of the Service: where its packets go, and the pod network's gateway that leads there."""

    eip: IPv4 = Field(examples=["192.168.0.30"])
    port: Port = Field(examples=[80])
    protocol: BalancedProtocol = Field(examples=["tcp"])
    cluster_ip: IPv4 = Field(alias="clusterIP", examples=["10.96.0.20"])
    target_port: Port = Field(examples=[8080])
    gateway: IPv4 = Field(examples=["10.16.0.1"])

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.eip, self.port, self.protocol)

    @property
    def target(self) -> tuple[str, int]:
        """Where packets go."""
        return (self.cluster_ip, self.target_port)

    @property
    def rule(self) -> Rule:
        """The rule that sends them there."""
        matches = (Destination(f"{self.eip}/32"), DestinationPort(self.protocol, self.port))
        return Rule(matches, Dnat(self.cluster_ip, self.target_port))


class BalancerDnatDel(Part):
    """Forget a port if it leads just there; one that has another target by now stays."""

    eip: IPv4
    port: Port
    protocol: BalancedProtocol
    cluster_ip: IPv4 = Field(alias="clusterIP")
    target_port: Port


class LoadBalancerSpec(Part):
    """The whole desired state of one lb-svc pod."""

    interfaces: Interfaces = Interfaces()
    eip: BalancerEip | None = None
    dnats: Keyed[BalancerDnat] = Field(default_factory=Keyed)

    @property
    def eips(self) -> tuple[BalancerEip, ...]:
        """The address, if it is known yet."""
        return (self.eip,) if self.eip else ()

    @property
    def initialized(self) -> bool:
        """Always: nothing can be asked of a load balancer before it is one."""
        return True


BalancerCommand = BalancerEip | BalancerDnat | BalancerDnatDel


def edit(spec: LoadBalancerSpec | None, commands: Iterable[BalancerCommand]) -> LoadBalancerSpec:
    """The spec after the commands; without any, the initialised one. The newest word on an address or a port holds."""
    return reduce(_changed, commands, spec or LoadBalancerSpec())


def _changed(spec: LoadBalancerSpec, command: BalancerCommand) -> LoadBalancerSpec:
    match command:
        case BalancerEip():
            return spec.model_copy(update={"eip": command})
        case BalancerDnat():
            return spec.model_copy(update={"dnats": spec.dnats.put(command)})
        case BalancerDnatDel():
            standing = spec.dnats.get((command.eip, command.port, command.protocol))
            if standing is None or standing.target != (command.cluster_ip, command.target_port):
                return spec
            return spec.model_copy(update={"dnats": spec.dnats.drop(standing.key)})


# --- what it means for the kernel -----------------------------------------------------------------------------


def desired(spec: LoadBalancerSpec, facts: Facts, actual: Actual) -> Desired:
    """What the kernel shall look like; of ``actual`` only what bears our mark or has our rules' shape is used."""
    vpc, external = spec.interfaces.vpc, spec.interfaces.external
    arp_on = facts.arp == "on" or spec.eip is not None
    guard = Rule((OutInterface(external),), Drop())  # see rules.nat: what is forwarded while ARP is off circles
    return Desired(
        hooks=_hooks(spec, actual) | {(FORWARD, guard): not arp_on},
        addresses=_addresses(spec, facts, actual),
        routes=_routes(spec, actual),
        arp={} if facts.arp == "on" else {external: arp_on},
        up={external: True},
        policy_rules={PolicyRule(name, BALANCER_TABLE): True for name in (external, vpc)},
    )


def _hooks(spec: LoadBalancerSpec, actual: Actual) -> dict[tuple[ChainRef, Rule], bool]:
    leftovers = [(PREROUTING, rule) for rule in _translations(actual)]
    leftovers += [(POSTROUTING, rule) for rule in _rules(actual, POSTROUTING) if _masquerades(rule)]
    wanted = [(PREROUTING, dnat.rule) for dnat in spec.dnats]
    wanted += [(POSTROUTING, Rule((Destination(f"{ip}/32"),), Masquerade())) for ip in _cluster_ips(spec)]
    return dict.fromkeys(leftovers, False) | dict.fromkeys(wanted, True)


def _cluster_ips(spec: LoadBalancerSpec) -> dict[str, str]:
    """The cluster IPs that ports lead to, with the gateway to each."""
    return {dnat.cluster_ip: dnat.gateway for dnat in spec.dnats}


def _rules(actual: Actual, ref: ChainRef) -> Iterator[Rule]:
    return (rule for rule in actual.ruleset.chains.get(ref, ()) if isinstance(rule, Rule))


def _translations(actual: Actual) -> Iterator[Rule]:
    for rule in _rules(actual, PREROUTING):
        match rule:
            case Rule((Destination(eip), DestinationPort()), Dnat(_, int())) if eip.endswith("/32"):
                yield rule


def _masquerades(rule: Rule) -> bool:
    match rule:
        case Rule((Destination(address),), Masquerade()):
            return address.endswith("/32")
    return False


def _addresses(spec: LoadBalancerSpec, facts: Facts, actual: Actual) -> dict[AddressKey, bool]:
    wanted = {AddressKey(spec.interfaces.external, eip.address): True for eip in spec.eips}
    mine = (key for key, ours in actual.addresses.items() if ours or key in facts.claimed)
    return dict.fromkeys(mine, False) | wanted


def _routes(spec: LoadBalancerSpec, actual: Actual) -> dict[RouteKey, RouteEntry | None]:
    vpc, external = spec.interfaces.vpc, spec.interfaces.external
    wanted: dict[RouteKey, RouteEntry | None] = {}
    for eip in spec.eips:
        wanted[RouteKey(eip.network, BALANCER_TABLE)] = RouteEntry(external, None)
        wanted[_DEFAULT] = RouteEntry(external, eip.gateway)
    for cluster_ip, gateway in _cluster_ips(spec).items():
        wanted[RouteKey(f"{cluster_ip}/32", BALANCER_TABLE)] = RouteEntry(vpc, gateway)
    leftovers: dict[RouteKey, RouteEntry | None] = {
        key: None for key, entry in actual.routes.items() if entry.protocol == ROUTE_PROTOCOL and key not in wanted
    }
    return wanted | leftovers


# --- connections ----------------------------------------------------------------------------------------------


def suspects(old: LoadBalancerSpec, new: LoadBalancerSpec) -> tuple[FlowFilter, ...]:
    """Where to look for stale entries after a change from ``old`` to ``new``: only at ports that changed."""
    changed = {dnat.key for dnat in {*old.dnats} ^ {*new.dnats}}
    return tuple(
        FlowFilter(orig_dst=eip, protocol=_NUMBERS[name], orig_dport=port) for eip, port, name in sorted(changed)
    )


def is_stale(flow: Flow, old: LoadBalancerSpec, new: LoadBalancerSpec) -> bool:
    """Whether the entry lost the port that translated it, or came before its port was there."""
    before, now = _target(flow, old), _target(flow, new)
    if flow.destination_translated:
        return before == (flow.reply_src, flow.reply_sport) and before != now
    return before is None and now is not None


def _target(flow: Flow, spec: LoadBalancerSpec) -> tuple[str, int] | None:
    names = (name for name, number in _NUMBERS.items() if number == flow.protocol)
    dnat = spec.dnats.get((flow.orig_dst, flow.orig_dport, next(names, "")))
    return dnat.target if dnat else None


# --- read back from the kernel ----------------------------------------------------------------------------------


def adopt(actual: Actual) -> LoadBalancerSpec | None:
    """The spec that the kernel carries out, or None where it is no load balancer's (no rules lead to table 100)."""
    sides = Interfaces()
    rules = (PolicyRule(name, BALANCER_TABLE) for name in (sides.vpc, sides.external))
    if not all(rule.is_in(actual.policy_rules) for rule in rules):
        return None
    eip = _eip(actual, sides.external)
    return LoadBalancerSpec(eip=eip, dnats=Keyed(_dnats(actual, sides.vpc)))


def _eip(actual: Actual, external: str) -> BalancerEip | None:
    """The address whose subnet table 100 has a route to; ours first, for the CNI may have given others."""
    default = actual.routes.get(_DEFAULT)
    if default is None or default.via is None or default.interface != external:
        return None
    mine = sorted((k for k in actual.addresses if k.interface == external), key=lambda k: not actual.addresses[k])
    for key in mine:
        eip = BalancerEip(address=key.address, gateway=default.via)
        if RouteKey(eip.network, BALANCER_TABLE) in actual.routes:
            return eip
    return None


def _dnats(actual: Actual, vpc: str) -> Iterator[BalancerDnat]:
    """The ports; of several rules for one the first, as for packets. Without a route to its target none works."""
    seen: set[Any] = set()
    for rule in _translations(actual):
        match rule:
            case Rule((Destination(eip), DestinationPort(protocol, port)), Dnat(ip, int(target))):
                route = actual.routes.get(RouteKey(f"{ip}/32", BALANCER_TABLE))
                fields = {"protocol": protocol, "clusterIP": ip, "target_port": target, "port": port}
                try:
                    gateway = route.via if route and route.interface == vpc else None
                    dnat = BalancerDnat.model_validate({"eip": eip.removesuffix("/32"), "gateway": gateway, **fields})
                except ValidationError:
                    continue  # a foreign hand's
                if dnat.key not in seen:
                    seen.add(dnat.key)
                    yield dnat
