"""What stands: the last accepted spec, and the kernel that is made to equal it.

A change goes through the one operation, is booked, announced and stored, and stale connections are forgotten. What
follows a committed change (store, flows) and fails is retried forward and keeps readiness false; it never undoes the
change. What is found at the start, and what others do to the kernel later, goes the same way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway import meters, transaction
from gateway.chase import Chase
from gateway.drift import LOOK_SHARE, Drift, Look
from gateway.endings import Endings
from gateway.follow import Announcing, Followers
from gateway.journal import DETAILED, Asker, Journal
from gateway.ports import Clock, Refused
from gateway.status import (
    ArpStatus,
    ConflictStatus,
    Counts,
    ErrorStatus,
    FastpathStatus,
    LinkStatus,
    Status,
    TransactionCounts,
)
from gateway.store import Store, Stored
from gateway.transaction import Done, Kernel
from rules.advice import warnings
from rules.appliance import OtherAppliance, Spec, adopt
from rules.changes import first
from rules.chase import concerns
from rules.desired import Facts, without_maps
from rules.differences import differences
from rules.edit import Conflict, NotInitialized
from rules.loadbalancer import LoadBalancerSpec
from rules.ruleset import BUILTIN
from rules.spec import GatewaySpec, Interfaces
from rules.state import Actual, AddAddress, AddressKey, EditTable, Plan

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0

ASKERS_DOING = (Conflict, NotInitialized, OtherAppliance)


@dataclass(frozen=True)
class Outcome:
    """What one change did: the spec that stands now, the steps taken, and what followed."""

    spec: Spec
    plan: Plan
    flows_deleted: int = 0
    announced: tuple[str, ...] = ()
    seconds: float = 0.0
    read: Actual | None = None
    """What the plan was made for, where nothing was carried out."""


@dataclass(frozen=True)
class Change:
    """What is asked for.

    ``edit`` takes the spec that stands and returns the wanted one. ``by`` is who asked. ``announce`` names EIPs to
    announce once more even if nothing changes, ``dismiss`` prefixes whose routes go even if somebody else made them.
    """

    edit: Callable[[Spec | None], Spec]
    by: Asker | str
    dry_run: bool = False
    announce: tuple[str, ...] = ()
    dismiss: frozenset[str] = frozenset()


class Standing:
    """The state of one namespace's gateway. The writer's thread alone changes it; any thread may read its attributes.

    ``changed`` is called with the spec before and after every change of it; it must not block or raise.
    """

    def __init__(
        self,
        kernel: Kernel,
        announcer: Announcing,
        store: Store,
        clock: Clock,
        *,
        facts: Facts,
        interfaces: Interfaces | None,
        version: str,
        drift: Drift,
        journal: Journal,
        changed: Callable[[Spec | None, Spec], object],
    ) -> None:
        self._kernel = kernel
        self._announcer = announcer
        self._store = store
        self._endings = Endings(kernel.flows, clock)
        self._followers = Followers(announcer, store, self._endings, self._keep_up)
        self._clock = clock
        self._interfaces = interfaces
        self._version = version
        self._drift = drift
        self._journal = journal
        self._changed = changed
        self._chase = Chase(clock)
        self._started = clock.monotonic()
        self._retry_at: float | None = None
        self.facts = facts
        self.spec: Spec | None = None
        """The last committed spec."""
        self.actual = Actual()
        """The kernel as it was last read; before there is a spec, links, addresses and routes alone."""
        self._error: ErrorStatus | None = None
        self._counts = TransactionCounts()
        self._generation = 0
        self._known = False  # whether there is a last state, and which
        self._unapplied = False  # the kernel is not known to equal the spec
        self._rejected = ("", "")
        self._fastpath = FastpathStatus()

    def status(self) -> Status:
        """One look at the gateway, without touching the kernel."""
        spec = self.spec
        initialized = spec is not None and spec.initialized
        interfaces = (spec.interfaces if spec and initialized else self._interfaces) or Interfaces()
        external = self.actual.links.get(interfaces.external)
        pending = self.pending()
        return Status(
            ready=not pending,
            initialized=initialized,
            appliance="lb-svc" if isinstance(spec, LoadBalancerSpec) else "nat-gateway",
            version=self._version,
            variant=self._kernel.firewall.variant,
            interfaces=interfaces,
            links={
                name: LinkStatus.of(link)
                for name, link in self.actual.links.items()
                if name in (interfaces.vpc, interfaces.external)
            },
            arp=ArpStatus(policy=self.facts.arp, on=external is not None and external.arp),
            counts=Counts.of(spec),
            conflicts=[
                ConflictStatus.of(interface, conflict)
                for interface, conflicts in self._announcer.conflicts().items()
                for conflict in conflicts
            ],
            last_error=self._error,
            pending=pending,
            warnings=warnings(spec) if isinstance(spec, GatewaySpec) else [],
            fastpath=self._fastpath,
            generation=self._generation,
            transactions=self._counts,
            drift=self._drift.status(),
            uptime_seconds=self._clock.monotonic() - self._started,
        )

    def pending(self) -> list[str]:
        """What is outstanding, in words: while there is any of it the gateway is not ready."""
        unknown = ["the last state is not known yet"] if not self._known else []
        unapplied = ["kernel does not equal the spec"] if self._unapplied or self._drift.differs else []
        lagging = ["the chains do not follow the maps"] if self._chase.failed else []
        return unknown + unapplied + lagging + self._followers.pending()

    def wait(self) -> float:
        """Seconds until something is to be done without being asked."""
        if self._endings.under_way:
            return 0.0
        wait = min(self._drift.wait(), math.inf if (chase := self._chase.wait()) is None else chase)
        return wait if self._retry_at is None else min(wait, max(0.0, self._retry_at - self._clock.monotonic()))

    def tend(self) -> None:
        """Do what is due: look whether the kernel is still as wanted, try again what is outstanding."""
        self._keep_up()
        now = self._clock.monotonic()
        if self._known and not (self._unapplied or self._followers.pending()):
            self._retry_at = None
        elif self._retry_at is None:
            self._retry_at = now + RETRY_SECONDS
        elif now >= self._retry_at:
            self._retry_at = None
            self._retry()

    def _keep_up(self) -> None:
        """What is done for the spec that stands, also while it is being stored: no disk is needed for it."""
        if (look := self._drift.due(writing=self._chase.due())) is not None:
            self._catch_up(look)
        self._follow_maps(due=self._chase.due())
        if self.spec is not None:
            self._endings.go_on(self.spec)

    def settle(self) -> None:
        """Have the chains follow the maps now."""
        self._follow_maps(due=self._chase.behind)

    def finish(self) -> None:
        """Leave nothing owed that can be done."""
        self.settle()
        if self.spec is not None:
            self._endings.finish(self.spec)
        self._followers.close()

    def _follow_maps(self, *, due: bool) -> None:
        """Bring the chains up to what the maps say already; a failure is told, and tried again, never undone."""
        if not due or self.spec is None:
            return
        try:
            done = transaction.apply(self._kernel, self.spec, self.facts)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("the chains do not follow the maps")
            self.failed("chains", error)  # first: whoever sees that it is not ready shall see why
            self._chase.fail()
        else:
            self.actual = done.actual
            self._note_behind(behind=False)

    def _note_behind(self, *, behind: bool) -> None:
        self._chase.note(behind=behind)
        self._fastpath = self._fastpath.model_copy(update={"behind": behind})

    def _retry(self) -> None:
        if self._unapplied or not self._known:
            self._catch_up(Look(("retry",)))
        elif self.spec is not None:
            self._follow_up(self.spec)

    def change(self, asked: Change) -> Outcome:
        """Carry out one change; raises what its edit or the kernel's drivers raised, and all is as before then."""
        begun = self._clock.monotonic()
        if not self._known:
            self._learn()  # a change of what is not known would take it for nothing
        old = self.spec
        new = asked.edit(old)
        facts = replace(self.facts, dismissed=asked.dismiss)
        if asked.dry_run:
            self.settle()  # what is owed is no difference that anybody asks for
            actual = transaction.read(self._kernel, anew=True)
            return Outcome(new, transaction.plan(new, facts, actual), read=actual)
        done = transaction.apply(self._kernel, new, facts, follow=True)
        plan = done.plan
        self._counts = self._counts.one_more("committed" if plan or new != old else "unchanged")
        announced, flows = self._committed(old, new, done, asked.announce)
        seconds = self._clock.monotonic() - begun
        meters.TRANSACTION_SECONDS.observe(seconds, "committed" if plan or new != old else "unchanged")
        if plan or new != old:
            self._journal.tell(
                "change", asked.by, old, new, plan, flows_deleted=flows, announced=announced, seconds=seconds
            )
        return Outcome(new, plan, flows, announced, seconds)

    def _committed(
        self, old: Spec | None, new: Spec, done: Done, asked: tuple[str, ...]
    ) -> tuple[tuple[str, ...], int]:
        """Book a change that stands in the kernel: spec, announcements, connections, disk.

        In this order: a disk may be slow, and who dies before the file is written has undone the change. Returns what
        was announced, and how many connections were ended.
        """
        self._unapplied = False
        self._drift.agrees()
        self.actual = done.actual
        if done.plan or new != old:
            self._generation += 1
        self._note_fastpath(new, done.actual)
        self._note_behind(behind=done.later and (self._chase.behind or concerns(old, new)))
        meters.TRANSACTION_STEPS.add(amount=len(done.plan.steps))
        if new != old:
            self.spec = new
            self._followers.changed(old, new)
            self._changed(old, new)
        announced = self._followers.announce(new, done.actual, asked)
        flows = self._endings.begin(new)
        self._followers.save(Stored(new, self.facts.claimed))
        return announced, flows

    def _why_no_maps(self, spec: Spec, actual: Actual) -> str | None:
        """Why the chains decide alone; empty where maps decide ahead of them, None where there is nothing to decide."""
        if not isinstance(spec, GatewaySpec) or not spec.initialized or self._kernel.maps is None:
            return None
        return without_maps(self.facts, actual)

    def _note_fastpath(self, spec: Spec, actual: Actual) -> None:
        """Say once whether maps decide, and why not, for everything else works alike."""
        reason = self._why_no_maps(spec, actual)
        if reason is None:
            return
        now = FastpathStatus(on=not reason, reason=reason, behind=self._fastpath.behind)
        if now != self._fastpath:
            self._fastpath = now
            what = f"the chains decide alone: {reason}" if reason else "maps decide ahead of the chains"
            self._journal.record("fastpath", "gateway", what)

    def _turns(self, spec: Spec, actual: Actual) -> bool:
        """Whether the maps must come or go because of what others did around our chains: nothing of ours differs."""
        reason = self._why_no_maps(spec, actual)
        return reason is not None and self._fastpath.on == bool(reason)

    def recover(self) -> Outcome | None:
        """Make the last state stand again; None where there is none, or where it cannot yet be known or restored."""
        try:
            self._learn()
            return self._restore() if self.spec else None
        except Refused as error:
            self.failed("restore", error)
            return None

    def _learn(self) -> None:
        """Find the last state: the stored one, else what the kernel's own rules say, else the one stored before.

        Raises Refused where the kernel cannot be read; that nothing stands is not known then.
        """
        stored = self._store.load()
        if stored is None:
            stored = self._adopt() or self._store.previous()
            if stored is not None:
                self._followers.unsaved()
        elif (before := self._store.before()) is not None and type(before.spec) is type(stored.spec):
            self._endings.owe(before.spec)  # who died in the midst of ending many of them has told nobody
        if stored is not None:
            self.spec = stored.spec
            self.facts = replace(self.facts, claimed=stored.claimed)
            self._unapplied = True
        else:
            self._drift.agrees()  # there is nothing to disagree with
        self._known = True

    def _adopt(self) -> Stored | None:
        """The spec that the kernel's own rules tell, with the addresses that somebody else put up for its EIPs."""
        actual = transaction.read(self._kernel)
        spec = adopt(actual, self._interfaces)
        if spec is None:
            return None
        said = "no stored spec: it is read from the kernel's own rules"
        self._journal.record("adopted", "gateway", said, changed=first(DETAILED, None, spec))
        # What the CNI gave a load balancer's pod stays the CNI's: there is no verb that takes it away.
        eips = {AddressKey(spec.interfaces.external, e.address) for e in spec.eips if isinstance(spec, GatewaySpec)}
        return Stored(spec, frozenset(key for key, ours in actual.addresses.items() if key in eips and not ours))

    def _restore(self, *, tell: bool = True) -> Outcome:
        """Make the kernel equal the spec that stands; one that already does is not written to."""
        if self.spec is None:
            raise RuntimeError("nothing to restore")
        self._unapplied = True
        begun = self._clock.monotonic()
        done = transaction.apply(self._kernel, self.spec, self.facts)
        added = (step.key for step in done.plan.steps if isinstance(step, AddAddress))
        again = tuple(key.address.partition("/")[0] for key in added)
        announced, flows = self._committed(self.spec, self.spec, done, again)
        if done.plan:
            self._counts = self._counts.one_more("committed")
            seconds = self._clock.monotonic() - begun
            if tell:
                self._journal.tell(
                    "repair", "gateway", self.spec, self.spec, done.plan, announced=announced, seconds=seconds
                )
        return Outcome(self.spec, done.plan, flows, announced)

    def _catch_up(self, look: Look) -> None:
        """Compare kernel and spec, make good what others changed, and try again what is outstanding.

        Nobody waits for an answer here, so whatever goes wrong is told in log and status, and tried again.
        """
        begun = self._clock.monotonic()
        try:
            if not self._known:
                self._learn()
            if self.spec is None:
                self.actual = transaction.with_links(Actual(), self._kernel.links.read())
                self._drift.agrees()
            else:
                self._compare(self.spec, look)
                self._follow_up(self.spec)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("catching up failed")
            self.failed("retry", error)
        took = self._clock.monotonic() - begun
        self._drift.looked(took)
        self._retry_at = begun + took + max(RETRY_SECONDS, LOOK_SHARE * took)

    def _follow_up(self, spec: Spec) -> None:
        """Try again what follows a change."""
        self._endings.begin(spec)
        self._followers.save(Stored(spec, self.facts.claimed))

    def _compare(self, spec: Spec, look: Look) -> None:
        """One full reading; if it differs from the spec, repair it (or only say so, if that is the policy)."""
        begun = self._clock.monotonic()
        actual = transaction.read(self._kernel, anew=not look.because)  # what left no evidence, too, is to be found
        if self._chase.behind:  # what we still owe is nobody else's doing
            left = transaction.foreign(spec, self.facts, actual, self.actual)
        else:
            left = transaction.plan(spec, self.facts, actual)
        if not left:
            self.actual = actual
            self.settle()
            self._committed(spec, spec, Done(left, self.actual, later=self._chase.behind), ())
            return
        turns = self._drift.policy == "repair" and self._turns(spec, actual)
        drifted = (not self._unapplied or bool(self._drift.differs)) and not turns
        found = differences(left, actual)
        if drifted:
            self._drift.found(found, look)
            if self._drift.policy == "report":
                self.actual = actual
                return
        self._restore(tell=not drifted)
        if drifted:
            self._drift.repaired(found, look, self._clock.monotonic() - begun)
            # Connections began while their rules were not there.
            self._endings.owe(_as_it_was(actual, left, spec))

    def failed(self, by: Asker | str, error: BaseException) -> None:
        """Book what was refused, or went wrong: status and journal."""
        said = str(error) or repr(error)
        if isinstance(error, ASKERS_DOING):
            # The asker's own doing. A controller asks again and again; the journal has it once.
            if self._rejected != (str(by), said):
                self._rejected = (str(by), said)
                self._journal.record("refused", by, said, outcome="failed", level=logging.WARNING)
            return
        retryable = not isinstance(error, Refused) or error.retryable
        if isinstance(error, transaction.NotReverted):
            self._unapplied = self.spec is not None
        repeated = self._error is not None and (self._error.by, self._error.message) == (str(by), said)
        self._counts = self._counts.one_more("failed")
        self._error = ErrorStatus(at=self._clock.time(), by=str(by), message=said, retryable=retryable)
        if not repeated:
            self._journal.record(
                "refused", by, said, outcome="failed", data={"retryable": retryable}, level=logging.ERROR
            )


def _as_it_was(actual: Actual, repair: Plan, spec: Spec) -> Spec:
    """The spec that the kernel followed before a repair; none at all where packets did not even come to our chains."""
    edits = (edit for step in repair.steps if isinstance(step, EditTable) for edit in step.edits)
    hooked = not any(edit.ref.chain in BUILTIN[edit.ref.table] for edit in edits)
    return (adopt(actual, spec.interfaces) if hooked else None) or type(spec)()
