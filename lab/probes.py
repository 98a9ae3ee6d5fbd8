"""What a lab test tries, and what must be seen, derived from the World alone. Pure.

Expectations come from the manifests and the routing model, never from what the gateway under test says: who must
answer, and which source address that one must see. "No answer" is an expectation like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from itertools import islice, permutations
from typing import Literal

from lab.routing import Frozen
from lab.world import ECHO_PORT, GatewayPlan, Host, Nic, World

How = Literal["tcp", "udp", "ping"]


class Expect(Frozen):
    """Who must answer (None: nobody; several: all of them in turn) and, for tcp and udp, the source each must see."""

    host: str | None
    peer: str = ""

    def __str__(self) -> str:
        return told(self.host, self.peer) if self.host is not None else "no answer"


class Probe(Frozen):
    """One attempt: from a namespace to an address."""

    what: str
    how: How
    source: str
    netns: str
    to: IPv4Address
    port: int = 0
    times: int = 1
    """How many connections it takes; more than one where any of several hosts may answer each."""
    expect: Expect

    @property
    def target(self) -> str:
        return f"{self.how} {self.to}" + (f":{self.port}" if self.port else "")


class Result(Frozen):
    """A line of the test's table. ``during`` is ``up`` for a state that was observed while building and is over."""

    what: str
    source: str
    target: str
    expected: str
    seen: str
    ok: bool
    during: Literal["up", "test"] = "test"


NOBODY = Expect(host=None)
_WAYS: tuple[tuple[How, int], ...] = (("tcp", ECHO_PORT), ("udp", ECHO_PORT), ("ping", 0))


def told(host: str, peer: str) -> str:
    ending = "" if " and " in host else "s"
    return f"{host} answer{ending}" + (f", see{ending} {peer}" if peer else "")


def judge(probe: Probe, reply: Mapping[str, str], during: Literal["up", "test"] = "test") -> Result:
    """Compare what the client saw with what must be seen."""
    answered = "error" not in reply
    ping = probe.how == "ping"
    if probe.expect.host is None:
        ok = not answered
    else:
        ok = answered and (ping or (reply["host"], reply["peer"]) == (probe.expect.host, probe.expect.peer))
    seen = told(str(probe.to) if ping else reply["host"], reply["peer"]) if answered else reply["error"]
    return Result(
        what=probe.what,
        source=probe.source,
        target=probe.target,
        expected=str(probe.expect),
        seen=seen,
        ok=ok,
        during=during,
    )


def before_first_eip(world: World, arp_always_on: bool = False) -> list[Probe]:
    """After ``init`` and before the first EIP ARP is off on net1: neither side finds the other."""
    return [probe for gw in world.gateways for probe in _link(world, gw, arp_always_on, "before the first EIP")]


def probes(world: World) -> list[Probe]:
    """Everything `lab test` tries."""
    return [
        *(probe for gw in world.gateways for probe in _gateway(world, gw)),
        *_isolation(world),
        *(probe for host in world.hosts for nic in host.nics for probe in _extra(world, host, nic)),
        *(
            p
            for one, other in permutations(world.gateways, 2)
            if one.vpc != other.vpc
            for p in _across(world, one, other)
        ),
    ]


class Door(Frozen):
    """A way in: what asks an EIP this way must come out at the target."""

    what: str
    eip: IPv4Address
    how: How
    port: int
    targets: tuple[Host, ...]
    """Each connection reaches one of them."""

    @property
    def label(self) -> str:
        """Who has answered once all have."""
        return " and ".join(sorted(host.label for host in self.targets))


