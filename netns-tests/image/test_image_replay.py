"""The life of a gateway in the real container, as the two newest releases' controllers act it out.

The one passes every rule as an argument, the other a line for a shell. Neither says which variant of iptables is to be
used: what stands is looked for where Kube-OVN's own tests would look in this image, with the image's own tools.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pod import CONTROLLER, Container, Pod
from replay.player import Mismatch, Player
from replay.script import RELEASES, Release, transcript
from world import Gateway, World


@pytest.fixture(scope="module")
def variant() -> str:
    """The choice of nat-gateway.sh and of Kube-OVN's tests."""
    with Container(*CONTROLLER, "--network=none") as container:
        legacy = container.exec("iptables-legacy", "-t", "nat", "-S", "INPUT", "1").returncode == 0
    return "legacy" if legacy else "nft"


@pytest.mark.parametrize("release", RELEASES[-2:], ids=lambda release: release.name)
def test_replay(world: World, release: Release, variant: str, tmp_path: Path) -> None:
    def plug(state_dir: Path) -> Gateway:
        pod = Pod(world, *CONTROLLER, state_dir=state_dir)
        pod.attach()
        pod.start()
        return pod

    player = Player(world, release, variant, tmp_path, plug)
    try:
        for number, step in enumerate(transcript(release), start=1):
            try:
                player.play(step)
            except Mismatch as error:
                pytest.fail(f"step {number}, {step.title!r}:\n{error}", pytrace=False)
        assert player.gateway.container.zombies() == []
    finally:
        player.close()
