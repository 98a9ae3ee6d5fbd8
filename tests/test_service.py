"""The single writer over the fake kernel: edits in, outcomes out, state kept over restarts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.fake import FakeKernel
from gateway.ports import Refused
from gateway.service import Edit, Service
from gateway.standing import Outcome
from gateway.status import FastpathStatus
from rules import commands as c
from rules.edit import Conflict, NotInitialized, edit_all
from rules.flows import Flow
from rules.nat import SHARED_DNAT
from rules.qos_commands import EipEgressQosAdd
from rules.spec import GatewaySpec
from rules.state import AddressKey, RouteKey
from tests.gateway_kit import Gateway, example, gateway

EIP = c.EipAdd(address="192.168.0.10/24")
DNAT = c.DnatAdd(eip="192.168.0.10", external_port=8888, protocol="tcp", internal_ip="10.0.1.10", internal_port=80)


def commands(*listed: c.Command) -> Edit:
    def edit(spec: GatewaySpec | None) -> GatewaySpec:
        edited = edit_all(spec, listed)
        assert edited is not None
        return edited

    return edit


def run(service: Service, *listed: c.Command, announce: tuple[str, ...] = ()) -> Outcome:
    return service.change(commands(*listed), by="test", announce=announce).result(timeout=60)


@pytest.fixture
def pod(tmp_path: Path) -> Gateway:
    return gateway(tmp_path)


def test_nothing_before_init(pod: Gateway) -> None:
    with pytest.raises(NotInitialized):
        run(pod.service, EIP)
    assert pod.service.spec is None
    assert pod.kernel.writes == 0
    run(pod.service, c.Init())
    assert pod.service.spec == GatewaySpec()


def test_the_same_command_twice_writes_once(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP, DNAT)
    writes = pod.kernel.writes
    outcome = run(pod.service, c.Init(), EIP, DNAT)
    assert not outcome.plan
    assert pod.kernel.writes == writes
    assert pod.service.status().transactions.unchanged == 1


def test_a_conflict_changes_nothing(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP, DNAT)
    other = DNAT.model_copy(update={"internal_ip": "10.0.1.11"})
    with pytest.raises(
        Conflict, match=r"10\.0\.1\.11:80 conflicts with DNAT 192\.168\.0\.10:8888/tcp -> 10\.0\.1\.10:80"
    ):
        run(pod.service, c.FipAdd(eip="192.168.0.12", internal_ip="10.0.1.5"), other)
    assert pod.service.spec is not None
    assert len(pod.service.spec.fips) == 0


def test_the_first_eip_announces_every_address_of_the_interface(pod: Gateway) -> None:
    run(pod.service, c.Init())
    assert pod.announcer.announced == []
    assert run(pod.service, EIP).announced == ("192.168.0.10", "192.168.0.11")
    assert run(pod.service, c.EipAdd(address="192.168.0.12/24")).announced == ("192.168.0.12",)


def test_a_limit_before_init_announces_nothing(pod: Gateway) -> None:
    limit = EipEgressQosAdd(eip="192.168.0.10", rate_max="10", burst_max="1")
    assert run(pod.service, limit).announced == ()
    assert pod.announcer.announced == []


def test_a_repeated_eip_is_announced_when_asked_and_withdrawn_when_gone(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP)
    assert run(pod.service, EIP).announced == ()
    assert run(pod.service, EIP, announce=("192.168.0.10",)).announced == ("192.168.0.10",)
    run(pod.service, c.EipDel(address="192.168.0.10/24"))
    assert pod.announcer.standing("net1") == frozenset()
    assert not pod.kernel.links["net1"].arp


def test_a_dry_run_plans_and_changes_nothing(pod: Gateway) -> None:
    run(pod.service, c.Init())
    writes = pod.kernel.writes
    outcome = pod.service.change(lambda _: example(), by="test", dry_run=True).result(timeout=60)
    assert outcome.plan
    assert pod.kernel.writes == writes
    assert pod.service.spec == GatewaySpec()


def test_a_refusal_reaches_the_asker_and_leaves_the_spec(pod: Gateway) -> None:
    run(pod.service, c.Init())

    def refuse(step: str) -> None:
        pod.kernel.faults = None
        raise Refused(step, "Operation not permitted", retryable=False)

    pod.kernel.faults = refuse
    with pytest.raises(Refused, match="Operation not permitted"):
        run(pod.service, EIP)
    status = pod.service.status()
    assert pod.service.spec == GatewaySpec()
    assert status.ready
    assert status.last_error is not None
    assert not status.last_error.retryable
    assert run(pod.service, EIP).plan


def test_a_deleted_rule_ends_its_flows_and_no_others(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP, DNAT)
    through = Flow(6, "203.0.113.9", "192.168.0.10", 5000, 8888, "10.0.1.10", "203.0.113.9", 80, 5000)
    beside = Flow(6, "203.0.113.9", "192.168.0.10", 5001, 22, "192.168.0.10", "203.0.113.9", 22, 5001)
    pod.kernel.conntrack = [through, beside]
    outcome = run(pod.service, c.DnatDel(eip="192.168.0.10", external_port=8888, protocol="tcp"))
    assert outcome.flows_deleted == 1
    assert pod.kernel.conntrack == [beside]


def test_a_source_that_left_untranslated_is_moved_by_its_new_rule(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP)
    bare = Flow(17, "10.0.1.7", "203.0.113.9", 4000, 53, "203.0.113.9", "10.0.1.7", 53, 4000)
    pod.kernel.conntrack = [bare]
    assert run(pod.service, c.SnatAdd(eip="192.168.0.10", internal_cidr="10.0.1.0/24")).flows_deleted == 1


def test_a_flush_that_fails_is_made_up_for(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP, DNAT)
    pod.kernel.conntrack = [Flow(6, "203.0.113.9", "192.168.0.10", 5000, 8888, "10.0.1.10", "203.0.113.9", 80, 5000)]
    refusals = []

    def refuse(step: str) -> None:
        if "connection" in step and not refusals:
            refusals.append(step)
            raise Refused(step, "No buffer space available", retryable=True)

    pod.kernel.faults = refuse
    run(pod.service, c.DnatDel(eip="192.168.0.10", external_port=8888, protocol="tcp"))
    assert pod.service.status().pending == ["stale connections are not deleted"]
    run(pod.service, c.Init())
    assert pod.service.ready
    assert pod.kernel.conntrack == []


def test_connections_that_the_last_change_made_stale_end_after_a_death_as_well(tmp_path: Path) -> None:
    """Many are ended behind the answer; who dies meanwhile has not ended all."""
    first = gateway(tmp_path)
    run(first.service, c.Init(), EIP, DNAT, DNAT.model_copy(update={"external_port": 8889}))
    run(first.service, c.DnatDel(eip="192.168.0.10", external_port=8888, protocol="tcp"))
    left, good = (
        Flow(6, "203.0.113.9", "192.168.0.10", 5000, port, "10.0.1.10", "203.0.113.9", 80, 5000)
        for port in (8888, 8889)
    )
    first.kernel.conntrack = [left, good]
    second = gateway(tmp_path, first.kernel)
    assert second.service.ready
    assert first.kernel.conntrack == [good]


def test_a_restart_finds_the_last_state_and_writes_nothing(tmp_path: Path) -> None:
    first = gateway(tmp_path)
    first.service.change(lambda _: example(), by="test").result(timeout=60)
    first.service.close()
    writes = first.kernel.writes
    second = gateway(tmp_path, first.kernel)
    assert second.service.spec == example()
    assert first.kernel.writes == writes
    assert second.service.ready


def test_a_restart_in_an_empty_namespace_restores_everything(tmp_path: Path) -> None:
    first = gateway(tmp_path)
    first.service.change(lambda _: example(), by="test").result(timeout=60)
    first.service.close()
    second = gateway(tmp_path, FakeKernel.gateway_pod())
    assert second.kernel.chains == first.kernel.chains
    assert ("net1", "192.168.0.10") in second.announcer.announced


def test_without_its_files_the_spec_is_read_from_the_kernel(tmp_path: Path) -> None:
    first = gateway(tmp_path / "one")
    first.service.change(lambda _: example(), by="test").result(timeout=60)
    first.service.close()
    writes = first.kernel.writes
    second = gateway(tmp_path / "two", first.kernel)
    assert second.service.spec is not None
    assert sorted(second.service.spec.qos, key=str) == sorted(example().qos, key=str)
    assert second.service.spec.model_copy(update={"qos": example().qos}) == example()
    assert second.kernel.writes == writes


def test_an_adopted_eip_takes_its_unmarked_address_along_even_after_a_restart(tmp_path: Path) -> None:
    first = gateway(tmp_path / "one")
    first.service.change(lambda _: example(), by="test").result(timeout=60)
    first.service.close()
    address = AddressKey("net1", "192.168.0.10/24")
    first.kernel.addresses[address] = False  # as another program leaves it
    gateway(tmp_path / "two", first.kernel).service.close()
    again = gateway(tmp_path / "two", first.kernel)
    run(again.service, c.EipDel(address="192.168.0.10/24"))
    assert address not in first.kernel.addresses
    assert AddressKey("net1", "192.168.0.11/24") in first.kernel.addresses


def test_a_disk_that_fails_does_not_fail_the_change_and_leaves_no_outdated_file(tmp_path: Path) -> None:
    pod = gateway(tmp_path)
    run(pod.service, c.Init())
    (tmp_path / "spec.json.new").mkdir()
    run(pod.service, EIP)
    assert pod.service.status().pending == ["spec is not on disk"]
    assert not (tmp_path / "spec.json").exists()
    (tmp_path / "spec.json.new").rmdir()
    run(pod.service, c.Init())
    assert pod.service.ready


def test_a_missing_interface_at_start_is_waited_for(tmp_path: Path) -> None:
    first = gateway(tmp_path)
    run(first.service, c.Init(), EIP)
    first.service.close()
    kernel = FakeKernel.gateway_pod()
    net1 = kernel.links.pop("net1")
    second = gateway(tmp_path, kernel)
    assert not second.service.ready
    kernel.links["net1"] = net1
    second.service.kernel_changed()
    run(second.service, c.Init())
    assert second.service.ready
    assert AddressKey("net1", "192.168.0.10/24") in kernel.addresses


def test_many_callers_at_once_lose_nothing(pod: Gateway) -> None:
    run(pod.service, c.Init())

    def add(port: int) -> Outcome:
        return run(pod.service, DNAT.model_copy(update={"external_port": port}))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(add, range(1000, 1200)))
    assert len(pod.kernel.chains[SHARED_DNAT]) == 200
    assert pod.service.status().generation == 201


def test_a_change_after_the_end_is_refused_at_once(pod: Gateway) -> None:
    run(pod.service, c.Init())
    pod.service.close()
    with pytest.raises(Refused, match="the daemon is ending"):
        run(pod.service, EIP)


def test_what_goes_with_a_link_comes_back_with_it(pod: Gateway) -> None:
    run(pod.service, c.Init(), c.SetGateways(gateway_v4="192.168.0.1"), EIP)
    default = pod.kernel.routes.pop(RouteKey("0.0.0.0/0"))
    pod.service.kernel_changed()
    run(pod.service, c.Init())
    assert pod.kernel.routes[RouteKey("0.0.0.0/0")] == default
    assert pod.service.status().transactions.committed == 2


def test_a_surprise_while_catching_up_does_not_end_the_writer(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP)
    pod.kernel.addresses.pop(AddressKey("net1", "192.168.0.10/24"))

    def surprise(step: str) -> None:
        raise ZeroDivisionError(step)

    pod.kernel.faults = surprise
    pod.service.kernel_changed()
    with pytest.raises(ZeroDivisionError):
        run(pod.service, c.Init())
    pod.kernel.faults = None
    run(pod.service, c.Init())
    assert pod.service.ready
    assert AddressKey("net1", "192.168.0.10/24") in pod.kernel.addresses


def test_it_says_once_whether_maps_decide_and_why_not(tmp_path: Path) -> None:
    kernel = FakeKernel.gateway_pod()
    kernel.no_maps = ""
    made = gateway(tmp_path, kernel)
    service = made.service
    assert not service.status().fastpath.on
    service.change(lambda _: example(), by="test").result(timeout=60)
    assert service.status().fastpath == FastpathStatus(on=True)
    kernel.no_maps = "another rule may come ahead of ours: nft table ip theirs, chain prerouting"
    for _ in range(2):
        service.change(lambda _: example(), by="test").result(timeout=60)
        assert service.status().fastpath == FastpathStatus(on=False, reason=kernel.no_maps)
        assert not kernel.maps.stands
    told = [event.what for event in service.journal.events() if event.kind == "fastpath"]
    assert told == ["maps decide ahead of the chains", f"the chains decide alone: {kernel.no_maps}"]
    service.close()


def test_a_redo_of_everything_writes_nothing_and_announces_each_eip_once(pod: Gateway, tmp_path: Path) -> None:
    """After a pod's restart the controller replays every object, one call each."""
    calls = [
        (c.Init(),),
        *((c.EipAdd(address=f"192.168.0.{n}/24"),) for n in range(20, 60)),
        *((c.FipAdd(eip=f"192.168.0.{n}", internal_ip=f"10.0.1.{n}"),) for n in range(20, 30)),
        (DNAT,),
        (c.SnatAdd(eip="192.168.0.40", internal_cidr="10.0.1.0/24"),),
        (c.RouteAdd(cidr="10.0.2.0/24", next_hop_ip="10.0.1.1"),),
    ]
    for listed in calls:
        run(pod.service, *listed)
    file = tmp_path / "spec.json"
    writes, stored, generation = pod.kernel.writes, file.stat().st_mtime_ns, pod.service.status().generation
    pod.announcer.announced.clear()
    for listed in calls:
        again = [command.address.partition("/")[0] for command in listed if isinstance(command, c.EipAdd)]
        run(pod.service, *listed, announce=tuple(again))
    assert pod.kernel.writes == writes
    assert file.stat().st_mtime_ns == stored
    assert pod.service.status().generation == generation
    assert sorted(pod.announcer.announced) == sorted(("net1", f"192.168.0.{n}") for n in range(20, 60))
