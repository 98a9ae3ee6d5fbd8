"""Addresses are given out as Kube-OVN's IPAM does it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.ipam import Pool


def pool(cidr: str = "192.168.0.0/24", gateway: str = "192.168.0.1", *excluded: str) -> Pool:
    ranges = [text.partition("..") for text in excluded]
    return Pool(
        "s", IPv4Network(cidr), IPv4Address(gateway), tuple((IPv4Address(a), IPv4Address(b or a)) for a, _, b in ranges)
    )


def test_the_first_free_address_skips_gateway_and_excluded_ranges() -> None:
    one = pool("192.168.0.0/24", "192.168.0.1", "192.168.0.1..192.168.0.10", "192.168.0.12")
    assert [str(one.first_free("x")) for _ in range(3)] == ["192.168.0.11", "192.168.0.13", "192.168.0.14"]


def test_an_address_taken_by_name_is_not_handed_out_again() -> None:
    one = pool()
    assert one.take(IPv4Address("192.168.0.2"), "a") is None
    assert one.take(IPv4Address("192.168.0.2"), "b") == "belongs to a already"
    assert one.take(IPv4Address("192.168.0.2"), "a") is None
    assert str(one.first_free("c")) == "192.168.0.3"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.0.1.111", "lies outside subnet s (192.168.0.0/24)"),
        ("192.168.0.1", "is the gateway of subnet s"),
        ("192.168.0.0", "is the network or broadcast address of subnet s (192.168.0.0/24)"),
        ("192.168.0.255", "is the network or broadcast address of subnet s (192.168.0.0/24)"),
        ("192.168.0.5", "is excluded by excludeIps 192.168.0.4..192.168.0.6 of subnet s"),
        ("192.168.0.9", "is excluded by excludeIps 192.168.0.9 of subnet s"),
    ],
)
def test_addresses_that_can_be_nobodys(address: str, why: str) -> None:
    one = pool("192.168.0.0/24", "192.168.0.1", "192.168.0.4..192.168.0.6", "192.168.0.9")
    assert one.take(IPv4Address(address), "x") == why


def test_an_exhausted_pool_gives_none() -> None:
    one = pool("10.0.0.0/30", "10.0.0.1")
    assert str(one.first_free("x")) == "10.0.0.2"
    assert one.first_free("y") is None


def test_a_search_may_be_confined_to_a_part() -> None:
    one = pool("10.0.0.0/8", "10.0.0.1")
    assert str(one.first_free("x", IPv4Network("10.200.0.0/24"))) == "10.200.0.0"
    assert str(one.first_free("x", IPv4Network("10.255.255.254/31"))) == "10.255.255.254"
    assert one.first_free("x", IPv4Network("10.255.255.254/31")) is None


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), max_size=4), st.integers(1, 30), st.integers(0, 30))
def test_what_is_handed_out_is_never_refused(spans: list[tuple[int, int]], gateway: int, wanted: int) -> None:
    base = IPv4Address("10.0.0.0")
    ranges = tuple((base + min(span), base + max(span)) for span in spans)
    one = Pool("s", IPv4Network("10.0.0.0/27"), base + gateway, ranges)
    given_out = [address for _ in range(wanted) if (address := one.first_free("x")) is not None]
    assert given_out == sorted(set(given_out))
    fresh = Pool("s", one.cidr, one.gateway, ranges)
    assert all(fresh.refusal(address) is None for address in given_out)
    if len(given_out) < wanted:
        assert all(one.refusal(address) is not None or address in one.holders for address in one.cidr)
