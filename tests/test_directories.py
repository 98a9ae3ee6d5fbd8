"""The run and state directories: others cannot write there, and what they wrote before is not trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from api.directories import own

OTHER = 65534


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
