"""The real daemon under pressure: a full disk, stalled and too many callers, floods of events; traffic goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from traffic import Stream, udp
from world import A2, Gateway, World, wait_for

EIP = "192.168.0.50"
CALLS = int(os.environ.get("NATGW_SOAK_CALLS", "200"))

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "state"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def streaming(world: World, gateway: Gateway) -> Iterator[None]:
    """A packet stream through a port mapping, of which nothing may be lost."""
    gateway.verb("eip-add", f"{EIP}/24")
    gateway.verb("dnat-add", f"{EIP},53,udp,{A2},53")
    with Stream(udp(world.internet, (EIP, 53), world.vpc.a2.udp(53))) as stream:
        yield
    print(f"{2 * stream.sent} datagrams sent, {stream.lost} lost, longest gap {stream.longest_gap * 1000:.0f} ms")
    assert stream.lost == 0


def asked(gateway: Gateway, *words: str) -> socket.socket:
    """A call on its way, as the client sends it."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(gateway.run_dir / "exec.sock"))  # which waits while the backlog is full
    client.settimeout(60)
    namespace = str(Path(f"/run/netns/{gateway.name}").stat().st_ino)
    client.sendall("\0".join(["natgw-exec/1", namespace, "", *words, ""]).encode())
    client.shutdown(socket.SHUT_WR)
    return client


def answer(client: socket.socket) -> tuple[int, str]:
    """Exit code and complaint."""
    with client:
        data = b""
        while chunk := client.recv(65536):
            data += chunk
    code, _, complaint, _ = data.split(b"\0")
    return int(code), complaint.decode()


def fill(disk: Path) -> None:
    """Leave no room on a file system."""
    with (disk / f"filling{len(list(disk.iterdir()))}").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def ports_of(gateway: Gateway) -> set[int]:
    return {dnat["externalPort"] for dnat in gateway.get("/v1/gateway")["dnats"]}


def test_a_full_and_a_read_only_disk_fail_no_call(world: World, disk: Path) -> None:
    with world.gateway(state_dir=disk) as gateway, streaming(world, gateway):
        fill(disk)
        gateway.verb("dnat-add", f"{EIP},1,udp,{A2},53")
        fill(disk)  # also what the outdated file has left
        gateway.kill()
        gateway.verb("dnat-add", f"{EIP},2,udp,{A2},53")
        assert ports_of(gateway) == {53, 1, 2}
        for file in disk.glob("filling*"):
            file.unlink()
        wait_for(lambda: gateway.status()["ready"], "the spec to be stored")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        gateway.verb("dnat-add", f"{EIP},3,udp,{A2},53")
        assert gateway.status()["pending"] == ["spec is not on disk"]
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        wait_for(lambda: gateway.status()["ready"], "the spec to be stored")
        gateway.kill()
        gateway.verb("init")
        assert ports_of(gateway) == {53, 1, 2, 3}
        assert gateway.get("/v1/drift")["now"] == []


def test_callers_that_stall_hold_up_nobody(world: World) -> None:
    with world.gateway() as gateway, streaming(world, gateway), contextlib.ExitStack() as stack:
        gateway.status()
        for name, half in (("exec.sock", b"natgw-exec/1\0"), ("api.sock", b"PUT /v1/gateway HTTP/1.1\r\nHost: x\r\n")):
            for _ in range(2000):
                client = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                client.connect(str(gateway.run_dir / name))
                with contextlib.suppress(ConnectionError):  # it may have given way to another already
                    client.sendall(half)
        gateway.verb("dnat-add", f"{EIP},1,udp,{A2},53")
        assert gateway.status()["ready"]
        assert ports_of(gateway) == {53, 1}


def test_thousands_of_calls_at_once_are_each_answered(world: World) -> None:
    with world.gateway() as gateway, streaming(world, gateway):
        gateway.status()
        ports = [2000 + number % 1100 for number in range(CALLS)]
        with ThreadPoolExecutor(8) as pool:
            clients = list(pool.map(lambda port: asked(gateway, "dnat-add", f"{EIP},{port},tcp,{A2},80"), ports))
            answers = list(pool.map(answer, clients))
        done = {port for port, (code, _) in zip(ports, answers, strict=True) if code == 0}
        refused = [complaint for code, complaint in answers if code]
        print(f"{CALLS} calls: {CALLS - len(refused)} done, {len(refused)} told to come again")
        assert done
        assert all("busy" in complaint for complaint in refused)
        assert ports_of(gateway) == done | {53}
        gateway.verb("dnat-add", f"{EIP},7,tcp,{A2},80")
        assert gateway.get("/v1/drift")["now"] == []


def test_two_controllers_at_once(world: World) -> None:
    """The old and the new leader of a controller, both going through all objects."""
    with world.gateway() as gateway, streaming(world, gateway):
        ports = range(1000, 1010)

        def controller(listed: list[int]) -> None:
            for port in listed:
                gateway.verb("dnat-add", f"{EIP},{port},tcp,{A2},80")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(controller, ([*ports], [*reversed(ports)])))
        assert ports_of(gateway) == {53, *ports}
        assert len(gateway.rules("-A SHARED_DNAT", "--dport 10")) == len(ports)
        assert gateway.get("/v1/drift")["now"] == []


def test_a_flood_of_events_is_missed_without_harm(world: World) -> None:
    """More than a socket's buffer holds (ENOBUFS), and among it something that concerns us."""
    with world.gateway() as gateway, streaming(world, gateway):
        listed = [f"198.18.{n // 250}.{n % 250 + 1}/32" for n in range(4000)]
        gateway.ip(*(f"addr add {address} dev eth0" for address in listed), f"addr del {EIP}/24 dev net1")
        wait_for(lambda: EIP in gateway.net1_addresses(), "the EIP to be put back")
        gateway.verb("dnat-add", f"{EIP},1,udp,{A2},53")
        gateway.ip(*(f"addr del {address} dev eth0" for address in reversed(listed)))
        gateway.verb("dnat-add", f"{EIP},2,udp,{A2},53")
        wait_for(lambda: gateway.status()["ready"], "the gateway to be ready")
        assert gateway.get("/v1/drift")["now"] == []
