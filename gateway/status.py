"""What the gateway says of itself: a document for people, probes and the HTTP face."""

from __future__ import annotations

from rules.spec import Interfaces, Part


class LinkStatus(Part):
    """One interface; ``arp`` is False while it answers no ARP."""

    up: bool
    arp: bool
    mac: str
    mtu: int


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
    qos: int = 0


class ConflictStatus(Part):
    """Another holder of one of our addresses, by its ARP; times in Unix seconds."""

    interface: str
    address: str
    mac: str
    first_seen: float
    last_seen: float
    count: int


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


class Status(Part):
    """One look at the gateway. ``ready``: the kernel equals the spec and nothing is left to be done.

    ``pending`` names work that follows an answered transaction and has not succeeded yet; it is retried.
    """

    ready: bool
    initialized: bool
    version: str
    variant: str
    interfaces: Interfaces
    links: dict[str, LinkStatus]
    arp: ArpStatus
    counts: Counts
    conflicts: list[ConflictStatus]
    last_error: ErrorStatus | None
    pending: list[str]
    generation: int
    transactions: TransactionCounts
    uptime_seconds: float
