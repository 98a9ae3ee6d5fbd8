"""The exec server over a unix socket: answers, bounds, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from api import execserver
from api.execserver import ExecServer
from api.execwire import Reply, Request, decode_reply
from gateway.ports import Refused
from rules.spec import GatewaySpec, Interfaces

VERSION = "iptables v1.8.9 (legacy)"
HERE = os.stat("/proc/self/ns/net").st_ino
OK = Reply()
EIP = "eip-add 172.18.0.20/16"


@dataclass(frozen=True)
class Done:
    spec: GatewaySpec


@dataclass
class FakeService:
    """Keeps a spec as the real one does, without a kernel; ``fails`` is raised instead, ``held`` withholds answers."""

    spec: GatewaySpec | None = None
    fails: Exception | None = None
    held: bool = False
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    withheld: list[Future[Any]] = field(default_factory=list)

    def change(
        self,
        edit: Callable[[GatewaySpec | None], GatewaySpec],
        *,
        by: object,
        announce: Collection[str] = (),
        dismiss: Collection[str] = (),
    ) -> Future[Any]:
        self.asked.append((str(by), tuple(announce)))
        future: Future[Any] = Future()
        try:
            if self.fails:
                raise self.fails
            self.spec = edit(self.spec)
        except Exception as error:  # noqa: BLE001 -- handed to the asker
            future.set_exception(error)
        else:
            self.withheld.append(future) if self.held else future.set_result(Done(self.spec))
        return future


@dataclass
class World:
    """A server that runs, and ways to call it."""

    service: FakeService
    server: ExecServer
    path: Path
    env_file: Path

    async def call(self, line: str, **environment: str) -> Reply:
        return await self.send(Request(HERE, environment, tuple(line.split())).encode())

    async def send(self, data: bytes) -> Reply:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(data)
            writer.write_eof()
            return decode_reply(await reader.read())
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def running(tmp_path: Path, version: str = VERSION, patience: float = 60.0) -> AsyncIterator[World]:
    service = FakeService()
    env_file = tmp_path / "etc" / "nat-gateway.env"
    server = ExecServer(service, tmp_path, env_file, version, patience=patience)
    await server.start()
    try:
        yield World(service, server, tmp_path / "exec.sock", env_file)
    finally:
        await server.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run one scenario; one that hangs fails."""
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_a_verb_is_one_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            assert await world.call("init", GATEWAY_V4="172.18.0.1") == OK
            assert await world.call("eip-add 172.18.0.20/16 172.18.0.21/16") == OK
            assert world.service.asked == [
                ("init", ()),
                ("eip-add 172.18.0.20/16 172.18.0.21/16", ("172.18.0.20", "172.18.0.21")),
            ]
            spec = world.service.spec
            assert spec is not None
            assert spec.gateway_v4 == "172.18.0.1"
            assert [eip.ip for eip in spec.eips] == ["172.18.0.20", "172.18.0.21"]

    run(scenario())


