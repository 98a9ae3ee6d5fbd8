"""The VPC router: OVN's order of routes and policies, and that the kernel's rules say the same."""

from __future__ import annotations

import shlex
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.routing import Connected, Policy, Router, Static, parse_match, rule_lines

IP, NET = IPv4Address, IPv4Network
LAN = Connected(cidr=NET("10.0.1.0/24"), device="lan0", gateway=IP("10.0.1.1"))
OTHER = Connected(cidr=NET("10.0.2.0/24"), device="lan1", gateway=IP("10.0.2.1"))


def router(*statics: Static, policies: tuple[Policy, ...] = ()) -> Router:
    return Router(connected=(LAN, OTHER), statics=statics, policies=policies)


def to(cidr: str, hop: str, by_source: bool = False) -> Static:
    return Static(cidr=NET(cidr), next_hop=IP(hop), by_source=by_source)


def hop(one: Router, src: str, dst: str) -> tuple[str, list[str]]:
    found = one.hop(IP(src), IP(dst))
    return found.kind, [str(address) for address in found.next_hops]


def test_without_routes_only_the_vpcs_own_subnets_are_reached() -> None:
    assert hop(router(), "10.0.1.9", "10.0.2.9") == ("deliver", [])
    assert hop(router(), "10.0.1.9", "8.8.8.8") == ("unrouted", [])


def test_the_longer_prefix_wins_whichever_side_it_speaks_of() -> None:
    one = router(to("0.0.0.0/0", "10.0.1.254"), to("10.0.1.0/24", "10.0.1.253", by_source=True))
    assert hop(one, "10.0.1.9", "8.8.8.8") == ("via", ["10.0.1.253"])
    assert hop(one, "10.0.2.9", "8.8.8.8") == ("via", ["10.0.1.254"])


def test_at_equal_length_destination_wins_over_source_and_connected_over_both() -> None:
    one = router(to("8.8.8.0/24", "10.0.1.254"), to("10.0.1.0/24", "10.0.1.253", by_source=True))
    assert hop(one, "10.0.1.9", "8.8.8.8") == ("via", ["10.0.1.254"])
    assert hop(one, "10.0.1.9", "10.0.2.9") == ("deliver", [])


def test_a_policy_overrides_the_route_but_needs_one() -> None:
    away = Policy(
        priority=10, src=NET("10.0.1.0/24"), dst=NET("0.0.0.0/0"), action="reroute", next_hop=IP("10.0.1.252")
    )
    assert hop(router(to("0.0.0.0/0", "10.0.1.254"), policies=(away,)), "10.0.1.9", "8.8.8.8") == (
        "via",
        ["10.0.1.252"],
    )
    assert hop(router(policies=(away,)), "10.0.1.9", "8.8.8.8") == ("unrouted", [])
    assert hop(router(policies=(away,)), "10.0.1.9", "10.0.2.9") == ("via", ["10.0.1.252"])


def test_the_highest_policy_speaks_first() -> None:
    drop = Policy(priority=11, src=NET("10.0.1.0/24"), dst=NET("8.8.0.0/16"), action="drop")
    allow = Policy(priority=12, src=NET("10.0.1.7/32"), dst=NET("0.0.0.0/0"), action="allow")
    one = router(to("0.0.0.0/0", "10.0.1.254"), policies=(drop, allow))
    assert hop(one, "10.0.1.9", "8.8.8.8") == ("drop", [])
    assert hop(one, "10.0.1.7", "8.8.8.8") == ("via", ["10.0.1.254"])


def test_equal_routes_share_the_traffic() -> None:
    one = router(to("0.0.0.0/0", "10.0.1.254"), to("0.0.0.0/0", "10.0.1.253"))
    assert hop(one, "10.0.1.9", "8.8.8.8") == ("via", ["10.0.1.254", "10.0.1.253"])
    assert any("nexthop via 10.0.1.254 dev lan0 nexthop via 10.0.1.253 dev lan0" in line for line in rule_lines(one))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ip4.src==10.0.1.0/24 && ip4.dst==10.0.1.250", ("10.0.1.0/24", "10.0.1.250/32")),
        ("ip4.src == 10.0.1.0/24", ("10.0.1.0/24", "0.0.0.0/0")),
        ("ip4 && ip4.dst==8.8.8.8", ("0.0.0.0/0", "8.8.8.8/32")),
        ("ip4.src==10.0.0.0/8 && ip4.src==10.1.0.0/16", ("10.1.0.0/16", "0.0.0.0/0")),
        ("ip4.src==10.0.0.0/16 && ip4.src==10.1.0.0/16", None),
        ("ip4.src!=10.0.0.0/16", None),
        ("ip4.src==10.0.0.0/16 || ip4.dst==10.0.0.0/16", None),
        ("ip4.src==$addresses", None),
        ("tcp.dst==80", None),
        ("ip4.src==10.0.0.0/99", None),
        ("", None),
    ],
)
def test_the_matches_that_are_understood(text: str, expected: tuple[str, str] | None) -> None:
    found = parse_match(text)
    assert found == (None if expected is None else (NET(expected[0]), NET(expected[1])))


