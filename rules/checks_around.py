"""What can be wrong around the gateway: neighbours, other people's rules, listeners, disks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from rules.examination import Facts, Finding, Severity, some
from rules.nat import HOOKS
from rules.ruleset import Foreign, Jump

MACVLAN = (
    "what net1 hangs on must let foreign MAC addresses pass: OpenStack: port security off; VMware: promiscuous mode, "
    "MAC address changes and forged transmits on accept; Hyper-V: MAC address spoofing on; public clouds do not offer "
    "it; where the switch port is a trunk, the macvlan's master is a VLAN subinterface. The node itself never reaches "
    "its own macvlans: test from another machine"
)
LITTLE_SPACE = 64 << 20
USUAL_CHAINS = frozenset(jump.target.chain for _, jump in HOOKS if isinstance(jump.target, Jump))


def gateways(facts: Facts) -> Iterator[Finding]:
    """Next hops answer ARP."""
    external = facts.sides.external
    for asked in facts.gateways:
        if asked.macs:
            continue
        outside = asked.interface == external
        yield Finding(
            check="gateway",
            severity="error",
            finding=f"{asked.address} does not answer ARP on {asked.interface}",
            consequence="nothing gets out" if outside else "nothing gets to the subnets behind it",
            remedy=f"is it the subnet's gateway, in the same VLAN? {MACVLAN}"
            if outside
            else "is it the gateway of the subnet that the gateway stands in (VpcNatGateway spec.subnet)?",
        )
    if facts.silent:
        yield Finding(check="gateway", severity="info", finding=f"nobody was asked by ARP: {facts.silent}")


def conflicts(facts: Facts) -> Iterator[Finding]:
    """Nobody else holds our addresses."""
    vpc = facts.sides.vpc
    for asked in facts.holders:
        others = [mac for mac in asked.macs if mac != _mac(facts, asked.interface)]
        if not others:
            continue
        if asked.interface == vpc:
            yield Finding(
                check="lanIp",
                severity="error",
                finding=f"{asked.address}, the lanIp on {vpc}, is also held by {', '.join(others)}",
                consequence="tenants' packets go to whoever answered last",
                remedy="most often lanIp is the subnet's gateway: give VpcNatGateway spec.lanIp another address",
            )
        else:
            yield Finding(
                check="EIP conflict",
                severity="error",
                finding=f"{asked.address} on {asked.interface} is also held by {', '.join(others)}",
                consequence="its traffic goes to whoever answered last",
                remedy="replicas of this gateway hold the same EIPs by design; else find that machine by its MAC, and "
                "exclude the address where it takes them from (Subnet spec.excludeIps, DHCP)",
            )


def variants(facts: Facts) -> Iterator[Finding]:
    """Only one of the two iptables variants holds a gateway's rules."""
    other = "nft" if facts.variant == "legacy" else "legacy"
    theirs = [rule for rule in facts.around.other_rules if rule.where == other and rule.table in ("nat", "mangle")]
    if not theirs:
        return
    upstream = any(chain in rule.text or rule.chain == chain for rule in theirs for chain in USUAL_CHAINS)
    whose = "a gateway's chains" if upstream else "rules"
    yield Finding(
        check="iptables variants",
        severity="error" if upstream else "warning",
        finding=f"iptables-{other} holds {whose}, too ({len(theirs)} rules); we use iptables-{facts.variant}",
        consequence="packets pass through both; the first that translates decides",
        remedy=f"look with iptables-{other}-save; if they are left over: iptables-{other} -t nat -F, then -X, and the "
        "same for mangle",
    )


def others(facts: Facts) -> Iterator[Finding]:
    """Rules of others where ours stand, and what may stop forwarded packets."""
    foreign = [
        f"{ref.table} {ref.chain}: {rule.text}"
        for ref, rules in facts.actual.ruleset.chains.items()
        if ref.family == 4
        for rule in rules
        if isinstance(rule, Foreign)
    ]
    if foreign:
        yield Finding(
            check="rules of others",
            severity="info",
            finding=f"not the gateway's: {some(foreign)}",
            consequence="they may decide before the gateway's own rules; maps ahead of the chains stay off",
            remedy="iptables -D, if nobody needs them",
        )
    stopping = [rule for rule in facts.around.other_rules if rule.table == "filter" and rule.chain == "FORWARD"]
    if stopping:
        policy = any(rule.text == "policy DROP" for rule in stopping)
        yield Finding(
            check="rules of others",
            severity="error" if policy else "warning",
            finding=f"in the way of forwarded packets: {some([str(rule) for rule in stopping])}",
            consequence="what they do not let pass is dropped" if policy else "they may drop what the gateway forwards",
            remedy="the gateway needs no rules there: iptables -P FORWARD ACCEPT, and delete what nobody needs",
        )


def features(facts: Facts) -> Iterator[Finding]:
    """What the kernel or the image lacks, and what is done instead."""
    for name, refusal in facts.features.items():
        if refusal:
            severity, instead = FALLBACKS[name]
            yield Finding(check="features", severity=severity, finding=f"no {name}: {refusal}", consequence=instead)


FALLBACKS: Mapping[str, tuple[Severity, str]] = {
    "iptables-legacy": ("info", "iptables-nft is used; Kube-OVN's tools look there, too, then"),
    "nf_tables": ("warning", "no maps ahead of the chains, no iptables-nft, and shared DNATs are refused"),
    "numgen": ("warning", "shared DNATs without affinity are refused"),
    "random-fully": ("warning", "source translations that ask for it are refused"),
    "conntrack match": ("error", "tenants cannot reach each other by their EIPs"),
    "conntrack netlink": ("error", "connections of deleted rules live on, and live ones cannot be explained"),
    "HTB": ("warning", "bandwidth limits are refused"),
    "u32 filters": ("warning", "bandwidth limits are refused"),
    "ifb": ("warning", "limits of what comes in are refused"),
}
"""What each feature is needed for."""


def listeners(facts: Facts) -> Iterator[Finding]:
    """What can be reached from tenants or from outside."""
    exposed = [str(each) for each in facts.listeners if not ip_address(each.address).is_loopback]
    if exposed:
        yield Finding(
            check="listeners",
            severity="warning",
            finding=f"open to tenants and the outside: {some(exposed)}",
            consequence="whoever reaches an address of the gateway may talk to them",
            remedy="bind them to one address; of the gateway's own only NATGW_LISTEN and metrics ports are meant to",
        )


def disks(facts: Facts) -> Iterator[Finding]:
    """Where state and log are written."""
    for disk in facts.disks:
        if disk.refusal:
            yield Finding(
                check="disk",
                severity="warning",
                finding=f"{disk.path} cannot be written: {disk.refusal}",
                consequence="after a restart the state is read from the kernel's own rules",
                remedy="a full or read-only file system: an emptyDir there will do",
            )
        elif disk.free is not None and disk.free < LITTLE_SPACE:
            yield Finding(
                check="disk",
                severity="warning",
                finding=f"{disk.path} has {disk.free >> 20} MiB left",
                consequence="soon the state cannot be stored",
                remedy="make room on the node",
            )


def unread(facts: Facts) -> Iterator[Finding]:
    """What could not be looked at."""
    for what in facts.around.unread:
        yield Finding(check="examination", severity="info", finding=f"not read: {what}")


def _mac(facts: Facts, interface: str) -> str:
    link = facts.actual.links.get(interface)
    return link.mac if link else ""
