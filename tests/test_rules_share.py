"""Share-type DNAT: what the table is, what leads from one to another, and its text both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rules import commands as c
from rules.apply import Rejected, apply_commands
from rules.edit import Conflict, edit, edit_all
from rules.nft import (
    AddChain,
    AddElement,
    NftTable,
    ServiceKey,
    SetRules,
    Spread,
    Unknown,
    parse,
    rule_text,
    script,
    table_text,
)
from rules.share import Service, chain_name, edits, services, services_of, table_of
from rules.spec import Backend, Dnat, GatewaySpec, SharedDnat
from tests import strategies as some
from tests.share_goldens import CASES, GOLDENS, TWO

KEY = ServiceKey("172.18.0.21", "tcp", 80)
keys = st.builds(ServiceKey, some.external_ips, some.protocols, some.ports)
ends = st.tuples(some.internal_ips, some.ports)
any_service = st.builds(
    Service, st.lists(ends, min_size=1, max_size=4, unique=True).map(tuple), st.sampled_from([None, 1, 10800])
)
any_services = st.dictionaries(keys, any_service, max_size=5)


# The table


@pytest.mark.parametrize("case", CASES)
def test_goldens(case: str) -> None:
    golden = {path.name: path.read_text() for path in (GOLDENS / case).iterdir()}
    table = table_of(CASES[case])
    assert script(edits(table, NftTable())) == golden["script.nft"]
    assert parse(golden["table.json"], golden["map.json"]) == table
    assert services_of(parse(golden["table.json"], golden["map.json"])) == CASES[case]


def test_where_the_system_does_not_know_protocols_by_name_their_numbers_are_read() -> None:
    texts = [(GOLDENS / "affinity" / name).read_text() for name in ("table.json", "map.json")]
    numbered = [text.replace('"tcp"', "6").replace('"udp"', '"17"') for text in texts]
    assert numbered != texts
    assert parse(*numbered) == parse(*texts)


def test_chains_are_named_by_the_hash_of_the_identity() -> None:
    assert chain_name(ServiceKey("172.31.255.21", "udp", 90)) == "dnat-9e86ad41116c"  # md5sum of 172.31.255.21:90:udp


@some.quick
@given(any_services)
def test_a_table_tells_its_services(wanted: dict[ServiceKey, Service]) -> None:
    assert services_of(table_of(wanted)) == wanted


@some.quick
@given(any_services, any_services)
def test_any_services_follow_any_others_and_the_way_back_is_as_good(
    old: dict[ServiceKey, Service], new: dict[ServiceKey, Service]
) -> None:
    one, other = table_of(old), table_of(new)
    assert apply_commands(one, edits(other, one)) == other
    assert apply_commands(other, edits(one, other)) == one
    assert not list(edits(one, one))
    assert apply_commands(one, edits(NftTable(), one)) == NftTable()


@some.quick
@given(any_services, any_services, st.booleans())
def test_leftovers_of_other_hands_go(
    old: dict[ServiceKey, Service], new: dict[ServiceKey, Service], dispatch: bool
) -> None:
    """Chains of other names, as Kube-OVN makes them for upper-case protocols, and rules of other shapes."""
    table = table_of(old)
    renamed = {name: f"{name}-old" for name in table.chains if not table.sets}
    chains = {renamed.get(name, name): rules for name, rules in table.chains.items()}
    chains |= {"dnat-junk": (Unknown("[]"),)}
    elements = {key: renamed.get(chain, chain) for key, chain in table.elements.items()}
    found = NftTable(dispatch, chains, table.sets | {"dnat-junk"}, elements)
    assert apply_commands(found, edits(table_of(new), found)) == table_of(new)


def test_only_the_clients_of_backends_that_go_are_forgotten() -> None:
    before, after = table_of({KEY: Service(TWO, 60)}), table_of({KEY: Service((TWO[1], ("10.0.1.9", 80)), 90)})
    assert [line for line in script(edits(after, before)).splitlines() if " set " in line] == [
        f"add set ip kube-ovn {chain_name(KEY)}-10.0.1.9-80 {{ type ipv4_addr; size 65535; flags dynamic,timeout; }}",
        f"delete set ip kube-ovn {chain_name(KEY)}-10.0.1.7-8080",
    ]


def test_chains_of_another_shape_tell_no_service() -> None:
    table = table_of({KEY: Service(TWO, 60)})
    chain = chain_name(KEY)
    for name, rules in table.chains.items():
        for strange in ((), rules[:-1], (Unknown("[]"), *rules), (*rules, Unknown("[]"))):
            assert services_of(replace(table, chains={**table.chains, name: strange})) == {}
    assert services_of(replace(table, chains={**table.chains, chain: (Spread("udp", TWO),)})) == {}
    assert services_of(replace(table, elements={KEY: ""})) == {}
    assert services_of(replace(table, dispatch=False)) == {}


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(ValueError, match="another writer"):
        rule_text(Unknown("[]"))
    for command in (AddChain("dnat-a; flush ruleset"), AddChain("prerouting"), AddElement(KEY, "")):
        with pytest.raises(ValueError, match="not a name"):
            script([command])
    with pytest.raises(ValueError, match="not a protocol"):
        script([AddElement(KEY._replace(protocol="{"), "dnat-a")])
    with pytest.raises(Rejected, match="another writer"):
        apply_commands(table_of({KEY: Service(TWO)}), [SetRules(chain_name(KEY), (Unknown("[]"),))])


@pytest.mark.parametrize("text", ["", "[]", "{}", "Error: No such file or directory", '{"nftables": 7}'])
def test_what_is_no_listing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a listing"):
        parse(text, '{"nftables": []}')


def test_the_text_for_people_holds_what_kube_ovns_tests_look_for() -> None:
    text = table_text(table_of({KEY: Service(TWO)}))
    for said in ("172.18.0.21 . tcp . 80 : goto", "numgen random mod 2 map", "10.0.1.7 . 8080", "10.0.1.8 . 8080"):
        assert said in text
    assert table_text(NftTable()) == ""


# The spec


ADD = c.SharedDnatAdd(
    eip="192.168.0.20",
    external_port=80,
    protocol="TCP",
    backends=(Backend(internal_ip="10.0.1.5", internal_port=80), Backend(internal_ip="10.0.1.6", internal_port=80)),
)
DEL = c.SharedDnatDel(eip="192.168.0.20", external_port=80, protocol="tcp")
EXCLUSIVE = c.DnatAdd(eip="192.168.0.20", external_port=80, protocol="tcp", internal_ip="10.0.1.5", internal_port=80)


def shared_of(spec: GatewaySpec | None) -> list[SharedDnat]:
    assert spec is not None
    return list(spec.shared_dnats)


def test_each_add_is_the_whole_set_of_backends_in_its_order_without_doubles() -> None:
    (added,) = shared_of(edit(GatewaySpec(), ADD))
    assert [str(backend) for backend in added.backends] == ["10.0.1.5:80", "10.0.1.6:80"]
    less = ADD.model_copy(update={"backends": ADD.backends[1:] * 2})
    (replaced,) = shared_of(edit_all(GatewaySpec(), [ADD, less]))
    assert [str(backend) for backend in replaced.backends] == ["10.0.1.6:80"]
    assert shared_of(edit_all(GatewaySpec(), [ADD, DEL, DEL])) == []


def test_the_affinity_that_is_not_named_stays() -> None:
    sticky = ADD.model_copy(update={"session_affinity": "ClientIP", "session_affinity_timeout_seconds": 60})
    (kept,) = shared_of(edit_all(GatewaySpec(), [sticky, ADD]))
    assert (kept.session_affinity, kept.session_affinity_timeout_seconds) == ("ClientIP", 60)
    (off,) = shared_of(edit_all(GatewaySpec(), [sticky, ADD.model_copy(update={"session_affinity": "None"})]))
    assert services(GatewaySpec(shared_dnats=[off]))[ServiceKey("192.168.0.20", "tcp", 80)].affinity is None
    (fresh,) = shared_of(edit(GatewaySpec(), ADD))
    assert (fresh.session_affinity, fresh.session_affinity_timeout_seconds) == ("None", 10800)


def test_a_shared_and_an_exclusive_mapping_contradict_each_other() -> None:
    with pytest.raises(Conflict, match=r"^DNAT 192\.168\.0\.20:80/tcp .* conflicts with shared DNAT"):
        edit_all(GatewaySpec(), [ADD, EXCLUSIVE])
    with pytest.raises(Conflict, match=r"^shared DNAT 192\.168\.0\.20:80/tcp .* conflicts with DNAT"):
        edit_all(GatewaySpec(), [EXCLUSIVE, ADD])
    exclusive = Dnat.model_validate(EXCLUSIVE.model_dump(exclude={"op"}))
    with pytest.raises(ValidationError, match="conflicts with"):
        GatewaySpec(dnats=[exclusive], shared_dnats=shared_of(edit(GatewaySpec(), ADD)))
    assert edit_all(GatewaySpec(), [ADD, EXCLUSIVE.model_copy(update={"external_port": 81})])
    assert edit_all(GatewaySpec(), [ADD, EXCLUSIVE.model_copy(update={"protocol": "udp"})])


@pytest.mark.parametrize(
    "wrong",
    [
        {"backends": []},
        {"sessionAffinityTimeoutSeconds": 0},
        {"sessionAffinityTimeoutSeconds": 86401},
        {"sessionAffinity": "clientip"},
        {"protocol": "sctp"},
        {"backends": [{"internalIp": "10.0.1.5"}]},
    ],
)
def test_bounds(wrong: dict[str, object]) -> None:
    good = {
        "eip": "192.168.0.20",
        "externalPort": 80,
        "protocol": "tcp",
        "backends": [{"internalIp": "10.0.1.5", "internalPort": 80}],
        "sessionAffinityTimeoutSeconds": 86400,
    }
    assert SharedDnat.model_validate(good)
    with pytest.raises(ValidationError):
        SharedDnat.model_validate(good | wrong)
