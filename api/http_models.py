"""What the HTTP face says besides the spec itself: plans, results and problems, camelCase on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from gateway.standing import Outcome
from rules.iptables import rule_text
from rules.maps import script as map_script
from rules.nft import command_lines
from rules.ruleset import ChainEdit, DeleteChain, DeleteRule, InsertRule, NewChain, ReplaceRules
from rules.spec import Part
from rules.state import (
    MAIN_TABLE,
    AddAddress,
    AddPolicyRule,
    DeleteAddress,
    DeletePolicyRule,
    DeleteRoute,
    EditMaps,
    EditNft,
    EditTable,
    Plan,
    ReplaceRoute,
    SetArp,
    SetPromoteSecondaries,
    SetUp,
    Step,
)
from rules.tc import DeleteTc, SetTc
from rules.tc_text import tc_text

PROBLEM_JSON = "application/problem+json"


class ChainEditModel(Part):
    """One edit of a chain. ``position`` counts from 1, as iptables does; ``text`` is what one would tell iptables."""

    edit: Literal["new-chain", "delete-chain", "insert-rule", "delete-rule", "replace-rules"]
    chain: str
    position: int | None = None
    rules: tuple[str, ...] = ()
    text: str


class EditTableStep(Part):
    """Edits of one netfilter table, committed as one."""

    step: Literal["edit-table"] = "edit-table"
    table: str
    edits: list[ChainEditModel]
    text: str


class EditNftStep(Part):
    """Commands for one of the nftables tables (shared port mappings; maps ahead of the chains), committed as one."""

    step: Literal["edit-nft"] = "edit-nft"
    commands: list[str]
    text: str


class AddressStep(Part):
    """An address comes to, or goes from, an interface."""

    step: Literal["add-address", "delete-address"]
    interface: str
    address: str
    text: str


class RouteStep(Part):
    """A route comes (in place of the one there was) or goes; 254 is the main table."""

    step: Literal["replace-route", "delete-route"]
    prefix: str
    table: int
    interface: str
    via: str | None
    onlink: bool
    text: str


class PolicyRuleStep(Part):
    """The rule comes or goes that what came in by the interface is routed by the table."""

    step: Literal["add-policy-rule", "delete-policy-rule"]
    interface: str
    table: int
    text: str


class SwitchStep(Part):
    """A flag of an interface: whether it answers ARP, is up; whether secondary addresses outlive their primary one."""

    step: Literal["set-arp", "set-promote-secondaries", "set-up"]
    interface: str
    on: bool
    text: str


class TcModel(Part):
    """An object of traffic control comes or changes, or goes: a qdisc, a class, a filter, an ifb device."""

    step: Literal["set-tc", "delete-tc"]
    interface: str
    text: str


StepModel = Annotated[
    EditTableStep | EditNftStep | AddressStep | RouteStep | PolicyRuleStep | SwitchStep | TcModel,
    Field(discriminator="step"),
]


class PlanModel(Part):
    """Steps in the order in which they happen; none when the kernel is as wanted."""

    steps: list[StepModel]


class Result(Part):
    """What a change did or, on a dry run, would do.

    ``changed``: the spec or the kernel differs from before. ``announced``: addresses announced by ARP.
    ``flowsDeleted``: tracked connections ended because their translation is gone or new. ``seconds`` include
    neither the wait for earlier changes nor the announcements' repetitions.
    """

    dry_run: bool = False
    changed: bool
    plan: PlanModel
    announced: tuple[str, ...] = ()
    flows_deleted: int = 0
    seconds: float = 0.0


class FieldError(Part):
    """``field`` is the dotted path in the body (``dnats.0.externalPort``) or the name of a path or query parameter."""

    field: str
    message: str


class Problem(Part):
    """Why a request failed (RFC 9457). Extensions beside the standard members stand only where they apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    type: str = Field(examples=["urn:natgw:problem:conflict"])
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = Field(default=None, description="invalid input: every field that is wrong")
    wanted: str | None = Field(default=None, description="conflict: the object that was asked for")
    standing: str | None = Field(default=None, description="conflict: the object that stands in its way")
    step: str | None = Field(default=None, description="kernel refusal: what was tried")
    reason: str | None = Field(default=None, description="kernel refusal: the kernel's own words")
    retryable: bool | None = Field(default=None, description="kernel refusal: whether it may succeed later")
    restored: bool | None = Field(default=None, description="kernel refusal: whether everything is as it was before")
    pending: list[str] | None = Field(default=None, description="not ready: what is still to be done")


# What FastAPI is told of the responses that are problems.
Responses = dict[int | str, dict[str, Any]]
NOT_INITIALIZED: Responses = {404: {"model": Problem, "description": "The gateway is not initialized"}}
NOT_THERE: Responses = {
    404: {"model": Problem, "description": "There is no such object"},
    422: {"model": Problem, "description": "The path names no object"},
}
NOT_READY: Responses = {503: {"model": Problem, "description": "Not ready; `pending` says what is still to be done"}}
WRITE_PROBLEMS: Responses = {
    409: {"model": Problem, "description": "Two objects contradict each other, or the gateway is not initialized"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "A field is wrong; `errors` names every one"},
    500: {"model": Problem, "description": "The kernel refused, in its own words; the state before is restored"},
    503: {"model": Problem, "description": "Too many changes are waiting; nothing was tried"},
}


