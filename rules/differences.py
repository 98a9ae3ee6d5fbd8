"""How the kernel differs from what is wanted, in words: read off the plan that would make it right. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rules.iptables import render_rule
from rules.maps import script as map_script
from rules.nft import command_lines
from rules.ruleset import ChainEdit, DeleteChain, DeleteRule, InsertRule, NewChain, ReplaceRules
from rules.state import (
    MAIN_TABLE,
    Actual,
    AddAddress,
    AddDevice,
    AddPolicyRule,
    DeleteAddress,
    DeleteDevice,
    DeletePolicyRule,
    DeleteRoute,
    EditMaps,
    EditNft,
    EditTable,
    Plan,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetMaster,
    SetPromoteSecondaries,
    SetSysctl,
    SetUp,
    Step,
)
from rules.tc import DeleteTc, SetTc
from rules.tc_text import tc_text


def differences(repair: Plan, actual: Actual) -> tuple[str, ...]:
    """One line for each object that is not as wanted; ``repair`` is the plan for ``actual``."""
    return tuple(line for step in repair.steps for line in _lines(step, actual))


def _lines(step: Step, actual: Actual) -> Iterator[str]:  # noqa: PLR0912 -- one line a step
    match step:
        case EditTable(table, edits):
            for edit in edits:
                yield from _edit(table, edit, len(actual.ruleset.chains.get(edit.ref, ())))
        case EditNft(commands):
            for command in commands:
                yield from (f"nft differs: it would take {line}" for line in command_lines(command))
        case EditMaps(map_edits):
            for one in map_edits:
                yield from (f"maps differ: it would take {line}" for line in map_script([one]).splitlines())
        case SetTc(key, _):
            yield f"{'differs' if key in actual.tc else 'missing'}: {tc_text(step)}"
        case DeleteTc():
            yield f"there: {tc_text(step).replace(' del ', ' ', 1)}"
        case AddAddress(key):
            yield f"address {key.address} on {key.interface} is missing"
        case DeleteAddress(key):
            yield f"address {key.address} on {key.interface} is there"
        case ReplaceRoute(key, entry):
            standing = actual.routes.get(key)
            now = f"is there as {_route(key, standing)}" if standing else "is missing"
            yield f"route {_route(key, entry)} {now}"
        case DeleteRoute(key, entry):
            yield f"route {_route(key, entry)} is there"
        case SetArp(interface, on):
            yield f"ARP is {'off' if on else 'on'} on {interface}"
        case SetPromoteSecondaries(interface, on):
            yield f"promote_secondaries is {int(not on)} on {interface}"
        case SetUp(interface, on):
            yield f"{interface} is {'down' if on else 'up'}"
        case AddPolicyRule(rule) | DeletePolicyRule(rule):
            what = "missing" if isinstance(step, AddPolicyRule) else "there"
            yield f"the routing rule for table {rule.table} (from {rule.interface or 'anywhere'}) is {what}"
        case SetSysctl(name, value):
            yield f"{name} is {actual.sysctls.get(name)}, not {value}"
        case AddDevice(interface):
            yield f"the device {interface} is missing"
        case DeleteDevice(interface):
            yield f"the device {interface} is there"
        case SetMaster(interface, master):
            yield f"{interface} is no port of {master}" if master else f"{interface} is a port"


def _edit(table: str, edit: ChainEdit, standing: int) -> Iterator[str]:
    where = f"{table} {edit.ref.chain}"
    match edit:
        case NewChain():
            yield f"chain {where} is missing"
        case DeleteChain():
            yield f"chain {where} is there"
        case InsertRule(_, _, rule):
            yield f"{where} lacks: {render_rule(rule)}"
        case DeleteRule(_, _, rule):
            yield f"{where} has besides: {render_rule(rule)}"
        case ReplaceRules(_, rules):
            yield f"{where} has {standing} rules, most of them not the {len(rules)} that it should have"


def _route(key: RouteKey, entry: RouteEntry) -> str:
    via = f" via {entry.via}" if entry.via else ""
    table = "" if key.table == MAIN_TABLE else f" table {key.table}"
    return f"{key.prefix}{via} dev {entry.interface}{table}"
