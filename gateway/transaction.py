"""The one operation: make the kernel equal this spec, or leave it exactly as it was.

Read, compare, commit, re-read what was touched, verify; on any refusal go back to the reading taken
before. Going back is the same comparison with the old reading as the wanted state, so it also repairs a
half-applied batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from gateway.ports import Around, Firewall, Flows, Joint, Links, LinksReading, Maps, Moved, Nft, Refused, Shaper
from rules.appliance import Spec, desired
from rules.delta import delta, touched_tables, touches_links, touches_maps, touches_nft, touches_tc, undo
from rules.desired import Facts
from rules.nft import NftTable
from rules.qos import interfaces_of
from rules.qos_tree import Unshapeable
from rules.ruleset import FAMILIES, ChainRef, Family, Rules, Ruleset
from rules.spec import GatewaySpec
from rules.state import Actual, Desired, EditMaps, EditNft, EditTable, LinkStep, Plan
from rules.tc import TcStep

D = TypeVar("D")

TABLES = ("mangle", "nat")
# One pass does it; a second one mends what the kernel itself changed on the way (routes that went with an address).
PASSES = 3


class Unverified(Refused):
    """The kernel took every step and yet does not look as wanted: somebody else is writing, or it lied."""

    def __init__(self, left: Plan) -> None:
        super().__init__("verify", f"after commit the kernel still differs: {left.steps[0]}", retryable=True)
        self.left = left


class NotReverted(Refused):
    """A change was refused and what had been done of it could not be undone: the kernel matches neither state."""

    def __init__(self, cause: Exception, undoing: Refused) -> None:
        super().__init__("revert", f"{undoing}; it followed a refusal: {cause}", retryable=True)


class Memory(Protocol):
    """Remembered readings (``gateway.remembered``)."""

    def forget(self) -> None: ...

    def share(self, wanted: Mapping[ChainRef, Rules | None]) -> None: ...


@dataclass(frozen=True)
class Kernel:
    """The ports that a transaction needs."""

    firewall: Firewall
    links: Links
    flows: Flows
    nft: Nft | None = None
    """The table of share-type DNAT; this and what follows: where they matter."""
    shaper: Shaper | None = None
    firewall6: Firewall | None = None
    maps: Maps | None = None
    """The maps ahead of the chains."""
    joint: Joint | None = None
    """Both at once, where one transaction can be about both."""
    around: Around | None = None
    tables: tuple[str, ...] = TABLES
    tables6: tuple[str, ...] = ()
    """Of ``firewall6``; empty: the same ones."""
    memory: Memory | None = None
    """Where readings are remembered."""


@dataclass(frozen=True)
class Done:
    """What a transaction did (an empty plan if nothing was to do), and the kernel as it was read at its end."""

    plan: Plan
    actual: Actual
    later: bool = False
    """Whether chains were not looked at, for they may follow the maps."""


def read(kernel: Kernel, *, anew: bool = False) -> Actual:
    """One reading of everything that a spec can be about; ``anew``: nothing of it remembered."""
    if anew and kernel.memory:
        kernel.memory.forget()
    chains = kernel.firewall.read(kernel.tables).chains
    if kernel.firewall6:
        chains = {**chains, **kernel.firewall6.read(kernel.tables6 or kernel.tables).chains}
    nft = kernel.nft.read() if kernel.nft else NftTable()
    tc = kernel.shaper.read() if kernel.shaper else {}
    return with_links(_with_maps(Actual(Ruleset(chains), nft=nft, tc=tc), kernel.maps), kernel.links.read())


def _with_maps(actual: Actual, maps: Maps | None) -> Actual:
    if maps is None:
        return actual
    read = maps.read()
    return replace(actual, maps=read.table, no_maps=read.hindrance)


def with_links(actual: Actual, read: LinksReading) -> Actual:
    """The reading with its links, addresses and routes replaced."""
    return replace(
        actual,
        links=read.links,
        addresses=read.addresses,
        routes=read.routes,
        policy_rules=read.policy_rules,
        sysctls=read.sysctls,
    )


def plan(spec: Spec, facts: Facts, actual: Actual) -> Plan:
    """What ``apply`` would do; raises Refused when an interface of the spec is missing."""
    return delta(_wanted(spec, facts, actual), actual)


def foreign(spec: Spec, facts: Facts, actual: Actual, left: Actual) -> Plan:
    """What others have changed while chains of ours follow the maps: those are wanted as we ``left`` them."""
    wanted = _wanted(spec, replace(facts, follow=True), actual)
    chains = {ref: rules for ref in wanted.later if (rules := left.ruleset.chains.get(ref)) is not None}
    return delta(replace(wanted, chains={**wanted.chains, **chains}), actual)


def _wanted(spec: Spec, facts: Facts, actual: Actual) -> Desired:
    sides = (spec.interfaces.vpc, spec.interfaces.external) if spec.initialized else ()
    shaped = interfaces_of(spec) if isinstance(spec, GatewaySpec) else ()
    for name in (*sides, *sorted(shaped)):
        if name not in actual.links:
            raise Refused(f"interface {name}", "no such interface", retryable=True)
    try:
        return desired(spec, facts, actual)
    except Unshapeable as error:
        raise Refused("bandwidth limits", str(error), retryable=False) from error


def apply(kernel: Kernel, spec: Spec, facts: Facts, *, follow: bool = False) -> Done:
    """Make the kernel equal ``spec``; with ``follow``, chains that may follow behind the maps are left as they are.

    Raises Refused (or whatever else a driver raised) with the kernel restored to what it was before, or NotReverted.
    """
    later = follow

    def planned(actual: Actual) -> Plan:
        nonlocal later
        wanted = _wanted(spec, replace(facts, follow=later), actual)
        later = bool(wanted.later)  # once they were looked at, they are verified, too
        left = delta(wanted, actual)
        if not left and kernel.memory:
            kernel.memory.share(wanted.chains)
        if not left and kernel.maps and wanted.maps:
            kernel.maps.share(wanted.maps)
        return left

    return replace(converge(kernel, planned), later=later)


def converge(kernel: Kernel, planned: Callable[[Actual], Plan]) -> Done:
    """Carry out what ``planned`` says of the kernel's state until it says nothing.

    Raises Refused (or whatever else a driver raised) with the kernel restored to what it was before, or NotReverted.
    """
    before = actual = read(kernel)
    done = left = planned(before)
    try:
        for _ in range(PASSES):
            if not left:
                return Done(done, actual)
            try:
                _commit(kernel, left)
                actual = _reread(kernel, left, actual)
            except Moved as moved:
                # What somebody else wrote meanwhile belongs to the state before ours: that edit did not happen.
                actual = read(kernel)
                before = _with_table(before, moved.table, actual)
                done = Plan((*done.steps, *planned(actual).steps))
            left = planned(actual)
        if left:
            raise Unverified(left)
    except Exception as error:
        _revert(kernel, done, before, error)
        raise
    return Done(done, actual)


def _with_table(actual: Actual, table: str, other: Actual) -> Actual:
    """The reading with one IPv4 table of another one."""
    rest = {ref: rules for ref, rules in actual.ruleset.chains.items() if (ref.table, ref.family) != (table, 4)}
    chains = {ref: rules for ref, rules in other.ruleset.chains.items() if (ref.table, ref.family) == (table, 4)}
    return replace(actual, ruleset=Ruleset(rest | chains))


def _revert(kernel: Kernel, done: Plan, before: Actual, cause: Exception) -> None:
    try:
        now = read(kernel)
        for _ in range(PASSES):
            back = undo(done, before, now)
            if not back:
                return
            _commit(kernel, back)
            now = read(kernel)
        if back := undo(done, before, now):
            raise Unverified(back)
    except Refused as undoing:
        raise NotReverted(cause, undoing) from cause


def _commit(kernel: Kernel, todo: Plan) -> None:
    """Carry the steps out in order; neighbouring steps of one port go as one batch."""
    batch: list[LinkStep] = []
    limits: list[TcStep] = []
    joined = None
    for step, following in zip(todo.steps, (*todo.steps[1:], None), strict=True):
        if step is joined:
            continue
        if not isinstance(step, LinkStep):
            _flush(kernel, batch)
        if not isinstance(step, TcStep):
            _shape(kernel, limits)
        if isinstance(step, EditTable):
            if _at_once(kernel, step, following):
                joined = following
            else:
                _firewall(kernel, step.family).edit(step.table, step.edits)
        elif isinstance(step, EditNft):
            _driver(kernel.nft, step).commit(step.commands)
        elif isinstance(step, EditMaps):
            _driver(kernel.maps, step).commit(step.edits)
        elif isinstance(step, TcStep):
            limits.append(step)
        else:
            batch.append(step)
    _flush(kernel, batch)
    _shape(kernel, limits)


def _at_once(kernel: Kernel, step: EditTable, following: object) -> bool:
    """Whether the table's edits, and the maps' that follow, were committed as one; else nothing has happened."""
    if kernel.joint is None or step.family != 4 or not isinstance(following, EditMaps):
        return False
    return kernel.joint.commit(step.table, step.edits, following.edits)


def _firewall(kernel: Kernel, family: Family) -> Firewall:
    return _driver(kernel.firewall if family == 4 else kernel.firewall6, "an IPv6 table")


def _driver(port: D | None, what: object) -> D:
    """The driver of a port; a plan that needs one which is not there is refused."""
    if port is None:
        raise Refused(str(what), "there is no driver for it", retryable=False)
    return port


def _flush(kernel: Kernel, batch: list[LinkStep]) -> None:
    if batch:
        kernel.links.commit(tuple(batch))
        batch.clear()


def _shape(kernel: Kernel, steps: list[TcStep]) -> None:
    if steps:
        _driver(kernel.shaper, steps[0]).commit(tuple(steps))
        steps.clear()


def _reread(kernel: Kernel, touched: Plan, actual: Actual) -> Actual:
    """The reading with what the plan touched read anew."""
    chains = dict(actual.ruleset.chains)
    for family in FAMILIES:
        if tables := touched_tables(touched, family):
            kept = {ref: rules for ref, rules in chains.items() if ref.family != family or ref.table not in tables}
            chains = {**kept, **_firewall(kernel, family).read(tables).chains}
    nft = kernel.nft.read() if kernel.nft and touches_nft(touched) else actual.nft
    tc = kernel.shaper.read() if kernel.shaper and touches_tc(touched) else actual.tc
    read = replace(actual, ruleset=Ruleset(chains), nft=nft, tc=tc)
    if touches_maps(touched):
        read = _with_maps(read, kernel.maps)
    if not touches_links(touched):
        return read
    return with_links(read, kernel.links.read())