def result(outcome: Outcome, *, changed: bool, dry_run: bool) -> Result:
    """The wire form of an outcome."""
    return Result(
        dry_run=dry_run,
        changed=changed,
        plan=plan_model(outcome.plan),
        announced=outcome.announced,
        flows_deleted=outcome.flows_deleted,
        seconds=outcome.seconds,
    )


def plan_model(plan: Plan) -> PlanModel:
    """The wire form of a plan; each step's ``text`` is the command line that an operator would know it by."""
    return PlanModel(steps=[_step(step) for step in plan.steps])


def _step(step: Step) -> StepModel:  # noqa: PLR0911 -- one line a step
    match step:
        case EditTable(table, edits):
            listed = [_edit(table, edit) for edit in edits]
            return EditTableStep(table=table, edits=listed, text=f"{len(listed)} edits of table {table}, in one commit")
        case EditNft(commands):
            lines = [line for command in commands for line in command_lines(command)]
            text = f"{len(commands)} edits of table ip kube-ovn, in one commit"
            return EditNftStep(commands=lines, text=text)
        case EditMaps(map_edits):
            text = f"{len(map_edits)} edits of table ip natgw, in one commit"
            return EditNftStep(commands=map_script(map_edits).splitlines(), text=text)
        case AddAddress(key):
            text = f"ip address add {key.address} dev {key.interface}"
            return AddressStep(step="add-address", interface=key.interface, address=key.address, text=text)
        case DeleteAddress(key):
            text = f"ip address del {key.address} dev {key.interface}"
            return AddressStep(step="delete-address", interface=key.interface, address=key.address, text=text)
        case ReplaceRoute() | DeleteRoute():
            return _route(step)
        case SetArp(interface, on):
            text = f"ip link set dev {interface} arp {'on' if on else 'off'}"
            return SwitchStep(step="set-arp", interface=interface, on=on, text=text)
        case SetPromoteSecondaries(interface, on):
            text = f"sysctl -w net/ipv4/conf/{interface}/promote_secondaries={on:d}"
            return SwitchStep(step="set-promote-secondaries", interface=interface, on=on, text=text)
        case SetUp(interface, on):
            text = f"ip link set dev {interface} {'up' if on else 'down'}"
            return SwitchStep(step="set-up", interface=interface, on=on, text=text)
        case AddPolicyRule(rule):
            text = f"ip rule add iif {rule.interface} table {rule.table}"
            return PolicyRuleStep(step="add-policy-rule", interface=rule.interface, table=rule.table, text=text)
        case DeletePolicyRule(rule):
            text = f"ip rule del iif {rule.interface} table {rule.table}"
            return PolicyRuleStep(step="delete-policy-rule", interface=rule.interface, table=rule.table, text=text)
        case SetTc() | DeleteTc():
            kind: Literal["set-tc", "delete-tc"] = "set-tc" if isinstance(step, SetTc) else "delete-tc"
            return TcModel(step=kind, interface=step.key.device, text=tc_text(step))
    raise TypeError(f"only an egress gateway's plan has such a step: {step}")


def _route(step: ReplaceRoute | DeleteRoute) -> RouteStep:
    replaces, entry = isinstance(step, ReplaceRoute), step.entry
    via = f" via {entry.via}" if entry.via else ""
    onlink = " onlink" if entry.onlink else ""
    table = "" if step.key.table == MAIN_TABLE else f" table {step.key.table}"
    return RouteStep(
        step="replace-route" if replaces else "delete-route",
        prefix=step.key.prefix,
        table=step.key.table,
        interface=entry.interface,
        via=entry.via,
        onlink=entry.onlink,
        text=f"ip route {'replace' if replaces else 'del'} {step.key.prefix}{via} dev {entry.interface}{onlink}{table}",
    )


def _edit(table: str, edit: ChainEdit) -> ChainEditModel:
    chain = edit.ref.chain
    command = f"iptables -t {table}"
    match edit:
        case NewChain():
            return ChainEditModel(edit="new-chain", chain=chain, text=f"{command} -N {chain}")
        case DeleteChain():
            return ChainEditModel(edit="delete-chain", chain=chain, text=f"{command} -X {chain}")
        case InsertRule(_, index, rule):
            body = rule_text(rule)
            text = f"{command} -I {chain} {index + 1} {body}"
            return ChainEditModel(edit="insert-rule", chain=chain, position=index + 1, rules=(body,), text=text)
        case DeleteRule(_, index, rule):
            body = rule_text(rule)
            text = f"{command} -D {chain} {body}"
            return ChainEditModel(edit="delete-rule", chain=chain, position=index + 1, rules=(body,), text=text)
        case ReplaceRules(_, rules):
            bodies = tuple(rule_text(rule) for rule in rules)
            text = f"{command} -F {chain}, then {len(bodies)} rules"
            return ChainEditModel(edit="replace-rules", chain=chain, rules=bodies, text=text)
