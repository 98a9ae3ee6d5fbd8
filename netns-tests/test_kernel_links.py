"""KernelLinks on the real kernel, with iproute2 as the witness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from netns import Namespace, veth

from gateway.kernel.links import KernelLinks
from gateway.ports import Refused
from rules.state import (
    ROUTE_PROTOCOL,
    AddAddress,
    AddPolicyRule,
    AddressKey,
    DeleteAddress,
    DeletePolicyRule,
    DeleteRoute,
    PolicyRule,
    ReplaceRoute,
    RouteEntry,
    RouteKey,
    SetArp,
    SetPromoteSecondaries,
    SetUp,
)

DEFAULT = RouteKey("0.0.0.0/0")
DEFAULT6 = RouteKey("::/0")


@pytest.fixture
def links(netns: Namespace) -> Iterator[KernelLinks]:
    """A driver inside a namespace with a tenant's and an external interface, both up."""
    veth(netns, "net1", netns, "peer1")
    veth(netns, "eth0", netns, "peer0")
    driver = KernelLinks()
    with netns.entered():
        yield driver
    driver.close()


def ip(netns: Namespace, *words: str) -> Any:
    return json.loads(netns.run("ip", "-j", *words) or "[]")


def eip(address: str, interface: str = "net1") -> AddressKey:
    return AddressKey(interface, address)


def test_links_are_read_as_ip_link_shows_them(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "link", "set", "net1", "mtu", "1400", "arp", "off")
    netns.run("ip", "link", "set", "eth0", "down")
    seen = links.read().links
    for shown in ip(netns, "link"):
        state = seen[shown["ifname"]]
        assert state.index == shown["ifindex"]
        assert state.mac == shown["address"]
        assert state.mtu == shown["mtu"]
        assert state.up == ("UP" in shown["flags"])
        assert state.arp == ("NOARP" not in shown["flags"])
    assert not seen["net1"].arp
    assert not seen["eth0"].up


def test_an_added_address_is_marked_and_adding_it_again_succeeds(netns: Namespace, links: KernelLinks) -> None:
    key = eip("192.168.0.10/24")
    links.commit([AddAddress(key)])
    links.commit([AddAddress(key)])
    assert links.read().addresses[key] is True
    (shown,) = ip(netns, "-4", "addr", "show", "net1")[0]["addr_info"]
    assert (shown["local"], shown["prefixlen"], shown["label"]) == ("192.168.0.10", 24, "net1:eip")


def test_somebody_elses_address_is_not_ours_even_after_we_wanted_it(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "addr", "add", "192.168.0.2/24", "dev", "net1")
    key = eip("192.168.0.2/24")
    assert links.read().addresses[key] is False
    links.commit([AddAddress(key)])
    assert links.read().addresses[key] is False


def test_an_interface_name_without_room_for_the_label(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "link", "set", "peer1", "name", "a-long-external")
    key = eip("192.168.0.10/24", "a-long-external")
    # Here IFA_PROTO alone says that it is ours.
    links.commit([AddAddress(key)])
    assert links.read().addresses[key] is True


def test_deleting_an_address_that_is_not_there_succeeds(links: KernelLinks) -> None:
    links.commit([DeleteAddress(eip("192.168.0.10/24"))])
    links.commit([DeleteAddress(eip("192.168.0.10/24", "net9"))])


def test_a_missing_interface_is_named_and_may_come(links: KernelLinks) -> None:
    with pytest.raises(Refused, match="no such interface net9") as refused:
        links.commit([AddAddress(eip("192.168.0.10/24", "net9"))])
    assert refused.value.retryable
    assert refused.value.step == "add address 192.168.0.10/24 on net9"


def test_the_step_that_the_kernel_refuses_is_named(links: KernelLinks) -> None:
    bad = ReplaceRoute(RouteKey("10.0.3.0/24"), RouteEntry("eth0", "10.0.1.1"))
    good = AddAddress(eip("192.168.0.10/24"))
    with pytest.raises(Refused, match="Nexthop has invalid gateway") as refused:
        links.commit([good, bad, SetArp("net1", False)])
    assert refused.value.step == "replace route 10.0.3.0/24 via 10.0.1.1 dev eth0"
    now = links.read()
    assert good.key in now.addresses
    assert now.links["net1"].arp


