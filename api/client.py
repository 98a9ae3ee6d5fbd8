"""The HTTP face's client for the command line: http.client over the daemon's Unix socket, quick to import."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120.0
# How long a daemon that lives may take until it answers: it serves verbs before it loads the HTTP face.
START_SECONDS = 30.0


class NotRunning(Exception):
    """No daemon answers; the message is one sentence that says how to start one."""


class Failed(Exception):
    """The daemon does not answer as it should; the message is one sentence."""


@dataclass(frozen=True)
class Answer:
    """What came back. ``body`` is as it was sent."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the request succeeded (2xx)."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body's value; raises Failed where it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Failed(f"the daemon's answer ({self.status}) is not JSON") from error


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("gateway", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Requests to the daemon of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "api.sock"

    def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """One request; raises NotRunning or Failed. A daemon that is just starting is waited for."""
        connection = self._connect()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"the daemon on {self._path} broke off: {error or type(error).__name__}") from error
        finally:
            connection.close()

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[str]]:
        """The lines of an answer that goes on; raises NotRunning or Failed, also while it is read."""
        connection = self._connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status != 200:
                raise Failed(str(Answer(response.status, response.read()).json().get("detail", response.reason)))
            yield (line.decode().rstrip("\r\n") for line in response)
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"the daemon on {self._path} broke off: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connect(self) -> _UnixConnection:
        deadline = time.monotonic() + START_SECONDS
        while True:
            connection = _UnixConnection(self._path)
            try:
                connection.connect()
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if not self._daemon_lives():
                    raise NotRunning(
                        f"no gateway daemon answers on {self._path}: start one with `natgw serve`, or name the run "
                        "directory of the one that runs with NATGW_RUN_DIR"
                    ) from None
                if time.monotonic() > deadline:
                    raise Failed(f"the daemon runs, but does not answer on {self._path}; see its natgw.log") from None
                time.sleep(0.05)
            except OSError as error:
                connection.close()
                raise Failed(f"cannot talk to the daemon on {self._path}: {error.strerror or error}") from error
            else:
                return connection

    def _daemon_lives(self) -> bool:
        """Whether the process that the run directory names is there, whatever it answers yet."""
        try:
            os.kill(int((self._run_dir / "natgw.pid").read_text()), 0)
        except (OSError, ValueError):
            return False
        return True
