"""What can be wrong with the gateway's own work: finding, consequence, remedy."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Interface

from rules.examination import Facts, Finding, some
from rules.routing import Host, route
from rules.spec import GatewaySpec
from rules.surroundings import CONNTRACK_COUNT, CONNTRACK_MAX, FORWARDING, promote_secondaries, rp_filter

SMALL_TABLE = 65536


def daemon(facts: Facts) -> Iterator[Finding]:
    """Is the daemon there, and has it done its work?"""
    status = facts.status
    if status is None:
        yield Finding(
            check="daemon",
            severity="warning",
            finding="no daemon answers here",
            consequence="the kernel forwards on as it is; nothing is repaired, announced or measured",
            remedy="any command of nat-gateway.sh starts it; natgw.log in the run directory has its last words",
        )
        return
    if not status["initialized"]:
        yield Finding(
            check="daemon",
            severity="warning",
            finding="the gateway is not initialized",
            consequence="nothing is translated",
            remedy="nat-gateway.sh init; Kube-OVN's controller does it when the pod is ready",
        )
    elif not status["ready"]:
        error = status["lastError"]
        yield Finding(
            check="daemon",
            severity="error",
            finding=f"the gateway is not ready: {'; '.join(status['pending'])}",
            consequence="not everything that was asked for is done",
            remedy=f"it is tried again all the time; the last error: {error['message']}"
            if error
            else "see natgw events",
        )


def links(facts: Facts) -> Iterator[Finding]:
    """Both interfaces are there and up, and do ARP."""
    if facts.spec is None:
        return
    for side, name in (("vpc", facts.sides.vpc), ("external", facts.sides.external)):
        link = facts.actual.links.get(name)
        if link is None or not link.up:
            yield Finding(
                check="links",
                severity="error",
                finding=f"{name} ({side}) is {'missing' if link is None else 'down'}",
                consequence="nothing flows on that side",
                remedy="the CNI makes it: kubectl describe pod, and the NetworkAttachmentDefinition's master"
                if link is None
                else f"ip link set {name} up, and see whether the node's interface has a carrier",
            )
        elif not link.arp and facts.spec.eips:
            yield Finding(
                check="links",
                severity="error",
                finding=f"ARP is off on {name} although there are EIPs",
                consequence="nobody finds the EIPs",
                remedy=f"ip link set {name} arp on; the daemon does it with the next change",
            )


def forwarding(facts: Facts) -> Iterator[Finding]:
    """The kernel forwards."""
    if facts.around.sysctls.get(FORWARDING) == 0:
        yield Finding(
            check="forwarding",
            severity="error",
            finding="net.ipv4.ip_forward is 0",
            consequence="no packet passes from one side to the other",
            remedy="sysctl -w net.ipv4.ip_forward=1; the pod's postStart hook does it in a privileged container",
        )


def addresses(facts: Facts) -> Iterator[Finding]:
    """Every EIP is up."""
    external = facts.sides.external
    held = {address.partition("/")[0] for address in facts.held(external)}
    down = [eip.ip for eip in facts.spec.eips if eip.ip not in held] if facts.spec else []
    if down:
        yield Finding(
            check="addresses",
            severity="error",
            finding=f"not up on {external}: {some(down)}",
            consequence="nobody reaches them",
            remedy="nat-gateway.sh eip-add puts them up again; natgw status says whether the daemon tries",
        )


def default_route(facts: Facts) -> Iterator[Finding]:
    """The outside is reached by the external interface."""
    if not isinstance(facts.spec, GatewaySpec) or not facts.spec.eips:
        return
    found = route(Host.of(facts.actual), "198.51.100.1")
    external = facts.sides.external
    if found is None or found[1].interface != external:
        where = "there is none" if found is None else f"it leads out by {found[1].interface}"
        yield Finding(
            check="default route",
            severity="error",
            finding=f"no default route by {external}: {where}",
            consequence="tenants do not reach the outside, and nobody outside gets answers",
            remedy="the external subnet's gateway was never named (GATEWAY_V4, Subnet spec.gateway); by hand: "
            f"ip route replace default via GATEWAY dev {external}",
        )


def targets(facts: Facts) -> Iterator[Finding]:
    """What rules lead to, and whom they translate, lies on the tenants' side."""
    spec, vpc = facts.spec, facts.sides.vpc
    if not isinstance(spec, GatewaySpec):
        return
    host = Host.of(facts.actual)
    inside = {fip.internal_ip for fip in spec.fips} | {dnat.internal_ip for dnat in spec.dnats}
    inside |= {backend.internal_ip for shared in spec.shared_dnats for backend in shared.backends}
    inside |= {snat.internal_cidr.partition("/")[0] for snat in spec.snats if snat.prefix_length}
    astray = sorted(ip for ip in inside if (way := route(host, ip)) is None or way[1].interface != vpc)
    if astray:
        yield Finding(
            check="tenants' routes",
            severity="error",
            finding=f"not reached by {vpc}: {some(astray)}",
            consequence="what rules send there leaves on the wrong side, and their answers are lost",
            remedy="nat-gateway.sh subnet-route-add CIDR,VPC_SUBNET_GATEWAY (VpcNatGateway spec.routes)",
        )


