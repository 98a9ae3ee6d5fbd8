"""Edits of a stored document, appended to a file beside it instead of writing it anew.

Each line is the beginning of the document's checksum, a checksum of its own, and a JSON value. A line's checksum covers
the one before it, the first one's that of the document: so a line that is missing or in another place does not check
out. A crash can tear the last line only, and nobody was told that what it says is stored; anything else that does not
check out is damage. A file without any line of the document is that of one before, which a crash kept from being
removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Damaged(ValueError):
    """A line in the midst of the file does not check out."""


class JournalFile:
    """The edits of one document; for one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of = ""
        self._checksum = ""
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes that are in use."""
        return self._end

    def load(self, of: str) -> list[Any]:
        """The edits of the document with that checksum, in order; none where the file is another's, or not there.

        Raises Damaged and OSError.
        """
        self._of, self._checksum, self._end = of, of, 0
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        edits: list[Any] = []
        lines = data.split(b"\n")
        if not any(line.startswith(_named(of)) for line in lines):
            return []
        for number, line in enumerate(lines[:-1], start=1):
            name, _, rest = line.partition(b" ")
            checksum, _, body = rest.partition(b" ")
            expected = _chained(self._checksum, body)
            if (name, checksum) != (_named(of), expected.encode()):
                if number == len(lines) - 1:
                    break
                raise Damaged(f"line {number} of {self._path.name} does not check out")
            edits.append(json.loads(body))
            self._checksum = expected
            self._end += len(line) + 1
        return edits

    def begin(self, of: str) -> None:
        """The document with that checksum stands now, and is on disk: its edits are none."""
        self._of, self._checksum, self._end = of, of, 0
        self._path.unlink(missing_ok=True)

    def append(self, edit: object) -> None:
        """Add an edit durably; raises OSError, and then the file may end in a torn line."""
        body = json.dumps(edit, separators=(",", ":")).encode()
        checksum = _chained(self._checksum, body)
        line = b" ".join((_named(self._of), checksum.encode(), body)) + b"\n"
        fresh = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)) as file:
            file.truncate(self._end)  # what a crash tore, or a document before left
            file.seek(self._end)
            if file.write(line) != len(line):
                raise OSError(f"{self._path} took a part of a line only")
            os.fsync(descriptor)
        if fresh:
            fsync_directory(self._path.parent)
        self._checksum, self._end = checksum, self._end + len(line)

    def forget(self) -> None:
        """Remove the file; raises OSError."""
        self._path.unlink(missing_ok=True)


def _named(of: str) -> bytes:
    return of[:16].encode()


def _chained(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()


def fsync_directory(directory: Path) -> None:
    """Make names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
