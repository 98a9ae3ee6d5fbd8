"""iperf3 between two hosts: what arrives per second once bursts are spent."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from traffic import Host
from world import wait_for

TRIES = 3
PATIENCE = 25  # seconds beyond a measurement's own


def received_mbit(
    client: Host, server: Host, to: str, *, seconds: float, udp_mbit: float | None = None, reverse: bool = False
) -> float:
    """Megabits of payload per second that the receiving side got, in the time after the first second.

    ``udp_mbit``: offered over UDP. ``reverse``: the server, which is reached at ``to``, sends.
    """
    words = ["iperf3", "-c", to, "-t", str(seconds), "-O", "1", "-J", "--get-server-output"]
    if udp_mbit is not None:
        words += ["-u", "-b", f"{udp_mbit}M", "-l", "1400"]
    if reverse:
        words += ["-R"]
    listening = server.spawn("iperf3", "-s", "-1", "-J")
    try:
        wait_for(lambda: ":5201" in server.run("ss", "-Hltn"), "an iperf3 server")
        calling = client.spawn(*words)
        said: dict[str, Any] = json.loads(calling.communicate(timeout=seconds + PATIENCE)[0])
    except subprocess.TimeoutExpired:
        calling.kill()
        calling.communicate()
        return 0.0
    finally:
        listening.kill()
        listening.communicate()
    if "error" in said:
        pytest.fail(f"{' '.join(words)}: {said['error']}")
    receiver = said if reverse else said["server_output_json"]
    counted = [one["sum"] for one in receiver["intervals"] if not one["sum"]["omitted"]]
    return 8e-6 * sum(one["bytes"] for one in counted) / sum(one["seconds"] for one in counted)


def assert_rate(measure: Callable[[], float], limit: float, tolerance: float = 0.10) -> None:
    """What is measured lies within the tolerance of the limit; a busy machine gets three tries."""
    seen: list[float] = []
    while not seen or abs(seen[-1] / limit - 1) > tolerance:
        if len(seen) == TRIES:
            pytest.fail(f"{limit} Mbit/s: measured {', '.join(f'{rate:.2f}' for rate in seen)}")
        seen.append(measure())
    print(f"limit {limit} Mbit/s: measured {', '.join(f'{rate:.2f}' for rate in seen)}")
