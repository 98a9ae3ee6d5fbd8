"""Kube-OVN's controllers from 1.12 to 1.17 act out the life of a gateway, and none notices a difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from netns import require
from replay.player import Mismatch, Player
from replay.script import RELEASES, Release, transcript
from wire import Capture, gratuitous
from world import World, identical


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    require("tc", "nft")
    with World() as made:
        yield made


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_replay(world: World, release: Release, variant: str, tmp_path: Path) -> None:
    player = Player(world, release, variant, tmp_path)
    try:
        for number, step in enumerate(transcript(release), start=1):
            try:
                player.play(step)
            except Mismatch as error:
                pytest.fail(f"step {number}, {step.title!r}:\n{error}", pytrace=False)
    finally:
        player.close()


def test_a_healthy_replica_stays_quiet_while_another_is_replaced(world: World) -> None:
    """1.17 with replicas: whenever one pod is replaced, all pods get all adds again, which write nothing. An EIP is
    announced three times when it comes, and again for the asking, but no more often than once a second."""
    eips = [f"192.168.0.{number}" for number in range(50, 55)]
    redo = [("eip-add", f"{eip}/24") for eip in eips]
    redo += [("floating-ip-add", f"{eips[0]},10.0.1.11"), ("dnat-add", f"{eips[1]},80,tcp,10.0.1.12,80")]
    redo += [("snat-add", f"{eips[2]},10.0.0.0/16,--random-fully")]
    with world.gateway(variant="nft") as gateway:
        heard = Capture(world.router, "eth0")
        for call in redo:
            gateway.verb(*call)

        def again() -> None:
            for call in redo:
                gateway.verb(*call)

        for _ in range(3):
            identical(gateway, again)
        frames = heard.rest(1.5, gratuitous(gateway.mac))
        seconds = frames[-1].at - frames[0].at
        announced = Counter(frame.announces()[0] for frame in frames)
        assert set(eips) <= set(announced)
        assert max(announced.values()) <= 3 + int(seconds) + 1, announced
