"""The story of a connection: what each thing that is missing does to it, and what would mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from api.explain import Endpoint, Explanation, Question, explain, explain_flow
from api.rendered import rendered
from api.state import offline
from rules.desired import Facts
from rules.flows import Flow
from rules.loadbalancer import LoadBalancerSpec
from rules.qos import limit_for
from rules.ruleset import ChainRef, Foreign, Ruleset
from rules.spec import GatewaySpec
from rules.state import Actual, AddressKey, LinkState, RouteEntry, RouteKey
from rules.story import Reading
from rules.surroundings import CONNTRACK_COUNT, CONNTRACK_MAX, FORWARDING, Neighbour, OtherRule, Surroundings
from tests.gateway_kit import STATE, example

OUTSIDE, TENANT = "203.0.113.5:40000", "10.0.1.77:40000"
LINK = LinkState(1, "02:00:00:00:00:01", True, True, 1500, True)
ROUTES = {
    RouteKey("0.0.0.0/0"): RouteEntry("net1", "192.168.0.1"),
    RouteKey("10.0.2.0/24"): RouteEntry("eth0", "10.0.1.1"),
}
SETTINGS = {FORWARDING: 1, CONNTRACK_COUNT: 10, CONNTRACK_MAX: 1000}


def reading(
    spec: GatewaySpec | None = None,
    *,
    links: Mapping[str, LinkState] | None = None,
    addresses: tuple[tuple[str, str], ...] | None = None,
    routes: Mapping[RouteKey, RouteEntry] | None = None,
    **around: Any,
) -> Reading:
    """A gateway in order, but for what is said."""
    spec = spec or example()
    held = addresses
    if held is None:
        held = (("eth0", "10.0.1.254/24"), *(("net1", eip.address) for eip in spec.eips))
    actual = Actual(
        ruleset=rendered(spec, Facts()),
        links={"eth0": LINK, "net1": LINK} if links is None else links,
        addresses=dict.fromkeys((AddressKey(*key) for key in held), True),
        routes=ROUTES if routes is None else routes,
    )
    return Reading(spec, actual, Surroundings(**{"sysctls": SETTINGS, **around}))


def ask(known: Reading, src: str = OUTSIDE, dst: str = "192.168.0.10:8888", protocol: str = "tcp") -> Explanation:
    ends = [Endpoint(address=a, port=int(p) if p else None) for a, _, p in (text.partition(":") for text in (src, dst))]
    return explain(Question(protocol=protocol, source=ends[0], destination=ends[1]), known)


def found(told: Explanation) -> str:
    return "\n".join(f"{fault.what} => {fault.remedy}" for fault in told.faults)


@pytest.mark.parametrize(
    ("src", "dst"), [(OUTSIDE, "192.168.0.10:8888"), (TENANT, "203.0.113.5:443"), (TENANT, "192.168.0.10:8888")]
)
def test_what_is_in_order_has_no_fault(src: str, dst: str) -> None:
    told = ask(reading(), src, dst)
    assert (told.works, told.verdict, found(told)) == (True, "forwarded", "")
    topics = list(dict.fromkeys(line.topic for line in told.story))
    assert [t for t in topics if t != "bandwidth"] == [
        "arrival",
        "rules",
        "translation",
        "route",
        "neighbour",
        "answers",
    ]


FORGOTTEN = STATE | {"snats": [], "fips": []}


@pytest.mark.parametrize(
    ("known", "src", "dst", "verdict", "what", "remedy"),
    [
        (
            reading(sysctls={**SETTINGS, FORWARDING: 0}),
            OUTSIDE,
            "192.168.0.10:8888",
            "dropped",
            "ip_forward is 0",
            "sysctl -w net.ipv4.ip_forward=1",
        ),
        (
            reading(addresses=(("eth0", "10.0.1.254/24"), ("net1", "192.168.0.12/24"))),
            OUTSIDE,
            "192.168.0.10:8888",
            "forwarded",
            "the EIP 192.168.0.10 is not up on net1",
            "eip-add",
        ),
        (reading(), OUTSIDE, "192.168.0.99:80", "forwarded", "nobody here answers ARP for it", "v4ip: 192.168.0.99"),
        (
            reading(links={"eth0": LINK, "net1": replace(LINK, arp=False)}),
            OUTSIDE,
            "192.168.0.10:8888",
            "forwarded",
            "ARP is off on net1",
            "first EIP",
        ),
        (
            reading(routes={}),
            OUTSIDE,
            "192.168.0.10:8888",
            "forwarded",
            "no route leads back to 203.0.113.5",
            "GATEWAY_V4",
        ),
        (
            reading(routes={}),
            TENANT,
            "203.0.113.5:443",
            "no route",
            "no route leads to 203.0.113.5",
            "ip route replace",
        ),
        (
            reading(GatewaySpec.model_validate(FORGOTTEN)),
            TENANT,
            "203.0.113.5:443",
            "forwarded",
            "no source translation for 10.0.1.77",
            "snat-add 192.168.0.10,10.0.1.0/24 (IptablesSnatRule with internalCIDR: 10.0.1.0/24)",
        ),
        (
            reading(GatewaySpec.model_validate(STATE | {"fips": [{"eip": "192.168.0.12", "internalIp": "10.9.9.9"}]})),
            OUTSIDE,
            "192.168.0.12:80",
            "forwarded",
            "the target 10.9.9.9 is looked for outside",
            "subnet-route-add 10.9.9.0/24",
        ),
        (
            reading(sysctls={**SETTINGS, CONNTRACK_COUNT: 1000}),
            OUTSIDE,
            "192.168.0.10:8888",
            "dropped",
            "table is full: 1,000 of 1,000",
            "nf_conntrack_max",
        ),
        (reading(), OUTSIDE, "192.168.0.10:22", "local", "no rule leads 192.168.0.10:22/tcp inside", "dnat-add"),
        (
            reading(links={"eth0": replace(LINK, up=False), "net1": LINK}),
            OUTSIDE,
            "192.168.0.10:8888",
            "dropped",
            "eth0 is down",
            "ip link set eth0 up",
        ),
        (reading(links={"eth0": LINK}), OUTSIDE, "192.168.0.10:8888", "dropped", "there is no interface net1", "CNI"),
        (
            reading(GatewaySpec.model_validate(STATE | {"eips": []})),
            TENANT,
            "203.0.113.5:443",
            "dropped",
            "while ARP is off on net1, nothing may leave by it",
            "eip-add",
        ),
        (
            reading(neighbours=(Neighbour(interface="eth0", address="10.0.1.10", mac=None, state="failed"),)),
            OUTSIDE,
            "192.168.0.10:8888",
            "forwarded",
            "10.0.1.10 does not answer ARP on eth0",
            "natgw doctor",
        ),
        (
            reading(neighbours=(Neighbour(interface="net1", address="192.168.0.1", mac=None, state="incomplete"),)),
            OUTSIDE,
            "192.168.0.10:8888",
            "forwarded",
            "192.168.0.1 has not answered ARP yet on net1",
            "port security",
        ),
        (
            reading(sysctls={**SETTINGS, "net/ipv4/conf/net1/rp_filter": 1}),
            TENANT.replace("10.0.1.77", "192.168.0.10"),
            "203.0.113.5:443",
            "dropped",
            "is an address of the gateway itself",
            "conflicts",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_would_mend_it(  # noqa: PLR0917 -- the columns of the table above
    known: Reading, src: str, dst: str, verdict: str, what: str, remedy: str
) -> None:
    told = ask(known, src, dst)
    assert not told.works
    assert told.verdict == verdict
    (fault,) = [fault for fault in told.faults if what in fault.what]
    assert remedy in fault.remedy
    assert any(line.topic == "missing" and what in line.text for line in told.story)


def test_a_strict_reverse_path_filter_drops_what_comes_by_the_wrong_side() -> None:
    strict = {**SETTINGS, "net/ipv4/conf/all/rp_filter": 1}
    question = Question(
        protocol="tcp",
        source=Endpoint(address="10.0.1.77", port=1),
        destination=Endpoint(address="192.168.0.10", port=8888),
        in_interface="net1",
    )
    told = explain(question, reading(sysctls=strict))
    assert told.verdict == "dropped"
    assert "the reverse-path filter of net1 drops it: 10.0.1.77 is reached by eth0" in found(told)
    assert explain(question, reading()).verdict == "forwarded"


def test_rules_of_others_are_shown_and_make_it_uncertain() -> None:
    known = reading(other_rules=(OtherRule(where="nft", table="filter", chain="FORWARD", text="-j DROP"),))
    told = ask(known)
    assert "may have a say: nft filter FORWARD: -j DROP" in found(told)
    assert told.works
    policy = reading(other_rules=(OtherRule(where="legacy", table="filter", chain="FORWARD", text="policy DROP"),))
    assert not ask(policy).works
    chains = dict(known.actual.ruleset.chains)
    ref = ChainRef("nat", "PREROUTING")
    chains[ref] = (Foreign("-m geoip --src-cc XX -j DROP"), *chains[ref])
    known = replace(known, actual=replace(known.actual, ruleset=Ruleset(chains)))
    told = ask(known)
    assert not told.certain
    assert "a rule that is not ours stands in nat PREROUTING: -m geoip --src-cc XX -j DROP" in found(told)


def test_limits_on_the_way_are_named_for_both_directions() -> None:
    told = ask(reading(), TENANT, "203.0.113.5:443")
    assert [line.text for line in told.story if line.topic == "bandwidth"] == [
        "egress limit of EIP 192.168.0.10: 10 Mbit/s, burst 0.5 MiB",
        "answers: ingress limit 2 of net1 src 203.0.113.0/24: 2.5 Mbit/s, burst 0.3 MiB",
    ]


def test_the_limit_that_is_asked_first_is_the_one() -> None:
    def interface(match: str, priority: int) -> dict[str, Any]:
        kind = "ip" if match else ""
        where = {"direction": "egress", "interface": "net1", "matchType": kind, "matchValue": match}
        return {**where, "priority": priority, "rateMax": "1", "burstMax": "1"}

    eip = {"eip": "192.168.0.10", "direction": "egress", "priority": 2, "rateMax": "9", "burstMax": "1"}
    limits = [interface("", 3), interface("dst 203.0.0.0/8", 2), interface("dst 203.0.113.0/24", 2), eip]
    spec = GatewaySpec.model_validate({"qos": limits})

    def at(src: str, dst: str) -> str:
        return str(limit_for(spec, "net1", "egress", src, dst))

    assert at("192.168.0.10", "203.0.113.5").startswith("egress limit of EIP 192.168.0.10")
    assert at("192.168.0.12", "203.0.113.5").startswith("egress limit 2 of net1 dst 203.0.113.0/24")
    assert at("192.168.0.12", "203.9.9.9").startswith("egress limit 2 of net1 dst 203.0.0.0/8")
    assert at("192.168.0.12", "8.8.8.8").startswith("egress limit 3 of net1: ")
    assert limit_for(spec, "eth0", "egress", "192.168.0.12", "8.8.8.8") is None
    assert limit_for(spec, "net1", "ingress", "192.168.0.12", "8.8.8.8") is None


def test_a_live_connection_is_told_by_what_holds_for_it_now() -> None:
    flow = Flow(6, "203.0.113.5", "192.168.0.10", 40000, 8888, "10.0.1.10", "203.0.113.5", 80, 40000)
    told = explain_flow([flow, flow], reading())
    assert told.flow is not None
    assert told.other_flows == 1
    assert [line.text for line in told.story if line.topic == "connection"] == [
        "tracked: 203.0.113.5:40000 -> 192.168.0.10:8888, answered by 10.0.1.10:80 -> 203.0.113.5:40000",
        "the rules would translate it the same way today",
    ]
    other = replace(flow, reply_src="10.0.1.99")
    assert "it was translated by other rules" in explain_flow([other], reading()).story[1].text


LB = {
    "eip": {"address": "192.168.0.30/24", "gateway": "192.168.0.1"},
    "dnats": [
        {
            "eip": "192.168.0.30",
            "port": 80,
            "protocol": "tcp",
            "clusterIP": "10.96.0.20",
            "targetPort": 8080,
            "gateway": "10.16.0.1",
        }
    ],
}


def test_a_load_balancers_packets_can_be_explained_too() -> None:
    known = offline(LB)
    assert isinstance(known.spec, LoadBalancerSpec)
    told = ask(known, OUTSIDE, "192.168.0.30:80")
    assert (told.verdict, told.out_interface, told.next_hop) == ("forwarded", "eth0", "10.16.0.1")
    assert (told.final.destination, told.final.destination_port) == ("10.96.0.20", 8080)
    assert told.works, found(told)
    told = ask(known, OUTSIDE, "192.168.0.30:81")
    assert told.verdict == "local"
    assert "a port 81 in the Service's spec.ports" in found(told)


@pytest.mark.parametrize("document", [STATE, LB])
def test_a_spec_alone_will_do(document: dict[str, Any]) -> None:
    address = "192.168.0.10:8888" if document is STATE else "192.168.0.30:80"
    told = ask(offline(document), OUTSIDE, address)
    assert (told.verdict, told.works) == ("forwarded", True)


def test_what_is_no_state_is_refused_in_a_sentence() -> None:
    for wrong in ([], {"eips": [{"address": "x"}]}, {"kind": "natgw-state/1"}, {"sha256": "0", "spec": "{}"}):
        with pytest.raises(ValueError, match=r"^.{5,200}$"):
            offline(wrong)
