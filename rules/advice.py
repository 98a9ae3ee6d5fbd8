"""What is legal in a spec and yet probably not what somebody meant: sentences for people."""

from __future__ import annotations

from rules.spec import GatewaySpec

_QOS_DEFAULT = "net1"
"""Where Kube-OVN's controller puts a bandwidth rule of a gateway that names no interface (egress; ingress: eth0)."""


def warnings(spec: GatewaySpec) -> list[str]:
    """One sentence for each thing; none for the usual gateway.

    The interfaces' names are taken literally. The controller's own default for bandwidth rules is literal as well, and
    where it is not the primary CNI, that name is the tenants' side.
    """
    if spec.interfaces.vpc != _QOS_DEFAULT:
        return []
    outside = spec.interfaces.external
    return [
        f"{_QOS_DEFAULT} is the tenants' side here: a bandwidth rule of the gateway whose policy names no interface "
        f"limits the tenants' side, not {outside}; name {outside} in the policy"
    ]
