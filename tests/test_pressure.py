"""More than can be done: bounded queues, answers that say so, and everything as it was once the pressure is gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway import service as service_module
from gateway.ports import Busy
from gateway.service import LONGEST_WAIT, MOST_WAITING
from rules import commands as c
from rules.nat import SHARED_DNAT
from tests.gateway_kit import Gateway, example, gateway
from tests.http_kit import Face, assert_problem, face
from tests.test_service import DNAT, EIP, commands, run


class Stuck:
    """A kernel that takes its time over the next step: until it is let go."""

    def __init__(self, pod: Gateway) -> None:
        self._pod = pod
        self._entered, self._free = threading.Event(), threading.Event()
        pod.kernel.faults = self._wait
        self.first = pod.service.change(commands(EIP), by="test")
        assert self._entered.wait(60)

    def _wait(self, _: str) -> None:
        self._entered.set()
        assert self._free.wait(100)

    def let_go(self) -> None:
        self._pod.kernel.faults = None
        self._free.set()
        self.first.result(timeout=60)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path)
    run(made.service, c.Init())
    yield made
    made.service.close()


def test_the_queue_is_bounded_and_says_so_at_once(pod: Gateway) -> None:
    stuck = Stuck(pod)
    waiting = [
        pod.service.change(commands(DNAT.model_copy(update={"external_port": 1000 + n})), by="test")
        for n in range(MOST_WAITING)
    ]
    beyond = pod.service.change(commands(DNAT), by="test")
    error = beyond.exception(timeout=0)
    assert isinstance(error, Busy)
    assert error.retryable
    assert not any(future.done() for future in waiting)
    stuck.let_go()
    for future in waiting:
        future.result(timeout=60)
    assert len(pod.kernel.chains[SHARED_DNAT]) == MOST_WAITING
    run(pod.service, DNAT)  # a later try finds room
    assert len(pod.kernel.chains[SHARED_DNAT]) == MOST_WAITING + 1


def test_what_waits_too_long_is_not_done(pod: Gateway) -> None:
    stuck = Stuck(pod)
    late = pod.service.change(commands(DNAT), by="test")
    pod.clock.now += LONGEST_WAIT + 1
    in_time = pod.service.change(commands(DNAT.model_copy(update={"external_port": 1})), by="test")
    stuck.let_go()
    assert isinstance(late.exception(timeout=60), Busy)
    in_time.result(timeout=60)
    assert len(pod.kernel.chains[SHARED_DNAT]) == 1


def test_who_has_gone_away_is_not_served(pod: Gateway) -> None:
    stuck = Stuck(pod)
    gone = pod.service.change(commands(DNAT), by="test")
    assert gone.cancel()
    stuck.let_go()
    run(pod.service, c.Init())
    assert len(pod.kernel.chains[SHARED_DNAT]) == 0


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Face]:
    yield from face(tmp_path)


def test_the_http_face_says_when_to_come_again(http: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    run(http.gateway.service, c.Init())
    monkeypatch.setattr(service_module, "MOST_WAITING", 0)
    response = http("PATCH", "/v1/gateway", json=[{"op": "eip-add", "address": "192.168.0.10/24"}])
    problem = assert_problem(response, 503, "busy")
    assert problem["retryable"]
    assert response.headers["retry-after"] == "1"


def test_a_storm_of_calls_ends_in_the_state_that_they_ask_for(pod: Gateway) -> None:
    """Two controllers, each with many workers, that ask for the same objects and never for contradicting ones."""
    ports = range(1000, 1100)

    def controller(_: int) -> None:
        with ThreadPoolExecutor(16) as workers:
            futures = [
                workers.submit(run, pod.service, EIP, DNAT.model_copy(update={"external_port": port}))
                for port in (*ports, *reversed(ports))
            ]
            for future in futures:
                future.result(timeout=60)

    with ThreadPoolExecutor(2) as controllers:
        list(controllers.map(controller, range(2)))
    assert len(pod.kernel.chains[SHARED_DNAT]) == len(ports)
    assert pod.service.ready
    assert not pod.service.compare().result(timeout=60).plan


@pytest.mark.parametrize("jump", [-(10.0**8), 10.0**8])
def test_a_jump_of_the_wall_clock_moves_nothing_but_what_people_read(pod: Gateway, jump: float) -> None:
    pod.service.change(lambda _: example(), by="test").result(timeout=60)
    before, wall = pod.service.status(), pod.clock.time
    pod.clock.time = lambda: wall() + jump  # type: ignore[method-assign]
    pod.kernel.addresses.clear()
    pod.service.kernel_changed()
    pod.service.compare().result(timeout=60)
    after = pod.service.status()
    assert after.ready
    assert after.drift.repairs == before.drift.repairs + 1
    assert after.drift.next_repair_in_seconds is None
    assert after.uptime_seconds == before.uptime_seconds
    assert after.drift.last is not None
    assert after.drift.last.at == pytest.approx(pod.clock.time())