def _gateway(world: World, gw: GatewayPlan) -> Iterator[Probe]:
    yield from _link(world, gw, bool(gw.eips), "link")
    floating = {fip.eip for fip in gw.fips}
    for cidr in gw.vpc_cidrs:
        there = (host for host in world.hosts if host.vpc == gw.vpc and host.ip in cidr)
        for host in islice(there, 1):
            yield _ping(f"subnet {host.subnet} of {gw.vpc}", gw.name, gw.netns, host.ip, answered=True)
    for eip in gw.eips:
        if eip.address.ip not in floating:
            yield _ping(f"EIP {eip.name}", "physical gateway", world.phys, eip.address.ip, answered=True)
    for door in _doors(world, gw):
        yield from _inward(world, gw, door)
    for snat in gw.snats:
        inside = (host for host in world.hosts if host.vpc == gw.vpc and host.ip in snat.cidr)
        ours = (host for host in inside if gw.fip_of(host.ip) is None and gw.source_outside(host.ip) == snat.eip)
        for host in islice(ours, 1):
            yield from _outward(world, f"SNAT {snat.name}", host)
    for fip in gw.fips:
        owner = world.host_at(gw.vpc, fip.internal)
        if owner is not None:
            yield from _outward(world, f"FIP {fip.name}", owner)


def _doors(world: World, gw: GatewayPlan) -> Iterator[Door]:
    for dnat in gw.dnats:
        target = world.host_at(gw.vpc, dnat.internal)
        if target is not None:
            yield Door(
                what=f"DNAT {dnat.name}", eip=dnat.eip, how=dnat.transport, port=dnat.external_port, targets=(target,)
            )
    for share in gw.shares:
        hosts = [world.host_at(gw.vpc, address) for address in dict.fromkeys(a for a, _ in share.backends)]
        targets = tuple(host for host in hosts if host is not None)
        yield Door(
            what=f"DNAT {share.name}", eip=share.eip, how=share.transport, port=share.external_port, targets=targets
        )
    for fip in gw.fips:
        target = world.host_at(gw.vpc, fip.internal)
        if target is not None:
            for how, port in _WAYS:
                yield Door(what=f"FIP {fip.name}", eip=fip.eip, how=how, port=port, targets=(target,))


def _link(world: World, gw: GatewayPlan, answered: bool, what: str) -> Iterator[Probe]:
    """Gateway and physical gateway, each pinging the other."""
    if gw.external is not None:
        yield _ping(f"{gw.name}: {what}", "physical gateway", world.phys, gw.external.ip, answered)
    yield _ping(f"{gw.name}: {what}", gw.name, gw.netns, gw.external_gateway, answered)


def _ping(what: str, source: str, netns: str, to: IPv4Address, answered: bool) -> Probe:
    expect = Expect(host=str(to)) if answered else NOBODY
    return Probe(what=what, how="ping", source=source, netns=netns, to=to, expect=expect)


def _inward(world: World, gw: GatewayPlan, door: Door) -> Iterator[Probe]:
    """From the internet, and (hairpin) from tenants of the same subnet, with and without a floating IP of their own.

    To a hairpin's target the gateway shows an address of its own (the client's floating IP, else the EIP that was
    asked), because the answer must come back through it.
    """
    yield from _enter(world, gw, door, world.internet, world.internet.ip)
    homes = {(target.vpc, target.subnet) for target in door.targets}
    neighbours = [host for host in world.hosts if (host.vpc, host.subnet) in homes and host not in door.targets]
    for floating in (False, True):
        for client in islice((h for h in neighbours if (gw.fip_of(h.ip) is not None) == floating), 1):
            fip = gw.fip_of(client.ip)
            peer = fip.eip if fip is not None else door.eip
            hairpin = door.model_copy(update={"what": f"{door.what}, hairpin"})
            leads = world.exit_of(gw.vpc, client.ip, door.eip) == gw
            yield from _enter(world, gw, hairpin, client, peer, leads=leads)


def _round_trip(world: World, gw: GatewayPlan, target: Host, peer: IPv4Address) -> bool:
    """Whether a packet gets from the gateway to the tenant, and the tenant's answer back to the same gateway."""
    router = world.vpc(gw.vpc).router
    there = target.ip in gw.lan.network or router.hop(peer, target.ip).kind == "deliver"
    return there and world.exit_of(gw.vpc, target.ip, peer) == gw


