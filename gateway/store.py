"""The last good spec on disk: written whole, fsynced and renamed into place, or as edits beside it; always checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from pydantic import ValidationError

from gateway.store_journal import JournalFile, fsync_directory
from rules.appliance import NAMES, Spec
from rules.loadbalancer import LoadBalancerSpec
from rules.patch import patch, patched
from rules.spec import GatewaySpec
from rules.state import AddressKey

log = logging.getLogger(__name__)

FORMAT, FORMAT_WITH_JOURNAL = 1, 2
JOURNAL = "spec.journal"
JOURNAL_ABOVE = 1 << 16
"""Bytes; less is written whole in the time that two fsyncs take."""
JOURNAL_LEAST = 4096
"""Bytes that a journal may have in any case."""
FILES: dict[type[Spec], str] = {GatewaySpec: "spec.json", LoadBalancerSpec: "lb-svc.json"}


@dataclass(frozen=True)
class Stored:
    """What outlives the daemon: the spec, and the unmarked addresses that go with their EIPs (``Facts.claimed``)."""

    spec: Spec
    claimed: frozenset[AddressKey] = frozenset()


@dataclass(frozen=True)
class _Standing:
    """What file and journal say together, and how long the file is."""

    stored: Stored
    size: int


class Store:
    """One file in the state directory: ``spec.json``, or ``lb-svc.json`` in a pod that is a load balancer.

    The generation before it stays beside it, with ``.1`` after its name. A gateway whose file is longer than
    ``journal_above`` bytes keeps its changes in ``spec.journal`` (``gateway.store_journal``), until that is half as
    long as the file: a file of 50,000 rules takes 75 ms to write. Releases that know no journal refuse such a file
    (its format is 2) and adopt what the kernel holds.
    """

    def __init__(self, directory: Path, *, journal_above: int = JOURNAL_ABOVE) -> None:
        self._directory = directory
        self._journal_above = journal_above
        self._journal = JournalFile(directory / JOURNAL)
        self._standing: _Standing | None = None

    def load(self) -> Stored | None:
        """What was stored, or None where there is nothing.

        A file that does not check out is set aside with ``.corrupt`` after its name, and its journal with it, and
        reported; the caller then recovers the spec from the kernel.
        """
        found = (self._read(kind, self._directory / name) for kind, name in FILES.items())
        return next((stored for stored in found if stored), None)

    def previous(self) -> Stored | None:
        """The generation before the one that ``load`` had to set aside; None where nothing was, or that is no better.

        The kernel knows better, as long as it holds anything of ours: it has the change that this one lacks. In a new
        network namespace this is all there is, and one change too few is better than nothing. Where there was a
        journal it would be many.
        """
        journals = (JOURNAL, f"{JOURNAL}.corrupt")
        for kind, name in FILES.items():
            path = self._directory / name
            aside = path.with_suffix(".json.corrupt").exists() and not path.exists()
            if aside and not any((self._directory / journal).exists() for journal in journals):
                found = self._read(kind, path.with_suffix(".json.1"))
                self._standing = None  # what is stored next is written whole
                return found
        return None

    def before(self) -> Stored | None:
        """What stood before the last change, after ``load``; None where there is a journal, or nothing to be read."""
        for kind, name in FILES.items():
            path = (self._directory / name).with_suffix(".json.1")
            try:
                data = path.read_bytes()
                if self._standing is None and json.loads(data)["format"] == FORMAT:
                    return self._parse(kind, data)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _read(self, kind: type[Spec], path: Path) -> Stored | None:
        try:
            return self._parse(kind, path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            aside = self._directory / f"{FILES[kind]}.corrupt"
            log.error("the stored spec is unusable (%s); it is set aside as %s", error, aside)
            journal = self._directory / JOURNAL
            for file, to in ((path, aside), (journal, journal.with_suffix(".journal.corrupt"))):
                with contextlib.suppress(OSError):
                    file.replace(to)
            return None

    def _parse(self, kind: type[Spec], data: bytes) -> Stored:
        document = json.loads(data)
        if document["format"] not in (FORMAT, FORMAT_WITH_JOURNAL):
            raise ValueError(f"format {document['format']} is neither {FORMAT} nor {FORMAT_WITH_JOURNAL}")
        body, digest = document["spec"], document["sha256"]
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            raise ValueError("its checksum does not match")
        if document.get("claimed_sha256", known := _digest(document["claimed"])) != known:
            raise ValueError("the checksum of the addresses that go with their EIPs does not match")
        journaled = document["format"] == FORMAT_WITH_JOURNAL
        edits = self._journal.load(digest) if journaled else []
        try:
            if edits:
                spec: Spec = kind.model_validate(reduce(patched, edits, json.loads(body)))
            else:
                spec = kind.model_validate_json(body)
        except (ValidationError, IndexError, AttributeError) as error:
            raise ValueError(f"it does not describe {NAMES[kind]}: {error}") from error
        claimed = frozenset(AddressKey(interface, address) for interface, address in document["claimed"])
        stored = Stored(spec, claimed)
        self._standing = _Standing(stored, len(data)) if journaled else None
        return stored

    def save(self, stored: Stored) -> None:
        """Replace what is stored durably; raises OSError and leaves the old state in place."""
        if not self._append(stored):
            self._replace(stored)

    def _append(self, stored: Stored) -> bool:
        """Add what changed to the journal; False where the file is to be written anew."""
        standing = self._standing
        if (
            standing is None
            or self._journal.size > max(JOURNAL_LEAST, standing.size // 2)
            or stored.claimed != standing.stored.claimed
        ):
            return False
        old, new = standing.stored.spec, stored.spec
        if not (isinstance(old, GatewaySpec) and isinstance(new, GatewaySpec)):
            return False
        if said := patch(old, new):
            self._journal.append(said)
        self._standing = _Standing(stored, standing.size)
        return True

    def _replace(self, stored: Stored) -> None:
        body = stored.spec.model_dump_json()
        digest = hashlib.sha256(body.encode()).hexdigest()
        journaled = isinstance(stored.spec, GatewaySpec) and len(body) > self._journal_above
        number = FORMAT_WITH_JOURNAL if journaled else FORMAT
        claimed = sorted(map(list, stored.claimed))
        document = {
            "format": number,
            "sha256": digest,
            "spec": body,
            "claimed": claimed,
            "claimed_sha256": _digest(claimed),
        }
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
        fsync_directory(path.parent)
        # What the journal held is in the file now. Until it is gone it is known by the checksum that it names.
        self._standing = None
        self._journal.begin(digest)
        self._standing = _Standing(stored, len(body)) if journaled else None

    def forget(self) -> None:
        """Remove the stored spec, so that no outdated one can come back; raises OSError."""
        self._standing = None
        for name in (*FILES.values(), *(f"{name}.1" for name in FILES.values()), JOURNAL):
            (self._directory / name).unlink(missing_ok=True)


def _digest(claimed: object) -> str:
    return hashlib.sha256(json.dumps(claimed).encode()).hexdigest()
