"""Probes of the gateway itself: its way out, the gateway there, forwarding, its own rules. None needs a capability.

The next hop is asked by the kernel, not by us: raw ARP and ND frames would need CAP_NET_RAW, and what forwards packets
is the kernel's neighbour entry anyway. A datagram to the discard port makes the kernel use the entry, and its state
tells what came of that, as often as ``quicken`` has made the kernel ask.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from gateway.bfd import netlink
from gateway.bfd.health import Result, Verdict
from gateway.bfd.netlink import Egress, Neighbour, Netlink

DISCARD_PORT = 9

# The relays of 6to4, which are no more (RFC 7526): no network has these addresses, so the way there is the default way.
# The prefixes for documentation would not do, because networks for tests are made of them.
NOWHERE = {socket.AF_INET: "192.88.99.1", socket.AF_INET6: "2002:c058:6301::"}
FAMILY_NAMES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}

POLICY_RULES = range(1001, 1005)
"""Priorities of the policy routing rules by which init-vpc-egress-gateway.sh leads replies back into the VPC."""
MASQUERADE_CHAIN = "VEG-MASQUERADE"


class Probe(Protocol):
    """Looks at one thing, again and again."""

    name: str

    def start(self, now: int) -> None:
        """Ask what needs time to be answered."""
        ...

    def finish(self, now: int) -> Result | None:
        """What came of it; None when there is no news."""
        ...


def passed(detail: str) -> Result:
    """The probe passes."""
    return Result(Verdict.PASS, detail)


def failed(detail: str, certain: bool = False) -> Result:
    """The probe fails."""
    return Result(Verdict.FAIL, detail, certain)


def not_applicable(detail: str) -> Result:
    """There is nothing to be seen here."""
    return Result(Verdict.NOT_APPLICABLE, detail)


class Outside:
    """The way out of one address family, looked up anew for every round.

    ``gateway`` overrules what the routes say; ``required`` makes the lack of a way a failure even where there never
    was one.
    """

    def __init__(self, kernel: Netlink, family: int, gateway: str | None = None, required: bool = True) -> None:
        self.kernel = kernel
        self.family = socket.AddressFamily(family)
        self.required = required
        self.egress: Egress | None = None
        self.interface = 0
        """The last interface that the way out was found to take."""
        self._gateway = gateway

    def look(self) -> None:
        """Find the way out. Raises OSError."""
        self.egress = self.kernel.egress(self._gateway or NOWHERE[self.family])
        if self.egress is not None:
            self.interface = self.egress.interface
            if self._gateway is not None:
                self.egress = Egress(self.interface, self._gateway)


class LinkProbe:
    """The outer interface is up and has a carrier. There is no doubt about it when not."""

    def __init__(self, outside: Outside) -> None:
        self.name = f"link_{FAMILY_NAMES[outside.family]}"
        self._outside = outside

    def start(self, now: int) -> None:
        self._outside.look()

    def finish(self, now: int) -> Result | None:
        if not self._outside.interface:
            return not_applicable("no way out is known")
        link = self._outside.kernel.link(self._outside.interface)
        if link is None:
            return failed("the outer interface is gone", certain=True)
        if not link.flags & netlink.IFF_UP:
            return failed(f"{link.name} is down", certain=True)
        if not link.flags & netlink.IFF_RUNNING:
            return failed(f"{link.name} has no carrier", certain=True)
        return passed(f"{link.name} is up")


class GatewayProbe:
    """The external gateway answers ARP, or neighbour discovery for IPv6. Comes after ``LinkProbe`` of the same way out.

    ``quicken`` is given the family, an interface on which the kernel shall ask often, and the gateway there.
    """

    def __init__(self, outside: Outside, quicken: Callable[[int, str, str], None]) -> None:
        self.name = f"gateway_{FAMILY_NAMES[outside.family]}"
        self._outside = outside
        self._quicken = quicken
        self._quickened = 0
        self._socket = socket.socket(outside.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def start(self, now: int) -> None:
        egress = self._outside.egress
        if egress is None or egress.gateway is None:
            return
        if self._quickened != egress.interface:
            self._quickened = egress.interface
            link = self._outside.kernel.link(egress.interface)
            if link is not None:
                self._quicken(self._outside.family, link.name, egress.gateway)
        with suppress(OSError):
            # Whatever stops this datagram shows in the neighbour's state. What it may bring back is thrown away.
            self._socket.sendto(b"", self._target(egress.gateway, egress.interface))

    def finish(self, now: int) -> Result | None:
        egress = self._outside.egress
        if egress is None:
            if self._outside.interface or self._outside.required:
                return failed("there is no route to the outside")
            return not_applicable("this family has no way out")
        link = self._outside.kernel.link(egress.interface)
        if egress.gateway is None:
            return not_applicable("the way out has no gateway")
        if link is not None and link.flags & netlink.IFF_NOARP:
            return not_applicable(f"ARP is off on {link.name}")
        return judge_neighbour(egress.gateway, self._outside.kernel.neighbour(egress.interface, egress.gateway))

    def _target(self, gateway: str, interface: int) -> tuple[str, int] | tuple[str, int, int, int]:
        if self._outside.family == socket.AF_INET6:
            return gateway, DISCARD_PORT, 0, interface
        return gateway, DISCARD_PORT


def judge_neighbour(address: str, neighbour: Neighbour | None) -> Result:
    """What the kernel's entry says half a round after it was made use of."""
    if neighbour is None:
        return failed(f"nothing is known of {address}")
    if neighbour.state & (netlink.INCOMPLETE | netlink.FAILED):
        return failed(f"{address} does not answer")
    if neighbour.state & netlink.PROBE and neighbour.probes:
        return failed(f"{address} has not answered the last {neighbour.probes}")
    if neighbour.state & (netlink.NOARP | netlink.PERMANENT):
        return not_applicable(f"the hardware address of {address} is fixed")
    if neighbour.state & netlink.REACHABLE:
        return passed(f"{address} answers")
    return passed(f"{address} answered a while ago, and is not doubted yet")


