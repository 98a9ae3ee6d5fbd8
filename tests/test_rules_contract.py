"""What Kube-OVN's own end-to-end tests look for in iptables-save, found in what a spec leads to.

The patterns are those of its test/e2e/iptables-vpc-nat-gw; they are order-sensitive, and so are operators' eyes.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import commands as c
from rules.edit import edit_all
from rules.iptables import render_save
from rules.spec import GatewaySpec, Snat
from tests import strategies as some


def saved(spec: GatewaySpec) -> str:
    return render_save(some.settled(spec).ruleset)


@some.quick
@given(some.specs)
def test_the_patterns_of_the_upstream_tests_match(spec: GatewaySpec) -> None:
    text = saved(spec)
    assert ":HAIRPIN_SNAT" in text
    for eip in spec.eips:
        address = re.escape(eip.ip)
        assert re.search(
            r"-A HAIRPIN_SNAT -o \b.*\b -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT --ctorigdst "
            rf"\b{address}\b -j SNAT --to-source \b{address}\b",
            text,
        )
    for fip in spec.fips:
        outside, inside = re.escape(fip.eip), re.escape(fip.internal_ip)
        assert re.search(rf"-A EXCLUSIVE_DNAT -d \b{outside}/32\b .* --to-destination \b{inside}\b", text)
        assert re.search(rf"-A EXCLUSIVE_SNAT -s \b{inside}/32\b .* --to-source \b{outside}\b", text)
    for dnat in spec.dnats:
        assert re.search(
            rf"-A SHARED_DNAT -d \b{re.escape(dnat.eip)}/32\b -p {dnat.protocol} .* --dport {dnat.external_port} "
            rf"-j DNAT --to-destination \b{re.escape(dnat.internal_ip)}:{dnat.internal_port}\b",
            text,
        )
    for snat in spec.snats:
        if snat.prefix_length:  # a match on 0.0.0.0/0 is never printed
            cidr = re.escape(snat.internal_cidr)
            assert re.search(rf"-A SHARED_SNAT\b.*-s {cidr}\b.*--to-source {re.escape(snat.eip)}\b", text)


def snat_order(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("-A SHARED_SNAT ")]
    return [line.split()[3] if line.split()[2] == "-s" else "0.0.0.0/0" for line in lines]


@some.quick
@given(st.permutations(["10.0.0.0/16", "10.0.16.0/20", "10.0.16.0/24", "10.0.16.7", "0.0.0.0/0"]))
def test_snat_rules_stand_by_descending_prefix_length_whatever_order_they_came_in(order: list[str]) -> None:
    adds = [c.SnatAdd(eip="192.168.0.20", internal_cidr=cidr) for cidr in order]
    spec = edit_all(GatewaySpec(), adds)
    assert spec is not None
    assert snat_order(saved(spec)) == ["10.0.16.7/32", "10.0.16.0/24", "10.0.16.0/20", "10.0.0.0/16", "0.0.0.0/0"]
    spec = edit_all(spec, [c.SnatDel(eip="192.168.0.20", internal_cidr="10.0.16.0/20")])
    assert spec is not None
    assert snat_order(saved(spec)) == ["10.0.16.7/32", "10.0.16.0/24", "10.0.0.0/16", "0.0.0.0/0"]


def test_the_newest_of_equal_prefix_lengths_comes_last() -> None:
    snats = [Snat(eip=f"192.168.0.2{n}", internal_cidr="10.0.1.0/24") for n in (3, 1, 2)]
    lines = [line for line in saved(GatewaySpec(snats=snats)).splitlines() if line.startswith("-A SHARED_SNAT ")]
    assert [re.findall(r"--to-source (\S+)", line)[0] for line in lines] == [snat.eip for snat in snats]


EMPTY = """\
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:ARP_GUARD - [0:0]
:VPC_MARK - [0:0]
-A PREROUTING -j VPC_MARK
-A FORWARD -j ARP_GUARD
-A ARP_GUARD -o net1 -j DROP
-A VPC_MARK -i eth0 -j MARK --set-xmark 0x1/0x1
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DNAT_FILTER - [0:0]
:EXCLUSIVE_DNAT - [0:0]
:EXCLUSIVE_SNAT - [0:0]
:HAIRPIN_SNAT - [0:0]
:SHARED_DNAT - [0:0]
:SHARED_SNAT - [0:0]
:SNAT_FILTER - [0:0]
-A PREROUTING -j DNAT_FILTER
-A POSTROUTING -j SNAT_FILTER
-A DNAT_FILTER -j EXCLUSIVE_DNAT
-A DNAT_FILTER -j SHARED_DNAT
-A SNAT_FILTER -j EXCLUSIVE_SNAT
-A SNAT_FILTER -j SHARED_SNAT
-A SNAT_FILTER -j HAIRPIN_SNAT
COMMIT
"""


def test_init_leaves_the_chains_that_operators_know() -> None:
    assert saved(GatewaySpec()) == EMPTY


WORD_BY_WORD = [
    (
        c.EipAdd(address="192.168.0.10/24"),
        "-A HAIRPIN_SNAT -o eth0 -m mark --mark 0x1/0x1 -m conntrack --ctstate DNAT "
        "--ctorigdst 192.168.0.10 -j SNAT --to-source 192.168.0.10 --random-fully",
    ),
    (
        c.FipAdd(eip="192.168.0.10", internal_ip="10.0.1.5"),
        "-A EXCLUSIVE_DNAT -d 192.168.0.10/32 -j DNAT --to-destination 10.0.1.5",
    ),
    (
        c.FipAdd(eip="192.168.0.10", internal_ip="10.0.1.5"),
        "-A EXCLUSIVE_SNAT -s 10.0.1.5/32 -j SNAT --to-source 192.168.0.10",
    ),
    (
        c.DnatAdd.model_validate(
            {
                "eip": "192.168.0.10",
                "externalPort": 8888,
                "protocol": "TCP",
                "internalIp": "10.0.1.10",
                "internalPort": 80,
            }
        ),
        "-A SHARED_DNAT -d 192.168.0.10/32 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 10.0.1.10:80",
    ),
    (
        c.SnatAdd(eip="192.168.0.10", internal_cidr="10.0.1.7/24", random_fully=False),
        "-A SHARED_SNAT -s 10.0.1.0/24 -o net1 -j SNAT --to-source 192.168.0.10",
    ),
    (
        c.SnatAdd(eip="192.168.0.10", internal_cidr="10.0.1.7"),
        "-A SHARED_SNAT -s 10.0.1.7/32 -o net1 -j SNAT --to-source 192.168.0.10 --random-fully",
    ),
]


@pytest.mark.parametrize(("command", "line"), WORD_BY_WORD)
def test_each_verb_leaves_its_rule(command: c.Command, line: str) -> None:
    spec = edit_all(GatewaySpec(), [command])
    assert spec is not None
    assert set(saved(spec).splitlines()) - set(EMPTY.splitlines()) >= {line}
