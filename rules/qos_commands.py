"""The commands of bandwidth limits and what they do to a spec: an add replaces, a delete of nothing is a success."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rules.fields import Direction, IPv4, Mbit, MiB
from rules.spec import PRIORITY_MAX, EipLimit, GatewaySpec, InterfaceLimit, LimitIdentity, Part


class _EipQosAdd(Part):
    direction: ClassVar[Direction]
    eip: IPv4
    priority: int = Field(default=1, ge=0, le=PRIORITY_MAX)
    rate_max: Mbit
    burst_max: MiB

    def limit(self) -> EipLimit:
        """The limit that the command asks for."""
        fields = self.model_dump(exclude={"op"})
        return EipLimit.model_validate({"direction": self.direction, **fields})


class _EipQosDel(Part):
    direction: ClassVar[Direction]
    eip: IPv4


class EipEgressQosAdd(_EipQosAdd):
    """Limit what leaves by an EIP; a standing limit is replaced."""

    direction = "egress"
    op: Literal["eip-egress-qos-add"] = "eip-egress-qos-add"


class EipIngressQosAdd(_EipQosAdd):
    """Limit what comes to an EIP; a standing limit is replaced."""

    direction = "ingress"
    op: Literal["eip-ingress-qos-add"] = "eip-ingress-qos-add"


class EipEgressQosDel(_EipQosDel):
    direction = "egress"
    op: Literal["eip-egress-qos-del"] = "eip-egress-qos-del"


class EipIngressQosDel(_EipQosDel):
    direction = "ingress"
    op: Literal["eip-ingress-qos-del"] = "eip-ingress-qos-del"


class QosAdd(InterfaceLimit):
    """Limit an interface; a standing limit of the same identity is replaced."""

    op: Literal["qos-add"] = "qos-add"

    def limit(self) -> InterfaceLimit:
        """The limit that the command asks for."""
        return InterfaceLimit.model_validate(self.model_dump(exclude={"op"}))


class QosDel(LimitIdentity):
    op: Literal["qos-del"] = "qos-del"


QosCommand = EipEgressQosAdd | EipIngressQosAdd | EipEgressQosDel | EipIngressQosDel | QosAdd | QosDel


def edit_qos(spec: GatewaySpec, command: QosCommand) -> GatewaySpec:
    """The spec after one command."""
    match command:
        case EipEgressQosAdd() | EipIngressQosAdd() | QosAdd():
            qos = spec.qos.put(command.limit())
        case EipEgressQosDel() | EipIngressQosDel():
            qos = spec.qos.drop((command.eip, command.direction))
        case QosDel():
            qos = spec.qos.drop(command.key)
    return spec.model_copy(update={"qos": qos})
