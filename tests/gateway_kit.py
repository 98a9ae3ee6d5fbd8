"""A gateway over the shipped fake kernel, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from gateway.arp.conflict import Conflict
from gateway.drift import Drift, Policy
from gateway.fake import (
    FakeFirewall,
    FakeFlows,
    FakeJoint,
    FakeKernel,
    FakeLinks,
    FakeMaps,
    FakeNft,
    FakeShaper,
    evidence,
)
from gateway.journal import Journal
from gateway.remembered import RememberedFirewall
from gateway.service import Service
from gateway.store import JOURNAL_ABOVE, Store
from gateway.transaction import Kernel
from gateway.watch import Watch, WatchedFirewall, WatchedJoint, WatchedLinks, WatchedMaps, WatchedNft, WatchedShaper
from rules.desired import ArpPolicy, Facts
from rules.spec import GatewaySpec, Interfaces

STATE = {
    "interfaces": {"vpc": "eth0", "external": "net1"},
    "gatewayV4": "192.168.0.1",
    "gatewayV6": None,
    "eips": [{"address": "192.168.0.10/24"}, {"address": "192.168.0.12/24"}],
    "fips": [{"eip": "192.168.0.12", "internalIp": "10.0.1.5"}],
    "dnats": [
        {
            "eip": "192.168.0.10",
            "externalPort": 8888,
            "protocol": "tcp",
            "internalIp": "10.0.1.10",
            "internalPort": 80,
        }
    ],
    "snats": [{"eip": "192.168.0.10", "internalCIDR": "10.0.1.0/24", "randomFully": True}],
    "routes": [{"cidr": "10.0.2.0/24", "nextHopIP": "10.0.1.1"}],
    "sharedDnats": [
        {
            "eip": "192.168.0.10",
            "externalPort": 53,
            "protocol": "udp",
            "backends": [
                {"internalIp": "10.0.1.10", "internalPort": 5353},
                {"internalIp": "10.0.1.11", "internalPort": 5353},
            ],
            "sessionAffinity": "ClientIP",
            "sessionAffinityTimeoutSeconds": 600,
        }
    ],
    "qos": [
        {"eip": "192.168.0.10", "direction": "egress", "priority": 1, "rateMax": "10", "burstMax": "0.5"},
        {
            "direction": "ingress",
            "interface": "net1",
            "matchType": "ip",
            "matchValue": "src 203.0.113.0/24",
            "priority": 2,
            "rateMax": "2.5",
            "burstMax": "0.3",
        },
    ],
}


def example() -> GatewaySpec:
    """A spec with one object of every kind."""
    return GatewaySpec.model_validate(STATE)


class ManualClock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1_700_000_000


@dataclass
class RecordingAnnouncer:
    """Keeps what was announced and what stands."""

    announced: list[tuple[str, str]] = field(default_factory=list)
    held: dict[str, set[IPv4Address]] = field(default_factory=dict)

    def announce(self, interface: str, addresses: Iterable[IPv4Address]) -> int:
        listed = list(addresses)
        self.announced += [(interface, str(a)) for a in listed]
        self.held.setdefault(interface, set()).update(listed)
        return len(listed)

    def withdraw(self, interface: str, addresses: Iterable[IPv4Address]) -> None:
        self.held.setdefault(interface, set()).difference_update(set(addresses))

    def standing(self, interface: str) -> frozenset[IPv4Address]:
        return frozenset(self.held.get(interface, set()))

    def conflicts(self) -> Mapping[str, tuple[Conflict, ...]]:
        return {}


def ports(kernel: FakeKernel) -> Kernel:
    """The fake kernel behind the ports of a transaction."""
    firewall = RememberedFirewall(FakeFirewall(kernel))
    rest = FakeLinks(kernel), FakeFlows(kernel), FakeNft(kernel), FakeShaper(kernel)
    joint = FakeJoint(kernel, firewall) if kernel.at_once else None
    return Kernel(firewall, *rest, maps=None if kernel.no_maps else FakeMaps(kernel), memory=firewall, joint=joint)


def watched(kernel: FakeKernel, watch: Watch) -> Kernel:
    """The same with a watch on who writes to it."""
    plain = ports(kernel)
    return Kernel(
        WatchedFirewall(plain.firewall, watch),
        WatchedLinks(plain.links, watch),
        plain.flows,
        WatchedNft(FakeNft(kernel), watch),
        WatchedShaper(FakeShaper(kernel), watch),
        maps=WatchedMaps(plain.maps, watch) if plain.maps else None,
        joint=WatchedJoint(plain.joint, watch) if plain.joint else None,
        memory=plain.memory,
    )


@dataclass
class Gateway:
    """A service with everything around it within reach."""

    service: Service
    kernel: FakeKernel
    announcer: RecordingAnnouncer
    clock: ManualClock = field(default_factory=ManualClock)


def gateway(
    directory: Path,
    kernel: FakeKernel | None = None,
    *,
    arp: ArpPolicy = "auto",
    interfaces: Interfaces | None = None,
    drift: Policy = "repair",
    journal_above: int = JOURNAL_ABOVE,
) -> Gateway:
    """A started service over a fake kernel (by default one as a pod has it) and a store in ``directory``."""
    kernel = kernel or FakeKernel.gateway_pod()
    announcer, clock = RecordingAnnouncer(), ManualClock()
    watch, journal = Watch(evidence(kernel)), Journal(clock)
    service = Service(
        watched(kernel, watch),
        announcer,
        Store(directory, journal_above=journal_above),
        clock,
        facts=Facts(arp),
        interfaces=interfaces,
        version="test",
        drift=Drift(clock, journal, drift, watch),
        journal=journal,
    )
    service.start().result(timeout=60)
    return Gateway(service, kernel, announcer, clock)
