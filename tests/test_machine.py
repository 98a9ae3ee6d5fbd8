"""A gateway's whole life at random: commands, refusals, deaths, restarts, lost files and other people's hands.

After each step the model (what every accepted command has made of the spec) is the service's spec, and the fake kernel
holds exactly what that spec says; a refused change has changed nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway import transaction
from gateway.fake import FakeKernel
from gateway.ports import Refused
from rules import commands as c
from rules.edit import Conflict, NotInitialized, edit_all
from rules.nft import NftTable
from rules.ruleset import BUILTIN, ChainRef, Drop, Foreign, Rule, Source
from rules.spec import GatewaySpec
from rules.state import AddressKey, RouteEntry, RouteKey
from rules.tc import Link, TableKey
from tests.gateway_kit import Gateway, gateway, ports
from tests.strategies import adds, commands, specs
from tests.test_crash import DieAt, Died
from tests.test_transaction import FailAt, state_of

# Where there is one, a file system in memory: the store waits for the disk at every change.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FOREIGN = Foreign("-p tcp -m tcp --dport 7 -j RETURN")
THEIRS = AddressKey("net1", "192.168.0.77/24")
moments = st.integers(1, 12)


def standing(kernel: FakeKernel) -> tuple[object, ...]:
    """Everything that a change may touch. Empty hash tables of the shaper, and links to them, stay by design."""
    *others, tc = state_of(kernel)
    assert isinstance(tc, dict)
    return (*others, {k: v for k, v in tc.items() if not isinstance(k, TableKey) and not isinstance(v, Link)})


class Life(RuleBasedStateMachine):
    """What may befall a gateway."""

    maps, at_once = False, False
    foreign_in = ChainRef("nat", "PREROUTING")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="natgw-life-", dir=MEMORY))
        self.kernel = FakeKernel.gateway_pod()
        self.kernel.at_once = self.at_once
        if self.maps:
            self.kernel.no_maps = ""
        self.kernel.addresses[THEIRS] = False
        self.kernel.chains[self.foreign_in] = (FOREIGN,)
        self.pod: Gateway = gateway(self.directory, self.kernel)
        self.model: GatewaySpec | None = None

    def teardown(self) -> None:
        self.kernel.faults = None
        self.pod.service.close()
        shutil.rmtree(self.directory)

    # --- what a controller does ---------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.carry_out([c.Init()])

    @rule(listed=st.lists(commands, min_size=1, max_size=4))
    def call(self, listed: list[c.Command]) -> None:
        self.carry_out(listed)

    @rule(listed=st.lists(adds, min_size=3, max_size=8))
    def add(self, listed: list[c.Command]) -> None:
        self.carry_out(listed)

    @rule(spec=specs)
    def put(self, spec: GatewaySpec) -> None:
        self.change_to(spec)

    @rule(spec=specs, refused=moments, for_ever=st.booleans())
    def put_and_be_refused(self, spec: GatewaySpec, refused: int, for_ever: bool) -> None:
        self.kernel.faults = FailAt(refused, for_ever=for_ever)
        self.change_to(spec, reverts=not for_ever)
        self.kernel.faults = None

    @rule(spec=specs, refused=moments, dead=moments)
    def put_and_die(self, spec: GatewaySpec, refused: int, dead: int) -> None:
        """Die at any step, be it one of the change or one of undoing it after a refusal."""
        self.kernel.faults = DieAt(dead)
        future = self.pod.service.change(lambda _: spec, by="test")
        died = isinstance(future.exception(timeout=60), Died)
        self.restart()
        assert self.pod.service.spec == (self.model if died or future.exception() else spec)
        self.model = self.pod.service.spec

    # --- what happens to the process and its files --------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self.pod.service.close()
        self.kernel.faults = None
        self.pod = gateway(self.directory, self.kernel)

    @precondition(lambda self: self.pod.service.ready)
    @rule(keep=st.sampled_from([None, 0, 10, 200]))
    def lose_the_file(self, keep: int | None) -> None:
        """It is gone, or only its beginning is left; the kernel is as it was, so the next process writes nothing."""
        self.pod.service.close()
        path = self.directory / "spec.json"
        if keep is None:
            shutil.rmtree(self.directory)
        elif path.exists():
            os.truncate(path, min(keep, path.stat().st_size))
        writes = self.kernel.writes
        self.pod = gateway(self.directory, self.kernel)
        assert self.kernel.writes == writes
        self.model = self.pod.service.spec

    # --- what others do to the kernel ---------------------------------------------------------------------

    @rule(data=st.data(), what=st.sampled_from(["flush", "insert", "address", "route", "tc", "nft", "chain"]))
    def meddle(self, data: st.DataObject, what: str) -> None:
        kernel = self.kernel
        if what in ("flush", "insert", "chain"):
            ours = [ref for ref in kernel.chains if ref.family == 4 and ref.chain not in BUILTIN[ref.table]]
            if not ours:
                return
            ref = data.draw(st.sampled_from(sorted(ours)))
            if what == "chain":
                del kernel.chains[ref]
            else:
                alien = Rule((Source("10.9.9.9/32"),), Drop())
                kernel.chains[ref] = (alien, *kernel.chains[ref]) if what == "insert" else ()
        elif what == "address":
            ours = [key for key, mine in kernel.addresses.items() if mine]
            for key in ours[: data.draw(st.integers(1, 3))]:
                del kernel.addresses[key]
        elif what == "route":
            kernel.routes.pop(RouteKey("0.0.0.0/0"), None)
            kernel.routes[RouteKey("10.0.2.0/24")] = RouteEntry("eth0", "10.0.1.9")
        elif what == "tc":
            kernel.tc = {}
        else:
            kernel.nft = NftTable()
        self.pod.clock.now += 100  # no repair of the same thing is held back, and everything outstanding is due
        self.pod.service.kernel_changed()

    # --- what must hold -----------------------------------------------------------------------------------

    def carry_out(self, listed: list[c.Command]) -> None:
        before = standing(self.kernel)
        future = self.pod.service.change(lambda spec: _edited(spec, listed), by="test")
        error = future.exception(timeout=60)
        try:
            wanted: GatewaySpec | None = _edited(self.model, listed)
        except (Conflict, NotInitialized) as refusal:
            expected = type(refusal)
        else:
            self.settle(error, wanted, before)
            return
        assert type(error) is expected
        assert standing(self.kernel) == before

    def change_to(self, spec: GatewaySpec, *, reverts: bool = True) -> None:
        before = standing(self.kernel)
        error = self.pod.service.change(lambda _: spec, by="test").exception(timeout=60)
        self.settle(error, spec, before, reverts=reverts)

    def settle(
        self,
        error: BaseException | None,
        wanted: GatewaySpec | None,
        before: tuple[object, ...],
        *,
        reverts: bool = True,
    ) -> None:
        if error is None:
            self.model = wanted
            return
        assert isinstance(error, Refused)
        if reverts:
            assert not isinstance(error, transaction.NotReverted)
            assert standing(self.kernel) == before

    @invariant()
    def the_kernel_is_the_model(self) -> None:
        self.kernel.faults = None
        self.pod.clock.now += 100
        self.pod.service.kernel_changed()
        try:
            left = self.pod.service.compare().result(timeout=60).plan
        except NotInitialized:
            assert self.model is None
            return
        except Refused as error:
            # The spec names interfaces that this pod has not: it was accepted by nobody, but may be adopted.
            raise AssertionError(f"{error} under {self.model}") from error
        assert self.pod.service.spec == self.model
        assert not left
        assert self.pod.service.ready
        assert not transaction.plan(
            self.model or GatewaySpec(), self.pod.service.facts, transaction.read(ports(self.kernel))
        )
        assert FOREIGN in self.kernel.chains[self.foreign_in]
        assert THEIRS in self.kernel.addresses


def _edited(spec: GatewaySpec | None, listed: list[c.Command]) -> GatewaySpec:
    edited = edit_all(spec, listed)
    if edited is None:
        raise NotInitialized
    return edited


class LifeWithMaps(Life):
    """The same with maps ahead of the chains, as in the legacy variant of iptables."""

    maps = True
    foreign_in = ChainRef("mangle", "PREROUTING")  # ahead of ours in nat it would keep the maps away


class LifeAtOnce(LifeWithMaps):
    """The same where one transaction may be about chains and maps, as in the nft variant."""

    at_once = True


TestLife, TestLifeWithMaps, TestLifeAtOnce = Life.TestCase, LifeWithMaps.TestCase, LifeAtOnce.TestCase
EXAMPLES = int(os.environ.get("NATGW_FUZZ_LIVES", "8"))
TestLife.settings = TestLifeWithMaps.settings = TestLifeAtOnce.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=20, deadline=None, derandomize="NATGW_FUZZ_LIVES" not in os.environ
)
