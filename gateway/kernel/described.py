"""Steps in words, for errors."""

from __future__ import annotations

from gateway.kernel import devices
from rules.state import (
    MAIN_TABLE,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    LinkStep,
    PolicyRule,
    ReplaceRoute,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
)


def described(step: LinkStep) -> str:  # noqa: PLR0911 -- one line a step
    """A step in words, for errors."""
    match step:
        case AddAddress(key):
            return f"add address {key.address} on {key.interface}"
        case DeleteAddress(key):
            return f"delete address {key.address} on {key.interface}"
        case ReplaceRoute(key, entry) | DeleteRoute(key, entry):
            verb = "replace" if isinstance(step, ReplaceRoute) else "delete"
            via = f" via {entry.via}" if entry.via else ""
            table = "" if key.table == MAIN_TABLE else f" table {key.table}"
            return f"{verb} route {key.prefix}{via} dev {entry.interface}{table}"
        case AddPolicyRule(rule) | DeletePolicyRule(rule):
            verb = "add" if isinstance(step, AddPolicyRule) else "delete"
            return f"{verb} {_rule_text(rule)}"
        case SetArp(interface, on):
            return f"switch ARP {'on' if on else 'off'} on {interface}"
        case SetPromoteSecondaries(interface, on):
            return f"set promote_secondaries={int(on)} on {interface}"
        case SetUp(interface, on):
            return f"set {interface} {'up' if on else 'down'}"
        case SetSysctl(name, value):
            return f"set {name}={value}"
        case AddDevice(interface, device):
            return f"make the {devices.kind(device)} device {interface}"
        case DeleteDevice(interface):
            return f"delete the device {interface}"
        case SetMaster(interface, master):
            return f"make {interface} a port of {master}" if master else f"make {interface} a port of nothing"


def _rule_text(rule: PolicyRule) -> str:
    words = ["rule" if rule.family == 4 else "IPv6 rule"]
    words += [f"{rule.priority}:"] if rule.priority is not None else []
    words += [f"from {rule.source}"] if rule.source else []
    words += [f"iif {rule.interface}"] if rule.interface else []
    return " ".join([*words, f"lookup {rule.table}"])
