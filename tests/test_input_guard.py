"""The guard of the gateway's own input: its rules, its settings, and that undoing and switching off leave nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from api.settings import BadSetting, Settings
from rules.appliance import desired
from rules.apply import apply
from rules.delta import delta, undo
from rules.desired import Facts
from rules.inputguard import InputPolicy, guard_chain, guard_rules
from rules.iptables import parse_rule, parse_save, render_rule, render_save
from rules.packet import Packet
from rules.routing import Host
from rules.ruleset import ChainRef, Foreign, Return, Rule, Ruleset
from rules.spec import GatewaySpec, Interfaces
from rules.state import Actual
from rules.trace import trace
from tests import strategies as some

POLICY = InputPolicy(
    (9100, 10667), ("192.168.0.1", "10.9.0.0/16", "fd00::1"), (("10.0.1.254", 8080), ("fd00::11", 8080))
)
TEXT = [
    "-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN",
    "-p icmp -j RETURN",
    "-p udp -m udp --dport 3784 -j RETURN",
    "-p udp -m udp --dport 4784 -j RETURN",
    "-p tcp -m tcp --dport 9100 -j RETURN",
    "-p tcp -m tcp --dport 10667 -j RETURN",
    "-s 10.9.0.0/16 -p tcp -m tcp --dport 179 -j RETURN",
    "-s 192.168.0.1/32 -p tcp -m tcp --dport 179 -j RETURN",
    "-d 10.0.1.254/32 -p tcp -m tcp --dport 8080 -j RETURN",
    "-i net1 -j DROP",
    "-i eth0 -j DROP",
]


def test_the_chain_reads_as_iptables_prints_it() -> None:
    assert [render_rule(rule) for rule in guard_rules(POLICY, Interfaces(), 4)] == TEXT
    six = [render_rule(rule) for rule in guard_rules(POLICY, Interfaces(), 6)]
    assert [line for line in six if line not in TEXT] == [
        "-p ipv6-icmp -j RETURN",
        "-s fd00::1/128 -p tcp -m tcp --dport 179 -j RETURN",
        "-d fd00::11/128 -p tcp -m tcp --dport 8080 -j RETURN",
    ]


@pytest.mark.parametrize("text", ["-p icmp -m tcp --dport 1 -j DROP", "-p icmp -p icmp -j DROP", "-p tcp -j DROP"])
def test_neighbours_of_our_shapes_are_foreign(text: str) -> None:
    assert parse_rule(text) == Foreign(text)


def pod6() -> Actual:
    """A pod whose tables of both families were read, with a rule of somebody else in each."""
    pod = some.pod()
    foreign = {ChainRef("mangle", "INPUT", family): (Foreign("-p tcp -m tcp --dport 7 -j LOG"),) for family in (4, 6)}
    return replace(pod, ruleset=Ruleset({**pod.ruleset.chains, **foreign}))


def settled(facts: Facts, kernel: Actual) -> Actual:
    return apply(delta(desired(GatewaySpec(), facts, kernel), kernel), kernel)


@pytest.mark.parametrize("kernel", [some.pod(), pod6()], ids=["IPv4", "both"])
def test_protected_opened_and_undone(kernel: Actual) -> None:
    opened = settled(Facts(), kernel)
    protected = settled(Facts(input=POLICY), opened)
    families = [family for family in (4, 6) if ChainRef("mangle", "INPUT", family) in kernel.ruleset.chains]
    for family in families:
        chain, hook, jump = guard_chain(family)
        assert protected.ruleset.chains[chain] == tuple(guard_rules(POLICY, Interfaces(), family))
        assert protected.ruleset.chains[hook] == (*opened.ruleset.chains[hook], jump)
    assert not delta(desired(GatewaySpec(), Facts(input=POLICY), protected), protected)
    assert settled(Facts(), protected) == opened
    plan = delta(desired(GatewaySpec(), Facts(input=POLICY), opened), opened)
    assert apply(undo(plan, opened, protected), protected) == opened
    text = render_save(Ruleset({ref: rules for ref, rules in protected.ruleset.chains.items() if ref.family == 4}))
    assert render_save(parse_save(text)) == text


@pytest.mark.parametrize(
    ("packet", "verdict"),
    [
        (Packet("icmp", "192.168.0.99", 0, "192.168.0.11", 0, "net1"), "local"),
        (Packet("udp", "192.168.0.99", 5, "192.168.0.11", 3784, "net1"), "local"),
        (Packet("tcp", "192.168.0.99", 5, "192.168.0.11", 179, "net1"), "dropped"),
        (Packet("tcp", "192.168.0.1", 5, "192.168.0.11", 179, "net1"), "local"),
        (Packet("tcp", "10.0.1.5", 5, "10.0.1.254", 22, "eth0"), "dropped"),
        (Packet("tcp", "10.0.1.5", 5, "10.0.1.254", 8080, "eth0"), "local"),
        (Packet("tcp", "10.0.1.5", 5, "192.168.0.11", 8080, "eth0"), "dropped"),
        (Packet("tcp", "127.0.0.1", 5, "10.0.1.254", 22, "lo"), "local"),
        (Packet("tcp", "10.0.1.5", 5, "203.0.113.2", 22, "eth0"), "forwarded"),
    ],
)
def test_trace_tells_who_gets_in(packet: Packet, verdict: str) -> None:
    kernel = settled(Facts(arp="on", input=POLICY), some.pod())
    assert trace(packet, kernel.ruleset, Host.of(kernel)).verdict == verdict


def test_the_settings_name_what_is_let_in() -> None:
    said = {
        "NATGW_INPUT": "protect",
        "NATGW_METRICS_PORTS": "9100,10667",
        "NATGW_BGP_PEERS": "192.168.0.1, fd00::1",
        "NATGW_LISTEN": "[fd00::11]:8080",
    }
    policy = InputPolicy((9100, 10667), ("192.168.0.1/32", "fd00::1/128"), (("fd00::11", 8080),))
    assert Settings.from_environment(said).input == policy
    assert Settings.from_environment({**said, "NATGW_INPUT": ""}).input is None
    assert all(
        isinstance(rule, Rule) and rule.target == Return() for rule in list(guard_rules(policy, Interfaces(), 6))[:-2]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATGW_INPUT", "closed"),
        ("NATGW_METRICS_PORTS", "9100,http"),
        ("NATGW_METRICS_PORTS", "65536"),
        ("NATGW_BGP_PEERS", "192.168.0.1/24"),
        ("NATGW_BGP_PEERS", "router"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=name):
        Settings.from_environment({name: value})
