"""``GET /v1/events``: a list, and a stream that can be resumed, over a real socket."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_kit import Gateway, gateway
from tests.http_kit import serving, unix


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path / "state")
    with serving(made, tmp_path):
        yield made
    made.service.close()


def stream(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Each server-sent event with its fields; comments and the retry time are passed over."""
    fields: dict[str, Any] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield fields
            fields = {}
            continue
        name, _, value = line.partition(": ")
        fields[name] = json.loads(value) if name == "data" else value


def test_the_list_tells_who_asked(pod: Gateway, tmp_path: Path) -> None:
    with unix(tmp_path / "api.sock") as http:
        assert http.put("/v1/gateway", json={}).status_code == 201
        assert http.put("/v1/eips/192.168.0.10", json={"address": "192.168.0.10/24"}).status_code == 201
        events = http.get("/v1/events", params={"follow": "false"}).json()
        assert [event["by"] for event in events] == ["HTTP PUT /v1/gateway", "HTTP PUT /v1/eips/192.168.0.10"]
        assert (events[1]["what"], events[1]["changes"][0]["value"]) == (
            "+ EIP 192.168.0.10/24",
            {"address": "192.168.0.10/24"},
        )
        assert (events[1]["pid"], events[1]["uid"]) == (os.getpid(), os.geteuid())
        assert events[1]["announced"] == ["192.168.0.10", "192.168.0.11"]
        newer = http.get("/v1/events", params={"follow": "false", "after": events[0]["id"]}).json()
        assert newer == events[1:]
        assert http.get("/v1/events", params={"follow": "false", "limit": 1}).json() == events[1:]


def test_a_stream_begins_now_and_is_resumed_where_it_broke_off(pod: Gateway, tmp_path: Path) -> None:
    with unix(tmp_path / "api.sock") as http, unix(tmp_path / "api.sock") as other:
        http.put("/v1/gateway", json={})
        with http.stream("GET", "/v1/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = stream(response.iter_lines())
            other.put("/v1/eips/192.168.0.10", json={"address": "192.168.0.10/24"})
            first = next(events)
            assert (first["event"], first["data"]["what"]) == ("change", "+ EIP 192.168.0.10/24")
            assert first["id"] == str(first["data"]["id"])
        other.delete("/v1/eips/192.168.0.10")
        with http.stream("GET", "/v1/events", headers={"Last-Event-ID": first["id"]}) as response:
            assert next(stream(response.iter_lines()))["data"]["what"] == "- EIP 192.168.0.10/24"


def test_a_reader_that_comes_back_too_late_is_told_of_the_gap(pod: Gateway, tmp_path: Path) -> None:
    first = pod.service.journal.record("change", "test", "first")
    for _ in range(3000):
        pod.service.journal.record("change", "test", "next")
    with (
        unix(tmp_path / "api.sock") as http,
        http.stream("GET", "/v1/events", headers={"Last-Event-ID": str(first.id)}) as response,
    ):
        gap = next(stream(response.iter_lines()))
        assert (gap["event"], "id" in gap) == ("gap", False)
        assert gap["data"]["lost"] >= 3000 - 2048


def test_a_silent_stream_says_that_it_lives(pod: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http_events.HEARTBEAT_SECONDS", 0.05)
    with unix(tmp_path / "api.sock") as http, http.stream("GET", "/v1/events") as response:
        assert ": still here" in response.iter_lines()


def test_the_end_of_the_daemon_waits_for_no_reader(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    with unix(tmp_path / "api.sock") as http, contextlib.ExitStack() as reading:
        with serving(made, tmp_path):
            lines = reading.enter_context(http.stream("GET", "/v1/events")).iter_lines()
            next(lines)
        # Whole to its end: nothing was cut off. (A comment says that the stream lives where this takes long.)
        assert [line for line in lines if line and not line.startswith(":")] == []
    made.service.close()


def test_too_many_readers_are_refused(pod: Gateway, tmp_path: Path) -> None:
    held = [pod.service.journal.subscribe() for _ in range(64)]
    with unix(tmp_path / "api.sock") as http:
        assert http.get("/v1/events").status_code == 503
    assert len(held) == 64
