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

from rules.appliance import NAMES, Spec
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import GatewaySpec
from rules.state import AddressKey

log = logging.getLogger(__name__)

FORMAT = 2
FILES: dict[type[Spec], str] = {GatewaySpec: "spec.json", LoadBalancerSpec: "lb-svc.json"}


@dataclass(frozen=True)
class Stored:
    """What outlives the daemon: the spec, and the unmarked addresses that go with their EIPs (``Facts.claimed``)."""

    spec: Spec
    claimed: frozenset[AddressKey] = frozenset()


class Store:
    """One file in the state directory: ``spec.json``, or ``lb-svc.json`` in a pod that is a load balancer.

    The generation before it stays beside it, with ``.1`` after its name.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> Stored | None:
        """What was stored, or None where there is nothing.

        A file that does not check out is set aside with ``.corrupt`` after its name and reported; the caller then
        recovers the spec from the kernel.
        """
        found = (self._read(kind, self._directory / name) for kind, name in FILES.items())
        return next((stored for stored in found if stored), None)

    def previous(self) -> Stored | None:
        """The generation before the one that ``load`` had to set aside; None where nothing was, or that is no better.

        The kernel knows better, as long as it holds anything of ours: it has the change that this one lacks. In a new
        network namespace this is all there is, and one change too few is better than nothing.
        """
        for kind, name in FILES.items():
            path = self._directory / name
            if path.with_suffix(".json.corrupt").exists() and not path.exists():
                return self._read(kind, path.with_suffix(".json.1"))
        return None

    def _read(self, kind: type[Spec], path: Path) -> Stored | None:
        try:
            return self._parse(kind, path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            aside = self._directory / f"{FILES[kind]}.corrupt"
            log.error("the stored spec is unusable (%s); it is set aside as %s", error, aside)
            with contextlib.suppress(OSError):
                path.replace(aside)
            return None

    def _parse(self, kind: type[Spec], data: bytes) -> Stored:
        document = json.loads(data)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']} is not {FORMAT}")
        body = document["spec"]
        if _checksum(body, document["claimed"]) != document["sha256"]:
            raise ValueError("its checksum does not match")
        try:
            spec = kind.model_validate_json(body)
        except ValidationError as error:
            raise ValueError(f"it does not describe {NAMES[kind]}: {error}") from error
        return Stored(spec, frozenset(AddressKey(interface, address) for interface, address in document["claimed"]))

    def save(self, stored: Stored) -> None:
        """Replace what is stored durably; raises OSError and leaves the old file in place."""
        body, claimed = stored.spec.model_dump_json(), sorted(map(list, stored.claimed))
        document = {"format": FORMAT, "sha256": _checksum(body, claimed), "spec": body, "claimed": claimed}
        path = self._directory / FILES[type(stored.spec)]
        previous = path.with_suffix(".json.1")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_suffix(".json.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            previous.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.link(path, previous)
        fresh.replace(path)
        _fsync_directory(path.parent)

    def forget(self) -> None:
        """Remove the stored spec, so that no outdated one can come back; raises OSError."""
        for name in FILES.values():
            for suffix in ("", ".1"):
                (self._directory / f"{name}{suffix}").unlink(missing_ok=True)


def _checksum(body: str, claimed: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps([body, claimed]).encode()).hexdigest()


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
