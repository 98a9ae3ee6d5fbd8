"""The supervisor from outside: settings, socket, HTTP, files, scripts; and its repair of a table that was emptied."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.bfd import control, natgw
from gateway.bfd.beacon import Beacon
from gateway.bfd.packet import State
from gateway.bfd.session import SessionConfig
from gateway.bfd.settings import Settings
from gateway.bfd.supervisor import Supervisor
from gateway.bfd.udp import UdpNetwork
from gateway.small.loop import Loop
from gateway.small.server import listen_tcp, listen_unix
from tests.bfd_kit import (
    PATIENCE,
    ROOTFS,
    SUPERVISOR,
    background,
    child_of,
    environment,
    eventually,
    loopback,
    peak_mebibytes,
    run,
)
from tests.ports import free_port

NOW = 1_800_000_000.0


# Settings


GOOD = {"POD_IPS": "10.0.0.5,fd00:0::5", "BFD_PEER_IPS": "10.0.0.1,fd00::1,10.0.0.2"}


def test_settings_of_a_pod() -> None:
    settings = Settings.read({**GOOD, "BFD_MIN_TX": "100", "BFD_MIN_RX": "200", "BFD_MULTI": "5"})
    assert settings.session == SessionConfig(100_000, 200_000, 5)
    assert settings.pairs() == [("10.0.0.5", "10.0.0.1"), ("10.0.0.5", "10.0.0.2"), ("fd00::5", "fd00::1")]
    assert str(settings.socket_path) == "/var/run/kube-ovn/bfdd-supervisor/control.sock"
    assert str(settings.state_path) == "/var/run/kube-ovn/bfdd-supervisor/state.json"
    assert settings.metrics_address == ":10669"
    assert not settings.multihop
    assert Settings.read({**GOOD, "NATGW_BFD_MULTIHOP": "on"}).multihop


def test_defaults_and_places() -> None:
    assert Settings.read(GOOD).session == SessionConfig(1_000_000, 1_000_000, 3)
    assert str(Settings.read({**GOOD, "NATGW_RUN_DIR": "/x"}).state_path) == "/x/bfdd-supervisor/state.json"
    explicit = Settings.read(
        {
            **GOOD,
            "NATGW_RUN_DIR": "/x",
            "BFDD_SUPERVISOR_SOCKET": "/y/s",
            "BFDD_SUPERVISOR_STATE": "/y/t",
            "BFDD_METRICS_ADDRESS": "127.0.0.1:1",
        }
    )
    assert (str(explicit.socket_path), str(explicit.state_path)) == ("/y/s", "/y/t")
    assert explicit.metrics_address == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"POD_IPS": ""}, "POD_IPS"),
        ({"POD_IPS": "10.0.0.5,"}, "POD_IPS"),
        ({"BFD_PEER_IPS": "10.0.0.1,,10.0.0.2"}, "BFD_PEER_IPS"),
        ({"BFD_PEER_IPS": "gateway"}, "BFD_PEER_IPS"),
        ({"BFD_MIN_TX": "0"}, "BFD_MIN_TX"),
        ({"BFD_MIN_RX": "-1"}, "BFD_MIN_RX"),
        ({"BFD_MIN_RX": "fast"}, "BFD_MIN_RX"),
        ({"BFD_MULTI": "256"}, "BFD_MULTI"),
        ({"BFD_MULTI": "0"}, "BFD_MULTI"),
        ({"POD_IPS": "10.0.0.5", "BFD_PEER_IPS": "fd00::1"}, "no pair"),
    ],
)
def test_settings_that_cannot_work_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings.read({**GOOD, **change})


# In this process, with a peer that is another beacon


class World:
    """A supervisor and a peer in one loop, on the loopback."""

    def __init__(self, run_dir: Path) -> None:
        self.loop = Loop()
        self.local, self.remote, port = loopback(), loopback(), free_port()
        self.settings = Settings.read(
            {
                "POD_IPS": self.local,
                "BFD_PEER_IPS": self.remote,
                "BFD_MIN_TX": "20",
                "BFD_MIN_RX": "20",
                "BFD_MULTI": "10",
                "NATGW_RUN_DIR": str(run_dir),
            }
        )
        run_dir.joinpath("bfdd-supervisor").mkdir(exist_ok=True)
        self.beacon = Beacon(self.loop, UdpNetwork([self.local], port), SessionConfig(), ["ours"])
        self.peer = Beacon(self.loop, UdpNetwork([self.remote], port), self.settings.session, ["theirs"])
        self.peer.commands.log_types["session"] = False
        self.peer.table.allow(self.local, self.loop.clock())
        self.wall = NOW
        self.supervisor = Supervisor(self.settings, self.beacon, lambda: self.wall)

    def look(self, wall: float) -> None:
        """The supervisor looks at its sessions when a wall clock shows this."""
        self.wall = wall
        self.supervisor.reconcile()

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.loop.turn()

    def up(self) -> bool:
        return [entry.session.state for entry in self.beacon.table.entries] == [State.UP]

    def command(self, line: str) -> str:
        return self.beacon.commands.execute(line, self.loop.clock())

    @property
    def session(self) -> dict[str, object]:
        (session,) = self.supervisor.status()["Sessions"]
        assert isinstance(session, dict)
        return session

    @property
    def last_action(self) -> object:
        return self.session["LastAction"]

    def close(self) -> None:
        self.beacon.close()
        self.peer.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("NATGW_RUN_DIR", str(tmp_path))
    made = World(tmp_path)
    yield made
    made.close()


def test_sessions_come_up_by_themselves(world: World) -> None:
    assert json.loads(world.supervisor.answer("ready"))["error"]
    world.until(world.up)
    assert json.loads(world.supervisor.answer("ready"))["error"] == ""
    assert world.beacon.table.entries[0].session.config == world.settings.session


def test_a_table_that_was_emptied_is_filled_again_after_the_grace_period(world: World) -> None:
    """What Kube-OVN's end-to-end test does: block, kill, and wait for the replay."""
    world.until(world.up)
    world.look(NOW)
    world.command(f"block {world.remote}")
    world.command("session all kill")
    assert world.command("status") == "There are 0 sessions:\n"
    for later in (0, 5, 55):
        world.look(NOW + later)
        assert world.command("status") == "There are 0 sessions:\n"
    assert json.loads(world.supervisor.answer("live"))["error"] == ""
    world.look(NOW + 60)
    assert (world.session["Attempts"], world.session["LastAction"]) == (1, "ReplayConfiguration")
    assert world.session["LastResult"] == "success"
    world.until(world.up)
    assert world.supervisor.status()["Ready"]
    world.look(NOW + 65)
    world.look(NOW + 125)
    assert world.session["Attempts"] == 0


