"""Calls that mean nothing, at the real daemon: refused, nothing changed, nothing run, nothing leaked."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from world import Gateway, World, identical, wait_for

from api.execwire import Reply, Request, decode_reply
from tests import malformed

EIP = "192.168.0.50"
ROUNDS = 3
LEAK = 2 << 20
"""Bytes of memory that may come with thousands of calls: the allocator's, not a leak's, which would be one a call."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(params=["legacy", "nft"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with world.gateway(variant=request.param) as made:
        made.verb("eip-add", f"{EIP}/24")
        made.verb("floating-ip-add", f"{EIP},10.0.1.11")
        made.status()  # all that it imports is imported
        yield made


class Caller:
    """Speaks to the daemon as the script's client does, without a process for each call."""

    def __init__(self, gateway: Gateway) -> None:
        self._path = str(gateway.run_dir / "exec.sock")
        self._namespace = os.stat(f"/run/netns/{gateway.name}").st_ino

    def raw(self, data: bytes) -> bytes:
        """What the daemon answers to these bytes."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(self._path)
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def call(self, words: Iterable[str]) -> Reply:
        return decode_reply(self.raw(Request(self._namespace, {}, tuple(words)).encode()))


def memory(pid: int) -> int:
    """Bytes of resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_thousands_of_malformed_calls_change_and_leak_nothing(gateway: Gateway) -> None:
    caller, pid, calls = Caller(gateway), gateway.pid, malformed.all_calls()

    def refused() -> None:
        for words in calls:
            reply = caller.call(words)
            assert (reply.code, reply.stdout, reply.stderr.count("\n")) == (1, "", 1), (words, reply)
            assert "internal error" not in reply.stderr

    identical(gateway, refused)  # once, so that all is loaded and buffers are there
    bytes_before, open_before = memory(pid), descriptors(pid)
    for _ in range(ROUNDS):
        identical(gateway, refused)
    bytes_after, made = memory(pid), ROUNDS * len(calls)
    assert made > 1500
    assert bytes_after - bytes_before < LEAK, f"{bytes_after - bytes_before} bytes more after {made} calls"
    # The HTTP face closes a connection a moment after its answer.
    wait_for(lambda: descriptors(pid) <= open_before, f"the {open_before} descriptors that were open before")
    assert gateway.pid == pid
    assert gateway.status()["ready"]


def test_bytes_that_are_no_call(gateway: Gateway) -> None:
    caller, pid = Caller(gateway), gateway.pid
    chance = random.Random(1)

    def garbage() -> None:
        for size in (0, 1, 7, 100, 4096, 1 << 20, 3 << 20):
            for head in (b"", b"natgw-exec/1\0", b"natgw-exec/1\x001\0\0", b"GET / HTTP/1.1\r\n\r\n"):
                reply = decode_reply(caller.raw(head + chance.randbytes(size)))
                assert (reply.code, reply.stderr.count("\n")) == (1, 1), reply

    identical(gateway, garbage)
    with contextlib.suppress(ConnectionError):  # it does not read on to the end of what is too long
        assert decode_reply(caller.raw(bytes(5 << 20))).code == 1
    assert gateway.pid == pid
    gateway.verb("eip-add", f"{EIP}/24")


def test_words_of_hostile_callers_are_words(gateway: Gateway) -> None:
    """Through the script, as 1.17 calls it, every rule an argument of its own: no shell looks at it."""
    ran = Path("/tmp/natgw-was-here")
    assert not ran.exists()

    def refused() -> None:
        for value in malformed.HOSTILE:
            if value.isascii():
                done = gateway.exec("floating-ip-add", f"{EIP},{value}")
                assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), (value, done)
        for words in (("eip-add", ""), ("init", "$(touch /tmp/natgw-was-here),net1"), ("eip-add", "x" * 100_000)):
            assert gateway.exec(*words).returncode == 1

    identical(gateway, refused)
    assert not ran.exists()
