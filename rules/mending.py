"""What keeps a connection from working, each with what would mend it: one small question after the other.

A remedy is a command of this image, and where the cluster's objects are meant, the line of the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

from rules.appliance import Spec
from rules.loadbalancer import LoadBalancerSpec
from rules.nat import ARP_GUARD
from rules.packet import Packet
from rules.ruleset import Foreign
from rules.spec import Interfaces, Part
from rules.state import Actual, RouteEntry
from rules.surroundings import CONNTRACK_COUNT, CONNTRACK_MAX, FORWARDING, Surroundings, rp_filter
from rules.trace import Fate


class Fault(Part):
    """Something missing or in the way.

    ``breaks``: the connection cannot work; else it may not, or something is worth knowing. ``drops``: the packet ends
    here, whatever the rules say.
    """

    what: str
    remedy: str
    breaks: bool = True
    drops: bool = False


@dataclass(frozen=True)
class Way:
    """A packet's whole way: its fate, what is wanted and what is there, the route of the answers (None: none)."""

    fate: Fate
    spec: Spec | None
    actual: Actual
    around: Surroundings
    surveyed: bool
    back: tuple[str, RouteEntry] | None
    answer: Packet | None

    @property
    def sides(self) -> Interfaces:
        """The two interfaces; the usual ones where there is no spec."""
        return self.spec.interfaces if self.spec else Interfaces()

    @property
    def hop(self) -> tuple[str, str]:
        """Out of which interface a forwarded packet goes, and to whom on the link."""
        return self.fate.out_interface or "", self.fate.next_hop or self.fate.final.dst

    def holds(self, interface: str, address: str) -> bool:
        """Whether an address is up on an interface."""
        return any(key == (interface, key[1]) and key[1].partition("/")[0] == address for key in self.actual.addresses)

    def wants(self, address: str) -> bool:
        """Whether an address is one of the EIPs that are wanted."""
        return self.spec is not None and any(eip.ip == address for eip in self.spec.eips)


def faults(way: Way) -> Iterator[Fault]:
    """Everything that is known to be wrong, in the order in which the packet meets it."""
    for question in QUESTIONS:
        yield from question(way)


def _link(way: Way) -> Iterator[Fault]:
    """An interface on the way is missing or down."""
    for name in dict.fromkeys((way.fate.packet.in_interface, way.fate.out_interface)):
        link = way.actual.links.get(name) if name else None
        if name and link is None:
            yield Fault(
                what=f"there is no interface {name}",
                remedy="the CNI makes it: see `kubectl describe pod` and the NetworkAttachmentDefinition",
                drops=True,
            )
        elif link is not None and not link.up:
            yield Fault(what=f"{name} is down", remedy=f"ip link set {name} up", drops=True)


def _reaches(way: Way) -> Iterator[Fault]:
    """From outside: does anybody lead the packet to us?"""
    packet, external = way.fate.packet, way.sides.external
    if packet.in_interface != external:
        return
    link = way.actual.links.get(external)
    if link is not None and not link.arp:
        yield Fault(
            what=f"ARP is off on {external}, so nobody finds us there",
            remedy="it comes on with the first EIP: nat-gateway.sh eip-add IP/LENGTH (an IptablesEIP of this gateway)",
        )
    if way.holds(external, packet.dst):
        return
    if way.wants(packet.dst):
        yield Fault(
            what=f"the EIP {packet.dst} is not up on {external}",
            remedy="`natgw status` says why; nat-gateway.sh eip-add puts it up again",
        )
    elif _on_link(way.actual, external, packet.dst):
        yield Fault(
            what=f"{packet.dst} is no address of this gateway: nobody here answers ARP for it",
            remedy=f"nat-gateway.sh eip-add {packet.dst}/LENGTH (IptablesEIP with v4ip: {packet.dst})",
        )


