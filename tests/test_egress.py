"""One run of the egress gateway over the shipped fake kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from gateway import egress
from gateway.fake import FakeFirewall, FakeFlows, FakeKernel, FakeLinks
from gateway.ports import Refused
from gateway.transaction import Kernel
from rules.ruleset import ChainRef, Foreign
from rules.state import AddressKey, Bridge, Plan, PolicyRule, RouteEntry, RouteKey, Vrf, Vxlan

ENVIRONMENT = {
    "INTERNAL_GATEWAY_IPV4": "10.0.1.1",
    "EXTERNAL_GATEWAY_IPV4": "192.168.0.1",
    "NO_SNAT_SOURCES_IPV4": "10.0.5.0/24,10.0.6.0/24",
}
IPV6 = {
    "INTERNAL_GATEWAY_IPV6": "fd00:1::1",
    "EXTERNAL_GATEWAY_IPV6": "fd00:9::1",
    "NO_SNAT_SOURCES_IPV6": "fd00:5::/64",
}
EVPN = {"ENABLE_BGP": "true", "ENABLE_EVPN": "true", "VNI": "1016"}


def pod() -> FakeKernel:
    kernel = FakeKernel.gateway_pod()
    kernel.addresses[AddressKey("eth0", "fd00:1::5/64")] = False
    kernel.addresses[AddressKey("net1", "fd00:9::11/64")] = False
    kernel.policy_rules.add(PolicyRule(None, 254, 32766))
    return kernel


def start(kernel: FakeKernel, environment: dict[str, str]) -> Plan:
    links = FakeLinks(kernel)
    drivers = FakeFirewall(kernel), FakeFirewall(kernel, family=6)
    return egress.start(
        Kernel(drivers[0], links, FakeFlows(kernel), firewall6=drivers[1], tables=("nat",)), links, environment
    )


def state(kernel: FakeKernel) -> object:
    return copy.deepcopy((kernel.links, kernel.routes, kernel.chains, kernel.policy_rules, kernel.sysctls))


def test_both_versions_of_ip_are_served_and_the_second_run_writes_nothing() -> None:
    kernel = pod()
    assert start(kernel, ENVIRONMENT | IPV6)
    assert kernel.routes[RouteKey("::/0", 1000)] == RouteEntry("eth0", "fd00:1::1")
    assert {(r.family, r.priority) for r in kernel.policy_rules if r.priority != 32766} == {
        (family, priority) for family in (4, 6) for priority in (1001, 1002, 1003, 1004)
    }
    assert len(kernel.chains[ChainRef("nat", "VEG-MASQUERADE", 6)]) == 2
    writes = kernel.writes
    assert not start(kernel, ENVIRONMENT | IPV6)
    assert kernel.writes == writes


def test_another_environment_changes_only_what_differs() -> None:
    kernel, fresh = pod(), pod()
    start(kernel, ENVIRONMENT | IPV6)
    changed = ENVIRONMENT | {"NO_SNAT_SOURCES_IPV4": "10.0.6.0/24,10.0.7.0/24"}
    plan = start(kernel, changed)
    assert not any(type(step).__name__ == "SetSysctl" for step in plan.steps)
    start(fresh, changed)
    assert state(kernel) == state(fresh)


@pytest.mark.parametrize("environment", [ENVIRONMENT | IPV6, ENVIRONMENT | EVPN])
def test_every_failure_leaves_the_pod_as_it_was(environment: dict[str, str]) -> None:
    count = 0
    kernel = pod()
    kernel.chains[ChainRef("nat", "POSTROUTING")] = (Foreign("-m comment --comment theirs -j ACCEPT"),)
    before = state(kernel)
    while True:
        kernel.faults = fail_at(count)
        try:
            start(kernel, environment)
            break
        except Refused:
            assert state(kernel) == before
        count += 1
    assert count > 5


def fail_at(number: int) -> Callable[[str], None]:
    left = [number]

    def fault(_: str) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise Refused("injected", "no", retryable=True)

    return fault


def test_evpn_makes_the_virtual_router_and_its_ports() -> None:
    kernel = pod()
    start(kernel, ENVIRONMENT | EVPN)
    links = kernel.links
    assert [links[name].device for name in ("vrf-vpn", "br-vpn", "vxlan-vpn")] == [
        Vrf(2000),
        Bridge(),
        Vxlan(1016, "192.168.0.11", 4789),
    ]
    assert {name: links[name].master for name in ("br-vpn", "vxlan-vpn", "eth0", "net1")} == {
        "br-vpn": "vrf-vpn",
        "vxlan-vpn": "br-vpn",
        "eth0": "vrf-vpn",
        "net1": None,
    }
    assert all(links[name].up for name in ("vrf-vpn", "br-vpn", "vxlan-vpn"))
    assert {key.prefix: entry.via for key, entry in kernel.routes.items() if key.table == 2000} == {
        "10.0.5.0/24": "10.0.1.1",
        "10.0.6.0/24": "10.0.1.1",
    }
    assert ChainRef("nat", "VEG-MASQUERADE") not in kernel.chains
    assert not start(kernel, ENVIRONMENT | EVPN)
    start(kernel, ENVIRONMENT | EVPN | {"VNI": "7"})
    assert kernel.links["vxlan-vpn"].device == Vxlan(7, "192.168.0.11", 4789)
    assert (kernel.links["vxlan-vpn"].master, kernel.links["vxlan-vpn"].up) == ("br-vpn", True)


def test_a_kernel_without_vrf_is_told_of_only_where_evpn_is_asked_for() -> None:
    kernel = pod()
    kernel.lacks = frozenset({Vrf})
    before = state(kernel)
    with pytest.raises(Refused, match="this kernel has no Vrf devices"):
        start(kernel, ENVIRONMENT | EVPN)
    assert state(kernel) == before
    assert start(kernel, ENVIRONMENT)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"INTERNAL_GATEWAY_IPV4": "10.9.9.9"}, "INTERNAL_GATEWAY_IPV4: 10.9.9.9 lies in no subnet of this pod"),
        ({"EXTERNAL_GATEWAY_IPV4": "10.0.1.9"}, "EXTERNAL_GATEWAY_IPV4: 10.0.1.9 is reached by eth0, as the internal"),
        ({"INTERNAL_GATEWAY_IPV4": "10.0.1.254"}, "INTERNAL_GATEWAY_IPV4: 10.0.1.254 cannot be reached: not an"),
        ({"INTERNAL_GATEWAY_IPV6": "fd00:7::1"}, "INTERNAL_GATEWAY_IPV6: fd00:7::1 cannot be reached: Network is"),
    ],
)
def test_a_gateway_in_the_wrong_place_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(Refused, match="^" + says):
        start(pod(), ENVIRONMENT | environment)


def test_with_bgp_only_forwarding_is_ours() -> None:
    kernel = pod()
    start(kernel, {"INTERNAL_GATEWAY_IPV4": "10.0.1.1", "EXTERNAL_GATEWAY_IPV4": "", "ENABLE_BGP": "true"})
    fresh = pod()
    assert (kernel.chains, kernel.policy_rules, kernel.routes) == (fresh.chains, fresh.policy_rules, fresh.routes)
    assert kernel.sysctls["net/ipv4/ip_forward"] == kernel.sysctls["net/ipv6/conf/all/forwarding"] == 1
    assert kernel.sysctls["net/ipv4/conf/eth0/rp_filter"] == 0
