"""The small protocols the gateway is written against; ``gateway.kernel`` and ``gateway.fake`` implement them.

All are synchronous and are called from the one writer thread only. An implementation that the kernel
refuses raises ``Refused`` and leaves that step undone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from rules.flows import Flow, FlowFilter
from rules.maps import MapEdit, MapTable
from rules.nft import NftCommand, NftTable
from rules.ruleset import ChainEdit, ChainRef, Rules, Ruleset
from rules.state import AddressKey, LinkState, LinkStep, PolicyRule, RouteEntry, RouteKey
from rules.surroundings import Surroundings
from rules.tc import Objects, TcStep


class Refused(Exception):
    """The kernel (or its tool) said no.

    ``step`` is what was tried, ``reason`` the kernel's own words, ``retryable`` whether the same step may
    succeed later without a change of the request (a lock, a missing link) or never will.
    """

    def __init__(self, step: str, reason: str, *, retryable: bool) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason
        self.retryable = retryable


class Busy(Refused):
    """More is asked for than is done in time: nothing was tried, and a later try may find a shorter queue."""

    def __init__(self, reason: str) -> None:
        super().__init__("busy", reason, retryable=True)


class Moved(Refused):
    """Somebody else wrote to a netfilter table since the reading that an edit was made for; the edit did not happen."""

    def __init__(self, table: str) -> None:
        super().__init__(f"edit table {table}", "somebody else changed it in the meantime", retryable=True)
        self.table = table


Variant = Literal["legacy", "nft"]
"""Which iptables: the kernel's own xtables, or the one that writes nf_tables."""


class Firewall(Protocol):
    """The netfilter tables of one iptables variant."""

    @property
    def variant(self) -> Variant: ...

    def read(self, tables: Collection[str]) -> Ruleset:
        """The named tables with all their chains; a table the kernel does not hold yet has empty built-in chains."""
        ...

    def edit(self, table: str, edits: Sequence[ChainEdit]) -> None:
        """Commit the edits of one table as one atomic change; raises Refused and changes nothing."""
        ...


@dataclass(frozen=True)
class LinksReading:
    """Links by name, IPv4 addresses (True: ours), routes (metric 0 only), rules of the routing policy, settings.

    Routes and rules are those of IPv4 and IPv6, of all tables but the local one. Settings go by their paths below
    /proc/sys; one that the kernel does not have is not there.
    """

    links: Mapping[str, LinkState]
    addresses: Mapping[AddressKey, bool]
    routes: Mapping[RouteKey, RouteEntry]
    policy_rules: frozenset[PolicyRule] = frozenset()
    sysctls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hop:
    """Where packets to a destination go: out of which interface, from which own address, by which next hop."""

    interface: str
    source: str | None
    via: str | None


class Links(Protocol):
    """Addresses, routes and flags of the namespace's interfaces."""

    def read(self) -> LinksReading:
        """Everything, once."""
        ...

    def commit(self, steps: Sequence[LinkStep]) -> None:
        """Apply the steps in order; raises Refused at the first one the kernel refuses (earlier ones stand)."""
        ...


class Lookup(Protocol):
    """What the routing table says about one destination."""

    def lookup(self, destination: str, within: str | None = None) -> Hop:
        """Where a packet of our own goes (``within``: out of this device); raises Refused if nowhere."""
        ...


class Shaper(Protocol):
    """Bandwidth limits: our trees of HTB classes and the filters that lead to them."""

    def read(self) -> Objects:
        """Every tree that is ours (or Kube-OVN's script's), the redirections to them and the ifb devices."""
        ...

    def commit(self, steps: Sequence[TcStep]) -> None:
        """Apply the steps in order; raises Refused at the first one the kernel refuses (earlier ones stand)."""
        ...


class Flows(Protocol):
    """The connection tracking table."""

    def matching(self, filters: Iterable[FlowFilter]) -> Iterable[Flow]:
        """Entries that match any of the filters, each once."""
        ...

    def end(self, filters: Iterable[FlowFilter], stale: Callable[[Flow], bool]) -> Iterator[int]:
        """Delete the entries that match any of the filters and are ``stale``, a few milliseconds' work at a time.

        Yields how many went. Whoever asks may stop in between, and go on later; raises Refused.
        """
        ...


class Nft(Protocol):
    """The nftables table of share-type DNAT."""

    def read(self) -> NftTable:
        """What it holds; the empty value where there is no table, or the kernel has no nftables."""
        ...

    def commit(self, commands: Sequence[NftCommand]) -> None:
        """Carry the commands out as one transaction; raises Refused and changes nothing."""
        ...


class Around(Protocol):
    """What surrounds the gateway in its namespace; unlike the other ports it may be asked from any thread."""

    def read(self) -> Surroundings:
        """Everything, once; what cannot be read is told in it."""
        ...


@dataclass(frozen=True)
class MapsReading:
    """The table of maps, and in ``hindrance`` why there can be none; empty where there can."""

    table: MapTable
    hindrance: str = ""


class Maps(Protocol):
    """The nftables table of maps that decide ahead of the chains."""

    def read(self) -> MapsReading:
        """What it holds, and whether there is anything in the kernel that speaks against it."""
        ...

    def commit(self, edits: Sequence[MapEdit]) -> None:
        """Carry the edits out as one transaction; raises Refused and changes nothing."""
        ...

    def share(self, table: MapTable) -> None:
        """Keep the very objects of a table that equals the one that stands, so that they are compared at once."""
        ...


class Joint(Protocol):
    """Chains and maps at once, where both are nf_tables."""

    def commit(self, table: str, chains: Sequence[ChainEdit], maps: Sequence[MapEdit]) -> bool:
        """Commit the edits of one IPv4 table and those of the maps as one transaction.

        False, and nothing has changed, where that cannot be. Raises Refused (Moved), and nothing has changed either.
        """
        ...


Committing = Callable[[Mapping[ChainRef, Rules], Hashable], bool]
"""Commits edits of a table with these chains if this evidence of them holds, else raises Moved; whether it did."""


class Remembering(Protocol):
    """Who knows the chains and the evidence that they stand (``gateway.remembered``); a ``Joint`` has need of it."""

    def edit_by(self, table: str, edits: Sequence[ChainEdit], commit: Committing) -> bool:
        """Have the edits done by ``commit``; False, and nothing has changed, if it did not or too little is known."""
        ...


class Sender(Protocol):
    """Sends Ethernet frames out of the external interface."""

    def send(self, frame: bytes) -> None: ...


class Clock(Protocol):
    """Time: ``monotonic`` for intervals, ``time`` (Unix seconds) for people."""

    def monotonic(self) -> float: ...

    def time(self) -> float: ...


class Shaped(NamedTuple):
    """What a bandwidth limit let through (bytes of frames, packets), dropped (packets), and holds back now (bytes)."""

    bytes: int
    packets: int
    drops: int
    backlog: int