class Kernel:
    """As much of the kernel's policy routing as `rule_lines` uses; anything else in a line fails the test."""

    def __init__(self, lines: list[str]) -> None:
        self.tables: dict[str, list[tuple[IPv4Network, list[str]]]] = {}
        self.rules: list[tuple[int, IPv4Network, IPv4Network, list[str]]] = []
        deleted = []
        for line in lines:
            words = shlex.split(line)
            if words[:2] == ["route", "add"]:
                table = words[words.index("table") + 1]
                hops = [words[i + 1] for i, word in enumerate(words) if word == "via"]
                assert (words[3], words[5] in ("via", "dev", "nexthop")) == (
                    "table",
                    True,
                )  # ip takes no table after next hops
                self.tables.setdefault(table, []).append((NET(words[2]), hops))
            elif words[:3] == ["rule", "del", "pref"]:
                deleted.append(words[3])
            else:
                assert words[:3] == ["rule", "add", "pref"]
                self._rule(int(words[3]), words[4:])
        assert deleted == ["32766", "32767"]
        self.rules.sort(key=lambda rule: rule[0])  # stable, as the kernel keeps equal preferences in order

    def _rule(self, preference: int, words: list[str]) -> None:
        src = dst = NET("0.0.0.0/0")
        if words[:1] == ["from"]:
            src, words = NET(words[1]), words[2:]
        if words[:1] == ["to"]:
            dst, words = NET(words[1]), words[2:]
        assert words[0] in ("lookup", "blackhole", "goto", "nop")
        self.rules.append((preference, src, dst, words))

    def hop(self, src: IPv4Address, dst: IPv4Address) -> tuple[str, list[str]]:
        start = 0
        for preference, from_, to_, (verb, *rest) in self.rules:
            if preference < start or src not in from_ or dst not in to_:
                continue
            if verb == "blackhole":
                return "drop", []
            if verb == "goto":
                start = int(rest[0])
                assert any(rule[0] == start for rule in self.rules), "the target of a goto must exist"
            elif verb == "lookup":
                matching = [route for route in self.tables[rest[0]] if dst in route[0]]
                if matching:
                    hops = max(matching, key=lambda route: route[0].prefixlen)[1]
                    return ("via", hops) if hops else ("deliver", [])
        return "unrouted", []


cidrs = st.builds(
    lambda base, length: NET((int(IP(base)), length), strict=False),
    st.sampled_from(["10.0.1.9", "10.0.1.130", "10.0.2.9", "8.8.8.8", "8.8.9.9", "0.0.0.0"]),
    st.sampled_from([0, 8, 16, 23, 24, 25, 32]),
)
hops = st.sampled_from([IP("10.0.1.254"), IP("10.0.1.253"), IP("10.0.2.254")])
addresses = st.sampled_from([IP(a) for a in ("10.0.1.9", "10.0.1.130", "10.0.2.9", "8.8.8.8", "8.8.9.9", "9.9.9.9")])
statics = st.lists(
    st.builds(Static, cidr=cidrs, next_hop=hops, by_source=st.booleans()),
    max_size=5,
    unique_by=lambda s: (s.cidr, s.by_source),
)
policies = st.lists(
    st.builds(
        Policy, priority=st.integers(0, 32767), src=cidrs, dst=cidrs,
        action=st.sampled_from(["allow", "drop", "reroute"]), next_hop=hops,
    ),
    max_size=4,
    unique_by=lambda p: p.priority,
)  # fmt: skip


@settings(max_examples=300)
@given(statics, policies, addresses, addresses)
def test_the_kernels_rules_send_every_packet_where_ovn_would(
    some: list[Static], more: list[Policy], src: IPv4Address, dst: IPv4Address
) -> None:
    one = router(*some, policies=tuple(more))
    said = one.hop(src, dst)
    assert Kernel(rule_lines(one)).hop(src, dst) == (said.kind, [str(address) for address in said.next_hops])
