"""Disks that are slow, or do not answer at all, for the daemon's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from netns import require

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_SIZE = 32 << 20


class Disk:
    """A file system on a loop device, which can be frozen (FIFREEZE). Use it with ``with``.

    Whoever writes to it while it is frozen waits in the kernel, as on a device that does not answer, and cannot be
    killed before it thaws; what is in its cache can be read.
    """

    def __init__(self, directory: Path) -> None:
        require("mkfs.ext4", "mount")
        self._image, self.path = directory / "image", directory / "disk"
        self._descriptor = -1

    def __enter__(self) -> Disk:
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(_SIZE)
        subprocess.run(["mkfs.ext4", "-q", str(self._image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(self._image), str(self.path)], check=True)
        self._descriptor = os.open(self.path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        subprocess.run(["umount", str(self.path)], check=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing can be written meanwhile."""
        fcntl.ioctl(self._descriptor, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(self._descriptor, _FITHAW, 0)


class SlowFsync:
    """Makes each fsync of a daemon take longer: a library that is preloaded into it (``slow_fsync.c``)."""

    def __init__(self, directory: Path) -> None:
        require("gcc")
        library, self._delay = directory / "slow_fsync.so", directory / "milliseconds"
        self.takes(0)
        source = Path(__file__).with_name("slow_fsync.c")
        subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        self.environment = {"LD_PRELOAD": str(library), "SLOW_FSYNC": str(self._delay)}
        """For whoever starts the daemon."""

    def takes(self, milliseconds: int) -> None:
        """From now on, also for one that is under way."""
        fresh = self._delay.with_suffix(".new")  # nobody reads half of it
        fresh.write_text(str(milliseconds))
        fresh.replace(self._delay)
