"""The egress gateway as statements about the kernel, carried out on values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.apply import apply
from rules.delta import delta, undo
from rules.egress import BadEnvironment, EgressSpec, Side, Way, desired
from rules.ruleset import BUILTIN, FAMILIES, ChainRef, Family, Foreign, Jump, Return, Rule, Ruleset, Source
from rules.state import Actual, AddressKey, LinkState, Plan, PolicyRule, RouteEntry, RouteKey
from tests import strategies as some

POSTROUTING = ChainRef("nat", "POSTROUTING")
WAYS: dict[Family, Way] = {
    4: Way(Side("eth0", "10.0.1.5"), Side("net1", "192.168.0.11")),
    6: Way(Side("eth0", "fd00:1::5"), Side("net1", "fd00:9::11")),
}
FOREIGN = (Foreign("-m comment --comment theirs -j ACCEPT"), Rule((Source("172.31.0.0/16"),), Return()))
THEIRS = PolicyRule("eth7", 77, 900)


def pod() -> Actual:
    """The namespace as the container network leaves it, with rules of others in it."""
    link = LinkState(index=2, mac="02:00:00:00:00:02", up=True, arp=True, mtu=1400, promote_secondaries=False)
    chains = {ChainRef(t, name, f): () for f in FAMILIES for t, names in BUILTIN.items() for name in names}
    return Actual(
        ruleset=Ruleset({**chains, POSTROUTING: FOREIGN}),
        links={"eth0": link, "net1": replace(link, index=3)},
        addresses={AddressKey("eth0", "10.0.1.5/24"): False, AddressKey("net1", "192.168.0.11/24"): False},
        routes={RouteKey("0.0.0.0/0"): RouteEntry("net1", "192.168.0.1", protocol=3)},
        policy_rules=frozenset({PolicyRule(None, 254, 32766), THEIRS}),
        sysctls={
            "net/ipv4/ip_forward": 0,
            "net/ipv6/conf/all/forwarding": 0,
            "net/ipv4/conf/eth0/rp_filter": 1,
            "net/ipv4/conf/net1/rp_filter": 1,
        },
    )


def planned(spec: EgressSpec, actual: Actual) -> Plan:
    return delta(desired(spec, {family: way(spec, family) for family in spec.families}, actual), actual)


def way(spec: EgressSpec, family: Family) -> Way:
    outside = spec.families[family].external_gateway
    return WAYS[family] if outside else Way(WAYS[family].internal, None)


def settled(spec: EgressSpec, actual: Actual | None = None) -> Actual:
    before = actual or pod()
    return apply(planned(spec, before), before)


def spec_of(**environment: str) -> EgressSpec:
    return EgressSpec.from_environment(environment)


_v4 = st.lists(st.sampled_from(["10.0.5.0/24", "10.0.6.1", "10.0.7.0/24", "0.0.0.0/1"]), max_size=3).map(",".join)
_v6 = st.lists(st.sampled_from(["fd00:5::/64", "fd00:6::1", "2001:db8::/32"]), max_size=3).map(",".join)
environments = st.fixed_dictionaries(
    {
        "INTERNAL_GATEWAY_IPV4": st.sampled_from(["10.0.1.1", "10.0.1.254"]),
        "EXTERNAL_GATEWAY_IPV4": st.sampled_from(["", "192.168.0.1"]),
        "NO_SNAT_SOURCES_IPV4": _v4,
        "INTERNAL_GATEWAY_IPV6": st.sampled_from(["", "fd00:1::1"]),
        "EXTERNAL_GATEWAY_IPV6": st.sampled_from(["", "fd00:9::1"]),
        "NO_SNAT_SOURCES_IPV6": _v6,
        "ENABLE_BGP": st.sampled_from(["", "true", "false"]),
        "ENABLE_EVPN": st.sampled_from(["", "false"]),
    }
)
vpns = st.fixed_dictionaries(
    {
        "INTERNAL_GATEWAY_IPV4": st.just("10.0.1.1"),
        "EXTERNAL_GATEWAY_IPV4": st.just("192.168.0.1"),
        "NO_SNAT_SOURCES_IPV4": _v4,
        "ENABLE_BGP": st.just("true"),
        "ENABLE_EVPN": st.just("true"),
        "VNI": st.sampled_from(["", "1016", "7"]),
    }
)


@some.quick
@given(environments | vpns, environments | vpns)
def test_a_run_over_any_earlier_one_leaves_what_a_first_run_leaves(one: dict[str, str], other: dict[str, str]) -> None:
    after = settled(spec_of(**other), settled(spec_of(**one)))
    # Making a device anew takes a second look: a new tunnel is nobody's port yet.
    after = settled(spec_of(**other), after)
    assert not planned(spec_of(**other), after)
    fresh = settled(spec_of(**other), settled(spec_of(**other)))
    assert after.ruleset == fresh.ruleset
    assert (after.routes, after.policy_rules) == (fresh.routes, fresh.policy_rules)
    assert {n: (s.device, s.master) for n, s in after.links.items()} == {
        n: (s.device, s.master) for n, s in fresh.links.items()
    }


@some.quick
@given(environments | vpns, environments | vpns, st.data())
def test_a_run_cut_short_anywhere_is_undone(one: dict[str, str], other: dict[str, str], data: st.DataObject) -> None:
    before = settled(spec_of(**one), settled(spec_of(**one)))
    plan = planned(spec_of(**other), before)
    done = data.draw(st.integers(0, len(plan.steps)))
    midway = apply(replace(plan, steps=plan.steps[:done]), before)
    back = apply(undo(plan, before, midway), midway)
    back = apply(undo(plan, before, back), back)  # a device that was made anew gets its ports in a second pass
    assert (back.ruleset, back.routes, back.sysctls) == (before.ruleset, before.routes, before.sysctls)
    assert back.policy_rules == before.policy_rules
    assert {n: s.master for n, s in back.links.items()} == {n: s.master for n, s in before.links.items()}


@some.quick
@given(environments, environments)
def test_what_others_put_there_stays(one: dict[str, str], other: dict[str, str]) -> None:
    after = settled(spec_of(**other), settled(spec_of(**one)))
    kept = [rule for rule in after.ruleset.chains[POSTROUTING] if rule in FOREIGN]
    assert tuple(kept) == FOREIGN
    assert THEIRS in after.policy_rules


def test_the_rules_are_those_that_kube_ovn_makes() -> None:
    before = replace(pod(), policy_rules=frozenset({PolicyRule(None, 9, 1002, foreign="ab"), PolicyRule("x", 5, 1004)}))
    after = settled(
        spec_of(
            INTERNAL_GATEWAY_IPV4="10.0.1.1", EXTERNAL_GATEWAY_IPV4="192.168.0.1", NO_SNAT_SOURCES_IPV4="10.0.5.0/24"
        ),
        before,
    )
    assert {(r.priority, r.interface, r.source, r.table) for r in after.policy_rules} == {
        (1001, "eth0", None, 253),
        (1002, "net1", None, 1000),
        (1003, "lo", "10.0.1.5/32", 1000),
        (1004, "lo", "192.168.0.11/32", 253),
    }
    assert after.routes[RouteKey("0.0.0.0/0", 1000)] == RouteEntry("eth0", "10.0.1.1")
    assert after.routes[RouteKey("0.0.0.0/0")] == RouteEntry("net1", "192.168.0.1", protocol=3)
    assert after.sysctls == {
        "net/ipv4/ip_forward": 1,
        "net/ipv6/conf/all/forwarding": 1,
        "net/ipv4/conf/eth0/rp_filter": 0,
        "net/ipv4/conf/net1/rp_filter": 1,
    }
    jump = Rule((), Jump("VEG-MASQUERADE"))
    assert after.ruleset.chains[POSTROUTING][-3:] == (*FOREIGN, jump)


def test_rules_in_pairs_go_and_single_ones_stay() -> None:
    """A source that once kept its address is known by its two rules; one RETURN rule alone is somebody else's."""
    gateways = {"INTERNAL_GATEWAY_IPV4": "10.0.1.1", "EXTERNAL_GATEWAY_IPV4": "192.168.0.1"}
    before = settled(spec_of(**gateways, NO_SNAT_SOURCES_IPV4="10.0.5.0/24"))
    after = settled(spec_of(**gateways, NO_SNAT_SOURCES_IPV4="10.0.6.0/24"), before)
    returns = [str(r.matches) for r in after.ruleset.chains[POSTROUTING] if isinstance(r, Rule) and r.matches]
    assert len(returns) == 3
    assert "10.0.5.0" not in str(returns)
    assert "172.31.0.0/16" in returns[-1]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"INTERNAL_GATEWAY_IPV4": "10.0.1.x"}, "INTERNAL_GATEWAY_IPV4: '10.0.1.x' is not an address"),
        ({"INTERNAL_GATEWAY_IPV4": "fd00::1"}, "INTERNAL_GATEWAY_IPV4: fd00::1 is not an IPv4 address of a gateway"),
        ({"EXTERNAL_GATEWAY_IPV6": "::"}, "EXTERNAL_GATEWAY_IPV6: :: is not an IPv6 address of a gateway"),
        ({"NO_SNAT_SOURCES_IPV4": "10.0.0.0/33"}, "NO_SNAT_SOURCES_IPV4: '10.0.0.0/33' is not a CIDR"),
        ({"NO_SNAT_SOURCES_IPV6": "10.0.0.0/8"}, "NO_SNAT_SOURCES_IPV6: 10.0.0.0/8 is not an IPv6 CIDR"),
        ({"ENABLE_EVPN": "true", "VNI": "16777216"}, "VNI: '16777216' is not a number from 1 to 16777215"),
        ({"ENABLE_EVPN": "true", "VNI": "7"}, "ENABLE_EVPN needs"),
    ],
)
def test_a_variable_that_says_what_cannot_be_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BadEnvironment, match="^" + says.replace("(", r"\(")):
        EgressSpec.from_environment(environment)


def test_sources_are_taken_once_and_with_their_length() -> None:
    spec = spec_of(INTERNAL_GATEWAY_IPV4="10.0.1.1", NO_SNAT_SOURCES_IPV4=" 10.0.5.7/24,10.0.6.1,,10.0.5.0/24 ")
    assert spec.families[4].no_snat == ("10.0.5.0/24", "10.0.6.1/32")
    assert spec.families[4].external_gateway is None