def test_the_second_step_resets_and_the_third_opens_the_sockets_anew(world: World) -> None:
    world.until(world.up)
    world.peer.table.block(world.local)
    world.peer.table.remove(world.peer.table.entries[0])
    world.until(lambda: not world.up())
    world.look(NOW)
    world.look(NOW + 60)
    before = world.beacon.table.entries[0].id
    world.look(NOW + 120)
    steps = [world.last_action]
    assert world.beacon.table.entries[0].id != before
    world.look(NOW + 420)
    steps.append(world.last_action)
    assert steps == ["ResetSession", "RestartChild"]
    assert world.supervisor.status()["ChildRestarts"] == 1
    world.peer.table.allow(world.local, world.loop.clock())
    world.until(world.up)


def test_sockets_that_could_not_be_opened_are_tried_at_every_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.until(world.up)
    network = world.beacon.speaker._network

    def refused() -> None:
        raise OSError(98, "Address already in use")

    with monkeypatch.context() as patch:
        patch.setattr(network, "listeners", refused)
        with pytest.raises(OSError, match="in use"):
            world.beacon.speaker.rebuild()
        world.look(NOW)
        assert not world.beacon.speaker.listening
    world.look(NOW + 5)
    assert world.beacon.speaker.listening
    world.until(world.up)


