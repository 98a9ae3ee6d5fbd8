"""The container with two capabilities and the seccomp profile of the example, loaded by podman and its runtime."""

from __future__ import annotations

import pytest
from pod import ROOT, eventually, pod
from test_image_gateway import fill, works
from world import World

PROFILE = ROOT / "deploy/security/seccomp.json"
CONFINED = (
    "--cap-drop=all",
    "--cap-add=NET_ADMIN",
    "--cap-add=NET_RAW",
    "--security-opt=no-new-privileges",
    f"--security-opt=seccomp={PROFILE}",
)
FILTERED, KEPT = "2", f"{1 << 12 | 1 << 13:016x}"  # proc(5): Seccomp, and the two capabilities as a mask


def status(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("command", [("sleep", "infinity"), None])
def test_it_works_with_the_profile_that_podman_loads(world: World, command: tuple[str, ...] | None) -> None:
    with pod(world, *CONFINED, command=command) as gateway:
        if command is None:
            eventually("the daemon to listen", (gateway.run_dir / "api.sock").exists)
        fill(gateway)
        works(world)
        for pid in ("1", gateway.container.run("cat", "/run/natgw/natgw.pid").strip()):
            said = status(gateway.container.run("cat", f"/proc/{pid}/status"))
            assert (said["Seccomp"], said["NoNewPrivs"]) == (FILTERED, "1")
            assert (said["CapEff"], said["CapBnd"]) == (KEPT, KEPT)
        if command is not None:  # else it is what the container runs
            gateway.kill_daemon()
        gateway.verb("dnat-add", "192.168.0.51,8889,tcp,10.0.1.12,80")
        assert gateway.get("/v1/drift")["now"] == []
        eventually("the flow watcher", lambda: gateway.get("/v1/traffic")["collector"]["running"])
        for forbidden in (("unshare", "-n", "true"), ("unshare", "-U", "true"), ("mount", "-t", "tmpfs", "x", "/mnt")):
            assert gateway.container.exec(*forbidden).returncode != 0