def test_routes_of_both_families(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "addr", "add", "10.0.1.254/24", "dev", "eth0")
    netns.run("ip", "addr", "add", "fd00:1::254/64", "dev", "eth0", "nodad")
    wanted = {
        RouteKey("10.0.2.0/24"): RouteEntry("eth0", "10.0.1.1"),
        RouteKey("10.0.9.9/32"): RouteEntry("eth0", None),
        RouteKey("fd00:2::/64"): RouteEntry("eth0", "fd00:1::1"),
        DEFAULT: RouteEntry("net1", "192.168.0.1", onlink=True),
        DEFAULT6: RouteEntry("net1", "fd00:9::1", onlink=True),
    }
    for _ in range(2):
        links.commit([ReplaceRoute(key, entry) for key, entry in wanted.items()])
        seen = links.read().routes
        assert {key: seen.get(key) for key in wanted} == wanted
    assert seen[RouteKey("10.0.1.0/24")].protocol != ROUTE_PROTOCOL
    moved = RouteEntry("eth0", "10.0.1.2")
    links.commit([ReplaceRoute(RouteKey("10.0.2.0/24"), moved)])
    assert links.read().routes[RouteKey("10.0.2.0/24")] == moved
    assert "via 10.0.1.2 dev eth0 proto 223" in netns.run("ip", "route", "show", "10.0.2.0/24")
    wanted[RouteKey("10.0.2.0/24")] = moved
    for _ in range(2):
        links.commit([DeleteRoute(key, entry) for key, entry in wanted.items()])
        assert not wanted.keys() & links.read().routes.keys()


def test_only_plain_routes_are_read_of_whatever_table(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "addr", "add", "10.0.1.254/24", "dev", "eth0")
    netns.run("ip", "route", "add", "10.1.0.0/16", "via", "10.0.1.1", "metric", "100")
    netns.run("ip", "route", "add", "10.2.0.0/16", "via", "10.0.1.1", "table", "100")
    netns.run("ip", "route", "add", "10.6.0.0/16", "via", "10.0.1.1", "table", "101")
    netns.run("ip", "route", "add", "blackhole", "10.3.0.0/16")
    netns.run("ip", "route", "add", "10.4.0.0/16", "via", "10.0.1.1", "tos", "0x10")
    netns.run("ip", "route", "add", "10.5.0.0/16", "via", "10.0.1.1")
    others = {RouteKey("10.2.0.0/16", 100), RouteKey("10.6.0.0/16", 101)}
    assert set(links.read().routes) == {RouteKey("10.0.1.0/24"), RouteKey("10.5.0.0/16")} | others


def test_routes_of_the_load_balancers_table_come_and_go(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "addr", "add", "10.0.1.254/24", "dev", "eth0")
    here, there = RouteKey("10.2.0.0/16"), RouteKey("10.2.0.0/16", 100)
    links.commit([ReplaceRoute(there, RouteEntry("eth0", "10.0.1.1")), ReplaceRoute(here, RouteEntry("eth0", None))])
    seen = links.read().routes
    assert (seen[here].via, seen[there].via) == (None, "10.0.1.1")
    for _ in range(2):
        links.commit([DeleteRoute(there, seen[there])])
        assert there not in links.read().routes
    assert here in links.read().routes


def test_policy_rules_are_read_and_written(netns: Namespace, links: KernelLinks) -> None:
    theirs = [
        ("pref", "6", "iif", "eth0", "from", "10.0.0.0/8", "table", "100"),
        ("pref", "7", "not", "iif", "eth0", "table", "100"),
        ("pref", "8", "iif", "eth0", "fwmark", "1", "table", "100"),
        ("pref", "9", "iif", "eth0", "blackhole"),
        ("pref", "5", "iif", "eth0", "table", "1000"),
    ]
    for words in theirs:
        netns.run("ip", "rule", "add", *words)
    foreign = links.read().policy_rules
    assert {rule.priority for rule in foreign if rule.foreign} == {7, 8, 9}
    assert {PolicyRule("eth0", 1000, 5), PolicyRule("eth0", 100, 6, "10.0.0.0/8")} < foreign
    ours = PolicyRule("net1", 100)
    for _ in range(2):
        links.commit([AddPolicyRule(ours)])
        assert links.read().policy_rules == foreign | {ours._replace(priority=32764)}
        assert ours.is_in(links.read().policy_rules)
    assert netns.run("ip", "rule", "show", "iif", "net1").count("lookup 100 proto 223") == 1
    for _ in range(2):
        links.commit([DeletePolicyRule(ours)])
        assert links.read().policy_rules == foreign


def test_a_link_goes_up_and_down(netns: Namespace, links: KernelLinks) -> None:
    for on in (False, True):
        links.commit([SetUp("net1", on)])
        assert links.read().links["net1"].up == on


