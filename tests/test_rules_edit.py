"""Commands on specs: idempotent, strict about contradictions, and independent of their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import commands as c
from rules.edit import Conflict, NotInitialized, edit, edit_all
from rules.keyed import Keyed
from rules.packet import Packet
from rules.routing import Host
from rules.ruleset import ChainRef, Destination, Rule
from rules.ruleset import Dnat as ToDestination
from rules.spec import Dnat, Fip, GatewaySpec, Interfaces, SharedDnat
from rules.state import Actual
from rules.trace import Fate, trace
from tests import strategies as some

SPEC = GatewaySpec()


@some.quick
@given(st.lists(some.commands, max_size=15))
def test_every_command_repeated_changes_nothing(listed: list[c.Command]) -> None:
    spec = SPEC
    for command in listed:
        try:
            spec = edit(spec, command)
        except Conflict:
            continue
        assert edit(spec, command) == spec


@some.quick
@given(some.specs | st.none(), st.lists(some.commands, max_size=15))
def test_many_commands_at_once_are_one_after_the_other(before: GatewaySpec | None, listed: list[c.Command]) -> None:
    def outcome(spec: Callable[[], GatewaySpec | None]) -> GatewaySpec | str | None:
        try:
            return spec()
        except (Conflict, NotInitialized) as error:
            return str(error)

    untouched = before.model_copy(deep=True) if before else None
    singly = outcome(lambda: reduce(edit, listed, before))
    at_once = outcome(lambda: edit_all(before, listed))
    assert at_once == singly
    assert before == untouched
    if isinstance(at_once, GatewaySpec) and isinstance(singly, GatewaySpec):
        standing = before or GatewaySpec()
        for name, value in at_once:
            was = getattr(standing, name)
            if isinstance(value, Keyed):
                assert type(value) is Keyed
                assert value.changes(was) == Keyed(value).changes(Keyed(was))


@some.quick
@given(some.specs, some.dels)
def test_deleting_what_is_absent_succeeds_and_changes_nothing(spec: GatewaySpec, command: c.Command) -> None:
    once = edit(spec, command)
    assert edit(once, command) == once
    assert edit(GatewaySpec(), command) == GatewaySpec()


@some.quick
@given(some.specs, some.adds)
def test_an_add_succeeds_or_names_what_stands_in_the_way(spec: GatewaySpec, command: c.Command) -> None:
    parts = (*spec.fips, *spec.dnats, *spec.shared_dnats)
    standing = next((part for part in parts if _contradicts(command, part)), None)
    if standing:
        with pytest.raises(Conflict) as conflict:
            edit(spec, command)
        assert conflict.value.standing == standing
        assert str(conflict.value) == f"{conflict.value.wanted} conflicts with {standing}"
    else:
        after = edit(spec, command)
        assert set(_all_parts(spec)) - set(_all_parts(after)) <= _replaceable(spec)


def _contradicts(command: c.Command, standing: Fip | Dnat | SharedDnat) -> bool:
    match command, standing:
        case (c.FipAdd(), Fip()):
            return command.eip == standing.eip and command.internal_ip != standing.internal_ip
        case (c.DnatAdd(), Dnat()):
            backends = [(part.internal_ip, part.internal_port) for part in (command, standing)]
            return command.key == standing.key and backends[0] != backends[1]
        case (c.DnatAdd(), SharedDnat()):
            return command.key == standing.key
    return False


def _replaceable(spec: GatewaySpec) -> set[object]:
    """What a newer call of the same identity may change."""
    return {*spec.eips, *spec.routes}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            c.FipAdd(eip="192.168.0.20", internal_ip="10.0.1.5"),
            c.FipAdd(eip="192.168.0.20", internal_ip="10.0.1.6"),
        ),
        (
            c.DnatAdd(eip="192.168.0.20", external_port=80, protocol="tcp", internal_ip="10.0.1.5", internal_port=80),
            c.DnatAdd(eip="192.168.0.20", external_port=80, protocol="tcp", internal_ip="10.0.1.5", internal_port=81),
        ),
    ],
)
def test_an_add_that_contradicts_what_stands_is_a_conflict(first: c.Command, second: c.Command) -> None:
    with pytest.raises(Conflict, match=r"192\.168\.0\.20.* conflicts with .*192\.168\.0\.20"):
        edit(edit(SPEC, first), second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (c.FipAdd(eip="192.168.0.20", internal_ip="10.0.1.5"), c.FipAdd(eip="192.168.0.21", internal_ip="10.0.1.5")),
        (
            c.DnatAdd(eip="192.168.0.20", external_port=80, protocol="tcp", internal_ip="10.0.1.5", internal_port=80),
            c.DnatAdd(eip="192.168.0.20", external_port=80, protocol="udp", internal_ip="10.0.1.5", internal_port=80),
        ),
        (
            c.SnatAdd(eip="192.168.0.20", internal_cidr="10.0.1.0/24"),
            c.SnatAdd(eip="192.168.0.21", internal_cidr="10.0.1.0/24"),
        ),
    ],
)
def test_what_only_shares_a_part_is_no_conflict(first: c.Command, second: c.Command) -> None:
    assert len(list(_all_parts(edit(edit(SPEC, first), second)))) == 2


def _all_parts(spec: GatewaySpec) -> Iterable[object]:
    return (*spec.eips, *spec.fips, *spec.dnats, *spec.snats, *spec.routes)


def test_an_eip_takes_the_newest_prefix_length_and_a_repeated_snat_keeps_its_flag() -> None:
    spec = edit(edit(SPEC, c.EipAdd(address="192.168.0.20/24")), c.EipAdd(address="192.168.0.20/16"))
    assert [eip.address for eip in spec.eips] == ["192.168.0.20/16"]
    spec = edit(spec, c.SnatAdd(eip="192.168.0.20", internal_cidr="10.0.1.0/24", random_fully=False))
    assert edit(spec, c.SnatAdd(eip="192.168.0.20", internal_cidr="10.0.1.7/24", random_fully=True)) == spec


def test_nothing_but_init_comes_first() -> None:
    with pytest.raises(NotInitialized, match="not initialized"):
        edit(None, c.EipAdd(address="192.168.0.20/24"))
    assert edit(None, c.Init()) == GatewaySpec()
    assert edit(None, c.Init(interfaces=Interfaces(vpc="a", external="b"))).interfaces.vpc == "a"


@some.quick
@given(some.specs)
def test_an_exported_spec_is_read_back_the_same(spec: GatewaySpec) -> None:
    assert GatewaySpec.model_validate_json(spec.model_dump_json()) == spec
    assert GatewaySpec.model_validate(spec.model_dump(mode="json")) == spec


# Order


def _order_free(listed: list[c.Command]) -> list[c.Command]:
    """Without those whose creation order is part of the spec, and without contradictions."""
    seen: dict[object, c.Command] = {}
    for command in listed:
        for identity in _identities(command):
            if identity in seen:
                break
        else:
            seen.update(dict.fromkeys(_identities(command), command))
    return list(dict.fromkeys(seen.values()))


def _identities(command: c.Command) -> list[object]:
    match command:
        case c.FipAdd():
            return [("fip", command.eip), ("fip", command.internal_ip)]
        case c.SnatAdd():
            return [("snat", command.prefix_length)]
        case c.DnatAdd():
            return [("dnat", command.key)]
        case c.EipAdd():
            return [("eip", command.ip)]
        case c.RouteAdd():
            return [("route", command.cidr)]
        case _:
            return [command.op]


@some.quick
@given(st.lists(some.adds, max_size=12).map(_order_free), st.lists(some.packets(), min_size=1, max_size=5), st.data())
def test_commands_in_any_order_give_every_packet_the_same_fate(
    listed: list[c.Command], packets: list[Packet], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(listed))
    one, other = (edit_all(SPEC, commands) for commands in (listed, shuffled))
    assert one is not None
    assert other is not None
    fates = [[fate(packet, some.settled(spec)).outcome for packet in packets] for spec in (one, other)]
    assert fates[0] == fates[1]


def fate(packet: Packet, actual: Actual) -> Fate:
    return trace(packet, actual.ruleset, Host.of(actual), strict=True)


def test_where_order_decides_the_older_one_does() -> None:
    snats = [c.SnatAdd(eip=f"192.168.0.2{n}", internal_cidr="10.0.1.0/24") for n in (1, 0)]
    fips = [c.FipAdd(eip=f"192.168.0.2{n}", internal_ip="10.0.2.5") for n in (3, 2)]
    spec = edit_all(SPEC, [*snats, *fips, c.EipAdd(address="192.168.0.20/24")])
    assert spec is not None
    settled = some.settled(spec)
    assert fate(Packet("tcp", "10.0.1.5", 1, "203.0.113.7", 80, "eth0"), settled).final.src == "192.168.0.21"
    assert fate(Packet("tcp", "10.0.2.5", 1, "203.0.113.7", 80, "eth0"), settled).final.src == "192.168.0.23"
    assert settled.ruleset.chains[ChainRef("nat", "EXCLUSIVE_DNAT")] == (
        Rule((Destination("192.168.0.23/32"),), ToDestination("10.0.2.5")),
        Rule((Destination("192.168.0.22/32"),), ToDestination("10.0.2.5")),
    )
