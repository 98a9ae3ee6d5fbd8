"""The journal: one event for each thing that happened, bounded readers, numbers that a reader can come back with."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from api.logs import JsonFormatter
from gateway.journal import BACKLOG, DETAILED, SUBSCRIBERS, Asker, Journal, TooManyReaders
from gateway.ports import Refused
from rules import commands as c
from rules.changes import changes, first, summary
from rules.edit import Conflict, edit_all
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import Dnat, Eip, GatewaySpec
from rules.state import AddressKey
from tests.gateway_kit import Gateway, ManualClock, example, gateway
from tests.test_service import DNAT, EIP, commands, run


@pytest.fixture
def journal() -> Journal:
    return Journal(ManualClock(), kept=8)


@pytest.fixture
def pod(tmp_path: Path) -> Gateway:
    return gateway(tmp_path)


def said(pod: Gateway) -> list[str]:
    return [f"{event.kind}: {event.what}" for event in pod.service.journal.events()]


def test_a_change_is_told_by_its_objects(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP)
    asker = Asker("dnat-add 192.168.0.10,8888,tcp,10.0.1.10,80", pid=4711, uid=0)
    pod.service.change(commands(DNAT), by=asker).result(timeout=60)
    event = pod.service.journal.events()[-1]
    assert event.what == "+ DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:80"
    assert (event.kind, event.by, event.pid, event.uid, event.outcome) == ("change", asker.words, 4711, 0, "done")
    assert event.steps == 1
    assert event.seconds is not None
    (change,) = event.changes
    assert (change.change, change.field, change.value) == ("added", "dnats", DNAT.model_dump(exclude={"op"}))
    assert event.line.startswith(f"{asker} (pid 4711, uid 0): + DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:80 [1 step, ")


def test_nothing_happens_nothing_is_told(pod: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    run(pod.service, c.Init(), EIP)
    before = said(pod)
    with caplog.at_level(logging.DEBUG):
        run(pod.service, c.Init(), EIP, announce=("192.168.0.10",))
        pod.service.change(lambda _: example(), by="test", dry_run=True).result(timeout=60)
        pod.service.kernel_changed()
        run(pod.service, c.Init())
    assert said(pod) == before
    assert caplog.records == []


def test_a_replaced_object_names_what_it_was() -> None:
    old = edit_all(GatewaySpec(), [c.SetGateways(gateway_v4="192.168.0.1"), c.EipAdd(address="192.168.0.10/24")])
    new = edit_all(old, [c.SetGateways(gateway_v4="192.168.0.254"), c.EipAdd(address="192.168.0.10/25")])
    assert old is not None
    assert new is not None
    assert [str(change) for change in changes(old, new)] == [
        "~ gatewayV4 192.168.0.254 (was 192.168.0.1)",
        "~ EIP 192.168.0.10/25 (was EIP 192.168.0.10/24)",
    ]


def test_added_and_removed_in_the_midst_of_many() -> None:
    def spec(*ports: int) -> GatewaySpec:
        return GatewaySpec.model_validate({"dnats": [_dnat(port) for port in ports]})

    old, new = spec(1, 2, 3, 4, 5), spec(1, 3, 4, 7, 5)
    assert [(change.change, (change.value or change.before)["externalPort"]) for change in changes(old, new)] == [
        ("added", 7),
        ("removed", 2),
    ]
    assert list(changes(old, spec(1, 2, 3, 4, 5))) == []
    reordered = spec(1, 2, 3, 5, 4)  # the order is no object
    assert list(changes(old, reordered)) == []


def _dnat(port: int) -> Dnat:
    return Dnat(eip="192.168.0.10", external_port=port, protocol="tcp", internal_ip="10.0.1.10", internal_port=80)


def test_both_appliances_and_every_field_can_be_told() -> None:
    fields = {change.field for change in changes(None, example())}
    assert fields == {"gatewayV4", "eips", "fips", "dnats", "snats", "routes", "sharedDnats", "qos"}
    assert list(changes(None, LoadBalancerSpec())) == []


def test_of_many_changes_the_numbers_are_told(journal: Journal) -> None:
    eips = [Eip(address=f"192.168.{i // 250}.{i % 250 + 1}/16") for i in range(1000)]
    event = journal.record(
        "change", "HTTP PUT /v1/gateway", changed=first(DETAILED, None, GatewaySpec.model_validate({"eips": eips}))
    )
    assert (len(event.changes), event.more) == (DETAILED, 1000 - DETAILED)
    assert event.what == f"+{DETAILED} eips and {1000 - DETAILED} more changes"
    assert summary(event.changes[:2]) == "+ EIP 192.168.0.1/16; + EIP 192.168.0.2/16"


def test_a_repair_says_what_was_missing(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP)
    pod.kernel.addresses.pop(AddressKey("net1", "192.168.0.10/24"))
    pod.service.kernel_changed()
    run(pod.service, c.Init())
    assert said(pod)[-1] == "repair: address 192.168.0.10/24 on net1 is missing"


def test_a_refusal_is_told_once_however_often_it_is_asked_for(pod: Gateway) -> None:
    run(pod.service, c.Init(), EIP, DNAT)
    other = DNAT.model_copy(update={"internal_ip": "10.0.1.11"})
    for _ in range(3):
        with pytest.raises(Conflict):
            run(pod.service, other)
    assert [line for line in said(pod) if line.startswith("refused")] == [
        "refused: DNAT 192.168.0.10:8888/tcp -> 10.0.1.11:80 conflicts with DNAT 192.168.0.10:8888/tcp -> 10.0.1.10:80"
    ]

    def refuse(step: str) -> None:
        raise Refused(step, "Operation not permitted", retryable=False)

    pod.kernel.faults = refuse
    for _ in range(3):
        with pytest.raises(Refused):
            run(pod.service, c.DnatDel(eip="192.168.0.10", external_port=8888, protocol="tcp"))
    assert [event.outcome for event in pod.service.journal.events()].count("failed") == 2


def test_an_adopted_gateway_is_told(tmp_path: Path) -> None:
    first = gateway(tmp_path / "one")
    first.service.change(lambda _: example(), by="test").result(timeout=60)
    first.service.close()
    second = gateway(tmp_path / "two", first.kernel)
    (event,) = [event for event in second.service.journal.events() if event.kind == "adopted"]
    assert any(change.field == "dnats" for change in event.changes)


def test_the_ring_is_bounded_and_a_reader_can_come_back(journal: Journal) -> None:
    events = [journal.record("change", "test", str(number)) for number in range(20)]
    assert [event.what for event in journal.events()] == [str(number) for number in range(12, 20)]
    assert [event.what for event in journal.events(events[17].id)] == ["18", "19"]
    assert [event.what for event in journal.events(limit=1)] == ["19"]
    with journal.subscribe(events[17].id) as back:
        assert [event.what for event in back.take()] == ["18", "19"]
        assert back.lost == 0
    with journal.subscribe(events[5].id) as late:
        assert [event.what for event in late.take()] == [str(number) for number in range(12, 20)]
        assert late.lost == 6


def test_numbers_go_on_rising_after_a_restart() -> None:
    clock = ManualClock()
    last = [Journal(clock).record("change", "test", "x") for _ in range(5)][-1]
    clock.now += 60
    assert Journal(clock).record("change", "test", "y").id > last.id


def test_a_slow_reader_loses_the_oldest_and_holds_up_nobody(journal: Journal) -> None:
    with journal.subscribe() as slow, journal.subscribe() as other:
        for number in range(BACKLOG + 10):
            journal.record("change", "test", str(number))
        assert slow.lost == 10
        assert [event.what for event in slow.take()][:1] == ["10"]
        assert len(other.take()) == BACKLOG


def test_readers_are_bounded_and_leave_their_places(journal: Journal) -> None:
    readers = [journal.subscribe() for _ in range(SUBSCRIBERS)]
    with pytest.raises(TooManyReaders):
        journal.subscribe()
    readers[0].close()
    journal.subscribe()


def test_threads_that_record_and_read_lose_nothing() -> None:
    journal = Journal(ManualClock())
    with journal.subscribe() as reader:
        writers = [
            threading.Thread(target=lambda: [journal.record("change", "test", "x") for _ in range(100)])
            for _ in range(4)
        ]
        for writer in writers:
            writer.start()
        got = []
        while len(got) < 400:
            taken = reader.wait(60)
            assert taken
            got += taken
        for writer in writers:
            writer.join()
    assert [event.id for event in got] == list(range(got[0].id, got[0].id + 400))


def test_a_reader_that_waits_is_let_go_at_the_end(journal: Journal) -> None:
    reader = journal.subscribe()
    waiting = threading.Thread(target=reader.wait)
    waiting.start()
    journal.hang_up()
    waiting.join(60)
    assert not waiting.is_alive()
    assert reader.ended


def test_a_json_log_has_the_event_as_data(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        journal.record("change", Asker("HTTP PUT /v1/gateway", client="192.0.2.9"), "+ EIP", steps=3, seconds=0.0125)
    line = JsonFormatter().format(caplog.records[-1])
    assert "\n" not in line
    document = json.loads(line)
    assert document["message"] == "HTTP PUT /v1/gateway (from 192.0.2.9): + EIP [3 steps, 12.5 ms]"
    assert document["level"] == "info"
    assert document["time"].endswith("Z")
    assert document["event"]["client"] == "192.0.2.9"
    assert document["event"]["steps"] == 3


def test_a_json_log_has_what_went_wrong() -> None:
    try:
        raise ValueError("no\nway")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "it %s", ("broke",), (ValueError, error, None))
    document = json.loads(JsonFormatter().format(record))
    assert document["message"] == "it broke"
    assert "ValueError: no\nway" in document["error"]
