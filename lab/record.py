"""What a lab has made, written down before it is made, so that it can be removed whatever happened since.

A lab is a directory ``<base>/<name>`` (base: ``NATGW_LAB_DIR``, else /run/natgw-lab) with ``lab.json`` and each
gateway's run and state directories. Making that directory is what claims the name; an flock on it tells a lab
being built or removed from one whose builder died.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from lab.probes import Result
from lab.world import World

DEFAULT_BASE = Path("/run/natgw-lab")
_SOCKET_PATH_LIMIT = 107  # sun_path holds 108 bytes with the final NUL (unix(7))


class LabError(Exception):
    """Something stands in the lab's way; the message is one sentence for people."""


class Record(BaseModel):
    """Contents of lab.json."""

    phase: Literal["building", "up"]
    world: World
    notes: tuple[str, ...] = ()
    observations: tuple[Result, ...] = ()
    """What was seen while the lab was built, in states that are over now."""


def base_directory() -> Path:
    return Path(os.environ.get("NATGW_LAB_DIR") or DEFAULT_BASE)


class Book:
    """The lab's directory on disk."""

    def __init__(self, name: str, base: Path | None = None) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", name):
            raise LabError(f"{name!r} is no name for a lab: up to 24 lower-case letters, digits and inner hyphens.")
        self.name = name
        self.base = base or base_directory()
        self.path = self.base / name

    @property
    def file(self) -> Path:
        return self.path / "lab.json"

    def exists(self) -> bool:
        return self.path.is_dir()

    def claim(self, record: Record) -> None:
        """Make the directory and write the record, durably. Raises LabError when the name is taken."""
        for _ in range(3):  # a `down` of the last other lab may remove the base between our two steps
            self.base.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                try:
                    self.path.mkdir(mode=0o700)
                except FileExistsError:
                    raise LabError(
                        f"Lab {self.name} exists already: take it down first (natgw lab down --name {self.name})."
                    ) from None
                self.write(record)
                return
        raise LabError(f"{self.base} keeps disappearing.")

    def write(self, record: Record) -> None:
        """Replace the record atomically and flush it to disk."""
        fresh = self.file.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(record.model_dump_json(indent=1))
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self.file)

    def read(self) -> Record:
        """The record. Raises LabError when there is no such lab."""
        try:
            return Record.model_validate_json(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._absent() from None

    def _absent(self) -> LabError:
        return LabError(f"There is no lab {self.name} (natgw lab up -f FILE --name {self.name} makes one).")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lab for building or removing. Raises LabError when another process does."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._absent() from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LabError(f"Lab {self.name} is being built or taken down by another process.") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def gateway_directory(self, gateway: str) -> Path:
        """Where a gateway's run directory, state and environment file lie. Long names are cut and end in a hash."""
        short = gateway if len(gateway) <= 24 else f"{gateway[:15]}~{hashlib.sha256(gateway.encode()).hexdigest()[:8]}"
        return self.path / "gw" / short

    def make_gateway_directories(self, world: World) -> None:
        """Make them all. Raises LabError where a unix socket in one would have too long a path."""
        for gw in world.gateways:
            run = self.gateway_directory(gw.name) / "run"
            if len(bytes(run / "api.sock.new")) > _SOCKET_PATH_LIMIT:
                raise LabError(
                    f"{run} is too long a path for a unix socket: choose a shorter NATGW_LAB_DIR or lab name."
                )
            run.mkdir(parents=True)
            (run.parent / "state").mkdir()

    def erase(self) -> None:
        """Remove the directory, and the default base when it is empty."""
        shutil.rmtree(self.path, ignore_errors=False)
        if self.base == DEFAULT_BASE:
            with contextlib.suppress(OSError):  # other labs are in it
                self.base.rmdir()
