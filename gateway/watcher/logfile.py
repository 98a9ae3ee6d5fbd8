"""The flow log's files: written in batches, rotated by size, the oldest thrown away."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.observer.metrics import Tally, add


class LogFile:
    """Writes records to ``path`` in their order; older ones are in ``path.1``, ``path.2`` and so on.

    A file has at most ``most_bytes`` (one batch at least), and there are at most ``files`` of them. What cannot be
    written is counted as dropped, and the next flush tries anew.
    """

    def __init__(self, path: Path, most_bytes: int, files: int, tally: Tally) -> None:
        self._path = path
        self._most = most_bytes
        self._files = files
        self._tally = tally
        self._batch: list[bytes] = []
        self._events: dict[str, int] = {}
        self._fd: int | None = None
        self._size = 0

    def __len__(self) -> int:
        return len(self._batch)

    def put(self, event: str, line: bytes) -> None:
        """Add a record, which ``flush`` writes."""
        self._batch.append(line)
        self._events[event] = self._events.get(event, 0) + 1

    def flush(self) -> None:
        """Write what was put."""
        if not self._batch:
            return
        batch, events = b"".join(self._batch), self._events
        self._batch, self._events = [], {}
        try:
            self._write(batch)
        except OSError:
            self.close()
            add(self._tally.drops, "write_error", sum(events.values()))
        else:
            for event, number in events.items():
                add(self._tally.records, event, number)

    def close(self) -> None:
        """Close the file; the next flush opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, batch: bytes) -> None:
        if self._fd is not None and self._size and self._size + len(batch) > self._most:
            self._rotate()
        fd = self._fd if self._fd is not None else self._open()
        self._size += len(batch)
        while batch:
            batch = batch[os.write(fd, batch) :]

    def _open(self) -> int:
        # Others of the pod have no business with who talked to whom, and lay no link to where it is written.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(fd).st_size
        return fd

    def _rotate(self) -> None:
        self.close()
        for number in range(self._files - 1, 0, -1):
            older = self._path if number == 1 else Path(f"{self._path}.{number - 1}")
            if older.exists():
                older.replace(f"{self._path}.{number}")
        if self._files == 1:
            self._path.unlink(missing_ok=True)
