"""The run and state directories are the gateway's alone: who can write there could have root write elsewhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def own(path: Path) -> list[str]:
    """Make an existing directory one that only root and we can write to; raises PermissionError where it is another's.

    A volume of a pod (an emptyDir) is everybody's at first. What others have put there is removed: links would lead our
    log and locks to where they point, and a stored spec would be taken for ours. Returns what there is to be told.
    """
    mine = {0, os.geteuid()}
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if found.st_uid not in mine:
            raise PermissionError(f"{path} belongs to user {found.st_uid}, who could write what the gateway trusts")
        if not found.st_mode & _OTHERS_WRITE:
            return []
        os.fchmod(directory, stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)
        told = [f"others could write to {path}: no longer"]
        for name in os.listdir(directory):
            entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if entry.st_uid not in mine and not stat.S_ISDIR(entry.st_mode):
                os.unlink(name, dir_fd=directory)
                told.append(f"removed {path / name} of user {entry.st_uid}")
        return told
    finally:
        os.close(directory)
