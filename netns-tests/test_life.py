"""A gateway's life at random on the real kernel, shorter than the one on the fake (``tests/test_machine.py``)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from netns import Namespace, require
from rig import rig

from gateway import transaction
from gateway.drift import Drift
from gateway.journal import Journal
from gateway.ports import Refused
from gateway.service import Service
from gateway.store import Store
from rules.desired import Facts
from rules.spec import GatewaySpec, Interfaces
from tests.gateway_kit import RecordingAnnouncer
from tests.strategies import specs
from tests.test_crash import DieAt, Died
from tests.test_transaction import FailAt

ours = specs.filter(lambda spec: spec.interfaces == Interfaces())
moments = st.integers(1, 12)
MEDDLING = (
    ("iptables-{variant}", "-t", "nat", "-F", "SHARED_DNAT"),
    ("iptables-{variant}", "-t", "nat", "-I", "SHARED_SNAT", "-s", "10.9.9.9/32", "-j", "RETURN"),
    ("iptables-{variant}", "-t", "nat", "-D", "PREROUTING", "-j", "DNAT_FILTER"),
    ("ip", "addr", "flush", "dev", "net1", "label", "net1:eip"),
    ("ip", "route", "replace", "10.0.2.0/24", "via", "10.0.1.99"),
    ("tc", "qdisc", "del", "dev", "net1", "root"),
    ("nft", "flush", "table", "ip", "kube-ovn"),
)


class Clock:
    """The machine's."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


class Life(RuleBasedStateMachine):
    """What may befall a gateway."""

    variant = "legacy"

    def __init__(self) -> None:
        super().__init__()
        require("ip", "tc", "nft", f"iptables-{self.variant}")
        self.directory = Path(tempfile.mkdtemp(prefix="natgw-life-"))
        self.undo = contextlib.ExitStack()
        self.undo.callback(shutil.rmtree, self.directory)
        self.netns = Namespace()
        self.undo.callback(self.netns.remove)
        self.real = self.undo.enter_context(rig(self.netns, self.variant))
        self.model = GatewaySpec()

    def teardown(self) -> None:
        self.real.wire.fault = None
        self.service.close()
        self.undo.close()

    @initialize()
    def begin(self) -> None:
        self.start()
        self.service.change(lambda _: GatewaySpec(), by="test").result(timeout=30)

    def start(self) -> None:
        clock = Clock()
        journal = Journal(clock)
        if self.real.kernel.memory:
            self.real.kernel.memory.forget()  # another process has none
        self.service = Service(
            self.real.kernel,
            RecordingAnnouncer(),
            Store(self.directory),
            clock,
            facts=Facts(),
            drift=Drift(clock, journal, "repair", self.real.watch),
            journal=journal,
        )
        self.service.start().result(timeout=30)

    def put_meeting(self, spec: GatewaySpec, fault: FailAt | DieAt | None) -> BaseException | None:
        self.real.wire.fault = fault
        error = self.service.change(lambda _: spec, by="test").exception(timeout=30)
        if not isinstance(error, Died):
            self.real.wire.fault = None
        if error is None:
            self.model = spec
        return error

    @rule(spec=ours)
    def put(self, spec: GatewaySpec) -> None:
        assert self.put_meeting(spec, None) is None

    @rule(spec=ours, at=moments)
    def be_refused(self, spec: GatewaySpec, at: int) -> None:
        before = self.real.state()
        if error := self.put_meeting(spec, FailAt(at)):
            assert isinstance(error, Refused)
            assert self.real.state() == before

    @rule(spec=ours, at=moments)
    def die(self, spec: GatewaySpec, at: int) -> None:
        self.put_meeting(spec, DieAt(at))
        self.restart()

    @rule()
    def restart(self) -> None:
        self.service.close()
        self.real.wire.fault = None
        self.start()

    @rule(words=st.sampled_from(MEDDLING))
    def meddle(self, words: tuple[str, ...]) -> None:
        self.netns.run(*(word.format(variant=self.variant) for word in words), check=False)

    @invariant()
    def the_kernel_is_the_model(self) -> None:
        # What others did may not have been noticed yet; the same change as before makes it right at once.
        self.service.change(lambda spec: spec or GatewaySpec(), by="test").result(timeout=30)
        assert self.service.spec == self.model
        assert self.service.ready
        assert not self.service.compare().result(timeout=30).plan
        assert not transaction.plan(self.model, self.service.facts, self.real.read())


class NftLife(Life):
    """The same with the nft variant of iptables."""

    variant = "nft"


LIVES = int(os.environ.get("NATGW_FUZZ_LIVES", "2"))
TestLife, TestNftLife = Life.TestCase, NftLife.TestCase
TestLife.settings = TestNftLife.settings = settings(
    max_examples=LIVES,
    stateful_step_count=10,
    deadline=None,
    derandomize="NATGW_FUZZ_LIVES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
