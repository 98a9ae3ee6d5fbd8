"""Making a pod an egress gateway of a VPC: once, when it starts; no process of ours stays.

What the environment asks for becomes statements about the kernel, and these one transaction: nothing of it stays
where the kernel refuses a part. A second run finds nothing to do, one with other values changes what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from gateway.ports import Hop, Links, Lookup, Refused
from gateway.transaction import Kernel, converge
from rules import egress
from rules.delta import delta
from rules.egress import VRF, EgressSpec, Request, Side, Way
from rules.ruleset import Family
from rules.state import Actual, Plan


class EgressLinks(Links, Lookup, Protocol):
    """The driver of the interfaces, which can also say where a packet would go."""


def start(kernel: Kernel, links: EgressLinks, environment: Mapping[str, str]) -> Plan:
    """Make the pod what its environment asks for; returns what was done.

    Raises BadEnvironment for a variable that says what cannot be, and Refused (the pod is as it was before) or
    NotReverted where the kernel refuses.
    """
    spec = EgressSpec.from_environment(environment)
    before = links.read()
    within = VRF if VRF in before.links else None
    ways = {family: _way(links, family, request, within) for family, request in spec.families.items()}

    def planned(actual: Actual) -> Plan:
        return delta(egress.desired(spec, ways, actual), actual)

    return converge(kernel, planned).plan


def _way(links: EgressLinks, family: Family, request: Request, vrf: str | None) -> Way:
    """The two sides: where the kernel would send packets for the two gateways."""
    inner, outer = f"INTERNAL_GATEWAY_IPV{family}", f"EXTERNAL_GATEWAY_IPV{family}"
    hop = _lookup(links, inner, request.internal_gateway, vrf)
    if hop.via is not None:
        raise _misplaced(inner, request.internal_gateway, "lies in no subnet of this pod")
    internal = _side(inner, request.internal_gateway, hop)
    if request.external_gateway is None:
        return Way(internal, None)
    external = _side(outer, request.external_gateway, _lookup(links, outer, request.external_gateway, None))
    if external.interface == internal.interface:
        why = f"is reached by {internal.interface}, as the internal gateway is"
        raise _misplaced(outer, request.external_gateway, why)
    return Way(internal, external)


def _lookup(links: EgressLinks, variable: str, gateway: str, vrf: str | None) -> Hop:
    """The way to a gateway. With EVPN the internal one is the virtual router's to know, once a run has made that."""
    if vrf is not None:
        with suppress(Refused):  # a run that was cut short: the interface is not its port yet
            hop = links.lookup(gateway, vrf)
            if hop.via is None:
                return hop
    try:
        return links.lookup(gateway)
    except Refused as error:
        raise _misplaced(variable, gateway, f"cannot be reached: {error.reason}") from error


def _side(variable: str, gateway: str, hop: Hop) -> Side:
    if hop.source is None:
        raise _misplaced(variable, gateway, f"is reached by {hop.interface}, which has no address")
    return Side(hop.interface, hop.source)


def _misplaced(variable: str, gateway: str, why: str) -> Refused:
    return Refused(variable, f"{gateway} {why}", retryable=True)
