"""What ``natgw doctor`` goes by and what it says: facts about a namespace (others collect them), findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rules.appliance import Spec
from rules.spec import Interfaces, Part
from rules.state import Actual
from rules.surroundings import Surroundings

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


class Finding(Part):
    """One thing that is not as it should be."""

    check: str
    severity: Severity
    finding: str
    consequence: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who answered for an address by ARP: hardware addresses, none where nobody did."""

    interface: str
    address: str
    macs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that takes what others send: ``tcp 0.0.0.0:8080``, and whose it is, if that is known."""

    protocol: str
    address: str
    port: int
    program: str = ""

    def __str__(self) -> str:
        whose = f" ({self.program})" if self.program else ""
        return f"{self.protocol} {self.address}:{self.port}{whose}"


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory of the gateway's: why it cannot be written (empty: it can), and bytes that are free."""

    path: str
    refusal: str = ""
    free: int | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that was collected.

    ``status`` is the daemon's, None where none runs. ``missing``: how the kernel differs from the spec, line by line.
    ``gateways`` and ``holders`` are the answers to ARP questions for next hops, and for addresses of our own;
    ``silent`` says why nobody was asked. ``features``: empty where it works, else the kernel's words; what was not
    tried is not there.
    """

    spec: Spec | None = None
    actual: Actual = field(default_factory=Actual)
    around: Surroundings = field(default_factory=Surroundings)
    variant: str = "legacy"
    status: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    gateways: tuple[Asked, ...] = ()
    holders: tuple[Asked, ...] = ()
    silent: str = ""
    features: Mapping[str, str] = field(default_factory=dict)
    listeners: tuple[Listener, ...] = ()
    disks: tuple[Disk, ...] = ()

    @property
    def sides(self) -> Interfaces:
        """The two interfaces; the usual ones where there is no spec."""
        return self.spec.interfaces if self.spec else Interfaces()

    def held(self, interface: str) -> list[str]:
        """IPv4 addresses up on an interface, with their prefix lengths."""
        return [key.address for key in self.actual.addresses if key.interface == interface and ":" not in key.address]


def some(names: list[str], most: int = 5) -> str:
    """The first of many, and how many more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
