"""The single writer: one thread that takes every change, in order, through the one operation.

Faces queue an edit (a pure function from spec to spec) and wait for its Outcome. What the thread does with it, and what
it does of its own accord between two changes, is ``gateway.standing``'s.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from gateway import meters
from gateway.drift import Drift
from gateway.follow import Announcing
from gateway.journal import Asker, Journal
from gateway.ports import Busy, Clock, Refused, Variant
from gateway.standing import ASKERS_DOING, Change, Outcome, Standing
from gateway.status import Status
from gateway.store import Store
from gateway.transaction import Kernel
from rules.appliance import Spec, only
from rules.desired import Facts
from rules.edit import NotInitialized
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import GatewaySpec, Interfaces
from rules.state import Actual
from rules.surroundings import Surroundings

Edit = Callable[[GatewaySpec | None], GatewaySpec]
Told = Callable[[Spec | None, Spec], object]
BalancerEdit = Callable[[LoadBalancerSpec | None], LoadBalancerSpec]

T = TypeVar("T")

MOST_WAITING = 1024
"""Changes in the queue; further ones are refused at once."""
LONGEST_WAIT = 50.0
"""Seconds after which a change that still waits is refused: whoever asked has most likely given up."""


@dataclass(frozen=True)
class _Job:
    """One queued change."""

    change: Change
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
        self._clock = clock
        self.journal = journal or Journal(clock)
        """What happened: one event for each change, repair and refusal."""
        self._drift = drift or Drift(clock, self.journal)
        self._standing = Standing(
            kernel,
            announcer,
            store,
            clock,
            facts=facts,
            interfaces=interfaces,
            version=version,
            drift=self._drift,
            journal=self.journal,
            changed=self._spec_changed,
        )
        # A job to do, a question, a request to look at the links again, or None: the end.
        self._jobs: queue.SimpleQueue[_Job | _Question | Literal["look"] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._look_queued = threading.Event()
        self._told: list[Told] = []

    # --- any thread ---------------------------------------------------------------------------------------

    @property
    def variant(self) -> Variant:
        """The iptables variant in use: legacy or nft."""
        return self._kernel.firewall.variant

    @property
    def spec(self) -> GatewaySpec | None:
        """The last committed spec; None before ``init``, and in a pod that is a load balancer."""
        return spec if isinstance(spec := self._standing.spec, GatewaySpec) else None

    @property
    def load_balancer(self) -> LoadBalancerSpec | None:
        """The last committed spec of a pod that is a load balancer; else None."""
        return spec if isinstance(spec := self._standing.spec, LoadBalancerSpec) else None

    @property
    def facts(self) -> Facts:
        """What is decided besides the spec."""
        return self._standing.facts

    @property
    def actual(self) -> Actual:
        """The kernel as the writer last read it; before there is a spec, links, addresses and routes alone."""
        return self._standing.actual

    @property
    def ready(self) -> bool:
        """Whether the kernel equals the spec and nothing that follows a change is outstanding."""
        return not self._standing.pending()

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

    def tell(self, changed: Told) -> None:
        """Call ``changed``, in the writer's thread, with the spec before and after every change of it.

        It must not block or raise.
        """
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
        return self._queue(Change(_unchanged, "comparison", dry_run=True))

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

        What the words mean says ``Change``. The future raises what ``edit`` raised (Conflict, NotInitialized),
        OtherAppliance in a pod that is a load balancer, or Refused; kernel and spec are then as before.
        """
        asked = Change(only(GatewaySpec, edit), by, dry_run, tuple(announce), frozenset(dismiss))
        return self._queue(asked)

    def balance(self, edit: BalancerEdit, *, by: Asker | str, announce: Collection[str] = ()) -> Future[Outcome]:
        """Queue one change of a pod that is (or with it becomes) a load balancer; else as ``change``."""
        return self._queue(Change(only(LoadBalancerSpec, edit), by, announce=tuple(announce)))

    def _queue(self, change: Change) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if self._closed:
            future.set_exception(Refused("change", "the daemon is ending", retryable=True))
        elif (waiting := self._jobs.qsize()) >= MOST_WAITING:
            future.set_exception(Busy(f"{waiting} changes are waiting already"))
        else:
            self._jobs.put(_Job(change, future, self._clock.monotonic()))
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
        return self._standing.status()

    # --- the writer thread --------------------------------------------------------------------------------

    def _run(self, recovered: Future[Outcome | None]) -> None:
        try:
            recovered.set_result(self._standing.recover())
        except BaseException as error:  # noqa: BLE001 -- handed to whoever started the service
            recovered.set_exception(error)
        while True:
            try:
                job = self._jobs.get(timeout=self._standing.wait())
            except queue.Empty:
                self._standing.tend()
                continue
            if job is None:
                self._standing.finish()
                return
            if job == "look":
                self._look_queued.clear()
                self._drift.hint()
            elif isinstance(job, _Question):
                job.answer(self._kernel)
            else:
                self._serve(job)
            self._standing.tend()

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
            outcome = self._standing.change(job.change)
        except BaseException as error:  # noqa: BLE001 -- handed to the asker, who raises it
            how = "rejected" if isinstance(error, ASKERS_DOING) else "failed"
            meters.TRANSACTION_SECONDS.observe(self._clock.monotonic() - begun, how)
            self._standing.failed(job.change.by, error)
            job.future.set_exception(error)
        else:
            job.future.set_result(outcome)

    def _spec_changed(self, old: Spec | None, new: Spec) -> None:
        for told in self._told:
            told(old, new)


def _unchanged(spec: Spec | None) -> Spec:
    if spec is None:
        raise NotInitialized
    return spec