def _enter(
    world: World, gw: GatewayPlan, door: Door, client: Host, peer: IPv4Address, *, leads: bool = True
) -> Iterator[Probe]:
    """One way in; nothing is foretold where some of several targets can answer and some cannot."""
    works = {leads and _round_trip(world, gw, target, peer) for target in door.targets}
    if len(works) > 1:
        return
    expect = _answer(door.label, door.how, door.eip, peer) if works == {True} else NOBODY
    # So often each of them is missed once in a million labs or less.
    times = 20 * len(door.targets) if len(door.targets) > 1 and works == {True} else 1
    yield Probe(
        what=door.what, how=door.how, source=client.label, netns=client.netns,
        to=door.eip, port=door.port, times=times, expect=expect,
    )  # fmt: skip


def _answer(target: str, how: How, to: IPv4Address, peer: IPv4Address) -> Expect:
    return Expect(host=str(to)) if how == "ping" else Expect(host=target, peer=str(peer))


def _outward(world: World, what: str, host: Host) -> Iterator[Probe]:
    """From a tenant to the internet: what source address is seen there."""
    outside = world.internet
    gw = world.exit_of(host.vpc, host.ip, outside.ip)
    source = gw.source_outside(host.ip) if gw is not None else None
    for how, port in _WAYS:
        expect = NOBODY if source is None else _answer(outside.label, how, outside.ip, source)
        yield Probe(
            what=f"{what}, outward", how=how, source=host.label, netns=host.netns,
            to=outside.ip, port=port, expect=expect,
        )  # fmt: skip


def _isolation(world: World) -> Iterator[Probe]:
    """From each VPC to an address of each other VPC: its own host of that address answers, or nobody."""
    for vpc, other in permutations(world.vpcs, 2):
        ours = [host for host in world.hosts if host.vpc == vpc.name]
        theirs = [host for host in world.hosts if host.vpc == other.name]
        pair = next(((src, dst) for src in ours for dst in theirs if src.ip != dst.ip), None)
        if pair is None:
            continue
        src, dst = pair
        own = world.host_at(vpc.name, dst.ip)
        reached = own is not None and (own.subnet == src.subnet or vpc.router.hop(src.ip, dst.ip).kind == "deliver")
        expect = Expect(host=own.label, peer=str(src.ip)) if own is not None and reached else NOBODY
        yield Probe(
            what=f"isolation of {vpc.name} from {other.name}", how="tcp", source=src.label, netns=src.netns,
            to=dst.ip, port=ECHO_PORT, expect=expect,
        )  # fmt: skip


def _extra(world: World, host: Host, nic: Nic) -> Iterator[Probe]:
    """By a further interface of a pod to where its routes lead; and nobody of its VPC without one gets there."""
    for route in nic.routes:
        target = next((other for other in world.hosts if other.ip in route.cidr and other.vpc != host.vpc), None)
        if target is None:
            continue
        without = (h for h in world.hosts if h.vpc == host.vpc and not h.nics and h.subnet == host.subnet)
        answered = _answer(target.label, "tcp", target.ip, nic.address.ip)
        for client, expect in ((host, answered), *((other, NOBODY) for other in islice(without, 1))):
            by = "by" if client is host else "without"
            yield Probe(
                what=f"{target.label} {by} {nic.interface}",
                how="tcp", source=client.label, netns=client.netns, to=target.ip, port=ECHO_PORT, expect=expect,
            )  # fmt: skip


def _across(world: World, one: GatewayPlan, other: GatewayPlan) -> Iterator[Probe]:
    """From one VPC to an EIP of another: out through the one's gateway, in through the other's."""
    if one.master == other.master and one.mode != "bridge":
        return  # only bridge mode switches between macvlans of one NIC
    clients = [host for host in world.hosts if host.vpc == one.vpc]
    for door in islice(_doors(world, other), 1):
        for client in clients[-1:]:
            source = one.source_outside(client.ip)
            if source is not None and world.exit_of(one.vpc, client.ip, door.eip) == one:
                through = door.model_copy(update={"what": f"{one.vpc} to {other.vpc} ({door.what})"})
                yield from _enter(world, other, through, client, source)
