"""What a colleague would look at in a gateway's namespace: finding, consequence, remedy.

Each check is a small function of the facts, which somebody else collected; it yields nothing where all is well. A
severity is what it means for the tenants' traffic: error (it does not flow), warning (it will not, sooner or later, or
some of it), info (worth knowing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rules import checks_around, checks_own
from rules.examination import SEVERITIES, Facts, Finding

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    checks_own.daemon,
    checks_own.links,
    checks_own.forwarding,
    checks_own.addresses,
    checks_own.default_route,
    checks_own.targets,
    checks_own.reverse_path,
    checks_own.secondaries,
    checks_own.mtu,
    checks_own.connections,
    checks_around.gateways,
    checks_around.conflicts,
    checks_own.lan_ip,
    checks_around.variants,
    checks_around.others,
    checks_own.differs,
    checks_around.features,
    checks_around.listeners,
    checks_around.disks,
    checks_around.unread,
)


def examine(facts: Facts) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
