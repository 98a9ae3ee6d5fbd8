"""The single writer: one thread that takes every change, in order, through the one operation.

Faces queue an edit (a pure function from spec to spec) and wait for its Outcome. The thread edits, makes
the kernel equal the result, stores it, announces new addresses and forgets stale connections, then answers.
What follows a committed change (store, flows) and fails is retried forward and keeps readiness false; it
never undoes the change.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from gateway import meters, transaction
from gateway.chase import Chase
from gateway.drift import LOOK_SHARE, Drift, Look
from gateway.follow import Announcing, Followers
from gateway.journal import Asker, Journal
from gateway.ports import Busy, Clock, Refused, Variant
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
from rules.appliance import OtherAppliance, Spec, adopt, only
from rules.changes import changes
from rules.desired import Facts, without_maps
from rules.differences import differences
from rules.edit import Conflict, NotInitialized
from rules.loadbalancer import LoadBalancerSpec
from rules.ruleset import BUILTIN
from rules.spec import GatewaySpec, Interfaces
from rules.state import Actual, AddAddress, AddressKey, EditTable, Plan
from rules.surroundings import Surroundings

log = logging.getLogger(__name__)

Edit = Callable[[GatewaySpec | None], GatewaySpec]
BalancerEdit = Callable[[LoadBalancerSpec | None], LoadBalancerSpec]

T = TypeVar("T")

RETRY_SECONDS = 1.0
MOST_WAITING = 1024
"""Changes in the queue; further ones are refused at once."""
LONGEST_WAIT = 50.0
"""Seconds after which a change that still waits is refused: whoever asked has most likely given up."""

_ASKERS_DOING = (Conflict, NotInitialized, OtherAppliance)


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
class _Job:
    """One queued change."""

    edit: Callable[[Spec | None], Spec]
    by: Asker | str
    dry_run: bool
    announce: tuple[str, ...]
    dismiss: frozenset[str]
    future: Future[Outcome]
    queued: float


@dataclass(frozen=True)
class _Question:
    """Something to read from the kernel, by the one thread that may use its drivers."""

    ask: Callable[[Kernel], Any]
    future: Future[Any]

    def answer(self, kernel: Kernel) -> None:
        """Whatever goes wrong is the asker's answer, never the writer's end."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.ask(kernel))
        except BaseException as error:  # noqa: BLE001 -- handed to the asker, who raises it
            self.future.set_exception(error)