class ForwardingProbe:
    """The kernel forwards packets of the families that there are sessions for."""

    name = "forwarding"

    def __init__(self, families: Sequence[int], root: Path = Path("/proc/sys/net")) -> None:
        files = {socket.AF_INET: "ipv4/ip_forward", socket.AF_INET6: "ipv6/conf/all/forwarding"}
        self._files = {files[socket.AddressFamily(family)]: root for family in families}

    def start(self, now: int) -> None:
        return

    def finish(self, now: int) -> Result | None:
        for name, root in self._files.items():
            if (root / name).read_text().strip() == "0":
                return failed(f"net.{name.replace('/', '.')} is 0", certain=True)
        return passed("on")


class RulesProbe:
    """What stood when we started still stands: the policy routing rules of the egress gateway's init script and, where
    we may read it, its masquerade chain.

    Which rules there are depends on settings that only the init script was given (BGP, EVPN), so the first look says
    what is to be expected.
    """

    name = "rules"

    def __init__(self, kernel: Netlink, families: Sequence[int]) -> None:
        self._kernel = kernel
        self._families = families
        self._expected: set[str] | None = None
        self._unreadable = ""
        try:
            self._netfilter: Netlink | None = Netlink(netlink.NETLINK_NETFILTER)
        except OSError as error:
            self._netfilter, self._unreadable = None, error.strerror or str(error)

    def start(self, now: int) -> None:
        return

    def finish(self, now: int) -> Result | None:
        found = self._found()
        if self._expected is None:
            self._expected = found
        missing = sorted(self._expected - found)
        remark = f"; netfilter is not looked at: {self._unreadable}" if self._unreadable else ""
        if missing:
            return failed("missing: " + ", ".join(missing))
        if not self._expected:
            return not_applicable(f"there were none at the start{remark}")
        return passed(f"{len(self._expected)} in place{remark}")

    def _found(self) -> set[str]:
        found: set[str] = set()
        for family in self._families:
            version = FAMILY_NAMES[socket.AddressFamily(family)]
            priorities = self._kernel.rule_priorities(family)
            found.update(f"{version} rule {priority}" for priority in POLICY_RULES if priority in priorities)
            if self._netfilter is not None and self._masquerades(self._netfilter, family):
                found.add(f"{version} chain {MASQUERADE_CHAIN}")
        return found

    def _masquerades(self, netfilter: Netlink, family: int) -> bool:
        try:
            return netfilter.chain_length(family, "nat", MASQUERADE_CHAIN) > 0
        except PermissionError:
            self._unreadable = "it needs CAP_NET_ADMIN"
            netfilter.close()
            self._netfilter = None
            return False