def test_replacing_a_foreign_route_can_be_undone_as_it_was(netns: Namespace, links: KernelLinks) -> None:
    netns.run("ip", "addr", "add", "192.168.0.2/24", "dev", "net1")
    netns.run("ip", "route", "add", "default", "via", "192.168.0.254", "proto", "static")
    before = links.read().routes[DEFAULT]
    links.commit([ReplaceRoute(DEFAULT, RouteEntry("net1", "192.168.0.1", onlink=True))])
    links.commit([ReplaceRoute(DEFAULT, before)])
    assert "default via 192.168.0.254 dev net1 proto static" in netns.run("ip", "route", "show", "default")


def test_arp_and_promote_secondaries_are_switched(netns: Namespace, links: KernelLinks) -> None:
    netns.run("sysctl", "-qw", "net.ipv4.conf.net1.promote_secondaries=0")
    for on in (True, False, True):
        links.commit([SetArp("net1", on), SetPromoteSecondaries("net1", on)])
        state = links.read().links["net1"]
        assert (state.arp, state.promote_secondaries) == (on, on)
        assert ("NOARP" in ip(netns, "link", "show", "net1")[0]["flags"]) is not on
        assert netns.run("sysctl", "-n", "net.ipv4.conf.net1.promote_secondaries").strip() == str(int(on))
    assert state.up


def test_the_first_eip_of_a_bare_interface_leaves_and_the_others_stay(netns: Namespace, links: KernelLinks) -> None:
    netns.run("sysctl", "-qw", "net.ipv4.conf.net1.promote_secondaries=0")
    first, second, third = (eip(f"192.168.0.{host}/24") for host in (10, 11, 12))
    links.commit(
        [
            SetPromoteSecondaries("net1", True),
            *map(AddAddress, (first, second, third)),
            ReplaceRoute(DEFAULT, RouteEntry("net1", "192.168.0.1", onlink=True)),
        ]
    )
    links.commit([DeleteAddress(first)])
    now = links.read()
    assert now.addresses.keys() & {first, second, third} == {second, third}
    assert now.addresses[second]
    assert now.routes[DEFAULT] == RouteEntry("net1", "192.168.0.1", onlink=True)
    assert now.routes[RouteKey("192.168.0.0/24")].interface == "net1"


def test_the_kernel_drops_ipv4_routes_with_the_last_address(netns: Namespace, links: KernelLinks) -> None:
    # Not the driver's doing; the gateway counts on it being so when the last EIP of a bare interface leaves.
    only = eip("192.168.0.10/24")
    links.commit(
        [
            AddAddress(only),
            ReplaceRoute(DEFAULT, RouteEntry("net1", "192.168.0.1", onlink=True)),
            ReplaceRoute(DEFAULT6, RouteEntry("net1", "fd00:9::1", onlink=True)),
        ]
    )
    links.commit([DeleteAddress(only)])
    now = links.read().routes
    assert DEFAULT not in now
    assert DEFAULT6 in now


def test_a_thousand_addresses_come_and_go(netns: Namespace, links: KernelLinks) -> None:
    keys = [eip(f"10.{high}.{low}.1/24") for high in range(4) for low in range(250)]
    links.commit([AddAddress(key) for key in keys])
    assert links.read().addresses.items() >= dict.fromkeys(keys, True).items()
    assert len(ip(netns, "-4", "addr", "show", "net1")[0]["addr_info"]) == 1000
    links.commit([DeleteAddress(key) for key in keys])
    assert not links.read().addresses.keys() & set(keys)


def test_a_refusal_in_a_batch_names_its_own_step(links: KernelLinks) -> None:
    keys = [eip(f"10.9.{low}.1/24") for low in range(200)]
    routes = [ReplaceRoute(RouteKey(f"10.10.{low}.0/24"), RouteEntry("net1", "10.9.7.2")) for low in range(200)]
    routes[150] = ReplaceRoute(RouteKey("10.11.0.0/24"), RouteEntry("net1", "172.31.0.1"))
    with pytest.raises(Refused, match="invalid gateway") as refused:
        links.commit([*map(AddAddress, keys), *routes])
    assert refused.value.step == "replace route 10.11.0.0/24 via 172.31.0.1 dev net1"


def test_a_namespace_that_never_had_a_route_reads_as_one_without(make_netns: Callable[[], Namespace]) -> None:
    driver = KernelLinks()
    with make_netns().entered():
        assert driver.read().routes == {}
    driver.close()
