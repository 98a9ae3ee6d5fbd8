"""The run and state directories: others cannot write there, and what they wrote before is not trusted."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from api.directories import own

OTHER = 65534
SCRIPT = Path(__file__).parents[1] / "image/rootfs/kube-ovn/nat-gateway.sh"


def test_what_is_ours_alone_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "kept").write_text("")
    os.chown(tmp_path / "kept", OTHER, OTHER)  # root put it there
    assert own(tmp_path) == []
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert (tmp_path / "kept").exists()


def test_an_open_directory_is_closed_and_what_others_left_is_removed(tmp_path: Path) -> None:
    target, run = tmp_path / "precious", tmp_path / "run"
    target.write_text("precious")
    run.mkdir()
    run.chmod(0o1777)
    (run / "spec.json").symlink_to(target)
    (run / "planted").write_text("{}")
    (run / "ours").write_text("")
    for name in ("spec.json", "planted"):
        os.chown(run / name, OTHER, OTHER, follow_symlinks=False)
    told = own(run)
    assert stat.S_IMODE(run.stat().st_mode) == 0o1755
    assert [path.name for path in run.iterdir()] == ["ours"]
    assert target.read_text() == "precious"
    assert told[0] == f"others could write to {run}: no longer"
    assert sorted(told[1:]) == [f"removed {run / name} of user {OTHER}" for name in ("planted", "spec.json")]


def test_anothers_directory_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"belongs to user {OTHER}"):
        own(tmp_path)


def verb(run_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NATGW_RUN_DIR": str(run_dir)}
    argv = ["bash", str(SCRIPT), "init"]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_verb_is_told_to_nobody_but_the_gateway(tmp_path: Path) -> None:
    """Another user has put a socket where the daemon's would be."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "exec.sock"))
        child = os.fork()
        if child == 0:
            os.setuid(OTHER)
            listener.listen()  # whose credentials callers see
            os._exit(0)
        os.waitpid(child, 0)
        done = verb(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"user {OTHER} listens on {tmp_path}/exec.sock, who is not the gateway" in done.stderr


@pytest.mark.parametrize("name", ["start.lock", "natgw.log"])
def test_a_verb_follows_no_link_that_was_laid_for_it(tmp_path: Path, name: str) -> None:
    run, target = tmp_path / "run", tmp_path / "precious"
    target.write_text("precious")
    run.mkdir()
    (run / name).symlink_to(target)
    done = verb(run)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert target.read_text() == "precious"
    assert not (run / "exec.sock").exists()
