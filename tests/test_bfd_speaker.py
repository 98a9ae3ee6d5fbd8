"""The shell: real UDP on the loopback, the loop, the control sockets."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.bfd import control
from gateway.bfd.beacon import Beacon, Options, parse, random
from gateway.bfd.packet import ControlPacket, Diag, State
from gateway.bfd.session import SessionConfig, StateChange
from gateway.bfd.speaker import Speaker
from gateway.bfd.table import Entry, SessionTable
from gateway.bfd.udp import UdpListener, UdpNetwork, UdpSender, canonical
from gateway.small.loop import Loop, monotonic_us
from gateway.small.server import DEADLINE, Server, line_protocol
from tests.ports import free_port

LEFT, RIGHT = ("127.88.0.1", "127.88.0.2")
FAST = SessionConfig(desired_min_tx=20_000, required_min_rx=20_000, detect_mult=5)
CHECKOUT = Path(__file__).parent.parent


@pytest.fixture
def port() -> int:
    """A UDP port that nobody has."""
    return free_port()


@pytest.fixture
def own_run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NATGW_RUN_DIR", str(tmp_path))
    return tmp_path


def turn_until(loop: Loop, condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        loop.turn()


class Side:
    def __init__(self, loop: Loop, address: str, port: int) -> None:
        network = UdpNetwork([address], port)
        self.table = SessionTable(FAST, network.locals_for, random)
        self.changes: list[StateChange] = []
        self.errors: list[OSError] = []
        self.speaker = Speaker(self.table, network, loop, self._changed, self._failed)

    def _changed(self, entry: Entry, change: StateChange) -> None:
        self.changes.append(change)

    def _failed(self, entry: Entry, error: OSError) -> None:
        self.errors.append(error)

    def is_in(self, state: State) -> bool:
        return [entry.session.state for entry in self.table.entries] == [state]


@pytest.fixture
def sides(port: int) -> Iterator[tuple[Loop, Side, Side]]:
    loop = Loop()
    left, right = Side(loop, LEFT, port), Side(loop, RIGHT, port)
    yield loop, left, right
    left.speaker.close()
    right.speaker.close()


def test_two_speakers_come_up_and_notice_a_death(sides: tuple[Loop, Side, Side]) -> None:
    loop, left, right = sides
    left.table.allow(RIGHT, loop.clock())
    right.table.allow(LEFT, loop.clock())
    turn_until(loop, lambda: left.is_in(State.UP) and right.is_in(State.UP))
    assert left.changes[-1].new is State.UP
    right.table.remove(right.table.entries[0])
    right.table.block(LEFT)
    turn_until(loop, lambda: left.is_in(State.DOWN))
    assert left.changes[-1].diag == Diag.DETECTION_TIME_EXPIRED


def test_what_waits_in_the_socket_is_heard_before_the_time_is_looked_at(
    sides: tuple[Loop, Side, Side], port: int
) -> None:
    """This process did not run for ten detection times, but its peer spoke meanwhile."""
    loop, left, right = sides
    left.table.allow(RIGHT, loop.clock())
    right.table.allow(LEFT, loop.clock())
    turn_until(loop, lambda: left.is_in(State.UP) and right.is_in(State.UP))
    (mine,), (theirs,) = left.table.entries, right.table.entries
    alive = ControlPacket(
        state=State.UP,
        detect_mult=5,
        my_discriminator=theirs.session.discriminator,
        your_discriminator=mine.session.discriminator,
        desired_min_tx=20_000,
        required_min_rx=20_000,
    )
    sender = UdpSender(RIGHT, LEFT, port)
    sender.send(alive.encode())
    sender.close()
    assert select.select(left.speaker._listeners, [], [], 30)[0]
    changes = len(left.changes)
    later = loop.clock() + 10 * mine.session.detection_time
    left.speaker.tick(later)
    assert len(left.changes) == changes
    left.speaker.tick(later + 2 * mine.session.detection_time)
    assert left.changes[-1].diag == Diag.DETECTION_TIME_EXPIRED, "and silence is still silence"


def test_rebuilt_sockets_carry_on(sides: tuple[Loop, Side, Side]) -> None:
    loop, left, right = sides
    left.table.allow(RIGHT, loop.clock())
    right.table.allow(LEFT, loop.clock())
    turn_until(loop, lambda: left.is_in(State.UP) and right.is_in(State.UP))
    left.speaker.rebuild()
    before = left.table.entries[0].session.packets_received
    turn_until(loop, lambda: left.table.entries[0].session.packets_received > before + 3)
    assert left.is_in(State.UP)


def test_failure_to_send_is_told_once_and_counted(port: int) -> None:
    loop = Loop()
    side = Side(loop, LEFT, port)
    # From the loopback's network no packet may leave for another one.
    side.table.allow("192.0.2.1", loop.clock())
    turn_until(loop, lambda: side.speaker.send_errors >= 1)
    session = side.table.entries[0].session
    for happened in side.table.tick(loop.clock() + 5 * session.transmit_interval):
        side.speaker.did(happened)
    assert side.speaker.send_errors >= 2
    assert len(side.errors) == 1
    side.speaker.close()


@pytest.mark.parametrize(("local", "remote"), [(LEFT, RIGHT), ("::1", "::1")])
def test_datagrams_carry_ttl_255_and_a_source_port_of_the_rfc(local: str, remote: str, port: int) -> None:
    listener, sender = UdpListener(remote, port), UdpSender(local, remote, port)
    sender.send(b"hello")
    end = time.monotonic() + 30
    while (datagram := listener.receive()) is None:
        assert time.monotonic() < end
    assert (datagram.payload, datagram.local, datagram.remote, datagram.ttl) == (b"hello", remote, local, 255)
    assert 49152 <= sender._socket.getsockname()[1] <= 65535
    assert listener.receive() is None
    listener.close()
    sender.close()


def test_two_sessions_have_two_source_ports() -> None:
    senders = [UdpSender(LEFT, RIGHT, 3784) for _ in range(50)]
    assert len({sender._socket.getsockname()[1] for sender in senders}) == 50
    for sender in senders:
        sender.close()


def test_an_address_that_is_taken_is_named(port: int) -> None:
    listener = UdpListener(LEFT, port)
    with pytest.raises(OSError, match=f"cannot listen on {LEFT} port {port}: Address already in use"):
        UdpListener(LEFT, port)
    listener.close()


def test_locals_are_of_the_family_of_the_peer() -> None:
    network = UdpNetwork(["10.0.0.5", "fd00::5"])
    assert network.locals_for("10.0.0.1") == ["10.0.0.5"]
    assert network.locals_for("fd00::1") == ["fd00::5"]
    assert UdpNetwork(["10.0.0.5"]).locals_for("fd00::1") == []


def test_behind_a_wildcard_the_route_decides() -> None:
    assert UdpNetwork(["0.0.0.0"]).locals_for("127.0.0.1") == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10.0.0.1", "10.0.0.1"), ("FD00:0::0001", "fd00::1"), ("10.0.0.256", None), ("fe80::1%eth0", None), ("", None)],
)
def test_canonical_addresses(text: str, expected: str | None) -> None:
    assert canonical(text) == expected


# The beacon and its control sockets


@pytest.fixture
def beacon(own_run_dir: Path, port: int) -> Iterator[Beacon]:
    made = Beacon(Loop(), UdpNetwork([LEFT], port), FAST, [control.DEFAULT_CHANNEL])
    yield made
    made.close()


class Heartbeat:
    """Keeps a loop turning that would otherwise wait for the client."""

    def next_timer(self) -> int | None:
        return monotonic_us() + 1000

    def tick(self, now: int) -> None:
        pass


def ask(loop: Loop, name: str, request: bytes) -> bytes:
    """What a client would get, with the loop turning meanwhile."""
    loop.add(Heartbeat())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(name)
        client.sendall(request)
        client.setblocking(False)
        reply = b""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            loop.turn()
            try:
                chunk = client.recv(65536)
            except BlockingIOError:
                continue
            if not chunk:
                return reply
            reply += chunk
    raise AssertionError("no end of the reply")


def test_a_command_over_the_socket(beacon: Beacon) -> None:
    name = control.address()
    assert ask(beacon.loop, name, f"allow {RIGHT}\n".encode()) == f"Allowing connections from {RIGHT}\n".encode()
    assert ask(beacon.loop, name, b"status\n").startswith(b"There are 1 sessions:\n")


def test_a_second_beacon_of_the_same_run_dir_is_refused(beacon: Beacon, port: int) -> None:
    with pytest.raises(OSError, match="cannot open the control channel"):
        control.listen()


def test_an_exchange_that_takes_too_long_is_closed(beacon: Beacon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(control.address())
        client.sendall(b"stat")
        client.settimeout(30)
        turn_until(beacon.loop, lambda: bool(beacon._servers[0]._connections))
        beacon.loop.turn()
        beacon._servers[0].tick(beacon.loop.clock() + DEADLINE)
        assert client.recv(100) == b""


def test_an_endless_request_is_closed(beacon: Beacon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(control.address())
        client.setblocking(False)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(100):
                client.send(b"x" * 4096)
                beacon.loop.turn()


def test_a_reply_larger_than_the_socket_buffer_arrives_whole(own_run_dir: Path) -> None:
    loop = Loop()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("\0" + str(own_run_dir))
    listening.listen()
    server = Server(loop, listening, line_protocol(lambda line: line * 1_000_000))
    assert len(ask(loop, "\0" + str(own_run_dir), b"abc\n")) == 3_000_000
    server.close()


def test_who_is_not_admitted_gets_nothing(own_run_dir: Path) -> None:
    loop = Loop()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("\0" + str(own_run_dir))
    listening.listen()
    server = Server(loop, listening, line_protocol(lambda line: line), lambda peer: False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect("\0" + str(own_run_dir))
        loop.turn()
        assert client.recv(10) == b""
    server.close()


def test_options_of_the_beacon() -> None:
    assert parse(["--nofork", "--tee", "--listen=10.0.0.1", "--listen=FD00::1", "--control=127.0.0.1:9000"]) == Options(
        ["10.0.0.1", "fd00::1"], ["127.0.0.1:9000"]
    )
    assert parse([]).addresses[0] == "0.0.0.0"
    assert parse(["--health"]).health
    assert (parse([]).port, parse(["--multihop"]).port) == (3784, 4784)
    for bad in ("--listen=", "--listen=x", "--control=", "--frob", "word"):
        with pytest.raises(ValueError):
            parse([bad])


def test_the_client_fails_when_no_beacon_answers(own_run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control.main(["status"]) == 1
    assert "Connection refused" in capsys.readouterr().err
    assert control.main([]) == 1
    assert control.main(["--frob", "status"]) == 1


@pytest.mark.parametrize(
    ("reply", "code"),
    [("There are 0 sessions:\n", 0), ("Unknown command <x>\n", 0), ("Unable to complete request.\n", 1), ("", 1)],
)
def test_exit_codes_of_the_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reply: str, code: int
) -> None:
    monkeypatch.setattr(control, "ask", lambda name, line: reply)
    assert control.main(["status"]) == code
    assert capsys.readouterr().out == reply


def test_the_programs_of_the_image_run_from_a_checkout_in_20_mib(own_run_dir: Path, tmp_path: Path) -> None:
    programs = CHECKOUT / "image" / "rootfs" / "usr" / "bin"
    # Of its own, so that runs beside each other do not meet.
    address = f"127.{int(random() * 60) + 2}.{int(random() * 256)}.9"
    environment = {**os.environ, "NATGW_RUN_DIR": str(own_run_dir), "NATGW_PYTHON": sys.executable}
    beacon = subprocess.Popen(
        [programs / "bfdd-beacon", "--nofork", "--tee", f"--listen={address}"], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert beacon.stdout is not None
        assert f"listening on {address}".encode() in beacon.stdout.readline()
        done = subprocess.run([programs / "bfdd-control", "status"], env=environment, capture_output=True, check=True)
        assert done.stdout == b"There are 0 sessions:\n"
        status = Path(f"/proc/{beacon.pid}/status").read_text()
        (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        assert resident <= 20 * 1024
    finally:
        beacon.terminate()
        assert beacon.wait(30) == 0
        beacon.stdout and beacon.stdout.close()