def test_a_session_held_down_by_hand_is_not_repaired(world: World) -> None:
    world.until(world.up)
    world.command("session all state down")
    for later in range(0, 1000, 5):
        world.look(NOW + later)
    assert world.session["Attempts"] == 0
    assert not world.supervisor.status()["Ready"]


def http(world: World, request: str) -> tuple[str, str]:
    reply = world.supervisor.respond(request.encode() + b"\r\n\r\n")
    assert reply is not None
    head, _, body = reply.decode().partition("\r\n\r\n")
    length = re.search(r"Content-Length: (\d+)", head)
    assert length is not None
    assert "HEAD" in request or int(length[1]) == len(body.encode())
    return head.split("\r\n")[0], body


def test_http(world: World) -> None:
    assert http(world, "GET /livez HTTP/1.1") == ("HTTP/1.1 200 OK", "")
    assert http(world, "GET /nothing HTTP/1.1")[0] == "HTTP/1.1 404 Not Found"
    assert http(world, "POST /metrics HTTP/1.1")[0] == "HTTP/1.1 405 Method Not Allowed"
    assert http(world, "HEAD /metrics HTTP/1.1")[1] == ""
    assert http(world, "\x00\xff garbage")[0].startswith("HTTP/1.1 4")
    assert world.supervisor.respond(b"GET /metrics HTTP/1.1\r\nHost: x\r\n") is None, "the head is not complete"


def test_metrics(world: World) -> None:
    world.until(world.up)
    world.look(NOW)
    world.beacon.table.entries[0].session.packets_sent = 123_456_789
    _, text = http(world, "GET /metrics HTTP/1.1")
    pair = f'local="{world.local}",remote="{world.remote}"'
    for line in (
        "kube_ovn_bfdd_expected_sessions 1",
        "kube_ovn_bfdd_up_sessions 1",
        f'kube_ovn_bfdd_recovery_phase{{{pair},phase="Up"}} 1',
        "kube_ovn_bfdd_session_zero_seconds 0.000",
        "kube_ovn_bfdd_child_restarts_total 0",
        "kube_ovn_bfdd_child_circuit_open 0",
        f"kube_ovn_bfdd_circuit_open{{{pair}}} 0",
        f"natgw_bfd_session_state{{{pair}}} 3",
        f"natgw_bfd_packets_sent_total{{{pair}}} 123456789",
    ):
        assert line in text.splitlines()
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.]+', line)
    world.command(f"block {world.remote}")
    world.command("session all kill")
    world.look(NOW + 10)
    world.look(NOW + 70)
    _, text = http(world, "GET /metrics HTTP/1.1")
    assert 'kube_ovn_bfdd_recovery_attempts_total{action="ReplayConfiguration",result="success"} 1' in text
    assert "kube_ovn_bfdd_up_sessions 0" in text
    assert float(re.findall(r"zero_seconds ([0-9.]+)", text)[-1]) >= 0


def test_the_state_file_survives_and_a_broken_one_is_put_aside(world: World) -> None:
    world.until(world.up)
    world.command(f"block {world.remote}")
    world.command("session all kill")
    world.look(NOW)
    world.look(NOW + 60)
    path = world.settings.state_path
    assert path.stat().st_mode & 0o777 == 0o600
    again = Supervisor(world.settings, world.beacon, lambda: NOW + 60)
    (session,) = again.status()["Sessions"]
    assert session["Attempts"] == 1
    for broken in (b"{ this is not", b"\xff\xfe", b"[]", b'{"episodes": 3}'):
        path.write_bytes(broken)
        Supervisor(world.settings, world.beacon, lambda: NOW + 60)
        assert Path(f"{path}.corrupt").read_bytes() == broken
    assert json.loads(path.read_text())["childRestarts"] == 0


# Listening


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s"
    first = listen_unix(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="another supervisor"):
        listen_unix(path)
    first.close()
    listen_unix(path).close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(FileExistsError):
        listen_unix(path)


