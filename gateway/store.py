"""The last good spec on disk: written whole, fsynced and renamed into place, checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rules.spec import GatewaySpec
from rules.state import AddressKey

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Stored:
    """What outlives the daemon: the spec, and the unmarked addresses that go with their EIPs (``Facts.claimed``)."""

    spec: GatewaySpec
    claimed: frozenset[AddressKey] = frozenset()


class Store:
    """One file, ``spec.json``, in the state directory; the generation before it stays as ``spec.json.1``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "spec.json"
        self._previous = directory / "spec.json.1"

    def load(self) -> Stored | None:
        """What was stored, or None where there is nothing.

        A file that does not check out is set aside as ``spec.json.corrupt`` and reported; the caller then
        recovers the spec from the kernel.
        """
        try:
            return self._parse(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            aside = self.path.with_suffix(".json.corrupt")
            log.error("the stored spec is unusable (%s); it is set aside as %s", error, aside)
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            return None

    def _parse(self, data: bytes) -> Stored:
        document = json.loads(data)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']} is not {FORMAT}")
        body = document["spec"]
        if hashlib.sha256(body.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its checksum does not match")
        try:
            spec = GatewaySpec.model_validate_json(body)
        except ValidationError as error:
            raise ValueError(f"it does not describe a gateway: {error}") from error
        return Stored(spec, frozenset(AddressKey(interface, address) for interface, address in document["claimed"]))

    def save(self, stored: Stored) -> None:
        """Replace what is stored durably; raises OSError and leaves the old file in place."""
        body = stored.spec.model_dump_json()
        digest = hashlib.sha256(body.encode()).hexdigest()
        document = {"format": FORMAT, "sha256": digest, "spec": body, "claimed": sorted(stored.claimed)}
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".json.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            self._previous.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.link(self.path, self._previous)
        fresh.replace(self.path)
        _fsync_directory(self.path.parent)

    def forget(self) -> None:
        """Remove the stored spec, so that no outdated one can come back; raises OSError."""
        self.path.unlink(missing_ok=True)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
