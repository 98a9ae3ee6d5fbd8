"""Callers that stall: each wait for a caller ends, and as many stalling ones as there may be keep nobody out."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from api import main
from api.http_connections import Patience
from api.tls import Exposure, TlsFiles
from gateway import meters
from tests.gateway_kit import STATE, Gateway, gateway
from tests.http_kit import PATIENCE, ask, serving, unix
from tests.ports import free_port
from tests.test_http_exposed import certificate
from tests.test_http_server import TOKEN, token_file

LONG, SHORT = Patience(200.0, 200.0, 200.0), Patience(0.6, 1.2, 0.9)
CROWD = 2000
HEAD = b"PUT /v1/gateway HTTP/1.1\r\nHost: x\r\n"
BODY = HEAD + b"Content-Length: 1000\r\n\r\n{"
ASK = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
RIGHT = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path / "state")
    yield made
    made.service.close()


@dataclass
class Mood:
    """The patience of a listener; it is short only while that is what is tried, so that no other request is cut."""

    head: float = LONG.head
    body: float = LONG.body
    answer: float = LONG.answer

    def become(self, patience: Patience) -> None:
        self.head, self.body, self.answer = patience.head, patience.body, patience.answer


@pytest.fixture
def mood() -> Mood:
    return Mood()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def cut(name: str) -> float:
    return sum(value for series, value in meters.REFUSED_CONNECTIONS.values().items() if series == ("http", name))


def drip(sock: socket.socket, part: bytes, until: float) -> bool:
    """Send a little again and again; whether the other side broke it off before that time."""
    while time.monotonic() < until:
        try:
            sock.sendall(part)
        except TimeoutError:
            continue  # it takes nothing more, but has not gone
        except OSError:
            return True
        time.sleep(0.05)
    return False


def fill(sock: socket.socket) -> None:
    """Ask and ask, and read no answer, until no more can be sent."""
    sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.sendall(ASK * 20)


STALLS: dict[str, tuple[bytes, bytes]] = {
    "silence": (b"", b""),
    "half a head": (HEAD, b""),
    "a dripping head": (HEAD, b"X: y\r\n"),
    "half a body": (BODY, b""),
    "a dripping body": (BODY, b" "),
    "silence after an answer": (ASK, b""),
    "a dripping body that nobody wants": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("name", STALLS)
def test_each_wait_for_a_caller_ends(made: Gateway, tmp_path: Path, mood: Mood, name: str) -> None:
    first, then = STALLS[name]
    before = cut("slow")
    with serving(made, tmp_path, patience=mood), connect(tmp_path / "api.sock") as sock:
        sock.sendall(first)
        mood.become(SHORT)
        if then:
            assert drip(sock, then, time.monotonic() + PATIENCE)
        else:
            sock.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass
        assert cut("slow") == before + 1
        mood.become(LONG)
        assert unix(tmp_path / "api.sock").get("/healthz").status_code == 200


def test_who_reads_no_answer_is_cut(made: Gateway, tmp_path: Path, mood: Mood) -> None:
    before = cut("slow")
    with serving(made, tmp_path, patience=mood), connect(tmp_path / "api.sock") as sock:
        fill(sock)
        mood.become(SHORT)
        assert drip(sock, ASK, time.monotonic() + PATIENCE)
        assert cut("slow") == before + 1


def test_an_answer_that_nobody_takes_does_not_outlive_its_connection(made: Gateway, tmp_path: Path, mood: Mood) -> None:
    """The server closes behind this answer; what it cannot send must not stay for ever."""
    path = tmp_path / "api.sock"
    dnat = {"eip": "192.168.0.20", "protocol": "tcp", "internalIp": "10.0.1.11", "internalPort": 80}
    dnats = [{**dnat, "externalPort": 1 + n} for n in range(5000)]  # more than fits a socket's buffer
    with serving(made, tmp_path, patience=mood):
        with unix(path) as client:
            answer = client.put("/v1/gateway", json={"eips": [{"address": "192.168.0.20/24"}], "dnats": dnats})
            assert answer.status_code == 201
            whole = len(client.get("/v1/gateway").content)
        before = cut("slow")
        with connect(path) as sock:
            sock.sendall(b"GET /v1/gateway HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            mood.become(SHORT)
            deadline = time.monotonic() + PATIENCE
            while cut("slow") == before and time.monotonic() < deadline:
                time.sleep(0.05)
            received = len(b"".join(iter(lambda: sock.recv(1 << 20), b"")))
        assert cut("slow") == before + 1
        assert 1000 < received < whole


def test_a_handshake_that_does_not_come_ends(made: Gateway, tmp_path: Path, mood: Mood) -> None:
    listen = f"127.0.0.1:{free_port()}"
    files = certificate(tmp_path, "one")
    exposure = Exposure(TlsFiles(files.cert, files.key))
    with serving(made, tmp_path, listen, token_file(tmp_path), exposure, patience=mood):
        host, port = listen.split(":")
        mood.become(SHORT)
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
            assert sock.recv(100) == b""
        mood.become(LONG)
        context = ssl.create_default_context(cafile=str(files.cert))
        assert ask("GET", f"https://{listen}/healthz", headers=RIGHT, verify=context).text == "ok\n"


def test_what_waits_for_the_gateway_is_not_cut(made: Gateway, tmp_path: Path, mood: Mood) -> None:
    """A stream without an event, and a change that takes its time, both far longer than any patience."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(_: str) -> None:
        made.kernel.faults = None
        entered.set()
        assert go_on.wait(100)

    path, answers = tmp_path / "api.sock", []
    made.kernel.faults = slow
    with serving(made, tmp_path, patience=mood), unix(path) as client, client.stream("GET", "/v1/events") as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("retry: ")
        writer = threading.Thread(
            target=lambda: answers.append(unix(path).put("/v1/gateway", json=STATE, timeout=PATIENCE))
        )
        writer.start()
        assert entered.wait(PATIENCE)
        mood.become(SHORT)
        time.sleep(4 * SHORT.body)
        mood.become(LONG)
        go_on.set()
        writer.join(timeout=PATIENCE)
        assert [answer.status_code for answer in answers] == [201]
        assert any(line.startswith("event: change") for line in lines)