@pytest.mark.parametrize(("host", "target"), [("", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")])
def test_metrics_addresses(host: str, target: str) -> None:
    port = free_port()
    with listen_tcp(f"{host}:{port}"), socket.create_connection((target, port), timeout=PATIENCE):
        pass


# The programs


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a program that succeeds has printed."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def states(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [session["State"] for session in json.loads(said(done))["Sessions"]]


def test_the_supervisor_as_a_program(tmp_path: Path) -> None:
    local, remote, port = loopback(), loopback(), free_port()
    ours = environment(
        tmp_path,
        POD_IPS=local,
        BFD_PEER_IPS=remote,
        BFD_MIN_TX="50",
        BFD_MIN_RX="50",
        BFDD_METRICS_ADDRESS=f"127.0.0.1:{port}",
    )
    theirs = environment(tmp_path / "peer")
    assert run(ours, SUPERVISOR, "live").returncode == 1, "nobody answers yet"
    with (
        background(ours, SUPERVISOR, "run") as process,
        background(theirs, ROOTFS / "usr/bin/bfdd-beacon", f"--listen={remote}"),
    ):
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:2] == [
            b"/kube-ovn/kube-ovn-bfdd-supervisor",
            b"run",
        ]
        assert (tmp_path / "bfdd-supervisor" / "control.sock").is_socket()
        assert run(ours, SUPERVISOR, "live").returncode == 0
        not_ready = run(ours, SUPERVISOR, "ready")
        assert (not_ready.returncode, not_ready.stdout) == (1, "")
        run(theirs, "bfdd-control", "allow", local)
        eventually(lambda: run(ours, SUPERVISOR, "ready").returncode == 0, "it is ready")
        # Where a speaker stands still, what was up may be down for a while.
        eventually(lambda: "Up" in states(run(ours, SUPERVISOR, "status")), "its status says so")
        assert run(ours, "bfdd-control", "status").stdout.startswith("There are 1 sessions:\n")
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        assert run(ours, SUPERVISOR, "run").returncode == 1, "there is one already"
        speaker = child_of(process.pid)
        assert speaker is not None
        assert peak_mebibytes(speaker) <= 18, "of the 20 MiB that it may have"
        assert peak_mebibytes(process.pid) <= 13
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert not (tmp_path / "bfdd-supervisor" / "control.sock").exists()
    assert (tmp_path / "bfdd-supervisor" / "state.json").exists()


NATGW = ROOTFS / "usr/bin/natgw"


def test_natgw_in_a_pod_that_speaks_bfd(tmp_path: Path) -> None:
    local, remote = loopback(), loopback()
    ours = environment(
        tmp_path,
        POD_IPS=local,
        BFD_PEER_IPS=remote,
        BFD_MIN_TX="50",
        BFD_MIN_RX="50",
        BFDD_METRICS_ADDRESS=f"127.0.0.1:{free_port()}",
    )
    theirs = environment(tmp_path / "peer")
    for words in (["drain"], ["undrain"]):
        nobody = run(ours, NATGW, *words)
        assert (nobody.returncode, nobody.stdout) == (3, "")
        assert nobody.stderr.startswith("natgw: no BFD supervisor answers on ")
    with (
        background(ours, SUPERVISOR, "run"),
        background(theirs, ROOTFS / "usr/bin/bfdd-beacon", f"--listen={remote}"),
    ):
        run(theirs, "bfdd-control", "allow", local)
        eventually(lambda: run(ours, SUPERVISOR, "ready").returncode == 0, "it is ready")
        up = ["ready       yes", f"session     {local} - {remote}: Up"]
        eventually(lambda: said(run(ours, NATGW, "status")).splitlines()[:2] == up, "its status says so")
        assert json.loads(run(ours, NATGW, "status", "--json").stdout)["Health"] is None
        assert "natgw_bfd_draining 0" in run(ours, NATGW, "metrics").stdout.splitlines()
        drained = run(ours, NATGW, "drain", "--wait")
        assert drained.returncode == 0
        assert f"session     {local} - {remote}: AdminDown" in drained.stdout.splitlines()
        assert "drain       done" in drained.stdout
        assert run(ours, NATGW, "undrain").returncode == 0
        eventually(lambda: run(ours, SUPERVISOR, "ready").returncode == 0, "it is ready")
        assert run(ours, NATGW, "drain", "now").returncode == 2


def test_whose_words_natgw_are(tmp_path: Path) -> None:
    environ = {"NATGW_RUN_DIR": str(tmp_path)}
    assert natgw.concerns(["drain"], environ)
    assert not natgw.concerns(["status"], environ), "nothing runs here: the NAT daemon's client says so"
    assert not natgw.concerns([], environ)
    (tmp_path / "bfdd-supervisor").mkdir()
    with socket.socket(socket.AF_UNIX) as supervisor:
        supervisor.bind(str(tmp_path / "bfdd-supervisor" / "control.sock"))
        assert natgw.concerns(["status"], environ)
        assert natgw.concerns(["metrics"], environ)
        assert not natgw.concerns(["export"], environ)
        (tmp_path / "api.sock").touch()
        assert not natgw.concerns(["status"], environ), "where there is a NAT daemon, it is meant"


@pytest.mark.parametrize("argv", [(), ("help",), ("live", "now"), ("run", "run")])
def test_any_other_word_is_refused(tmp_path: Path, argv: tuple[str, ...]) -> None:
    done = run(environment(tmp_path), SUPERVISOR, *argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("usage: ")


def test_a_multiplier_out_of_range_ends_the_supervisor(tmp_path: Path) -> None:
    done = run(environment(tmp_path, POD_IPS="127.0.0.1", BFD_PEER_IPS="127.0.0.2", BFD_MULTI="300"), SUPERVISOR, "run")
    assert done.returncode == 1
    assert "BFD_MULTI" in done.stderr


def test_the_scripts_of_a_bfdd_container(tmp_path: Path) -> None:
    local, remote = loopback(), loopback()
    environ = environment(
        tmp_path, POD_IPS=local, BFD_PEER_IPS=f"{remote},127.0.0.9", BFD_MIN_TX="100", BFD_MIN_RX="200", BFD_MULTI="4"
    )
    scripts = ROOTFS / "kube-ovn"
    assert run(environ, "bash", scripts / "bfdd-prestart.sh").returncode != 0, "no speaker answers"
    with background(environ, "bash", scripts / "start-bfdd.sh") as process:
        assert run(environ, "bash", scripts / "bfdd-healthcheck.sh").returncode != 0, "no sessions yet"
        assert run(environ, "bash", scripts / "bfdd-prestart.sh").stdout.splitlines() == [
            "Attempting to set mintx to 100,000 us.",
            "Attempting to set minrx to 200,000 us.",
            "Attempting to set multi to 4.",
            f"Allowing connections from {remote}",
            "Allowing connections from 127.0.0.9",
            "Log type command set to no, was yes",
        ]
        healthy = run(environ, "bash", scripts / "bfdd-healthcheck.sh")
        assert healthy.returncode == 0
        assert healthy.stdout.startswith("There are 2 sessions:\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("reply", "code", "healthy"),
    [("There are 1 sessions:", 0, True), ("There are 0 sessions:", 0, False), ("There are 1 sessions:", 1, False)],
)
def test_the_health_check_with_any_bfdd_control(tmp_path: Path, reply: str, code: int, healthy: bool) -> None:
    """It is tried by Kube-OVN's own tests with a bfdd-control of theirs, which must only be asked for the status."""
    stand_in = tmp_path / "bfdd-control"
    stand_in.write_text(f'#!/bin/sh\n[ "$*" = status ] || exit 9\necho "{reply}"\nexit {code}\n')
    stand_in.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run(environ, "bash", ROOTFS / "kube-ovn" / "bfdd-healthcheck.sh")
    assert (done.returncode == 0) is healthy


def test_the_client_waits_for_a_beacon_that_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATGW_RUN_DIR", str(tmp_path))
    with background(environment(tmp_path), ROOTFS / "usr/bin/bfdd-beacon", f"--listen={loopback()}"):
        assert control.main(["--wait=5", "status"]) == 0
    begin = time.monotonic()
    assert control.main(["--wait=1", "status"]) == 1
    assert time.monotonic() - begin >= 1
    assert "There are 0 sessions:" in capsys.readouterr().out