def _martian(way: Way) -> Iterator[Fault]:
    """The kernel's check of the source address (RFC 1812, 5.3.8; RFC 3704)."""
    packet = way.fate.packet
    if any(key[1].partition("/")[0] == packet.src for key in way.actual.addresses):
        yield Fault(
            what=f"the source {packet.src} is an address of the gateway itself: the kernel drops such packets",
            remedy="who sends it has an address that is ours: natgw doctor looks for conflicts",
            drops=True,
        )
        return
    strictness = way.around.strictness(packet.in_interface)
    if not strictness or way.answer is None:
        return
    astray = way.back is None or (strictness == 1 and way.back[1].interface != packet.in_interface)
    if astray:
        where = "nowhere" if way.back is None else f"by {way.back[1].interface}"
        yield Fault(
            what=f"the reverse-path filter of {packet.in_interface} drops it: {packet.src} is reached {where}",
            remedy=f"sysctl -w {rp_filter(packet.in_interface)}=0, or a route to {packet.src}",
            drops=True,
        )


def _table(way: Way) -> Iterator[Fault]:
    """Room in the connection tracking table."""
    count, most = (way.around.sysctls.get(name) for name in (CONNTRACK_COUNT, CONNTRACK_MAX))
    if not count or not most or count < most * 0.9:
        return
    full = count >= most
    yield Fault(
        what=f"the connection tracking table {'is full' if full else 'is nearly full'}: {count:,} of {most:,}",
        remedy="raise net.netfilter.nf_conntrack_max on the node; natgw top shows who opens so many connections",
        breaks=full,
        drops=full,
    )


def _foreign(way: Way) -> Iterator[Fault]:
    """Rules of others on the way."""
    for step in way.fate.steps:
        if isinstance(step.rule, Foreign) and step.ref is not None:
            yield Fault(
                what=f"a rule that is not ours stands in {step.ref.table} {step.ref.chain}: {step.rule.text}",
                remedy="what it does is not known here; if nobody needs it, delete it with iptables -D",
                breaks=False,
            )
    chains = {"forwarded": ("FORWARD",), "local": ("INPUT",)}.get(way.fate.verdict, ())
    for rule in way.around.others(("PREROUTING", *chains, "POSTROUTING") if chains else ()):
        yield Fault(
            what=f"a rule that is not ours may have a say: {rule}",
            remedy="look at it there; rules of the other iptables variant are listed by iptables-legacy or -nft",
            breaks=rule.text in ("policy DROP", "policy REJECT"),
            drops=False,
        )


def _local(way: Way) -> Iterator[Fault]:
    """It ends at the gateway."""
    packet, external = way.fate.packet, way.sides.external
    if way.fate.verdict != "local" or packet.protocol == "icmp" or not way.holds(external, packet.dst):
        return
    port = f"{packet.dst}:{packet.dport}/{packet.protocol}"
    if isinstance(way.spec, LoadBalancerSpec):
        remedy = f"a port {packet.dport} in the Service's spec.ports"
    else:
        words = f"{packet.dst},{packet.dport},{packet.protocol},INTERNAL_IP,INTERNAL_PORT"
        remedy = f"nat-gateway.sh dnat-add {words} (an IptablesDnatRule), or an IptablesFIPRule for the whole EIP"
    yield Fault(what=f"no rule leads {port} inside: it is for the gateway itself", remedy=remedy)


def _dropped(way: Way) -> Iterator[Fault]:
    """Our own guard."""
    if way.fate.verdict != "dropped":
        return
    last = way.fate.steps[-1]
    if last.ref == ARP_GUARD:
        yield Fault(
            what=f"while ARP is off on {way.sides.external}, nothing may leave by it",
            remedy="ARP comes on with the first EIP: nat-gateway.sh eip-add IP/LENGTH (an IptablesEIP of this gateway)",
        )
    else:
        yield Fault(what=f"dropped: {last}", remedy="delete that rule if nobody needs it")


def _no_route(way: Way) -> Iterator[Fault]:
    """It cannot be sent on."""
    if way.fate.verdict != "no route":
        return
    packet, final = way.fate.packet, way.fate.final
    if packet.dst != final.dst:
        yield Fault(what=f"no route leads to the target {final.dst}", remedy=_tenant_route(final.dst))
    else:
        yield Fault(what=f"no route leads to {final.dst}", remedy=_default_route(way))


def _tenant_route(address: str) -> str:
    network = IPv4Interface(f"{address}/24").network
    return f"nat-gateway.sh subnet-route-add {network},VPC_SUBNET_GATEWAY (VpcNatGateway spec.routes)"


