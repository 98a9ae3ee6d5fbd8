"""What a packet costs with 1, 30 and 300 limited EIPs: the ratio must be flat.

As root: ``.venv/bin/python bench/qos_classes.py``. A namespace of its own sends small datagrams from random EIPs
through an interface whose limits are far above what is sent, so that only finding the class takes time. For
comparison the same filters stand in one list, as Kube-OVN's script makes them.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "netns-tests"))

from netns import Namespace, require, run, veth

from gateway.kernel.shaper import KernelShaper
from rules.keyed import Keyed
from rules.qos import statements
from rules.spec import EipLimit, GatewaySpec
from rules.tc import Classify, ClassKey, FilterKey, Key, RootKey, Value, steps_after, steps_before

COUNTS = (1, 30, 300)
PACKETS, ROUNDS = 20_000, 7


def eips(count: int) -> list[str]:
    return [f"172.18.{n // 200}.{n % 200 + 1}" for n in range(count)]


def limits(count: int) -> GatewaySpec:
    """Limits of 40 Gbit/s, all a little different."""
    fields = {"direction": "egress", "burstMax": "1000"}
    made = [{"eip": eip, "rateMax": str(40000 + n), **fields} for n, eip in enumerate(eips(count))]
    return GatewaySpec(qos=Keyed(EipLimit.model_validate(one) for one in made))


def shape(shaper: KernelShaper, spec: GatewaySpec, *, listed: bool) -> None:
    have = shaper.read()
    shaper.commit([*steps_after({key: None for key in have if isinstance(key, RootKey)}, have)])
    wanted = statements(spec, {})
    if listed:
        wanted = in_one_list(wanted)
    shaper.commit([*steps_before(wanted, shaper.read())])


def in_one_list(wanted: dict[Key, Value | None]) -> dict[Key, Value | None]:
    filters = [value for key, value in wanted.items() if isinstance(key, FilterKey) and isinstance(value, Classify)]
    others = {key: value for key, value in wanted.items() if isinstance(key, RootKey | ClassKey)}
    return others | {FilterKey("net1", 1, 0, 0, n): value for n, value in enumerate(filters, start=1)}


def cost(sources: list[str]) -> float:
    """Microseconds of CPU per packet, the least of several rounds."""
    senders = []
    for source in random.sample(sources, min(30, len(sources))):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.bind((source, 0))
        sender.connect(("10.9.9.9", 9))
        senders.append(sender)
    order = [random.choice(senders) for _ in range(PACKETS)]
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.process_time()
        for sender in order:
            sender.send(b"x")
        best = min(best, time.process_time() - begun)
    for sender in senders:
        sender.close()
    return best / PACKETS * 1e6


def main() -> None:
    """Print the costs and their ratio to that of one class."""
    require("ip", "tc")
    here, there = Namespace("bench"), Namespace("bench")
    try:
        veth(here, "net1", there, "peer")
        addresses = "\n".join(f"addr add {eip}/32 dev net1" for eip in eips(max(COUNTS)))
        peer = run("ip", "-n", there.name, "-br", "link", "show", "peer").split()[2]
        here_is = f"{addresses}\nroute add 10.9.9.9 dev net1\nneigh add 10.9.9.9 lladdr {peer} dev net1\n"
        run("ip", "-n", here.name, "-batch", "-", stdin=here_is)
        with here.entered():
            shaper = KernelShaper()
            print(f"without limits: {cost(eips(300)):.2f} us per packet")
            for listed in (False, True):
                costs = []
                for count in COUNTS:
                    shape(shaper, limits(count), listed=listed)
                    costs.append(cost(eips(count)))
                said = ", ".join(
                    f"{n} classes {one:.2f} us ({one / costs[0]:.2f})" for n, one in zip(COUNTS, costs, strict=True)
                )
                print(f"{'in one list' if listed else 'hashed':>11}: {said}")
            shaper.close()
    finally:
        here.remove()
        there.remove()


if __name__ == "__main__":
    main()