def test_every_verb_but_init_needs_init(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            for line in (
                EIP,
                "eip-del ,",
                "floating-ip-del ,",
                "subnet-route-add",
                "ext-subnet-route-del 172.18.0.0/16,172.18.0.1",
            ):
                assert await world.call(line) == Reply(1, "", "nat gateway not initialized\n"), line
                assert await world.call(line, GATEWAY_V4="172.18.0.1") == Reply(1, "", "nat gateway not initialized\n")
            assert (await world.call("help")).code == 0
            assert await world.call("get-iptables-version") == Reply(0, f"get-iptables-version\n{VERSION}\n", "")
            assert world.service.spec is None
            assert await world.call("init") == OK
            assert await world.call("floating-ip-del ,") == OK

    run(scenario())


def test_a_conflict_is_one_line_on_stdout_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            for line in ("init", "floating-ip-add 172.18.0.20,10.0.1.5", "dnat-add 172.18.0.21,80,tcp,10.0.1.7,80"):
                assert await world.call(line) == OK
            before = world.service.spec
            fip = await world.call("floating-ip-add 172.18.0.22,10.0.1.9 172.18.0.20,10.0.1.6")
            dnat = await world.call("dnat-add 172.18.0.21,80,TCP,10.0.1.8,80")
            for reply, standing in ((fip, "172.18.0.20 -> 10.0.1.5"), (dnat, "172.18.0.21:80/tcp -> 10.0.1.7:80")):
                assert (reply.code, reply.stderr) == (1, "")
                assert reply.stdout.count("\n") == 1
                assert standing in reply.stdout
            assert world.service.spec == before

    run(scenario())


def test_a_refusal_says_the_step_and_the_kernels_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.service.fails = Refused("iptables-restore", "line 3 failed\nbad rule\n", retryable=False)
            assert await world.call("init") == Reply(1, "", "iptables-restore: line 3 failed; bad rule\n")
            assert not world.env_file.exists()

    run(scenario())


def test_a_defect_is_answered_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.service.fails = ZeroDivisionError("oops")
            reply = await world.call("init")
            assert reply == Reply(1, "", "internal error: ZeroDivisionError('oops')\n")

    run(scenario())
    assert "Traceback" in caplog.text


def test_a_caller_from_another_namespace_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            reply = await world.send(Request(HERE + 1, {}, ("init",)).encode())
            assert (reply.code, reply.stdout) == (1, "")
            assert "network namespace" in reply.stderr
            assert "NATGW_RUN_DIR" in reply.stderr
            assert world.service.asked == []

    run(scenario())


# --- the interfaces that init leaves ----------------------------------------------------------------------


def test_init_leaves_the_interfaces_every_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            assert await world.call("init net3,net4") == OK
            assert world.env_file.read_text() == "VPC_INTERFACE=net3\nEXTERNAL_INTERFACE=net4\n"
            world.env_file.unlink()
            assert await world.call("init") == OK
            assert world.env_file.read_text() == "VPC_INTERFACE=net3\nEXTERNAL_INTERFACE=net4\n"
            assert [path.name for path in world.env_file.parent.iterdir()] == ["nat-gateway.env"]

    run(scenario())


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        ("init", {}, ("net3", "net4")),
        ("init", {"VPC_INTERFACE": "", "EXTERNAL_INTERFACE": "net9"}, ("net3", "net9")),
        ("init a,b", {"EXTERNAL_INTERFACE": "net9"}, ("a", "b")),
    ],
)
def test_the_first_init_takes_argument_then_environment_then_file(
    tmp_path: Path, line: str, environment: dict[str, str], expected: tuple[str, str]
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.env_file.parent.mkdir()
            world.env_file.write_text("# left by hand\nVPC_INTERFACE=net3\nEXTERNAL_INTERFACE='net4'\n")
            assert await world.call(line, **environment) == OK
            assert world.service.spec is not None
            assert world.service.spec.interfaces == Interfaces(vpc=expected[0], external=expected[1])

    run(scenario())


def test_a_later_init_keeps_what_stands_whatever_the_file_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.service.spec = GatewaySpec(interfaces=Interfaces(vpc="a", external="b"))
            world.env_file.parent.mkdir()
            world.env_file.write_text("VPC_INTERFACE=net3\nEXTERNAL_INTERFACE=net4\n")
            assert await world.call("init") == OK
            assert world.service.spec.interfaces == Interfaces(vpc="a", external="b")
            assert world.env_file.read_text() == "VPC_INTERFACE=a\nEXTERNAL_INTERFACE=b\n"

    run(scenario())


def test_a_file_that_cannot_be_written_fails_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.env_file.parent.symlink_to(tmp_path / "nowhere")
            assert await world.call("init") == OK

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "the interfaces cannot be kept" in caplog.text


def test_a_file_that_cannot_be_read_may_name_other_interfaces(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.env_file.mkdir(parents=True)
            reply = await world.call("init")
            assert (reply.code, reply.stdout) == (1, "")
            assert "nat-gateway.env" in reply.stderr
            assert world.service.asked == []

    run(scenario())


# --- callers that misbehave -------------------------------------------------------------------------------


def test_a_stalled_caller_is_left_and_holds_up_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            patience, world.server._patience = world.server._patience, 1.0
            reader, writer = await asyncio.open_unix_connection(str(world.path))
            writer.write(Request(HERE, {}, ("init",)).encode())  # and never the end of it
            while not world.server._calls:
                await asyncio.sleep(0.01)
            world.server._patience = patience  # with others
            assert await world.call("init") == OK
            reply = decode_reply(await reader.read())
            assert reply.code == 1
            assert "did not end within" in reply.stderr
            assert [by for by, _ in world.service.asked] == ["init"]
            writer.close()

    run(scenario())


def test_a_caller_that_takes_no_answer_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, version="x" * (8 << 20), patience=3.0) as world:
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(str(world.path))
            caller.sendall(Request(HERE, {}, ("get-iptables-version",)).encode())
            caller.shutdown(socket.SHUT_WR)
            assert await world.call("init") == OK
            await asyncio.sleep(0)
            begun = time.monotonic()
            await world.server.close()  # waits for the caller that is still being answered
            assert time.monotonic() - begun < 30
            caller.close()

    run(scenario())


def test_a_request_without_end_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            _, writer = await asyncio.open_unix_connection(str(world.path))
            with pytest.raises(ConnectionError):  # noqa: PT012 -- the write or the drain, whichever notices
                while True:
                    writer.write(b"x" * (1 << 20))
                    await writer.drain()
            assert await world.call("init") == OK
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"natgw-exec/1\0", b"natgw-exec/1\0x\0\0init\0"]
)
def test_what_is_no_request_is_refused(tmp_path: Path, data: bytes) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            reply = await world.send(data)
            assert (reply.code, reply.stdout) == (1, "")
            assert "not a natgw-exec/1 request" in reply.stderr

    run(scenario())


