"""The spec recovered from the kernel alone: ours exactly, and what older releases left behind."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from rules.adopt import adopt
from rules.iptables import parse_save, render_save
from rules.keyed import Keyed
from rules.ruleset import ChainRef, Foreign, Rule, Ruleset, Snat, Source
from rules.ruleset import Dnat as ToDestination
from rules.spec import Dnat, Eip, Fip, GatewaySpec, Interfaces, Route, SharedDnat
from rules.spec import Snat as SnatRule
from rules.state import Actual, AddressKey, RouteEntry, RouteKey
from tests import strategies as some


def recoverable(spec: GatewaySpec) -> GatewaySpec:
    """What the kernel can know of a spec: the order among SNATs of different prefix lengths means nothing, nor does
    the timeout of an affinity that is off, and the external gateways come with the first EIP."""
    gateways = {} if spec.eips else {"gateway_v4": None, "gateway_v6": None}
    by_length = Keyed(sorted(spec.snats, key=lambda snat: -snat.prefix_length))
    return in_order(spec).model_copy(
        update={"snats": by_length, "shared_dnats": Keyed(map(_said, spec.shared_dnats)), **gateways}
    )


def in_order(spec: GatewaySpec | None) -> GatewaySpec:
    """Limits sorted: their order means nothing."""
    assert spec is not None
    return spec.model_copy(update={"qos": Keyed(sorted(spec.qos, key=str))})


def _said(shared: SharedDnat) -> SharedDnat:
    off = shared.session_affinity == "None"
    return shared.model_copy(update={"session_affinity_timeout_seconds": 10800} if off else {})


def by_key(parts: Keyed[SharedDnat]) -> Keyed[SharedDnat]:
    """Their order means nothing, and the kernel does not keep it."""
    return Keyed(sorted(parts, key=lambda part: part.key))


@some.quick
@given(some.specs)
def test_what_was_applied_is_recovered(spec: GatewaySpec) -> None:
    kernel = some.settled(spec)
    assert in_order(adopt(kernel, spec.interfaces)) == recoverable(spec)
    assert in_order(adopt(kernel)) == recoverable(spec)


@some.quick
@given(some.specs, some.specs)
def test_it_is_recovered_from_text_and_after_changes_too(old: GatewaySpec, new: GatewaySpec) -> None:
    kernel = some.settled(new, some.settled(old))
    kernel = replace(kernel, ruleset=parse_save(render_save(kernel.ruleset)))
    recovered = in_order(adopt(kernel, new.interfaces))
    # Once they are there, default routes stay after the last EIP.
    gateways = {"gateway_v4": recovered.gateway_v4, "gateway_v6": recovered.gateway_v6}
    routes = Keyed(sorted(recovered.routes, key=lambda route: route.cidr))
    expected = recoverable(new).model_copy(update={"routes": Keyed(sorted(new.routes, key=lambda route: route.cidr))})
    shared = {"shared_dnats": by_key(expected.shared_dnats)}
    if not new.eips or old.eips:
        expected = expected.model_copy(update=gateways)
    found = recovered.model_copy(update={"routes": routes, "shared_dnats": by_key(recovered.shared_dnats)})
    assert found == expected.model_copy(update=shared)


def test_nothing_is_adopted_where_our_chains_do_not_stand() -> None:
    assert adopt(some.pod()) is None
    chains = {**some.settled(GatewaySpec()).ruleset.chains, ChainRef("nat", "SNAT_FILTER"): ()}
    assert adopt(replace(some.pod(), ruleset=Ruleset(chains))) is None


# As release 1.14 leaves it: no marks, no hairpin rules, SNATs in order of arrival, the default route not on-link.
LEGACY = """\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DNAT_FILTER - [0:0]
:EXCLUSIVE_DNAT - [0:0]
:EXCLUSIVE_SNAT - [0:0]
:SHARED_DNAT - [0:0]
:SHARED_SNAT - [0:0]
:SNAT_FILTER - [0:0]
-A PREROUTING -j DNAT_FILTER
-A POSTROUTING -j SNAT_FILTER
-A DNAT_FILTER -j EXCLUSIVE_DNAT
-A DNAT_FILTER -j SHARED_DNAT
-A EXCLUSIVE_DNAT -d 192.168.0.21/32 -j DNAT --to-destination 10.0.1.5
-A EXCLUSIVE_SNAT -s 10.0.1.5/32 -j SNAT --to-source 192.168.0.21
-A SHARED_DNAT -d 192.168.0.20/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 10.0.1.10:80
-A SHARED_DNAT -d 192.168.0.20/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 10.0.1.11:80
-A SHARED_SNAT -s 10.0.0.0/16 -o net1 -j SNAT --to-source 192.168.0.20 --random-fully
-A SHARED_SNAT -s 10.0.1.0/24 -o net1 -j SNAT --to-source 192.168.0.22
-A SNAT_FILTER -j EXCLUSIVE_SNAT
-A SNAT_FILTER -j SHARED_SNAT
COMMIT
"""
ADDRESSES = ["192.168.0.11/24", "192.168.0.20/24", "192.168.0.21/24"]


def legacy() -> Actual:
    pod = some.pod()
    addresses = {AddressKey("net1", address): False for address in ADDRESSES}
    chains = {**pod.ruleset.chains, **parse_save(LEGACY).chains}
    return replace(pod, ruleset=Ruleset(chains), addresses={**pod.addresses, **addresses})


def test_what_an_older_release_left_is_adopted() -> None:
    assert adopt(legacy()) == GatewaySpec(
        eips=[Eip(address="192.168.0.20/24"), Eip(address="192.168.0.21/24")],
        fips=[Fip(eip="192.168.0.21", internal_ip="10.0.1.5")],
        dnats=[Dnat(eip="192.168.0.20", external_port=8888, protocol="tcp", internal_ip="10.0.1.10", internal_port=80)],
        snats=[
            SnatRule(eip="192.168.0.20", internal_cidr="10.0.0.0/16", random_fully=True),
            SnatRule(eip="192.168.0.22", internal_cidr="10.0.1.0/24", random_fully=False),
        ],
    )


def test_applying_what_was_adopted_completes_it_and_keeps_it() -> None:
    spec = adopt(legacy())
    assert spec is not None
    kernel = some.settled(spec, legacy())
    assert adopt(kernel) == recoverable(spec)
    assert "HAIRPIN_SNAT -o eth0" in render_save(kernel.ruleset)


def test_strange_rules_and_values_in_our_chains_are_passed_over() -> None:
    kernel = some.settled(
        GatewaySpec(interfaces=Interfaces(vpc="a", external="b")), some.pod(Interfaces(vpc="a", external="b"))
    )
    strange = {
        ChainRef("nat", "EXCLUSIVE_DNAT"): (
            Foreign("-d 1.2.3.4/32 -j ACCEPT"),
            Rule((Source("10.0.0.1/32"),), ToDestination("10.0.0.1")),
        ),
        ChainRef("nat", "SHARED_SNAT"): (Rule((Source("10.0.0.0/8"),), Snat("192.168.0.20")),),
    }
    kernel = replace(kernel, ruleset=Ruleset({**kernel.ruleset.chains, **strange}))
    assert adopt(kernel) == GatewaySpec(interfaces=Interfaces(vpc="a", external="b"))


def test_only_marked_routes_and_on_link_defaults_are_taken() -> None:
    pod = some.pod()
    routes = {
        **pod.routes,
        RouteKey("10.9.0.0/16"): RouteEntry("eth0", "10.0.1.1", protocol=3),
        RouteKey("10.2.0.0/16"): RouteEntry("eth0", "10.0.1.1"),
        RouteKey("::/0"): RouteEntry("net1", "2001:db8::1", onlink=True),
    }
    adopted = adopt(
        some.settled(
            GatewaySpec(routes=[Route(cidr="10.2.0.0/16", next_hop_ip="10.0.1.1")]), replace(pod, routes=routes)
        )
    )
    assert adopted is not None
    assert [route.cidr for route in adopted.routes] == ["10.2.0.0/16"]
    assert (adopted.gateway_v4, adopted.gateway_v6) == (None, "2001:db8::1")


def test_of_two_lengths_of_one_address_the_marked_one_counts() -> None:
    kernel = some.settled(GatewaySpec(eips=[Eip(address="192.168.0.20/24")]), some.pod())
    addresses = {AddressKey("net1", "192.168.0.20/32"): False, AddressKey("net1", "192.168.0.20/16"): False}
    for arranged in ({**addresses, **kernel.addresses}, {**kernel.addresses, **addresses}):
        adopted = adopt(replace(kernel, addresses=arranged))
        assert adopted is not None
        assert [eip.address for eip in adopted.eips] == ["192.168.0.20/24"]
