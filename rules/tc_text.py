"""Traffic control's steps in the words of tc(8), for logs, answers and refusals."""

from __future__ import annotations

from rules.tc import (
    BUCKETS,
    R2Q,
    Classify,
    ClassKey,
    DeleteTc,
    FilterKey,
    Htb,
    IfbKey,
    IngressKey,
    Link,
    Policer,
    PolicerKey,
    Rate,
    Redirect,
    RedirectKey,
    RootKey,
    TableKey,
    TcStep,
    Value,
)


def tc_text(step: TcStep) -> str:  # noqa: PLR0911 -- one line an object
    """The step as one would tell tc (or ip) about it."""
    delete, key, value = isinstance(step, DeleteTc), step.key, step.value
    match key, value:
        case IfbKey(device), _:
            return f"ip link {'del' if delete else 'add'} {device}{'' if delete else ' type ifb'}"
        case RootKey(device), Htb(default):
            what = "" if delete else f" handle 1: htb default {default:#x} r2q {R2Q}"
            return f"tc qdisc {'del' if delete else 'add'} dev {device} root{what}"
        case ClassKey(device, minor), Rate(rate):
            if delete:
                return f"tc class del dev {device} classid 1:{minor:x}"
            size = f"{value.burst_bytes:.0f}b"
            speed = f"{rate * 8}bit"
            limits = f"rate {speed} ceil {speed} burst {size} cburst {size}"
            return f"tc class replace dev {device} parent 1: classid 1:{minor:x} htb {limits}"
        case TableKey(device, priority, table), _:
            verb = "del" if delete else "add"
            end = "" if delete else f" divisor {BUCKETS}"
            return f"tc filter {verb} dev {device} parent 1: protocol ip prio {priority} handle {table:x}: u32{end}"
        case FilterKey(device, priority, table, bucket, node), _:
            where = f"dev {device} parent 1: protocol ip prio {priority} handle {table:x}:{bucket:x}:{node:x} u32"
            return f"tc filter del {where}" if delete else f"tc filter add {where} {_filter_text(value)}"
        case PolicerKey(device, ingress, priority, handle), Policer(selector, Rate(rate)):
            parent = "ffff:" if ingress else "1:"
            where = f"dev {device} parent {parent} protocol ip prio {priority} handle {handle:#x}"
            kind = "matchall" if value.matchall else f"u32 match u32 {selector.value:#x} {selector.mask:#x}"
            kind += "" if value.matchall else f" at {selector.offset}"
            drop = f" {kind} police rate {rate * 8}bit burst {value.rate.burst_bytes:.0f}b drop"
            return f"tc filter {'del' if delete else 'add'} {where}{f' {kind.split()[0]}' if delete else drop}"
        case IngressKey(device), _:
            return f"tc qdisc {'del' if delete else 'add'} dev {device} ingress"
        case RedirectKey(device), Redirect(ifb):
            where = f"dev {device} parent ffff: prio 65535"
            to = f" protocol ip u32 match u32 0 0 action mirred egress redirect dev {ifb}"
            return f"tc filter {'del' if delete else 'add'} {where}{'' if delete else to}"
    return f"{key} {value}"


def _filter_text(value: Value) -> str:
    match value:
        case Classify(selectors, minor):
            matches = " ".join(f"match u32 {s.value:#x} {s.mask:#x} at {s.offset}" for s in selectors)
            return f"{matches} flowid 1:{minor:x}"
        case Link(table, offset, mask):
            return f"match u32 0 0 link {table:x}: hashkey mask {mask:#x} at {offset}"
    return ""