def test_a_caller_that_is_gone_before_its_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.service.held = True
            _, writer = await asyncio.open_unix_connection(str(world.path))
            writer.write(Request(HERE, {}, ("init",)).encode())
            writer.write_eof()
            while not world.service.withheld:
                await asyncio.sleep(0.01)
            writer.transport.abort()
            assert world.service.spec is not None
            world.service.withheld[0].set_result(Done(world.service.spec))
            world.service.held = False
            assert await world.call(EIP) == OK

    run(scenario())


def test_many_callers_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            assert await world.call("init") == OK
            lines = [f"eip-add 172.18.{n // 250}.{n % 250 + 1}/16" for n in range(300)]
            assert set(await asyncio.gather(*(world.call(line) for line in lines))) == {OK}
            assert world.service.spec is not None
            assert len(world.service.spec.eips) == 300

    run(scenario())


# --- the socket -------------------------------------------------------------------------------------------


def test_the_socket_is_its_owners_alone_and_replaces_a_dead_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "exec.sock"))
        async with running(tmp_path) as world:
            mode = world.path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert await world.call("init") == OK
        assert not world.path.exists()

    run(scenario())


def test_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execserver, "_peer", lambda _writer: execserver.Peer(4711, 65534))

    async def scenario() -> None:
        async with running(tmp_path) as world:
            assert await world.call("init") == Reply(1, "", "user 65534 may not change this gateway\n")
            assert world.service.asked == []

    run(scenario())


def test_closing_answers_what_is_under_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            world.service.held = True
            call = asyncio.create_task(world.call("init"))
            while not world.service.withheld:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(world.server.close())
            await asyncio.sleep(0.05)
            assert not closing.done()
            assert not world.path.exists()
            assert world.service.spec is not None
            world.service.withheld[0].set_result(Done(world.service.spec))
            await closing
            assert await call == OK

    run(scenario())
