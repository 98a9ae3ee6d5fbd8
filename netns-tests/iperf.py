"""iperf3 between two hosts: what arrives per second once bursts are spent."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from traffic import Host
from wire import ETH_P_IP, Capture, Frame
from world import wait_for

TRIES = 5
PATIENCE = 25  # seconds beyond a measurement's own
SPENT = 0.5  # seconds from the first arrival, in which the tests' bursts are spent


def received_mbit(client: Host, server: Host, to: str, *, seconds: float) -> float:
    """Megabits of payload per second that the server got of one TCP connection after its first second, as it says."""
    words = ("-t", str(seconds), "-O", "1", "-J", "--get-server-output")
    with _sending(client, server, to, *words) as calling:
        try:
            said: dict[str, Any] = json.loads(calling.communicate(timeout=seconds + PATIENCE)[0])
        except subprocess.TimeoutExpired:
            return 0.0
    if "error" in said:
        pytest.fail(f"iperf3 {' '.join(words)}: {said['error']}")
    counted = [one["sum"] for one in said["server_output_json"]["intervals"] if not one["sum"]["omitted"]]
    return 8e-6 * sum(one["bytes"] for one in counted) / sum(one["seconds"] for one in counted)


def limited_mbit(
    client: Host, server: Host, to: str, *, seconds: float = 1, udp_mbit: float | None = None, reverse: bool = False
) -> float:
    """Megabits of payload per second that reach the receiver's eth0 through a limit that always has something waiting.

    Timed from one arrival to another by the kernel's clock, and what arrives last is not counted: the shaper waits
    after each packet for as long as that one takes. So it does not matter that segments come in bunches of up to 64 KB
    (half a second's worth at 1 Mbit/s), nor when the receiving program gets a processor; 0 if it got one so seldom that
    some of them found no room.

    ``udp_mbit``: offered over UDP. ``reverse``: the server, which is reached at ``to``, sends.
    """
    words = ["-t", "60"]
    if udp_mbit is not None:
        words += ["-u", "-b", f"{udp_mbit}M", "-l", "1400"]
    if reverse:
        words += ["-R"]
    capture = Capture(client if reverse else server, "eth0", ETH_P_IP)
    with contextlib.closing(capture), _sending(client, server, to, *words):
        begin = _arrival(capture, after=_arrival(capture).at + SPENT)
        size, last = 0, begin
        while last.at < begin.at + seconds:
            size += _payload(last)
            last = _arrival(capture)
        if capture.missed:
            return 0.0
    return 8e-6 * size / (last.at - begin.at)


@contextlib.contextmanager
def _sending(client: Host, server: Host, to: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    listening = server.spawn("iperf3", "-s", "-1", "-J")
    try:
        wait_for(lambda: ":5201" in server.run("ss", "-Hltn"), "an iperf3 server")
        calling = client.spawn("iperf3", "-c", to, *words)
        try:
            yield calling
        finally:
            calling.kill()
            calling.communicate()
    finally:
        listening.kill()
        listening.communicate()


def _arrival(capture: Capture, after: float = 0.0) -> Frame:
    """The next frame from then on that is no mere acknowledgement."""
    frame = capture.next(wanted=lambda frame: _payload(frame) > 0 and frame.at >= after)
    assert frame is not None, "nothing arrives any more"
    return frame


def _payload(frame: Frame) -> int:
    """The bytes that a TCP segment, a bunch of them, or a UDP datagram carries (the IP headers have no options)."""
    packet = frame.data[14:]
    headers = 20 + (packet[32] >> 4) * 4 if packet[9] == socket.IPPROTO_TCP else 28
    return int.from_bytes(packet[2:4]) - headers


def assert_rate(measure: Callable[[], float], limit: float) -> None:
    """What is measured is at most the limit and at least nine tenths of it; a busy machine gets five tries.

    The limit is one of whole frames: their headers are 3 (UDP) and 4.4 % (TCP) of it.
    """
    seen: list[float] = []
    while not seen or not 0.9 <= seen[-1] / limit <= 1:
        if len(seen) == TRIES:
            pytest.fail(f"{limit} Mbit/s: measured {', '.join(f'{rate:.2f}' for rate in seen)}")
        seen.append(measure())
    print(f"limit {limit} Mbit/s: measured {', '.join(f'{rate:.2f}' for rate in seen)}")
