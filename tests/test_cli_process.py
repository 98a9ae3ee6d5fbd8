"""natgw as a process: exit codes, what goes to which stream, what it needs to start."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_kit import gateway
from tests.http_kit import serving

ROOT = Path(__file__).resolve().parent.parent
NATGW = Path(sys.executable).with_name("natgw")


def natgw(*arguments: str, run_dir: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    if run_dir:
        given["NATGW_RUN_DIR"] = str(run_dir)
    return subprocess.run(
        [NATGW, *arguments],
        cwd=ROOT,
        env=given,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("export",), ("explain", "tcp", "10.0.0.1:1", "192.0.2.1:1"), ("api", "GET", "/healthz")],
)
def test_without_a_daemon_one_sentence_says_how_to_start_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = natgw(*arguments, run_dir=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"natgw: no gateway daemon answers on {tmp_path}/api.sock")
    assert "natgw serve" in line


def test_what_a_dead_daemon_left_is_no_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "api.sock"))
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / "natgw.pid").write_bytes(ended.stdout)
    assert natgw("status", run_dir=tmp_path).returncode == 3


def test_a_daemon_that_is_starting_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "natgw.pid").write_text(f"{os.getpid()}\n")
    made = gateway(tmp_path / "state")
    answers: list[subprocess.CompletedProcess[str]] = []
    caller = threading.Thread(target=lambda: answers.append(natgw("api", "GET", "/healthz", run_dir=tmp_path)))
    caller.start()
    time.sleep(0.5)  # the caller must come before the socket does
    with serving(made, tmp_path):
        caller.join(timeout=100)
    made.service.close()
    assert [(a.returncode, a.stdout) for a in answers] == [(0, "ok\n")]


@contextlib.contextmanager
def answering(path: Path, reply: bytes) -> Iterator[None]:
    """Something on the socket that is no gateway: it sends ``reply`` to the first caller and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(4096)
                caller.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(timeout=60)


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<p>x"])
def test_a_stranger_on_the_socket_is_a_failure_in_one_sentence(tmp_path: Path, reply: bytes) -> None:
    with answering(tmp_path / "api.sock", reply):
        done = natgw("status", run_dir=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("natgw: ")


def test_help_tells_commands_and_exit_codes() -> None:
    done = natgw("--help")
    assert done.returncode == 0
    for word in ("serve", "status", "apply", "export", "plan", "explain", "api", "lab", "Exit codes"):
        assert word in done.stdout
    for command in ("status", "events", "apply", "export", "plan", "explain", "api", "serve"):
        helped = natgw(command, "--help")
        assert (helped.returncode, helped.stderr) == (0, "")
        assert f"Usage: natgw {command}" in helped.stdout


def test_wrong_usage_is_2() -> None:
    assert natgw("plan").returncode == 2
    assert natgw("frobnicate").returncode == 2


def test_the_labs_commands_are_under_lab() -> None:
    done = natgw("lab", "--help")
    assert done.returncode == 0
    for command in ("up", "down", "status", "test"):
        assert command in done.stdout


def test_completion_knows_commands_and_the_labs() -> None:
    for line, expected in (("natgw ex", {"export", "explain"}), ("natgw lab ", {"up", "down", "status", "test"})):
        words = line.split(" ")
        done = natgw(
            _NATGW_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), _TYPER_COMPLETE_ARGS=line
        )
        assert set(done.stdout.split()) == expected, done.stderr


def test_the_client_side_stays_light(tmp_path: Path) -> None:
    """Status, apply and the like must not load the daemon's side: models, HTTP server, kernel drivers."""
    heavy = ("pydantic", "fastapi", "starlette", "uvicorn", "pyroute2", "iptc", "scapy", "lab", "gateway", "rules")
    program = (
        "import sys, api.cli, api.show; api.cli.mount_lab(['status']);"
        f"print(*(name for name in {heavy!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
