"""No flap at 3 x 50 ms while other processes want every core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netns import Namespace, require, veth
from ovn import SUPERVISOR, wait_until

pytestmark = pytest.mark.alone

SECONDS = 60
ADDRESSES = ("10.90.0.1", "10.90.0.2")


@pytest.fixture
def burners() -> Iterator[None]:
    """As many processes as there are cores, each with all of it if it can."""
    processes = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)
    ]
    yield
    for process in processes:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(SECONDS + 60)
def test_sessions_stay_up_beside_busy_cores(make_netns: Callable[[], Namespace], tmp_path: Path, burners: None) -> None:
    require("ip")
    ends = (make_netns(), make_netns())
    veth(ends[0], "v", ends[1], "v")
    logs, speakers, environments = [], [], []
    try:
        for number, netns in enumerate(ends):
            netns.run("ip", "address", "add", f"{ADDRESSES[number]}/24", "dev", "v")
            logs.append(tmp_path / f"log{number}")
            environments.append(
                {
                    **os.environ,
                    "NATGW_RUN_DIR": str(tmp_path / str(number)),
                    "NATGW_PYTHON": sys.executable,
                    "NATGW_BFD_HEALTH": "off",
                    "POD_IPS": ADDRESSES[number],
                    "BFD_PEER_IPS": ADDRESSES[1 - number],
                    "BFD_MIN_TX": "50",
                    "BFD_MIN_RX": "50",
                }
            )
            with open(logs[-1], "wb") as output:
                argv = ["ip", "netns", "exec", netns.name, SUPERVISOR, "run"]
                speakers.append(subprocess.Popen(argv, env=environments[-1], stdout=output, stderr=output))

        def ready() -> bool:
            return not any(
                subprocess.run([SUPERVISOR, "ready"], env=one, capture_output=True, check=False).returncode
                for one in environments
            )

        wait_until(ready, "both sessions are Up")
        before = [log.read_text().count(" -> ") for log in logs]
        time.sleep(SECONDS)
        assert [log.read_text().count(" -> ") for log in logs] == before, "\n".join(log.read_text() for log in logs)
        assert ready()
    finally:
        for speaker in speakers:
            speaker.send_signal(signal.SIGKILL)
            speaker.wait(10)