def _default_route(way: Way) -> str:
    external = way.sides.external
    return (
        f"the default route comes with an EIP and the external subnet's gateway (GATEWAY_V4, Subnet spec.gateway); by "
        f"hand: ip route replace default via GATEWAY dev {external}"
    )


def _forwarding(way: Way) -> Iterator[Fault]:
    """The kernel forwards at all."""
    if way.fate.verdict == "forwarded" and way.around.sysctls.get(FORWARDING) == 0:
        yield Fault(
            what="net.ipv4.ip_forward is 0: the kernel forwards nothing",
            remedy="sysctl -w net.ipv4.ip_forward=1 (the pod's postStart hook does it; a privileged container may)",
            drops=True,
        )


def _target(way: Way) -> Iterator[Fault]:
    """What comes from outside and was translated must leave on the tenants' side."""
    packet, final, sides = way.fate.packet, way.fate.final, way.sides
    if way.fate.verdict == "forwarded" and packet.dst != final.dst and way.fate.out_interface == sides.external:
        what = f"the target {final.dst} is looked for outside, by {sides.external}: no tenant route leads to it"
        yield Fault(what=what, remedy=_tenant_route(final.dst))


def _untranslated(way: Way) -> Iterator[Fault]:
    """What tenants send out must bear an address that the outside can answer."""
    packet, final, sides = way.fate.packet, way.fate.final, way.sides
    outwards = packet.in_interface == sides.vpc and way.fate.out_interface == sides.external
    if way.fate.verdict != "forwarded" or not outwards or isinstance(way.spec, LoadBalancerSpec):
        return
    if final.src == packet.src:
        eip = next((eip.ip for eip in way.spec.eips), "EIP") if way.spec else "EIP"
        network = IPv4Interface(f"{packet.src}/24").network
        yield Fault(
            what=f"no source translation for {packet.src}: it leaves with an address that the outside cannot answer",
            remedy=f"nat-gateway.sh snat-add {eip},{network} (IptablesSnatRule with internalCIDR: {network})",
        )
    elif not way.holds(sides.external, final.src):
        yield Fault(
            what=f"{final.src}, as which it leaves, is not up on {sides.external}: answers find nobody",
            remedy=f"nat-gateway.sh eip-add {final.src}/LENGTH (IptablesEIP with v4ip: {final.src})",
        )


def _neighbours(way: Way) -> Iterator[Fault]:
    """Next hops that do not answer."""
    hops = [way.hop] if way.fate.verdict == "forwarded" else []
    if way.back is not None and way.fate.verdict == "forwarded":
        hops.append((way.back[1].interface, way.back[1].via or way.fate.packet.src))
    for interface, address in dict.fromkeys(hops):
        found = way.around.neighbour(interface, address)
        if found is not None and not found.known:
            seen = "has not answered ARP yet" if found.state == "incomplete" else "does not answer ARP"
            yield Fault(
                what=f"{address} {seen} on {interface} ({found.state})",
                remedy="natgw doctor asks it and names the usual reasons (VLAN, port security, promiscuous mode)",
            )


def _way_back(way: Way) -> Iterator[Fault]:
    """Answers must find the sender, where the packet came from."""
    packet = way.fate.packet
    if way.fate.verdict not in ("forwarded", "local"):
        return
    if way.back is None:
        remedy = _tenant_route(packet.src) if packet.in_interface == way.sides.vpc else _default_route(way)
        yield Fault(what=f"no route leads back to {packet.src}", remedy=remedy)
    elif way.back[1].interface != packet.in_interface:
        yield Fault(
            what=f"answers to {packet.src} leave by {way.back[1].interface}, though it came by {packet.in_interface}",
            remedy=_tenant_route(packet.src) if packet.in_interface == way.sides.vpc else f"a route to {packet.src}",
        )


def _on_link(actual: Actual, interface: str, address: str) -> bool:
    nets = (IPv4Interface(k[1]).network for k in actual.addresses if k[0] == interface and ":" not in k[1])
    return any(IPv4Address(address) in net for net in nets)


QUESTIONS: tuple[Callable[[Way], Iterator[Fault]], ...] = (
    _link,
    _reaches,
    _martian,
    _table,
    _foreign,
    _local,
    _dropped,
    _no_route,
    _forwarding,
    _target,
    _untranslated,
    _neighbours,
    _way_back,
)