def reverse_path(facts: Facts) -> Iterator[Finding]:
    """A strict filter drops what comes in where its source is not looked for."""
    for name in (facts.sides.vpc, facts.sides.external):
        if facts.around.strictness(name) == 1:
            yield Finding(
                check="rp_filter",
                severity="info",
                finding=f"the reverse-path filter of {name} is strict (1)",
                consequence="tenants of a subnet without a route here are dropped without a word",
                remedy=f"sysctl -w {rp_filter(name).replace('/', '.')}=2, with all.rp_filter not 1",
            )


def secondaries(facts: Facts) -> Iterator[Finding]:
    """The other EIPs survive when the first goes."""
    name = facts.sides.external
    settings = facts.around.sysctls
    on = any(settings.get(promote_secondaries(each), 0) for each in ("all", name))
    nets = [IPv4Interface(address).network for address in facts.held(name)]
    if not on and settings.get(promote_secondaries(name)) is not None and len(nets) > len(set(nets)):
        yield Finding(
            check="promote_secondaries",
            severity="warning",
            finding=f"promote_secondaries is off on {name}, which has several addresses of one subnet",
            consequence="the kernel takes all of them down with the first one",
            remedy="the daemon switches it on with its next change; by hand: "
            f"sysctl -w net.ipv4.conf.{name}.promote_secondaries=1",
        )


def mtu(facts: Facts) -> Iterator[Finding]:
    """The two legs carry packets of one size."""
    inner, outer = (facts.actual.links.get(name) for name in (facts.sides.vpc, facts.sides.external))
    if inner is None or outer is None or inner.mtu == outer.mtu:
        return
    narrow, wide = sorted((inner.mtu, outer.mtu))
    tenants = inner.mtu > outer.mtu
    yield Finding(
        check="MTU",
        severity="warning" if tenants else "info",
        finding=f"{facts.sides.vpc} has an MTU of {inner.mtu}, {facts.sides.external} of {outer.mtu}",
        consequence=f"packets of {narrow + 1} to {wide} bytes from {'tenants' if tenants else 'outside'} are refused "
        "with ICMP (type 3, code 4); where that is filtered, connections stall once they carry much",
        remedy="give the VPC's subnet (Subnet spec.mtu) an MTU that is not larger than the external network's"
        if tenants
        else "usual for overlays: tenants' TCP adapts to it by its MSS; let that ICMP pass for the rest",
    )


def connections(facts: Facts) -> Iterator[Finding]:
    """Room in the connection tracking table."""
    count, most = (facts.around.sysctls.get(name) for name in (CONNTRACK_COUNT, CONNTRACK_MAX))
    if count is None or not most:
        return
    share = count / most
    if count >= most:
        yield Finding(
            check="connections",
            severity="error",
            finding=f"the connection tracking table is full ({most:,} entries)",
            consequence="new connections are dropped, whoever opens them; those that stand go on",
            remedy="raise net.netfilter.nf_conntrack_max on the node; natgw top shows who opens them",
        )
    elif share >= 0.7:
        yield Finding(
            check="connections",
            severity="error" if share >= 0.95 else "warning",
            finding=f"the connection tracking table holds {count:,} of {most:,} ({share:.0%})",
            consequence="when it is full, new connections are dropped",
            remedy="raise net.netfilter.nf_conntrack_max on the node; natgw top shows who opens them",
        )
    elif most < SMALL_TABLE:
        yield Finding(
            check="connections",
            severity="warning",
            finding=f"the connection tracking table takes only {most:,} entries",
            consequence="a scan or a busy tenant fills it, and new connections of all are dropped",
            remedy="raise net.netfilter.nf_conntrack_max on the node (262144 is usual)",
        )


def lan_ip(facts: Facts) -> Iterator[Finding]:
    """The gateway does not route through itself."""
    if not isinstance(facts.spec, GatewaySpec):
        return
    own = {address.partition("/")[0] for address in facts.held(facts.sides.vpc)}
    wrong = [str(each) for each in facts.spec.routes if each.next_hop_ip in own]
    if wrong:
        yield Finding(
            check="lanIp",
            severity="error",
            finding=f"the next hop is the gateway's own lanIp: {some(wrong)}",
            consequence="the kernel refuses such a route, or packets end here",
            remedy="the next hop is the gateway of the subnet on the tenants' side; lanIp must be another address",
        )


def differs(facts: Facts) -> Iterator[Finding]:
    """The kernel is as the spec wants it."""
    if facts.missing:
        yield Finding(
            check="drift",
            severity="error",
            finding=f"the kernel is not as it should be: {some(list(facts.missing))}",
            consequence="some objects do not work, or some work that were deleted",
            remedy="the daemon repairs it with its next look or change; natgw status --diff compares",
        )
