"""The listeners: a Unix socket of root's, TCP only behind a token, quiet, and gone at the end."""

from __future__ import annotations

import asyncio
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from api.http import serve_http
from api.http_app import build_app
from api.listen import CannotListen, check_listen, parse_listen, tcp_socket
from tests.gateway_kit import STATE, Gateway, gateway
from tests.http_kit import PATIENCE, ask, assert_problem, call, serving, unix
from tests.ports import free_port

TOKEN = "correct horse battery staple"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path / "state")
    yield made
    made.service.close()


def token_file(directory: Path, token: str = TOKEN) -> Path:
    path = directory / "token"
    path.write_text(token + "\n")
    return path


def test_the_unix_socket_answers_is_its_owners_alone_and_goes_with_the_server(made: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with serving(made, tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with unix(path) as client:
            assert client.put("/v1/gateway", json=STATE).status_code == 201
            assert client.get("/v1/gateway").json() == STATE
    assert not path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]


def test_what_a_dead_daemon_left_is_replaced(made: Gateway, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "api.sock"))
    with serving(made, tmp_path):
        assert unix(tmp_path / "api.sock").get("/healthz").text == "ok\n"


def test_nothing_is_written_to_the_standard_streams(
    made: Gateway, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(made, tmp_path), unix(tmp_path / "api.sock") as client:
        client.get("/v1/gateway")
        client.put("/v1/gateway", content=b"{")
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(str(tmp_path / "api.sock"))
        raw.sendall(b"no http at all\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
        raw.close()
    assert capfd.readouterr() == ("", "")


def test_the_processs_signals_stay_the_daemons(made: Gateway, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen: list[object] = []

    async def go() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(serve_http(made.service, tmp_path, None, None, stop))
        while not (tmp_path / "api.sock").exists():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(unix(tmp_path / "api.sock").get, "/healthz")
        seen.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        stop.set()
        await task

    with asyncio.Runner() as runner:
        runner.get_loop().run_until_complete(go())
    assert seen == before


def test_a_request_that_runs_is_answered_before_the_end(made: Gateway, tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(step: str) -> None:
        made.kernel.faults = None
        entered.set()
        assert go_on.wait(PATIENCE)

    made.kernel.faults = slow
    answers: list[int] = []

    def put() -> None:
        with unix(tmp_path / "api.sock") as client:
            answers.append(client.put("/v1/gateway", json=STATE).status_code)

    with serving(made, tmp_path):
        caller = threading.Thread(target=put)
        caller.start()
        assert entered.wait(PATIENCE)
        threading.Timer(0.3, go_on.set).start()
    caller.join(timeout=PATIENCE)
    assert answers == [201]


def test_tcp_needs_the_token_and_the_unix_socket_does_not(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    path = token_file(tmp_path)
    with serving(made, tmp_path, listen, path), httpx.Client(timeout=PATIENCE, base_url=f"http://{listen}") as client:
        bad = ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN)
        for headers in [{}, *({"authorization": b} for b in bad), {"authorization": b"Bearer \xff".decode("latin-1")}]:
            encoded = {key: value.encode("latin-1") for key, value in headers.items()}
            for route in ("/v1/gateway", "/healthz", "/openapi.json", "/nothing"):
                refused = client.get(route, headers=encoded)
                assert_problem(refused, 401, "unauthorized")
                assert refused.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {TOKEN}"}
        assert client.put("/v1/gateway", json=STATE, headers=right).status_code == 201
        assert client.get("/v1/gateway", headers={"authorization": f"bearer {TOKEN}"}).json() == STATE
        assert unix(tmp_path / "api.sock").get("/v1/gateway").json() == STATE

        # The file is the truth: a new token holds at once, an empty or missing file admits nobody.
        token_file(tmp_path, "another, longer token")
        assert client.get("/healthz", headers=right).status_code == 401
        assert client.get("/healthz", headers={"authorization": "Bearer another, longer token"}).status_code == 200
        token_file(tmp_path, "")
        assert client.get("/healthz", headers={"authorization": "Bearer"}).status_code == 401
        path.unlink()
        assert client.get("/healthz", headers={"authorization": "Bearer another, longer token"}).status_code == 401
        token_file(tmp_path)
        assert client.get("/healthz", headers=right).status_code == 200


def test_tcp_on_ipv6(made: Gateway, tmp_path: Path) -> None:
    listen = f"[::1]:{free_port()}"
    with serving(made, tmp_path, listen, token_file(tmp_path)):
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert ask("GET", f"http://{listen}/healthz", headers=headers).text == "ok\n"


@pytest.mark.parametrize(
    ("listen", "token", "sentence"),
    [
        ("127.0.0.1:0", None, "needs NATGW_TOKEN_FILE"),
        ("127.0.0.1:0", "", "is empty"),
        ("127.0.0.1:0", " \n", "is empty"),
        ("8080", TOKEN, "is not an address and a port"),
        ("localhost:8080", TOKEN, "is not an address and a port"),
        ("::1:8080", TOKEN, "is not an address and a port"),
        ("[127.0.0.1]:8080", TOKEN, "is not an address and a port"),
        ("127.0.0.1:65536", TOKEN, "is not an address and a port"),
        ("127.0.0.256:80", TOKEN, "127.0.0.256"),
        ("192.0.2.1:0", TOKEN, "cannot listen on 192.0.2.1:0"),
    ],
)
def test_listening_is_refused_with_one_sentence(
    made: Gateway, tmp_path: Path, listen: str, token: str | None, sentence: str
) -> None:
    path = None if token is None else token_file(tmp_path, token)
    with pytest.raises(CannotListen, match=sentence) as refused:
        asyncio.run(serve_http(made.service, tmp_path, listen, path, asyncio.Event()))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "api.sock").exists()


def test_small_answers_over_tcp_wait_for_no_acknowledgement() -> None:
    with tcp_socket("127.0.0.1:0") as listener:
        assert listener.proto == socket.IPPROTO_TCP, "asyncio sets TCP_NODELAY on no other socket"


def test_an_unreadable_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="No such file"):
        check_listen("127.0.0.1:8080", tmp_path / "none")
    assert parse_listen("[::1]:8080") == ("::1", 8080)


def test_a_path_too_long_for_a_socket_is_refused_with_one_sentence(made: Gateway, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(CannotListen, match="cannot listen on"):
        asyncio.run(serve_http(made.service, deep, None, None, asyncio.Event()))


def test_too_large_a_body_is_refused_whether_announced_or_only_sent(made: Gateway) -> None:
    app = build_app(made.service, max_body=1000)
    announced = call(app, "PUT", "/v1/gateway", content=b" " * 1001)
    assert_problem(announced, 413, "too-large")

    async def chunks() -> object:
        for _ in range(11):
            yield b" " * 100

    sent = call(app, "PUT", "/v1/gateway", content=chunks())
    assert_problem(sent, 413, "too-large")
    assert call(app, "PUT", "/v1/gateway", json=STATE).status_code == 201


def test_many_connections_at_once(made: Gateway, tmp_path: Path) -> None:
    async def go() -> list[int]:
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "api.sock"), limits=httpx.Limits(max_connections=100))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=PATIENCE) as client:
            answers = await asyncio.gather(
                *(client.put(f"/v1/eips/192.168.0.{i}", json={"address": f"192.168.0.{i}/24"}) for i in range(20, 220))
            )
            return [answer.status_code for answer in answers]

    with serving(made, tmp_path):
        unix(tmp_path / "api.sock").put("/v1/gateway", json={})
        assert asyncio.run(go()) == [201] * 200
        assert len(unix(tmp_path / "api.sock").get("/v1/eips").json()) == 200


def test_every_answer_bears_the_date(made: Gateway, tmp_path: Path) -> None:
    with serving(made, tmp_path), unix(tmp_path / "api.sock") as client:
        for _ in range(2):
            said = parsedate_to_datetime(client.get("/healthz").headers["date"])
            assert abs(time.time() - said.timestamp()) < 60