Connect = Callable[[], socket.socket]


def crowd(connect: Connect, stack: contextlib.ExitStack) -> None:
    """Callers that stall in every way, and stay."""
    for number in range(CROWD):
        sock = stack.enter_context(contextlib.closing(connect()))
        with contextlib.suppress(OSError):
            sock.send((b"", HEAD, BODY, ASK)[number % 4])


def test_a_crowd_of_stalling_local_callers_keeps_nobody_out(made: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with serving(made, tmp_path), contextlib.ExitStack() as stack:
        crowd(lambda: connect(path), stack)
        with unix(path) as client:
            assert client.put("/v1/gateway", json=STATE).status_code == 201
            assert client.get("/v1/gateway").json() == STATE
        assert cut("crowd") > 0


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_crowd_from_one_address_displaces_its_own(made: Gateway, tmp_path: Path, encrypted: bool) -> None:
    listen = f"127.0.0.1:{free_port()}"
    host, port = listen.split(":")
    files = certificate(tmp_path, "one")
    exposure = Exposure(TlsFiles(files.cert, files.key) if encrypted else None, rate=(10_000, 10_000))
    verify = ssl.create_default_context(cafile=str(files.cert)) if encrypted else True

    def stranger() -> socket.socket:
        return socket.create_connection((host, int(port)), timeout=PATIENCE, source_address=("127.0.0.2", 0))

    with serving(made, tmp_path, listen, token_file(tmp_path), exposure), contextlib.ExitStack() as stack:
        client = stack.enter_context(
            httpx.Client(
                timeout=PATIENCE,
                base_url=f"http{'s' if encrypted else ''}://{listen}",
                headers=RIGHT,
                verify=verify,
            )
        )
        following = stack.enter_context(client.stream("GET", "/v1/events"))
        assert following.status_code == 200
        assert client.get("/healthz").status_code == 200
        crowd(stranger, stack)
        assert client.put("/v1/gateway", json=STATE).status_code == 201
        assert any(line.startswith("event: change") for line in following.iter_lines())
        assert unix(tmp_path / "api.sock").get("/healthz").status_code == 200


def test_no_more_are_open_than_there_may_be_and_the_rest_waits_its_turn(
    made: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every connection waits for the gateway, none is displaced: a new caller is served when one has ended."""
    monkeypatch.setattr("api.http.MAX_CONNECTIONS", 3)
    path = tmp_path / "api.sock"
    with serving(made, tmp_path), contextlib.ExitStack() as stack:
        followers = [stack.enter_context(unix(path)).stream("GET", "/v1/events") for _ in range(4)]
        streams = [stack.enter_context(follower).iter_lines() for follower in followers]
        assert all(next(stream).startswith("retry: ") for stream in streams)
        with connect(path) as late:
            late.sendall(ASK)
            late.settimeout(1)
            with pytest.raises(TimeoutError):
                late.recv(100)
            streams.pop().close()  # type: ignore[attr-defined]
            streams.pop().close()  # type: ignore[attr-defined]
            late.settimeout(PATIENCE)
            assert late.recv(100).startswith(b"HTTP/1.1 200")


def test_the_daemon_asks_for_as_many_descriptors_as_that_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        main._more_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, main.DESCRIPTORS), hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        main._more_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
