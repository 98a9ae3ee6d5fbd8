"""The daemon's log: one line for people, or one JSON object a line, on stderr or in a file that is kept small.

A disk may take its time for a line, and nobody may wait for that: not the loops that answer verbs and HTTP, nor the
writer. So a thread of its own writes them. Whoever logs waits for his line a moment at most, and not at all while the
lines before it are still waiting: on a disk that works, a line is there before the answer that it is about.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from api.settings import LogFormat
from gateway.journal import Event

LOG_BYTES = 4 << 20
MOST_WAITING = 10_000
"""Records that wait for a disk that does not answer."""
PATIENCE, LAST_SECONDS = 0.05, 1.0
"""Seconds: how long one line may hold up whoever logs, and how long the end of the process."""


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, message; of an event of the journal all its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        seconds, milliseconds = time.gmtime(record.created), int(record.msecs)
        said: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            said["event"] = event.model_dump(mode="json", exclude_defaults=True)
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


class Unhurried(logging.Handler):
    """Hands records to another handler in a thread; while that is behind, MOST_WAITING records wait and more are lost.

    How many were lost is told by a record of its own. ``patience`` in seconds.
    """

    def __init__(self, target: logging.Handler, patience: float = PATIENCE) -> None:
        super().__init__()
        self._target = target
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: deque[logging.LogRecord] = deque()
        self._put = self._written = self._lost = 0
        self._behind = False
        self._thread: threading.Thread | None = None

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        """The format of what is written."""
        super().setFormatter(fmt)
        self._target.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written."""
        record.msg, record.args = record.getMessage(), None  # what the arguments are may change
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(record)
            self._put += 1
            number = self._put
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            if not self._behind:
                self._behind = not self._changed.wait_for(lambda: self._written >= number, self._patience)

    def flush(self) -> None:
        """Wait for what is still to be written, at most a second."""
        with self._changed:
            self._changed.wait_for(lambda: self._written >= self._put, LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                record = self._waiting.popleft()
                lost, self._lost = self._lost, 0
            if lost:
                self._target.handle(_told(f"{lost:,} lines were lost here: the log could not be written in time"))
            self._target.handle(record)
            with self._changed:
                self._written += 1
                self._behind = bool(self._behind and self._waiting)
                self._changed.notify_all()


def _told(message: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)


def log_to(path: Path, form: LogFormat = "console") -> None:
    """Log to stderr where somebody reads it, else (detached) to the file."""
    handler: logging.Handler
    if "NATGW_READY_FD" in os.environ:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    else:
        handler = logging.StreamHandler()
    handler = Unhurried(handler)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
