"""The exec face: nat-gateway.sh's calls come in over a unix socket and leave as transactions.

The socket is root's alone. A call is answered when its transaction is done; a caller that stalls is left
after a few seconds. What a call says and what it gets back is in ``api.execverbs`` and ``api.execwire``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from api.execverbs import VERBS, Change, IptablesVersion, parse
from api.execwire import BadRequest, Reply, Request, conflict, decode_request, failure, one_line, success
from api.settings import interfaces_file
from gateway import meters
from gateway.journal import Asker
from gateway.ports import Refused
from gateway.small.server import credentials
from rules.appliance import OtherAppliance
from rules.edit import Conflict, NotInitialized, edit_all
from rules.spec import GatewaySpec, Interfaces

log = logging.getLogger(__name__)

MAX_REQUEST = 4 << 20
"""Bytes; the kernel lets a process have arguments and environment of 2 MiB by default."""
PATIENCE = 5.0
"""Seconds that a caller may take to say what it wants, and again to take the answer."""
_BACKLOG = 1024


class Peer(NamedTuple):
    """The process that called, and its effective user, as far as they are known."""

    pid: int | None = None
    uid: int | None = None


_NOBODY = Peer()


class _Done(Protocol):
    @property
    def spec(self) -> GatewaySpec: ...


class Service(Protocol):
    """What this face asks of ``gateway.service.Service``."""

    @property
    def spec(self) -> GatewaySpec | None: ...

    def change(
        self,
        edit: Callable[[GatewaySpec | None], GatewaySpec],
        *,
        by: Asker | str,
        announce: Collection[str] = (),
        dismiss: Collection[str] = (),
    ) -> Future[Any]: ...


Face = Callable[[Sequence[str], Asker], Awaitable[Reply]]
"""Answers the calls of another script; it gets the words behind the one that names it, and who asks."""


class ExecServer:
    """Answers the calls of one gateway's script on ``exec.sock`` in the run directory.

    ``version`` is what ``iptables --version`` prints for the variant in use. ``faces`` answer the calls whose first
    word is their name.
    """

    def __init__(
        self,
        service: Service,
        run_dir: Path,
        env_file: Path,
        version: str,
        *,
        patience: float = PATIENCE,
        faces: Mapping[str, Face] | None = None,
    ) -> None:
        self._faces = faces or {}
        self._service = service
        self._path = run_dir / "exec.sock"
        self._env_file, self._one_at_a_time = env_file, threading.Lock()
        self._version = version
        self._patience = patience
        self._namespace = os.stat("/proc/self/ns/net").st_ino
        self._users = {0, os.geteuid()}
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; callers can connect when this returns. Raises OSError where the socket cannot be made.

        A socket that a dead daemon left is replaced: the run directory has one owner at a time.
        """
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._accepted, sock=listener, backlog=_BACKLOG)
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """Take no more calls, and answer those that are under way."""
        if self._server is None:
            return
        self._path.unlink(missing_ok=True)
        self._server.close()
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._patience)
        self._server = None

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.current_task()
        if call is not None:
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        await self._call(reader, writer)

    async def _call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reply = await self._answer(reader, writer)
            writer.transport.set_write_buffer_limits(0)  # so that drain waits for the last byte
            async with asyncio.timeout(self._patience):
                writer.write(reply.encode())
                await writer.drain()
        except (OSError, TimeoutError) as error:
            log.info("a caller went away before it was answered: %s", error or "no answer to take")
        finally:
            writer.transport.abort()  # which waits for nobody; nothing is left to be sent

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Reply:
        # Read before refusing anybody: closing on unread bytes would take the answer back.
        try:
            async with asyncio.timeout(self._patience):
                request = decode_request(await _read_all(reader))
        except TimeoutError:
            return _refused("timeout", f"the request did not end within {self._patience:g} s")
        except BadRequest as error:
            return _refused("malformed", str(error))
        peer = _peer(writer)
        if peer.uid not in self._users:
            return _refused("user", f"user {peer.uid} may not change this gateway")
        begun = time.monotonic()
        try:
            reply = await self.handle(request, peer)
        except Exception as error:
            log.exception("%s", one_line(" ".join(request.words)))
            reply = failure(f"internal error: {error!r}")
        meters.VERB_SECONDS.observe(time.monotonic() - begun, _verb(request.words), "failed" if reply.code else "ok")
        return reply

    async def handle(self, request: Request, peer: Peer = _NOBODY) -> Reply:
        """Carry out one call; ``peer`` is who makes it, for the journal."""
        if request.namespace != self._namespace:
            return failure(
                "this daemon serves a gateway in another network namespace; give each gateway its own NATGW_RUN_DIR"
            )
        asker = Asker(one_line(" ".join(request.words))[:200], peer.pid, peer.uid)
        if request.words and (face := self._faces.get(request.words[0])):
            return await face(request.words[1:], asker)
        standing = self._service.spec
        environment = {name: value for name, value in request.environment.items() if value}
        if standing is not None and not standing.initialized:
            standing = None
        if standing is None and request.words[:1] == ("init",):
            # Once initialised, the spec knows its interfaces; what an earlier init left speaks only before.
            try:
                environment = interfaces_file(self._env_file) | environment
            except (OSError, ValueError) as error:
                return failure(f"the interfaces that an earlier init left cannot be read: {error}")
        parsed = parse(request.words, environment, standing.interfaces if standing else None)
        match parsed:
            case Reply():
                return parsed
            case IptablesVersion():
                return success(f"get-iptables-version\n{self._version}\n")
            case Change():
                return await self._change(parsed, asker)

    async def _change(self, change: Change, by: Asker) -> Reply:
        def edit(spec: GatewaySpec | None) -> GatewaySpec:
            edited = edit_all(spec, change.commands)
            if edited is None:
                raise NotInitialized
            return edited

        try:
            done: _Done = await asyncio.wrap_future(
                self._service.change(edit, by=by, announce=change.announce, dismiss=change.dismissed)
            )
        except Conflict as error:
            return conflict(str(error))
        except Refused as error:
            return failure(f"{error} (a retry may succeed)" if error.retryable else str(error))
        except (NotInitialized, OtherAppliance) as error:
            return failure(str(error))
        if change.initializes:
            await asyncio.to_thread(self._leave_interfaces, done.spec.interfaces)  # others' calls wait for no disk
        return success()

    def _leave_interfaces(self, interfaces: Interfaces) -> None:
        """Keep the interfaces where operators' shells and the next daemon look for them.

        The gateway works without this file, so one that cannot be written is logged and fails nobody.
        """
        text = f"VPC_INTERFACE={interfaces.vpc}\nEXTERNAL_INTERFACE={interfaces.external}\n"
        new = self._env_file.with_name(self._env_file.name + ".new")
        with self._one_at_a_time:
            try:
                self._env_file.parent.mkdir(parents=True, exist_ok=True)
                new.write_text(text)
                new.replace(self._env_file)
            except OSError as error:
                log.warning("the interfaces cannot be kept: %s", error)


def _refused(reason: str, message: str) -> Reply:
    """The answer to a call that is not even looked into."""
    meters.REFUSED_CONNECTIONS.add("exec", reason)
    return failure(message)


def _verb(words: Sequence[str]) -> str:
    """The verb of a call, for its meter: those of lb-svc.sh are among nat-gateway.sh's."""
    return next((word for word in words[:2] if word in VERBS), "unknown")


def _peer(writer: asyncio.StreamWriter) -> Peer:
    """Who called; a process of another PID namespace has no number here."""
    pid, uid = credentials(writer.get_extra_info("socket"))
    return Peer(pid or None, uid)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while chunk := await reader.read(1 << 16):
        data += chunk
        if len(data) > MAX_REQUEST:
            raise BadRequest(f"the request is longer than {MAX_REQUEST} bytes")
    return bytes(data)
