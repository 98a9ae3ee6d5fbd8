"""The daemon's log: one line for people, or one JSON object a line, on stderr or in a file that is kept small."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import time
from pathlib import Path
from typing import Any

from api.settings import LogFormat
from gateway.journal import Event

LOG_BYTES = 4 << 20


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


def log_to(path: Path, form: LogFormat = "console") -> None:
    """Log to stderr where somebody reads it, else (detached) to the file."""
    handler: logging.Handler
    if "NATGW_READY_FD" in os.environ:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    else:
        handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
