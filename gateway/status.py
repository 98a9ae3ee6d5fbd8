"""What the gateway says of itself: a document for people, probes and the HTTP face."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from gateway.arp.conflict import Conflict
from rules.appliance import Spec
from rules.spec import Interfaces, Part
from rules.state import LinkState


class LinkStatus(Part):
    """One interface; ``arp`` is False while it answers no ARP."""

    up: bool
    arp: bool
    mac: str
    mtu: int

    @classmethod
    def of(cls, link: LinkState) -> Self:
        """The part of a link's state that people ask for."""
        return cls(up=link.up, arp=link.arp, mac=link.mac, mtu=link.mtu)


class ArpStatus(Part):
    """``policy``: auto (on while there is an EIP) or on (never touched)."""

    policy: str
    on: bool


class Counts(Part):
    """Objects of each kind in the spec that stands."""

    eips: int = 0
    fips: int = 0
    dnats: int = 0
    snats: int = 0
    routes: int = 0
    shared_dnats: int = 0
    qos: int = 0

    @classmethod
    def of(cls, spec: Spec | None) -> Self:
        """Counted in ``spec``; all zero where there is none. Not every spec has every kind."""
        return cls(**{kind: len(getattr(spec, kind, ())) for kind in cls.model_fields})


class ConflictStatus(Part):
    """Another holder of one of our addresses, by its ARP; times in Unix seconds."""

    interface: str
    address: str
    mac: str
    first_seen: float
    last_seen: float
    count: int

    @classmethod
    def of(cls, interface: str, conflict: Conflict) -> Self:
        """A holder as the announcer reports it."""
        return cls(
            interface=interface,
            address=str(conflict.address),
            mac=conflict.mac,
            first_seen=conflict.first_seen,
            last_seen=conflict.last_seen,
            count=conflict.count,
        )


class ErrorStatus(Part):
    """The last transaction that failed: when (Unix seconds), asked by whom, and the kernel's words."""

    at: float
    by: str
    message: str
    retryable: bool


class TransactionCounts(Part):
    """Transactions since the start: committed (something was written), unchanged, failed."""

    committed: int = 0
    unchanged: int = 0
    failed: int = 0

    def one_more(self, outcome: Literal["committed", "unchanged", "failed"]) -> Self:
        """The counts after one more transaction."""
        return self.model_copy(update={outcome: getattr(self, outcome) + 1})


class FastpathStatus(Part):
    """Whether maps decide ahead of the chains; if not, ``reason`` says why the chains decide alone.

    ``behind``: long chains have yet to follow a change of the maps, which takes them a second at most.
    """

    on: bool = False
    reason: str = ""
    behind: bool = False


class DriftEntry(Part):
    """What others had changed of what is ours, found at one look; times in Unix seconds.

    ``noticedBy``: the domains of which there was evidence, or ``comparison``. ``count`` differences, the first ones
    listed. ``seconds``: how long the repair took.
    """

    at: float
    noticed_by: str
    differences: list[str]
    count: int
    repaired: bool
    seconds: float


class DriftStatus(Part):
    """Changes that others made to what is ours: what the last look found and left, and what was done so far.

    ``policy``: repair or report. ``differs``: not repaired (yet). ``repairsInARow``: more than a few mean that another
    program insists on its own state; then ``nextRepairInSeconds`` says how long the gateway waits. ``lookSeconds``:
    what a look at everything takes.
    """

    policy: str = "repair"
    differs: list[str] = Field(default_factory=list)
    repairs: int = 0
    repairs_in_a_row: int = 0
    next_repair_in_seconds: float | None = None
    looks: int = 0
    look_seconds: float = 0.0
    compare_in_seconds: float = 0.0
    last: DriftEntry | None = None


class Status(Part):
    """One look at the gateway. ``ready``: the kernel equals the spec and nothing is left to be done.

    ``appliance``: what the pod is; a NAT gateway also before it is initialized. ``pending`` names work that follows
    an answered transaction and has not succeeded yet; it is retried. ``warnings`` are for people: what is legal and
    yet probably not what was meant.
    """

    ready: bool
    initialized: bool
    appliance: Literal["nat-gateway", "lb-svc"] = "nat-gateway"
    version: str
    variant: str
    interfaces: Interfaces
    links: dict[str, LinkStatus]
    arp: ArpStatus
    counts: Counts
    conflicts: list[ConflictStatus]
    last_error: ErrorStatus | None
    pending: list[str]
    warnings: list[str] = Field(default_factory=list)
    fastpath: FastpathStatus = FastpathStatus()
    generation: int
    transactions: TransactionCounts
    drift: DriftStatus = Field(default_factory=DriftStatus)
    uptime_seconds: float
