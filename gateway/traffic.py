"""What flows through the gateway, as a document: for ``GET /v1/traffic``, ``natgw top``, the console and Prometheus.

"in" is what comes from the external network, "out" what goes to it. Flows count in the direction in which they were
opened; bytes (of IP packets) and packets where they flow. Sums begin when the flow watcher first heard of the object,
and anew when the watcher does; ``bytes`` and ``packets`` stay 0 where the kernel does not count them
(``collector.accounting``).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from rules.spec import GatewaySpec, Part

PORTS = 64512
"""Source ports that the kernel gives translated connections of one protocol to one destination: 1024 to 65535."""


class Direction(Part):
    """One direction. Rates are those of the last interval (``Traffic.intervalSeconds``)."""

    bytes: int = 0
    packets: int = 0
    active_flows: int = 0
    new_flows: int = 0
    bytes_per_second: float = 0.0
    packets_per_second: float = 0.0
    new_flows_per_second: float = 0.0


class BothWays(Part):
    """Traffic in both directions."""

    incoming: Direction = Field(default_factory=Direction, alias="in")
    outgoing: Direction = Field(default_factory=Direction, alias="out")


class BusiestDestination(Part):
    """Where most source-translated connections of an EIP go; its ports are the first to run out."""

    protocol: str
    address: str
    port: int
    in_use: int


class SnatPorts(Part):
    """Source ports of an EIP that translated connections hold.

    The kernel needs a port of its own for each connection to the same destination only: ``available`` is per protocol
    and destination, so exhaustion is ``busiest.inUse`` reaching it. ``in_use`` counts different ports, each protocol's
    own.
    """

    in_use: int = 0
    available: int = PORTS
    busiest: BusiestDestination | None = None


class EipTraffic(BothWays):
    """Everything translated to or from an EIP, whatever rule did it."""

    eip: str
    snat_ports: SnatPorts = Field(default_factory=SnatPorts)


class FipTraffic(BothWays):
    """What a floating IP carries."""

    eip: str
    internal_ip: str


class DnatTraffic(BothWays):
    """What a port mapping carries; ``shared``: one with several backends."""

    eip: str
    external_port: int
    protocol: str
    shared: bool = False


class SnatTraffic(BothWays):
    """What a source translation carries."""

    eip: str
    internal_cidr: str = Field(alias="internalCIDR")


class Talker(BothWays):
    """One address and its traffic in the last interval."""

    address: str


class Conntrack(Part):
    """The kernel's connection tracking table, this namespace's part; None where the kernel does not say.

    ``insert_failed`` counts connections refused because their translated form was taken: among them all for which no
    source port was left. ``drop`` counts those for which the table had no room, ``early_drop`` entries thrown out to
    make room.
    """

    count: int | None = None
    maximum: int | None = Field(default=None, alias="max")
    insert_failed: int | None = None
    drop: int | None = None
    early_drop: int | None = None
    invalid: int | None = None


class Collector(Part):
    """The flow watcher itself. ``running`` is False while there is none, and ``detail`` says why.

    ``lost`` counts how often the kernel had to drop events (not how many); the resync that follows makes good for
    them. ``beyond_capacity`` counts flows that were not remembered, only counted. ``resync_seconds`` is the CPU
    time of the last dump of the table.
    """

    running: bool = False
    detail: str = ""
    accounting: bool = False
    flows: int = 0
    capacity: int = 0
    events: dict[Literal["new", "end"], int] = Field(default_factory=dict)
    lost: int = 0
    beyond_capacity: int = 0
    resyncs: int = 0
    resync_seconds: float = 0.0


class FlowLog(Part):
    """The flow log: records written and, by reason, dropped."""

    enabled: bool = False
    records: int = 0
    drops: dict[str, int] = Field(default_factory=dict)


class Traffic(Part):
    """One look at the traffic. ``at`` is when the rates were computed (Unix seconds; the sums are newer).

    ``top_sources`` are addresses inside, ``top_destinations`` those outside, the busiest of the last interval first.
    """

    at: float = 0.0
    age_seconds: float = 0.0
    interval_seconds: float = 0.0
    collector: Collector = Field(default_factory=Collector)
    flow_log: FlowLog = Field(default_factory=FlowLog)
    conntrack: Conntrack = Field(default_factory=Conntrack)
    total: BothWays = Field(default_factory=BothWays)
    eips: list[EipTraffic] = Field(default_factory=list)
    fips: list[FipTraffic] = Field(default_factory=list)
    dnats: list[DnatTraffic] = Field(default_factory=list)
    snats: list[SnatTraffic] = Field(default_factory=list)
    top_sources: list[Talker] = Field(default_factory=list)
    top_destinations: list[Talker] = Field(default_factory=list)

    @classmethod
    def unwatched(cls, spec: GatewaySpec | None, why: str) -> Self:
        """The objects of ``spec`` without traffic, as long as nobody watches."""
        if spec is None:
            return cls(collector=Collector(detail=why))
        exclusive = [(*dnat.key, False) for dnat in spec.dnats]
        shared = [(*dnat.key, True) for dnat in spec.shared_dnats]
        return cls(
            collector=Collector(detail=why),
            eips=[EipTraffic(eip=eip.ip) for eip in spec.eips],
            fips=[FipTraffic(eip=fip.eip, internal_ip=fip.internal_ip) for fip in spec.fips],
            dnats=[
                DnatTraffic(eip=eip, external_port=port, protocol=protocol, shared=many)
                for eip, port, protocol, many in exclusive + shared
            ],
            snats=[SnatTraffic(eip=snat.eip, internal_cidr=snat.internal_cidr) for snat in spec.snats],
        )
