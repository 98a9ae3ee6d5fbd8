"""The first process of a pod that speaks BFD: a killed speaker is started again, peers are kept awake meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.bfd import turns
from tests.bfd_kit import PATIENCE, SUPERVISOR, background, child_of, environment, eventually, loopback, run
from tests.ports import free_port


class Pod:
    """A supervisor on the loopback; its peer is a socket of the test."""

    def __init__(self, directory: Path) -> None:
        self.local, self.remote = loopback(), loopback()
        self.environment = environment(
            directory,
            POD_IPS=self.local,
            BFD_PEER_IPS=self.remote,
            BFD_MIN_TX="50",
            BFD_MIN_RX="50",
            BFDD_METRICS_ADDRESS=f"127.0.0.1:{free_port()}",
        )
        self.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.peer.bind((self.remote, 3784))
        self.peer.settimeout(PATIENCE)

    def live(self) -> bool:
        return run(self.environment, SUPERVISOR, "live").returncode == 0

    def status(self) -> dict[str, object]:
        said: dict[str, object] = json.loads(run(self.environment, SUPERVISOR, "status").stdout)
        return said

    def hear(self, empty: bool) -> None:
        """Wait for a packet, or for an empty datagram, from the pod's address."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            payload, (address, _) = self.peer.recvfrom(512)
            if bool(payload) is not empty:
                assert address == self.local
                return
        pytest.fail(f"only {'packets' if empty else 'empty datagrams'} came")


def kill_speaker(guard: subprocess.Popen[bytes]) -> int:
    """Kill the child that runs, when there is one; its process id."""
    eventually(lambda: child_of(guard.pid) is not None, "there is a speaker")
    speaker = child_of(guard.pid)
    assert speaker is not None
    os.kill(speaker, signal.SIGKILL)
    eventually(lambda: child_of(guard.pid) != speaker, "it is gone")
    return speaker


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    made = Pod(tmp_path)
    with contextlib.closing(made.peer):
        yield made


def test_a_speaker_that_is_killed_is_started_again(pod: Pod) -> None:
    with background(pod.environment, SUPERVISOR, "run") as guard:
        eventually(pod.live, "it is live")
        assert pod.status()["ChildRestarts"] == 0
        first = kill_speaker(guard)
        eventually(pod.live, "it is live again")
        assert child_of(guard.pid) not in (None, first)
        assert pod.status()["ChildRestarts"] == 1
        pod.peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while pod.peer.recv(512) is not None:
                pass
        pod.peer.settimeout(PATIENCE)
        pod.hear(empty=False)


def test_peers_are_kept_awake_while_nobody_speaks(pod: Pod) -> None:
    with background(pod.environment, SUPERVISOR, "run") as guard:
        eventually(pod.live, "it is live")
        pod.hear(empty=False)
        for _ in range(3):  # the first is replaced at once, the others after a while
            kill_speaker(guard)
        pod.hear(empty=True)
        pod.hear(empty=True)
        eventually(pod.live, "it is live again")
        pod.hear(empty=False)


def test_told_to_end_while_there_is_no_speaker(pod: Pod) -> None:
    with background(pod.environment, SUPERVISOR, "run") as guard:
        eventually(pod.live, "it is live")
        for _ in range(4):
            kill_speaker(guard)
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(PATIENCE) == 0


def test_a_speaker_ends_with_its_guard(pod: Pod) -> None:
    with background(pod.environment, SUPERVISOR, "run") as guard:
        eventually(pod.live, "it is live")
        speaker = child_of(guard.pid)
        guard.kill()
        guard.wait(PATIENCE)
        eventually(lambda: not Path(f"/proc/{speaker}").exists(), "the speaker is gone, too")


def test_a_speaker_that_never_served_is_not_started_again(pod: Pod) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((pod.local, 3784))
        done = run(pod.environment, SUPERVISOR, "run")
    assert done.returncode == 1
    assert done.stderr == (
        f"kube-ovn-bfdd-supervisor run: cannot listen on {pod.local} port 3784: Address already in use\n"
    )


def test_short_turns_are_asked_for() -> None:
    """Where this kernel and machine know it, what a process forks has it, too."""
    number = {"x86_64": 315, "aarch64": 275}.get(os.uname().machine)  # sched_getattr
    if number is None or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 12):
        turns.ask_for_short_ones()
        return
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        turns.ask_for_short_ones()
        grandchild = os.fork()
        if grandchild == 0:
            attributes = ctypes.create_string_buffer(56)
            ctypes.CDLL(None).syscall(number, 0, attributes, 56, 0)
            os.write(write_end, attributes.raw)
            os._exit(0)
        os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)
    size, policy, _, nice, _, runtime = struct.unpack_from("=IIQiIQ", os.read(read_end, 56))
    os.close(read_end)
    os.close(write_end)
    assert (policy, nice, runtime) == (0, os.getpriority(os.PRIO_PROCESS, 0), turns.NANOSECONDS)
    assert size >= 48
