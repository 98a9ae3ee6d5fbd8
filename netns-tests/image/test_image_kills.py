"""The daemon is killed again and again while a controller works: every call it would repeat ends well.

NATGW_KILLS sets how often it is killed (there are ten verbs to a kill); the default keeps a run short.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time

import pytest
from pod import eventually, pod
from world import World

KILLS = int(os.environ.get("NATGW_KILLS", "10"))
VERBS = 10 * KILLS
TRIES = KILLS + 1
"""Of one verb: each but the last may meet a kill."""
EIPS = [f"192.168.0.{number}" for number in range(100, 140)]


class Controller:
    """Adds and deletes port mappings, repeats what fails, and remembers what must stand at the end."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.wanted: dict[tuple[str, int], str] = {}
        self.failures = 0
        self.longest = 0.0

    def next(self) -> tuple[str, str]:
        eip, port = self.random.choice(EIPS), self.random.randrange(1, 6)
        if (eip, port) in self.wanted:
            del self.wanted[eip, port]
            return "dnat-del", f"{eip},{port},tcp"
        backend = f"10.0.1.{self.random.randrange(20, 250)}"
        self.wanted[eip, port] = backend
        return "dnat-add", f"{eip},{port},tcp,{backend},80"

    def expected(self) -> set[str]:
        return {
            f"-A SHARED_DNAT -d {eip}/32 -p tcp -m tcp --dport {port} -j DNAT --to-destination {backend}:80"
            for (eip, port), backend in self.wanted.items()
        }


@pytest.mark.timeout(120 + 5 * KILLS)
def test_every_verb_ends_in_the_state_asked_for(world: World) -> None:
    with pod(world) as gateway:
        gateway.verb("init")
        gateway.verb("eip-add", *(f"{eip}/24" for eip in EIPS))
        container, controller = gateway.container, Controller(1)
        resident, keeper = [], []
        done = threading.Event()
        killed = 0

        def kill() -> None:
            nonlocal killed
            dice = random.Random(2)
            while killed < KILLS and not done.wait(dice.uniform(0.0, 0.6)):
                if container.nsenter("sh", "-c", "kill -9 $(cat /run/natgw/natgw.pid)").returncode == 0:
                    killed += 1

        killer = threading.Thread(target=kill)
        killer.start()
        number = 0
        while number < VERBS or killer.is_alive():
            verb, rule = controller.next()
            began = time.monotonic()
            for _ in range(TRIES):
                said = container.nsenter("bash", "/kube-ovn/nat-gateway.sh", verb, rule)
                if (said.returncode, said.stderr) == (0, ""):
                    break
                controller.failures += 1
            else:
                pytest.fail(f"{verb} {rule} failed {TRIES} times: {said.stderr}\n{gateway.log()}")
            controller.longest = max(controller.longest, time.monotonic() - began)
            number += 1
            if number % 50 == 0:
                rows = container.processes()
                resident += [row[2] for row in rows if row[4].endswith("-m api.main")]
                keeper += [row[2] for row in rows if "natgw_keeper" in row[4]]
        done.set()
        killer.join()

        gateway.verb("init")
        assert killed == KILLS
        assert set(gateway.rules("-A SHARED_DNAT")) == controller.expected()
        # The container's own process; the keeper, its daemon, and the process in which that one watches flows.
        parts = ("sleep infinity", "natgw_keeper.py", " -m api.main", "gateway.watcher")

        def nobody_else() -> bool:
            rows = [row for row in container.processes() if not row[4].startswith("ps ")]
            resident.extend(row[2] for row in rows if row[4].endswith("-m api.main"))
            names = [[part for part in parts if part in row[4]] for row in rows]
            return sorted(names) == sorted([part] for part in parts) and not container.zombies()

        # A watcher ends, and the next one starts, in their own time.
        eventually("the four processes and no zombie", nobody_else)
        print(
            f"{number} verbs, {killed} kills: {controller.failures} calls were repeated, the longest verb took "
            f"{controller.longest:.2f} s; daemon {min(resident) / 1024:.0f} to {max(resident) / 1024:.0f} MiB (median "
            f"{statistics.median(resident) / 1024:.0f}), keeper {max(keeper) / 1024:.1f} MiB"
        )
        assert max(resident) <= 96 * 1024
        assert max(keeper) <= 16 * 1024
