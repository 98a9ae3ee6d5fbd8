"""Verbs over remembered readings while others write: what stands at the end is what was asked for, and theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import transaction
from gateway.fake import FakeFirewall, FakeKernel
from gateway.ports import Moved
from gateway.remembered import RememberedFirewall
from rules import nat
from rules.apply import apply_edit
from rules.delta import chain_edits
from rules.desired import Facts
from rules.ruleset import ChainRef, DeleteRule, Foreign, InsertRule, ReplaceRules
from rules.spec import Dnat, GatewaySpec
from tests.gateway_kit import ports
from tests.strategies import quick

CHAIN, PREROUTING = nat.SHARED_DNAT, ChainRef("nat", "PREROUTING")
THEIRS = Foreign("-m comment --comment theirs -j ACCEPT")


def spec(numbers: tuple[int, ...]) -> GatewaySpec:
    mappings = (
        Dnat(eip="192.168.0.10", external_port=n, protocol="tcp", internal_ip="10.0.1.10", internal_port=n)
        for n in numbers
    )
    return GatewaySpec.model_validate({"eips": [{"address": "192.168.0.10/24"}], "dnats": list(mappings)})


def write(kernel: FakeKernel, what: int) -> None:
    """What somebody else does to the chain, or beside it."""
    standing = kernel.chains[CHAIN]
    edits = [
        InsertRule(CHAIN, 0, THEIRS),
        *([DeleteRule(CHAIN, 0, standing[0])] if standing else []),
        ReplaceRules(CHAIN, standing[::-1]),
        InsertRule(PREROUTING, 0, THEIRS),
    ]
    kernel.chains = apply_edit(kernel.chains, edits[what % len(edits)])


SPECS = st.lists(st.integers(1, 8), unique=True, max_size=6).map(tuple)
# A wanted state, what others do before, and what they do between our reading and our edit.
VERBS = st.lists(st.tuples(SPECS, st.lists(st.integers(0, 3), max_size=2), st.lists(st.integers(0, 3), max_size=1)))


@quick
@given(VERBS)
def test_whoever_writes_when_a_verb_ends_with_what_it_wants(
    verbs: list[tuple[tuple[int, ...], list[int], list[int]]],
) -> None:
    kernel = FakeKernel.gateway_pod()
    over = ports(kernel)
    transaction.apply(over, spec(()), Facts())
    for numbers, before, during in verbs:
        for what in before:
            write(kernel, what)
        foreign = kernel.chains[PREROUTING].count(THEIRS)
        pending = list(during)

        def interfere(step: str, pending: list[int] = pending) -> None:
            if step == "edit table nat" and pending:
                write(kernel, pending.pop())

        kernel.faults = interfere
        done = transaction.apply(over, spec(numbers), Facts())
        kernel.faults = None
        assert kernel.chains[CHAIN] == nat.shared_dnat(spec(numbers).dnats)
        assert kernel.chains[PREROUTING].count(THEIRS) >= foreign
        assert done.actual.ruleset.chains == transaction.read(over, anew=True).ruleset.chains


def test_what_is_remembered_is_not_read_again_and_what_is_forgotten_is() -> None:
    kernel = FakeKernel.gateway_pod()
    reads: list[object] = []
    driver = FakeFirewall(kernel)
    firewall = RememberedFirewall(counted(driver, reads))
    chains = firewall.read(["nat"]).chains
    assert firewall.read(["nat"]).chains[PREROUTING] is chains[PREROUTING]
    assert len(reads) == 1
    firewall.edit("nat", [InsertRule(PREROUTING, 0, THEIRS)])
    assert firewall.read(["nat"]).chains == driver.read(["nat"]).chains
    assert len(reads) == 1
    firewall.forget()
    firewall.read(["nat"])
    assert len(reads) == 2


def test_a_refused_edit_is_forgotten_with_the_reading_it_was_for() -> None:
    kernel = FakeKernel.gateway_pod()
    firewall = RememberedFirewall(FakeFirewall(kernel))
    firewall.read(["nat"])
    kernel.chains = apply_edit(kernel.chains, InsertRule(PREROUTING, 0, THEIRS))
    with pytest.raises(Moved):
        firewall.edit("nat", list(chain_edits(PREROUTING, (), (THEIRS,))))
    assert kernel.chains[PREROUTING] == (THEIRS,)
    assert firewall.read(["nat"]).chains[PREROUTING] == (THEIRS,)


def test_evidence_that_never_rests_costs_the_memory_but_no_reading() -> None:
    kernel = FakeKernel.gateway_pod()
    moments = itertools.count()

    class Restless(FakeFirewall):
        def evidence(self, table: str) -> object:  # type: ignore[override]
            return next(moments)

    firewall = RememberedFirewall(Restless(kernel))
    assert firewall.read(["nat"]).chains == FakeFirewall(kernel).read(["nat"]).chains
    firewall.edit("nat", [InsertRule(PREROUTING, 0, THEIRS)])
    kernel.chains = apply_edit(kernel.chains, InsertRule(PREROUTING, 0, THEIRS))
    assert firewall.read(["nat"]).chains[PREROUTING].count(THEIRS) == 2


def counted(driver: FakeFirewall, reads: list[object]) -> FakeFirewall:
    class Counted(FakeFirewall):
        read: Callable[..., object] = lambda _, tables: reads.append(tables) or driver.read(tables)  # type: ignore[assignment]

        def evidence(self, table: str) -> object:  # type: ignore[override]
            return driver.evidence(table)

        def edit_if(self, *args: object) -> object:  # type: ignore[override]
            return driver.edit_if(*args)  # type: ignore[arg-type]

    return Counted(driver.kernel)
