"""The two things that a pod of the image can be: a VPC NAT gateway, or the load balancer of one Service (lb-svc).

Both are made by the same operation: a spec, the statements about the kernel that it implies, the difference. A pod is
one of them for as long as its network namespace lives; which one, the first ``init`` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from rules import adopt as gateway_adopt
from rules import desired as gateway_desired
from rules import flows as gateway_flows
from rules import inputguard, loadbalancer
from rules.desired import Facts
from rules.flows import Flow, FlowFilter
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import GatewaySpec, Interfaces
from rules.state import Actual, Desired

Spec = GatewaySpec | LoadBalancerSpec
S = TypeVar("S", GatewaySpec, LoadBalancerSpec)

NAMES: dict[type[Spec], str] = {GatewaySpec: "a NAT gateway", LoadBalancerSpec: "a load balancer (lb-svc)"}


class OtherAppliance(Exception):
    """The pod is the other of the two; nothing was changed."""

    def __init__(self, standing: Spec, wanted: type[Spec]) -> None:
        super().__init__(f"this pod is {NAMES[type(standing)]} and cannot be {NAMES[wanted]} as well")


def only(kind: type[S], edit: Callable[[S | None], S]) -> Callable[[Spec | None], Spec]:
    """The edit for whatever stands; it raises OtherAppliance where that is of the other kind."""

    def checked(standing: Spec | None) -> Spec:
        if standing is None or isinstance(standing, kind):
            return edit(standing)
        raise OtherAppliance(standing, kind)

    return checked


def desired(spec: Spec, facts: Facts, actual: Actual) -> Desired:
    """Every statement about the kernel that the spec implies."""
    if isinstance(spec, LoadBalancerSpec):
        wanted = loadbalancer.desired(spec, facts, actual)
    else:
        wanted = gateway_desired.desired(spec, facts, actual)
    if not spec.initialized:
        return wanted
    chains, hooks = inputguard.statements(facts.input, spec.interfaces, actual)
    return replace(wanted, chains={**wanted.chains, **chains}, hooks={**wanted.hooks, **hooks})


def adopt(actual: Actual, interfaces: Interfaces | None = None) -> Spec | None:
    """The spec that the kernel carries out, or None where it carries out neither."""
    return gateway_adopt.adopt(actual, interfaces) or loadbalancer.adopt(actual)


def suspects(old: Spec, new: Spec) -> tuple[FlowFilter, ...]:
    """Where to look for connections that a change made stale."""
    if isinstance(old, LoadBalancerSpec) and isinstance(new, LoadBalancerSpec):
        return loadbalancer.suspects(old, new)
    if isinstance(old, GatewaySpec) and isinstance(new, GatewaySpec):
        return gateway_flows.suspects(old, new)
    raise TypeError("a pod does not change what it is")


def staleness(old: Spec, new: Spec) -> Callable[[Flow], bool]:
    """Whether a change took a connection's translation away, or gave one that it does not have."""
    if isinstance(old, LoadBalancerSpec) and isinstance(new, LoadBalancerSpec):
        return partial(loadbalancer.is_stale, old=old, new=new)
    if isinstance(old, GatewaySpec) and isinstance(new, GatewaySpec):
        return gateway_flows.Staleness(old, new)
    raise TypeError("a pod does not change what it is")
