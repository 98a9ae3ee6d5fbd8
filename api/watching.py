"""The flow watcher's parent: starts it, tells it of the spec, starts it again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gateway
from gateway import meters
from gateway.service import Service
from rules.appliance import Spec
from rules.spec import Dnat, Eip, Fip, GatewaySpec, SharedDnat, Snat

log = logging.getLogger(__name__)

SOCKET_NAME = "flows.sock"
FIRST_DELAY, LONGEST_DELAY, STEADY_SECONDS = 0.5, 60.0, 60.0
PAUSE_SECONDS = 0.2
"""Between one word of the spec and the next: a controller sends hundreds of verbs in a row."""
GRACE_SECONDS = 3.0

# -I and -S as for everything that stands on the standard library alone: a third of the memory, half of the start.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from gateway.watcher.main import main; sys.exit(main(int(sys.argv[2])))"
)


class Watching:
    """Keeps a flow watcher on ``flows.sock`` in the run directory; for the event loop, but for ``changed``."""

    def __init__(self, service: Service, run_dir: Path) -> None:
        self._service = service
        self._path = run_dir / SOCKET_NAME
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._news: list[Change] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; what goes wrong is logged and tried again, for a gateway works without being watched."""
        self._service.tell(self._note)
        self._task = asyncio.create_task(self._keep())

    def _note(self, old: Spec | None, new: Spec) -> None:
        """A change of the spec, in the writer's thread."""
        change = Change.between(old, new)
        self._loop.call_soon_threadsafe(self._news.append, change)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def close(self) -> None:
        """End the watcher and wait for it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._path.unlink(missing_ok=True)

    async def _keep(self) -> None:
        delay = FIRST_DELAY
        while True:
            begun = time.monotonic()
            try:
                code = await self._watch()
                log.warning("the flow watcher has ended with %d", code)
            except OSError as error:
                log.warning("the flow watcher cannot be started: %s", error)
            delay = FIRST_DELAY if time.monotonic() - begun >= STEADY_SECONDS else min(LONGEST_DELAY, 2 * delay)
            await asyncio.sleep(delay)

    async def _watch(self) -> int:
        """One life of a watcher; its exit code."""
        with self._listener() as listener, _log_target() as stdout:
            watcher = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-B", "-c", _PROGRAM),
                *(str(Path(gateway.__file__).parent.parent), str(listener.fileno())),
                stdin=asyncio.subprocess.PIPE,
                stdout=stdout,
                pass_fds=(listener.fileno(),),
            )
        meters.WATCHER_STARTS.add()
        telling = asyncio.create_task(self._tell(watcher))
        try:
            return await watcher.wait()
        finally:
            telling.cancel()
            await asyncio.shield(_end(watcher))

    def _listener(self) -> socket.socket:
        """The socket where the watcher is asked. Only the watcher keeps it: while there is none, nobody waits there."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        return listener

    async def _tell(self, watcher: asyncio.subprocess.Process) -> None:
        assert watcher.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended, which its parent sees
            self._news.clear()  # in the spec that stands
            watcher.stdin.write(await asyncio.to_thread(objects, self._service.spec))
            while True:
                await watcher.stdin.drain()
                await asyncio.sleep(PAUSE_SECONDS)
                await self._changed.wait()
                self._changed.clear()
                news, self._news = self._news, []
                watcher.stdin.write(await asyncio.to_thread(_lines, news))


async def _end(watcher: asyncio.subprocess.Process) -> None:
    if watcher.returncode is not None:
        return
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        await asyncio.wait_for(watcher.wait(), GRACE_SECONDS)
    except TimeoutError:
        watcher.kill()
        await watcher.wait()


@contextlib.contextmanager
def _log_target() -> Iterator[int | None]:
    """Where a flow log for ``stdout`` goes: ours, or the container's where ours leads nowhere (None: inherited).

    A daemon that a verb has started is detached; what the container's first process writes is the container's log.
    """
    if os.environ.get("NATGW_FLOW_LOG") != "stdout" or not os.path.samestat(os.fstat(1), os.stat(os.devnull)):
        yield None
        return
    target = os.open("/proc/1/fd/1", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
    try:
        yield target
    finally:
        os.close(target)


_Parts = tuple[Iterable[Eip], Iterable[Fip], Iterable[Dnat], Iterable[SharedDnat], Iterable[Snat]]
_NOTHING: _Parts = ((), (), (), (), ())


@dataclass(frozen=True)
class Change:
    """What left a spec and what came to it; being told of it twice does no harm."""

    gone: _Parts
    new: _Parts

    @classmethod
    def between(cls, old: Spec | None, new: Spec) -> Change:
        """In the time that the change itself takes, however much stays."""
        was = old if isinstance(old, GatewaySpec) else GatewaySpec()
        now = new if isinstance(new, GatewaySpec) else GatewaySpec()
        eips = now.eips.changes(was.eips)
        fips = now.fips.changes(was.fips)
        dnats = now.dnats.changes(was.dnats)
        shared = now.shared_dnats.changes(was.shared_dnats)
        snats = now.snats.changes(was.snats)
        gone, came = zip(eips, fips, dnats, shared, snats, strict=True)
        return cls(gone, came)

    @property
    def line(self) -> bytes:
        """The line that tells the watcher."""
        return _line({"gone": _said(self.gone), "new": _said(self.new)})


def _lines(news: Iterable[Change]) -> bytes:
    return b"".join(change.line for change in news)


def objects(spec: GatewaySpec | None) -> bytes:
    """The line that tells the watcher of a whole spec."""
    return _line(_said((spec.eips, spec.fips, spec.dnats, spec.shared_dnats, spec.snats) if spec else _NOTHING))


def _said(parts: _Parts) -> dict[str, Any]:
    eips, fips, dnats, shared, snats = parts
    return {
        "eips": [eip.ip for eip in eips],
        "fips": [(fip.eip, fip.internal_ip) for fip in fips],
        "dnats": [*((*dnat.key, False) for dnat in dnats), *((*dnat.key, True) for dnat in shared)],
        "snats": [snat.key for snat in snats],
    }


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"
