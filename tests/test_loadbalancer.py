"""The load balancer of one Service: its spec, what it means for the kernel, and its life over the fake kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fake import FakeKernel
from gateway.ports import Refused
from rules.appliance import OtherAppliance
from rules.apply import apply
from rules.delta import delta, undo
from rules.desired import Facts
from rules.edit import edit_all
from rules.flows import Flow
from rules.iptables import render_rule
from rules.loadbalancer import (
    POSTROUTING,
    PREROUTING,
    BalancerCommand,
    BalancerDnat,
    BalancerDnatDel,
    BalancerEip,
    LoadBalancerSpec,
    adopt,
    desired,
    edit,
    is_stale,
    suspects,
)
from rules.ruleset import ChainRef, Foreign, Jump, Rule
from rules.spec import Interfaces
from rules.state import Actual, AddressKey, PolicyRule, RouteEntry, RouteKey
from tests.gateway_kit import Gateway, example, gateway
from tests.strategies import pod, quick

EIP = BalancerEip(address="192.168.0.30/24", gateway="192.168.0.1")
FACTS = Facts()


def dnat(
    port: int = 80, protocol: str = "tcp", cluster_ip: str = "10.96.0.20", target_port: int = 8080
) -> BalancerDnat:
    return BalancerDnat.model_validate(
        {
            "eip": EIP.ip,
            "port": port,
            "protocol": protocol,
            "clusterIP": cluster_ip,
            "targetPort": target_port,
            "gateway": "10.0.1.1",
        }
    )


def deletion(of: BalancerDnat) -> BalancerDnatDel:
    return BalancerDnatDel.model_validate(of.model_dump(exclude={"gateway"}))


dnats = st.builds(
    dnat,
    st.sampled_from([53, 80, 443]),
    st.sampled_from(["tcp", "udp", "sctp"]),
    st.sampled_from(["10.96.0.20", "10.96.0.21"]),
    st.sampled_from([80, 8080]),
)
eips = st.sampled_from([EIP, BalancerEip(address="192.168.0.31/24", gateway="192.168.0.2")])
commands: st.SearchStrategy[BalancerCommand] = st.one_of(eips, dnats, dnats.map(deletion))
specs = st.lists(commands, max_size=8).map(lambda drawn: edit(None, drawn))


def settle(spec: LoadBalancerSpec, before: Actual) -> Actual:
    return apply(delta(desired(spec, FACTS, before), before), before)


@quick
@given(specs)
def test_the_second_apply_is_empty(spec: LoadBalancerSpec) -> None:
    after = settle(spec, pod())
    assert not delta(desired(spec, FACTS, after), after)


@quick
@given(specs, specs)
def test_one_spec_follows_another_as_if_it_were_the_first(one: LoadBalancerSpec, other: LoadBalancerSpec) -> None:
    via, straight = settle(other, settle(one, pod())), settle(other, pod())
    assert (via.addresses, via.policy_rules, via.links) == (straight.addresses, straight.policy_rules, straight.links)
    chains = [{ref: set(rules) for ref, rules in actual.ruleset.chains.items()} for actual in (via, straight)]
    assert chains[0] == chains[1]
    if other.eip or not one.eip:
        assert via.routes == straight.routes


@quick
@given(specs, specs)
def test_every_change_can_be_taken_back(one: LoadBalancerSpec, other: LoadBalancerSpec) -> None:
    before = settle(one, pod())
    plan = delta(desired(other, FACTS, before), before)
    after = apply(plan, before)
    back = apply(undo(plan, before, after), after)
    assert replace(back, ruleset=before.ruleset) == before
    assert {r: set(x) for r, x in back.ruleset.chains.items()} == {r: set(x) for r, x in before.ruleset.chains.items()}


@quick
@given(specs)
def test_what_the_kernel_carries_out_is_read_back(spec: LoadBalancerSpec) -> None:
    adopted = adopt(settle(spec, pod()))
    assert adopted is not None
    assert adopted.eip == spec.eip
    assert set(adopted.dnats) == set(spec.dnats)


def test_another_pod_is_no_load_balancer() -> None:
    assert adopt(pod()) is None


def test_the_rules_are_those_of_kube_ovns_script() -> None:
    after = settle(edit(None, [EIP, dnat(), dnat(443, target_port=8443), dnat(9, "sctp")]), pod()).ruleset.chains
    assert [render_rule(rule) for rule in after[PREROUTING]] == [
        "-d 192.168.0.30/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.96.0.20:8080",
        "-d 192.168.0.30/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.96.0.20:8443",
        "-d 192.168.0.30/32 -p sctp -m sctp --dport 9 -j DNAT --to-destination 10.96.0.20:8080",
    ]
    assert [render_rule(rule) for rule in after[POSTROUTING]] == ["-d 10.96.0.20/32 -j MASQUERADE"]


def test_what_it_forwards_is_routed_by_table_100() -> None:
    after = settle(edit(None, [EIP, dnat()]), pod())
    assert after.policy_rules == {PolicyRule("net1", 100), PolicyRule("eth0", 100)}
    assert {key: entry for key, entry in after.routes.items() if key.table == 100} == {
        RouteKey("192.168.0.0/24", 100): RouteEntry("net1", None),
        RouteKey("0.0.0.0/0", 100): RouteEntry("net1", "192.168.0.1"),
        RouteKey("10.96.0.20/32", 100): RouteEntry("eth0", "10.0.1.1"),
    }


def test_foreign_rules_stay_where_they_are() -> None:
    foreign = (Foreign("-p tcp -m tcp --dport 1:9 -j ACCEPT"), Rule((), Jump("OTHER")))
    before = pod()
    chains = {**before.ruleset.chains, PREROUTING: foreign, ChainRef("nat", "OTHER"): ()}
    before = replace(before, ruleset=replace(before.ruleset, chains=chains))
    after = settle(LoadBalancerSpec(), settle(edit(None, [EIP, dnat()]), before))
    assert after.ruleset.chains[PREROUTING] == foreign


def test_the_address_of_the_network_plugin_is_not_taken_away() -> None:
    given_by_cni = AddressKey("net1", EIP.address)
    before = replace(pod(), addresses={given_by_cni: False})
    moved = edit(None, [EIP, BalancerEip(address="192.168.0.31/24", gateway="192.168.0.1")])
    assert given_by_cni in settle(moved, settle(edit(None, [EIP]), before)).addresses


def test_only_the_target_that_is_meant_is_deleted() -> None:
    spec = edit(None, [dnat(), dnat(target_port=9090), deletion(dnat())])
    assert [port.target_port for port in spec.dnats] == [9090]
    assert not edit(spec, [deletion(dnat(target_port=9090))]).dnats


def test_connections_of_a_port_end_with_it() -> None:
    web, dns = dnat(), dnat(53, "udp", target_port=5353)
    one, other = edit(None, [EIP, web, dns]), edit(None, [EIP, dns])
    flow = Flow(6, "203.0.113.2", EIP.ip, 40000, 80, "10.96.0.20", "10.0.1.77", 8080, 40000)
    kept = Flow(17, "203.0.113.2", EIP.ip, 40000, 53, "10.96.0.20", "10.0.1.77", 5353, 40000)
    assert [f.matches(flow) for f in suspects(one, other)] == [True]
    assert not any(f.matches(kept) for f in suspects(one, other))
    assert is_stale(flow, one, other)
    assert not is_stale(flow, one, one)
    assert not is_stale(kept, one, other)


def test_connections_from_before_their_port_end_when_it_comes() -> None:
    flow = Flow(17, "203.0.113.2", EIP.ip, 40000, 53, EIP.ip, "203.0.113.2", 53, 40000)
    without, with_port = edit(None, [EIP]), edit(None, [EIP, dnat(53, "udp")])
    assert is_stale(flow, without, with_port)
    assert not is_stale(flow, with_port, with_port)


# --- over the fake kernel -------------------------------------------------------------------------------------


def balance(made: Gateway, *drawn: BalancerCommand, announce: tuple[str, ...] = ()) -> None:
    made.service.balance(lambda spec: edit(spec, drawn), by="test", announce=announce).result(timeout=60)


def test_arp_is_off_until_the_address_comes_and_stays_on(tmp_path: Path) -> None:
    made = gateway(tmp_path)
    made.kernel.links["net1"] = replace(made.kernel.links["net1"], up=False)
    balance(made)
    assert (made.kernel.links["net1"].up, made.kernel.links["net1"].arp) == (True, False)
    balance(made, EIP, announce=(EIP.ip,))
    balance(made)
    assert made.kernel.links["net1"].arp
    assert ("net1", EIP.ip) in made.announcer.announced


def test_a_sequence_sent_again_writes_nothing(tmp_path: Path) -> None:
    made = gateway(tmp_path)
    for _ in range(2):
        writes = made.kernel.writes
        for drawn in ((), (EIP,), (dnat(),), (dnat(53, "udp"),)):
            balance(made, *drawn)
    assert made.kernel.writes == writes


def test_it_is_stored_in_a_file_of_its_own_and_comes_back(tmp_path: Path) -> None:
    made = gateway(tmp_path)
    balance(made, EIP, dnat())
    made.service.close()
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["lb-svc.json"]
    again = gateway(tmp_path, FakeKernel.gateway_pod())
    assert again.service.load_balancer == edit(None, [EIP, dnat()])
    assert {(rule.interface, rule.table) for rule in again.kernel.policy_rules} == {("net1", 100), ("eth0", 100)}


def test_without_its_file_it_is_adopted_and_nothing_is_written(tmp_path: Path) -> None:
    made = gateway(tmp_path / "one")
    balance(made, EIP, dnat())
    made.service.close()
    writes = made.kernel.writes
    again = gateway(tmp_path / "other", made.kernel)
    assert again.service.load_balancer == edit(None, [EIP, dnat()])
    assert made.kernel.writes == writes


@pytest.mark.parametrize("failing", range(6))
def test_a_refusal_at_any_step_leaves_everything_as_it_was(tmp_path: Path, failing: int) -> None:
    made = gateway(tmp_path)
    balance(made)
    kernel = made.kernel
    before = (dict(kernel.routes), dict(kernel.chains), dict(kernel.addresses), dict(kernel.links))
    left = [failing]

    def fault(step: str) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise Refused(step, "no", retryable=True)

    kernel.faults = fault
    with pytest.raises(Refused, match="no"):
        balance(made, EIP, dnat())
    assert (kernel.routes, kernel.chains, kernel.addresses, kernel.links) == before
    assert made.service.load_balancer == LoadBalancerSpec()


def test_a_pod_is_a_gateway_or_a_load_balancer(tmp_path: Path) -> None:
    balancer = gateway(tmp_path / "one")
    balance(balancer, EIP)
    with pytest.raises(OtherAppliance, match="cannot be a NAT gateway"):
        balancer.service.change(lambda _: example(), by="test").result(timeout=60)
    assert balancer.service.spec is None
    assert balancer.service.status().appliance == "lb-svc"
    nat = gateway(tmp_path / "other")
    nat.service.change(lambda _: example(), by="test").result(timeout=60)
    with pytest.raises(OtherAppliance, match="cannot be a load balancer"):
        balance(nat, EIP)
    assert edit_all(nat.service.spec, []) == example()
    assert nat.service.status().appliance == "nat-gateway"


def test_counts_and_interfaces_are_its_own(tmp_path: Path) -> None:
    made = gateway(tmp_path, interfaces=Interfaces(vpc="a", external="b"))
    balance(made, EIP, dnat(), dnat(53, "udp"))
    status = made.service.status()
    assert (status.counts.eips, status.counts.dnats, status.counts.snats) == (1, 2, 0)
    assert status.interfaces == Interfaces()