class Service:
    """The gateway of one namespace. ``start`` recovers the last state; ``close`` leaves the kernel forwarding."""

    def __init__(
        self,
        kernel: Kernel,
        announcer: Announcing,
        store: Store,
        clock: Clock,
        *,
        facts: Facts,
        interfaces: Interfaces | None = None,
        version: str = "",
        drift: Drift | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._kernel = kernel
        self._announcer = announcer
        self._store = store
        self._followers = Followers(announcer, store, kernel.flows)
        self._clock = clock
        self._facts = facts
        self._interfaces = interfaces
        self._version = version
        self.journal = journal or Journal(clock)
        """What happened: one event for each change, repair and refusal."""
        self._drift = drift or Drift(clock, self.journal)
        self._chase = Chase(clock)
        self._retry_at: float | None = None
        self._started = clock.monotonic()
        # A job to do, a question, a request to look at the links again, or None: the end.
        self._jobs: queue.SimpleQueue[_Job | _Question | Literal["look"] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._look_queued = threading.Event()
        self._told: list[Callable[[], object]] = []
        self._spec: Spec | None = None
        self._actual = Actual()
        self._error: ErrorStatus | None = None
        self._counts = TransactionCounts()
        self._generation = 0
        self._known = False  # whether there is a last state, and which
        self._unapplied = False  # the kernel is not known to equal the spec
        self._rejected = ("", "")
        self._fastpath = FastpathStatus()

    # --- any thread ---------------------------------------------------------------------------------------

    @property
    def variant(self) -> Variant:
        """The iptables variant in use: legacy or nft."""
        return self._kernel.firewall.variant

    @property
    def spec(self) -> GatewaySpec | None:
        """The last committed spec; None before ``init``, and in a pod that is a load balancer."""
        return self._spec if isinstance(self._spec, GatewaySpec) else None

    @property
    def load_balancer(self) -> LoadBalancerSpec | None:
        """The last committed spec of a pod that is a load balancer; else None."""
        return self._spec if isinstance(self._spec, LoadBalancerSpec) else None

    @property
    def facts(self) -> Facts:
        """What is decided besides the spec."""
        return self._facts

    @property
    def actual(self) -> Actual:
        """The kernel as the writer last read it; before there is a spec, links, addresses and routes alone."""
        return self._actual

    @property
    def ready(self) -> bool:
        """Whether the kernel equals the spec and nothing that follows a change is outstanding."""
        return not self._pending()

    @property
    def drift(self) -> Drift:
        """What others changed; ``status`` and ``entries`` may be asked from any thread."""
        return self._drift

    def start(self) -> Future[Outcome | None]:
        """Start the writer; the future is done when the last state stands again (None: there was none)."""
        recovered: Future[Outcome | None] = Future()
        self._thread = threading.Thread(target=self._run, args=(recovered,), name="writer", daemon=True)
        self._thread.start()
        return recovered

    def kernel_changed(self) -> None:
        """Tell that somebody may have written to the kernel; if so, what is ours is made good as soon as it can be.

        That includes the kernel itself: it drops the routes of an interface that goes down and does not bring them
        back.
        """
        if not self._look_queued.is_set():
            self._look_queued.set()
            self._jobs.put("look")

    def tell(self, changed: Callable[[], object]) -> None:
        """Call ``changed``, in the writer's thread, after every change of the spec; it must not block or raise."""
        self._told.append(changed)

    def close(self) -> None:
        """Finish what is queued and end the writer; what comes later is refused. The kernel goes on forwarding."""
        self._closed = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def compare(self) -> Future[Outcome]:
        """Queue a full comparison; its plan is what would make the kernel equal the spec. Nothing is written.

        The future raises NotInitialized where there is no spec, or Refused.
        """
        return self._queue(_standing, "comparison", True, ())

    def change(
        self,
        edit: Edit,
        *,
        by: Asker | str,
        dry_run: bool = False,
        announce: Collection[str] = (),
        dismiss: Collection[str] = (),
    ) -> Future[Outcome]:
        """Queue one change: ``edit`` takes the spec that stands then and returns the wanted one.

        ``by`` is who asked, for the journal. ``announce`` names EIPs to announce once more even if nothing
        changes, ``dismiss`` prefixes whose routes go even if somebody else made them. The future raises what ``edit``
        raised (Conflict, NotInitialized), OtherAppliance in a pod that is a load balancer, or Refused; kernel and spec
        are then as before.
        """
        return self._queue(only(GatewaySpec, edit), by, dry_run, announce, dismiss)

    def balance(self, edit: BalancerEdit, *, by: Asker | str, announce: Collection[str] = ()) -> Future[Outcome]:
        """Queue one change of a pod that is (or with it becomes) a load balancer; else as ``change``."""
        return self._queue(only(LoadBalancerSpec, edit), by, False, announce)

    def _queue(
        self,
        edit: Callable[[Spec | None], Spec],
        by: Asker | str,
        dry_run: bool,
        announce: Collection[str],
        dismiss: Collection[str] = (),
    ) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if self._closed:
            future.set_exception(Refused("change", "the daemon is ending", retryable=True))
        elif (waiting := self._jobs.qsize()) >= MOST_WAITING:
            future.set_exception(Busy(f"{waiting} changes are waiting already"))
        else:
            now = self._clock.monotonic()
            self._jobs.put(_Job(edit, by, dry_run, tuple(announce), frozenset(dismiss), future, now))
        return future

    def ask(self, question: Callable[[Kernel], T]) -> Future[T]:
        """Queue a question to the kernel, which changes nothing; the future raises what it raises."""
        future: Future[T] = Future()
        if self._closed:
            future.set_exception(Refused("read", "the daemon is ending", retryable=True))
        else:
            self._jobs.put(_Question(question, future))
        return future

    def around(self) -> Surroundings:
        """What surrounds the gateway, read now in the caller's thread."""
        return self._kernel.around.read() if self._kernel.around else Surroundings()

    def status(self) -> Status:
        """One look at the gateway, without touching the kernel."""
        spec = self._spec
        initialized = spec is not None and spec.initialized
        interfaces = (spec.interfaces if spec and initialized else self._interfaces) or Interfaces()
        external = self._actual.links.get(interfaces.external)
        pending = self._pending()
        return Status(
            ready=not pending,
            initialized=initialized,
            appliance="lb-svc" if isinstance(spec, LoadBalancerSpec) else "nat-gateway",
            version=self._version,
            variant=self.variant,
            interfaces=interfaces,
            links={
                name: LinkStatus.of(link)
                for name, link in self._actual.links.items()
                if name in (interfaces.vpc, interfaces.external)
            },
            arp=ArpStatus(policy=self._facts.arp, on=external is not None and external.arp),
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

    def _pending(self) -> list[str]:
        unknown = ["the last state is not known yet"] if not self._known else []
        unapplied = ["kernel does not equal the spec"] if self._unapplied or self._drift.differs else []
        lagging = ["the chains do not follow the maps"] if self._chase.failed else []
        return unknown + unapplied + lagging + self._followers.pending()

    # --- the writer thread --------------------------------------------------------------------------------

    def _run(self, recovered: Future[Outcome | None]) -> None:
        self._recover(recovered)
        while True:
            try:
                job = self._jobs.get(timeout=self._patience())
            except queue.Empty:
                self._tend()
                continue
            if job is None:
                self._follow_maps(due=self._chase.behind)
                return
            if job == "look":
                self._look_queued.clear()
                self._drift.hint()
            elif isinstance(job, _Question):
                job.answer(self._kernel)
            else:
                self._serve(job)
            self._tend()

    def _patience(self) -> float:
        """Seconds until something is to be done without being asked."""
        wait = min(self._drift.wait(), math.inf if (chase := self._chase.wait()) is None else chase)
        return wait if self._retry_at is None else min(wait, max(0.0, self._retry_at - self._clock.monotonic()))

    def _tend(self) -> None:
        """Do what is due: look whether the kernel is still as wanted, try again what is outstanding."""
        if (look := self._drift.due()) is not None:
            self._catch_up(look)
        self._follow_maps(due=self._chase.due())
        now = self._clock.monotonic()
        if self._known and not (self._unapplied or self._followers.pending()):
            self._retry_at = None
        elif self._retry_at is None:
            self._retry_at = now + RETRY_SECONDS
        elif now >= self._retry_at:
            self._retry_at = None
            self._retry()

    def _follow_maps(self, *, due: bool) -> None:
        """Bring the chains up to what the maps say already; a failure is told, and tried again, never undone."""
        if not due or self._spec is None:
            return
        try:
            done = transaction.apply(self._kernel, self._spec, self._facts)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("the chains do not follow the maps")
            self._chase.fail()
            self._failed("chains", error)
        else:
            self._actual = done.actual
            self._note_behind(behind=False)

    def _note_behind(self, *, behind: bool) -> None:
        self._chase.note(behind=behind)
        self._fastpath = self._fastpath.model_copy(update={"behind": behind})

    def _retry(self) -> None:
        if self._unapplied or not self._known:
            self._catch_up(Look(("retry",)))
        elif self._spec is not None:
            self._follow_up(self._spec)

    def _serve(self, job: _Job) -> None:
        """Answer one job; whatever goes wrong is the asker's answer, never the writer's end."""
        if not job.future.set_running_or_notify_cancel():
            return
        begun = self._clock.monotonic()
        meters.WRITER_WAIT_SECONDS.observe(begun - job.queued)
        if begun - job.queued > LONGEST_WAIT:
            job.future.set_exception(Busy(f"after {LONGEST_WAIT:.0f} s earlier changes are still not done"))
            return
        try:
            outcome = self._transact(job)
        except BaseException as error:  # noqa: BLE001 -- handed to the asker, who raises it
            rejected = isinstance(error, _ASKERS_DOING)
            meters.TRANSACTION_SECONDS.observe(self._clock.monotonic() - begun, "rejected" if rejected else "failed")
            self._failed(job.by, error)
            job.future.set_exception(error)
        else:
            job.future.set_result(outcome)

    def _transact(self, job: _Job) -> Outcome:
        begun = self._clock.monotonic()
        if not self._known:
            self._learn()  # a change of what is not known would take it for nothing
        old = self._spec
        new = job.edit(old)
        facts = replace(self._facts, dismissed=job.dismiss)
        if job.dry_run:
            self._follow_maps(due=self._chase.behind)  # what is owed is no difference that anybody asks for
            actual = transaction.read(self._kernel, anew=True)
            return Outcome(new, transaction.plan(new, facts, actual), read=actual)
        done = transaction.apply(self._kernel, new, facts, follow=True)
        plan = done.plan
        self._counts = self._counts.one_more("committed" if plan or new != old else "unchanged")
        announced = self._committed(old, new, done, job.announce)
        flows = self._followers.flush(new)
        seconds = self._clock.monotonic() - begun
        meters.TRANSACTION_SECONDS.observe(seconds, "committed" if plan or new != old else "unchanged")
        if plan or new != old:
            self.journal.tell(
                "change", job.by, old, new, plan, flows_deleted=flows, announced=announced, seconds=seconds
            )
        return Outcome(new, plan, flows, announced, seconds)

    def _committed(self, old: Spec | None, new: Spec, done: Done, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Book a change that stands in the kernel: spec, announcements, disk."""
        self._unapplied = False
        self._drift.agrees()
        self._actual = done.actual
        if done.plan or new != old:
            self._generation += 1
        self._note_fastpath(new, done.actual)
        self._note_behind(behind=done.behind)
        meters.TRANSACTION_STEPS.add(amount=len(done.plan.steps))
        if new != old:
            self._spec = new
            self._followers.changed(old, new)
            for told in self._told:
                told()
        announced = self._followers.announce(new, done.actual, asked)
        self._followers.save(Stored(new, self._facts.claimed))
        return announced

    def _note_fastpath(self, spec: Spec, actual: Actual) -> None:
        """Say once whether maps decide, and why not, for everything else works alike."""
        if not isinstance(spec, GatewaySpec) or not spec.initialized or self._kernel.maps is None:
            return
        reason = without_maps(self._facts, actual)
        now = FastpathStatus(on=not reason, reason=reason, behind=self._fastpath.behind)
        if now != self._fastpath:
            self._fastpath = now
            what = f"the chains decide alone: {reason}" if reason else "maps decide ahead of the chains"
            self.journal.record("fastpath", "gateway", what)

    def _turns(self, spec: Spec, actual: Actual) -> bool:
        """Whether the maps must come or go because of what others did around our chains: nothing of ours differs."""
        if not isinstance(spec, GatewaySpec) or not spec.initialized or self._kernel.maps is None:
            return False
        return self._fastpath.on == bool(without_maps(self._facts, actual))

    def _recover(self, recovered: Future[Outcome | None]) -> None:
        """Make the last state stand again."""
        try:
            self._learn()
            recovered.set_result(self._restore() if self._spec else None)
        except Refused as error:
            self._failed("restore", error)
            recovered.set_result(None)
        except BaseException as error:  # noqa: BLE001 -- handed to whoever started the service
            recovered.set_exception(error)

    def _learn(self) -> None:
        """Find the last state: the stored one, else what the kernel's own rules say, else the one stored before.

        Raises Refused where the kernel cannot be read; that nothing stands is not known then.
        """
        stored = self._store.load()
        if stored is None:
            stored = self._adopt() or self._store.previous()
            if stored is not None:
                self._followers.unsaved()
        if stored is not None:
            self._spec = stored.spec
            self._facts = replace(self._facts, claimed=stored.claimed)
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
        self.journal.record("adopted", "gateway", said, changed=changes(None, spec))
        # What the CNI gave a load balancer's pod stays the CNI's: there is no verb that takes it away.
        eips = {AddressKey(spec.interfaces.external, e.address) for e in spec.eips if isinstance(spec, GatewaySpec)}
        return Stored(spec, frozenset(key for key, ours in actual.addresses.items() if key in eips and not ours))

    def _restore(self, *, tell: bool = True) -> Outcome:
        """Make the kernel equal the spec that stands; one that already does is not written to."""
        if self._spec is None:
            raise RuntimeError("nothing to restore")
        self._unapplied = True
        begun = self._clock.monotonic()
        done = transaction.apply(self._kernel, self._spec, self._facts)
        added = (step.key for step in done.plan.steps if isinstance(step, AddAddress))
        again = tuple(key.address.partition("/")[0] for key in added)
        announced = self._committed(self._spec, self._spec, done, again)
        if done.plan:
            self._counts = self._counts.one_more("committed")
            seconds = self._clock.monotonic() - begun
            if tell:
                self.journal.tell(
                    "repair", "gateway", self._spec, self._spec, done.plan, announced=announced, seconds=seconds
                )
        return Outcome(self._spec, done.plan, 0, announced)

    def _catch_up(self, look: Look) -> None:
        """Compare kernel and spec, make good what others changed, and try again what is outstanding.

        Nobody waits for an answer here, so whatever goes wrong is told in log and status, and tried again.
        """
        begun = self._clock.monotonic()
        try:
            if not self._known:
                self._learn()
            if self._spec is None:
                self._actual = transaction.with_links(Actual(), self._kernel.links.read())
                self._drift.agrees()
            else:
                self._compare(self._spec, look)
                self._follow_up(self._spec)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("catching up failed")
            self._failed("retry", error)
        took = self._clock.monotonic() - begun
        self._drift.looked(took)
        self._retry_at = begun + took + max(RETRY_SECONDS, LOOK_SHARE * took)

    def _follow_up(self, spec: Spec) -> None:
        """Try again what follows a change."""
        self._followers.save(Stored(spec, self._facts.claimed))
        self._followers.flush(spec)

    def _compare(self, spec: Spec, look: Look) -> None:
        """One full reading; if it differs from the spec, repair it (or only say so, if that is the policy)."""
        begun = self._clock.monotonic()
        self._follow_maps(due=self._chase.behind)  # what we still owe is nobody else's doing
        actual = transaction.read(self._kernel, anew=not look.because)  # what left no evidence, too, is to be found
        left = transaction.plan(spec, self._facts, actual)
        if not left:
            self._committed(spec, spec, Done(left, actual), ())
            return
        turns = self._drift.policy == "repair" and self._turns(spec, actual)
        drifted = (not self._unapplied or bool(self._drift.differs)) and not turns
        found = differences(left, actual)
        if drifted:
            self._drift.found(found, look)
            if self._drift.policy == "report":
                self._actual = actual
                return
        self._restore(tell=not drifted)
        if drifted:
            self._drift.repaired(found, look, self._clock.monotonic() - begun)
            self._followers.repaired(_as_it_was(actual, left, spec))

    def _failed(self, by: Asker | str, error: BaseException) -> None:
        said = str(error) or repr(error)
        if isinstance(error, _ASKERS_DOING):
            # The asker's own doing. A controller asks again and again; the journal has it once.
            if self._rejected != (str(by), said):
                self._rejected = (str(by), said)
                self.journal.record("refused", by, said, outcome="failed", level=logging.WARNING)
            return
        retryable = not isinstance(error, Refused) or error.retryable
        if isinstance(error, transaction.NotReverted):
            self._unapplied = self._spec is not None
        repeated = self._error is not None and (self._error.by, self._error.message) == (str(by), said)
        self._counts = self._counts.one_more("failed")
        self._error = ErrorStatus(at=self._clock.time(), by=str(by), message=said, retryable=retryable)
        if not repeated:
            self.journal.record(
                "refused", by, said, outcome="failed", data={"retryable": retryable}, level=logging.ERROR
            )


def _standing(spec: Spec | None) -> Spec:
    if spec is None:
        raise NotInitialized
    return spec


def _as_it_was(actual: Actual, repair: Plan, spec: Spec) -> Spec:
    """The spec that the kernel followed before a repair; none at all where packets did not even come to our chains."""
    edits = (edit for step in repair.steps if isinstance(step, EditTable) for edit in step.edits)
    hooked = not any(edit.ref.chain in BUILTIN[edit.ref.table] for edit in edits)
    return (adopt(actual, spec.interfaces) if hooked else None) or type(spec)()
