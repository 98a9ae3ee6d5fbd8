"""``init-vpc-egress-gateway.sh`` comes to this: the real kernel's drivers, one run, an exit code.

Kube-OVN runs it in a privileged init container and looks at nothing but the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gateway import egress
from gateway.bfd import quicken
from gateway.kernel.conntrack import KernelFlows
from gateway.kernel.links import KernelLinks
from gateway.kernel.restore import RestoreFirewall
from gateway.kernel.variant import choose
from gateway.ports import Refused
from gateway.transaction import Kernel
from rules.egress import BadEnvironment
from rules.ruleset import Family


def firewall(environment: Mapping[str, str], family: Family) -> RestoreFirewall:
    """The driver for a version of IP; ``NATGW_IPTABLES`` names the variant (raises ValueError for another word).

    Both variants go through their programs: python-iptables would take longer to load than all else here takes.
    """
    return RestoreFirewall(choose(environment.get("NATGW_IPTABLES") or "auto", family), family)


def firewall6(environment: Mapping[str, str]) -> RestoreFirewall | None:
    """The driver for IPv6, unless IPv6 is neither asked for nor left over from an earlier run.

    Asking for a legacy table loads it, and a loaded table stands in the way of every packet.
    """
    driver = firewall(environment, 6)
    if environment.get("INTERNAL_GATEWAY_IPV6"):
        return driver
    loaded = Path("/proc/net/ip6_tables_names")  # of this network namespace
    if driver.variant == "legacy" and not (loaded.exists() and "nat" in loaded.read_text().split()):
        return None
    return driver if Path("/proc/net/if_inet6").exists() else None


def main(environment: Mapping[str, str]) -> int:
    """Make this network namespace an egress gateway; 0 if it is one now."""
    links = KernelLinks()
    try:
        drivers = firewall(environment, 4), firewall6(environment)
        kernel = Kernel(drivers[0], links, KernelFlows(), firewall6=drivers[1], tables=("nat",))
        plan = egress.start(kernel, links, environment)
    except (BadEnvironment, Refused, ValueError) as error:
        sys.stderr.write(f"init-vpc-egress-gateway: {' '.join(str(error).split())}\n")
        return 1
    finally:
        links.close()
    # A gateway works without: its BFD speaker then notices the loss of the external gateway later, and its log says so.
    with suppress(OSError, ValueError):
        quicken.apply(environment)
    done = f"{len(plan.steps)} steps" if plan else "nothing to do"
    sys.stdout.write(f"init-vpc-egress-gateway: {done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
