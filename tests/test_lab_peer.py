"""The echo server and its client, as separate processes on the loopback interface."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lab.lifecycle
from tests.ports import free_port

PEER = Path(lab.lifecycle.PEER)


def ask(*tasks: dict[str, Any]) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PEER), "ask"],
        input=json.dumps([{"to": "127.0.0.1", "wait": 30.0, **task} for task in tasks]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    replies: list[dict[str, str]] = json.loads(done.stdout)
    return replies


@pytest.fixture
def server() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(PEER), "serve", "me", f"tcp:{port}", f"udp:{port}"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.read() == "", "once ready it lets go of its stdout"
        yield port
        process.terminate()


def test_tcp_and_udp_tell_who_answers_and_who_asked(server: int) -> None:
    answer = {"host": "me", "peer": "127.0.0.1"}
    assert ask({"how": "tcp", "port": server}, {"how": "udp", "port": server}) == [answer, answer]


def test_http_is_understood_as_well(server: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server}/any", timeout=30) as reply:
        assert json.load(reply) == {"host": "me", "peer": "127.0.0.1"}


def test_a_silent_client_does_not_keep_others_waiting(server: int) -> None:
    with socket.create_connection(("127.0.0.1", server)):
        assert ask({"how": "tcp", "port": server})[0]["host"] == "me"


def test_no_answer_is_a_result() -> None:
    port = free_port()
    refused, silent = ask({"how": "tcp", "port": port}, {"how": "udp", "port": port, "wait": 0.2})
    assert refused == {"error": "connection refused"}
    assert "error" in silent


def test_a_listener_that_says_nothing_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert ask({"how": "tcp", "port": mute.getsockname()[1], "wait": 0.2}) == [{"error": "no answer"}]


def test_ping() -> None:
    assert ask({"how": "ping"}, {"how": "ping", "to": "127.1.2.3"}) == [
        {"host": "127.0.0.1", "peer": ""},
        {"host": "127.1.2.3", "peer": ""},
    ]


def test_a_port_in_use_is_said_instead_of_ready(server: int) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PEER), "serve", "me", f"tcp:{server}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.startswith(f"cannot open tcp:{server}: ")


def test_a_repeated_task_tells_of_all_who_answered(server: int) -> None:
    (reply,) = ask({"how": "udp", "port": server, "times": 3})
    assert reply == {"host": "me", "peer": "127.0.0.1"}
    (refused,) = ask({"how": "tcp", "port": free_port(), "times": 3})
    assert "host" not in refused
