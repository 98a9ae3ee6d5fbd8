"""What attackers send: smuggled requests, tricks with paths, bombs in JSON, lines for the log, pages of other sites."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.consoleproxy import serve_console
from api.http_console import ASSETS
from api.listen import tcp_socket
from api.rate import network
from api.tls import Exposure
from tests.gateway_kit import STATE, Gateway, gateway
from tests.http_kit import PATIENCE, ask, serving, unix
from tests.ports import free_port
from tests.test_http_server import TOKEN, token_file

FAST = Exposure(rate=(100_000, 100_000))
RIGHT = {"authorization": f"Bearer {TOKEN}"}
JSON = {**RIGHT, "content-type": "application/json"}
GOOD = f"Authorization: Bearer {TOKEN}\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = gateway(tmp_path_factory.mktemp("state"))
    yield made
    made.service.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def listen(made: Gateway, run_dir: Path) -> Iterator[str]:
    """A gateway with objects, on TCP behind a token."""
    where = f"127.0.0.1:{free_port()}"
    with serving(made, run_dir, where, token_file(run_dir), FAST):
        with unix(run_dir / "api.sock") as client:
            assert client.put("/v1/gateway", json=STATE).status_code == 201
        yield where


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever was sent, the gateway answers, and its state is what it was."""
    yield
    if "listen" in request.fixturenames:
        with unix(request.getfixturevalue("run_dir") / "api.sock") as client:
            assert client.get("/v1/gateway").json() == STATE


LAST = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def statuses(listen: str, sent: bytes) -> list[int]:
    """The statuses of the answers to these bytes; if the connection is still one of requests, of ``LAST``, too: 401."""
    host, port = listen.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        data = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent + LAST)
            while part := sock.recv(1 << 16):
                data += part
    return [
        int(line.split()[1]) for line in data.replace(b"HTTP/1.1 ", b"\nHTTP/1.1 ").split(b"\n") if line[:5] == b"HTTP/"
    ]


# --- one request in another -------------------------------------------------------------------------------------

WIPE = "DELETE /v1/eips/192.168.0.20 HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 99999999999999999999999999\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Content-Length : 5\r\n",
        "X: a\0b\r\n",
        "X: a\rb\r\n",
        "no colon\r\n",
        "Host: another\r\n",
    ],
)
def test_an_ambiguous_head_is_no_request(listen: str, head: str) -> None:
    sent = f"GET /v1/status HTTP/1.1\r\nHost: x\r\n{GOOD}{head}\r\n{WIPE}\r\n"
    assert statuses(listen, sent.encode()) in ([400], [413])


@pytest.mark.parametrize(
    "body", ["5;\0\r\nhello\r\n", "-5\r\nhello\r\n", "ffffffffffffffffffffff\r\n", "5 \r\nhello", "z\r\n"]
)
def test_a_chunk_that_is_none_ends_the_connection(listen: str, body: str) -> None:
    sent = f"PUT /v1/gateway HTTP/1.1\r\nHost: x\r\n{GOOD}Transfer-Encoding: chunked\r\n\r\n{body}\r\n{WIPE}\r\n"
    assert 204 not in statuses(listen, sent.encode())


def test_every_request_of_a_connection_needs_the_token(listen: str) -> None:
    asked = "GET /v1/status HTTP/1.1\r\nHost: x\r\n"
    body = f"GET /v1/status HTTP/1.1\r\nHost: x\r\n{GOOD}Content-Length: {len(WIPE) + 2}\r\n\r\n{WIPE}\r\n"
    assert statuses(listen, f"{asked}{GOOD}\r\n{WIPE}\r\n{asked}{GOOD}\r\n".encode()) == [200, 401, 200, 401]
    assert statuses(listen, f"{body}{WIPE}\r\n".encode()) == [200, 401, 401]
    # Both lengths: the chunks count, as RFC 9112 says, and what follows them is another request.
    both = f"{asked}{GOOD}Content-Length: 500\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{WIPE}\r\n"
    assert statuses(listen, both.encode()) in ([200, 401, 401], [400])


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        b"A" * 1_000_000,
    ],
    ids=["address", "header", "headers", "no end"],
)
def test_a_head_of_any_size_is_not_kept(listen: str, sent: bytes) -> None:
    assert statuses(listen, sent) in ([400], [])


# --- paths ------------------------------------------------------------------------------------------------------

TRICKS = [
    "/console/../v1/gateway",
    "/console/%2e%2e/v1/gateway",
    "/console/..%2fv1%2fgateway",
    "/console/%2e%2e%2f%2e%2e%2fapi/main.py",
    "/console/../../../../../../etc/passwd",
    "/console/....//....//etc/passwd",
    "/console//etc/passwd",
    "/console/%2fetc%2fpasswd",
    "/console/..\\..\\main.py",
    "/console/%00",
    "/console/index.html%00.js",
    "/console/%c0%ae%c0%ae/main.py",
    "//v1/gateway",
    "/%2fv1/gateway",
    "/console;/../v1/gateway",
    "/CONSOLE/../v1/gateway",
    "http://x/v1/gateway",
    "/console/" + "a" * 5000,
    "/console/" + "../" * 1000,
]


@pytest.mark.parametrize("path", TRICKS)
def test_without_the_token_no_path_leads_anywhere_but_to_the_console(listen: str, path: str) -> None:
    status, _ = statuses(listen, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status in (307, 401, 404)
    if status == 307:
        assert ask("GET", f"http://{listen}{path}", follow_redirects=True).status_code in (401, 404)


def test_the_console_serves_its_own_files_only_and_follows_no_link(made: Gateway, tmp_path: Path) -> None:
    assert not [path for path in ASSETS.rglob("*") if path.is_symlink()]
    with serving(made, tmp_path), unix(tmp_path / "api.sock") as client:
        assert client.get("/console/").status_code == 200
        assert client.get("/", headers={"host": "evil.example"}).headers["location"] == "/console/"


# --- bodies -----------------------------------------------------------------------------------------------------

BOMBS: dict[str, bytes] = {
    "depth": b"[" * 1_000_000,
    "objects' depth": b'{"a":' * 500_000,
    "a huge whole number": b'{"eips":[],"routes":' + b"9" * 1_000_000 + b"}",
    "a huge number": b'{"qos":[{"rate":1e999999}]}',
    "no number": b'{"eips":NaN}',
    "half a character": b'{"gatewayV4":"\\ud800"}',
    "no UTF-8": b'{"gatewayV4":"\xff\xfe"}',
    "another encoding": '{"eips":[]}'.encode("utf-16") + b"\xd8",
    "a key twice": b'{"eips":[{"address":"bad"}],"eips":[{"address":"worse"}]}',
    "NUL": b'{"gatewayV4":"192.168.0.1\\u0000"}',
    "other digits": '{"gatewayV4":"\uff11\uff19\uff12.168.0.1"}'.encode(),
    "a million fields": b"{" + b",".join(b'"%d":0' % n for n in range(200_000)) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_invalid_request(listen: str, run_dir: Path, name: str) -> None:
    for method, path in (("PUT", "/v1/gateway"), ("PATCH", "/v1/gateway"), ("PUT", "/v1/eips/192.168.0.20")):
        answer = ask(method, f"http://{listen}{path}", content=BOMBS[name], headers=JSON)
        assert answer.status_code in (400, 422), answer.text[:500]
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "word",
    ["", "net1 ", "net\u0661", "\uff4eet1", "n\u202e1", "a" * 16, "../x", "eth0;reboot", "-i", "$(id)", "a\nb", "\0"],
)
def test_a_name_is_an_interfaces_or_refused(listen: str, word: str) -> None:
    answer = ask("PUT", f"http://{listen}/v1/gateway", json={**STATE, "interfaces": {"vpc": word}}, headers=RIGHT)
    assert answer.status_code == 422


def test_a_number_in_a_path_or_query_may_have_any_length(listen: str) -> None:
    for path in ("/v1/dnats/192.168.0.20/" + "9" * 9000 + "/tcp", "/v1/events?follow=false&after=" + "9" * 9000):
        assert ask("GET", f"http://{listen}{path}", headers=RIGHT).status_code in (200, 404, 422)


# --- what is kept of a request ------------------------------------------------------------------------------------


def test_a_request_writes_no_line_of_its_own(listen: str, made: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    forged = "%0a2026-01-01%20WARNING%20natgw:%20all%20is%20well%0d%1b[2K%e2%80%a8"
    headers = {**RIGHT, "user-agent": "x", "x-forwarded-for": "10.0.0.1", "forwarded": "for=10.0.0.1"}
    path = f"/v1/eips/192.168.0.77{forged}{'a' * 3000}"
    with caplog.at_level("DEBUG"):
        ask("PUT", f"http://{listen}{path}", headers=headers, json={"address": "192.168.0.77/24"})
        eip = {"address": "192.168.0.78/24"}
        assert ask("PUT", f"http://{listen}/v1/eips/192.168.0.78", headers=headers, json=eip).status_code == 201
        assert ask("DELETE", f"http://{listen}/v1/eips/192.168.0.78?{forged}", headers=headers).status_code == 204
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert not [line for line in lines if not line.isprintable() or "all is well" in line]
    event = made.service.journal.events()[-1]
    assert (event.by, event.client) == ("HTTP DELETE /v1/eips/192.168.0.78", "127.0.0.1")


def test_what_proxies_say_of_their_callers_is_not_believed(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with (
        serving(made, tmp_path, listen, token_file(tmp_path), Exposure(rate=(0.001, 5))),
        httpx.Client(timeout=PATIENCE) as client,
    ):
        forwarded = [{"x-forwarded-for": f"10.0.0.{n}", "forwarded": f"for=10.0.0.{n}"} for n in range(8)]
        answers = [client.get(f"http://{listen}/healthz", headers=headers).status_code for headers in forwarded]
        assert answers == [401] * 5 + [429] * 3


def test_one_host_of_ipv6_is_one_caller_whatever_address_it_takes() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff:1:2") == "2001:db8::/64"
    assert network("2001:db8:0:1::1") != network("2001:db8::1")
    assert network("::ffff:192.0.2.1") == network("192.0.2.1") == "192.0.2.1"
    assert network("fe80::1%net1") == "fe80::/64"
    assert network("peer:7,0") == "peer:7,0"


def test_all_of_ipv6_is_not_ipv4_as_well() -> None:
    with contextlib.closing(tcp_socket(f"[::]:{free_port()}")) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("::1", port), timeout=PATIENCE).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


# --- browsers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
    ],
)
def test_a_page_of_another_site_uses_nobodys_rights(listen: str, said: dict[str, str]) -> None:
    for method in ("GET", "DELETE", "POST", "OPTIONS"):
        answer = ask(method, f"http://{listen}/v1/eips/192.168.0.20", headers={**RIGHT, **said})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_console_itself_and_programs_are_let_through(listen: str) -> None:
    for said in ({}, {"sec-fetch-site": "same-origin", "origin": f"http://{listen}"}, {"sec-fetch-site": "none"}):
        assert ask("GET", f"http://{listen}/v1/status", headers={**RIGHT, **said}).status_code == 200


@pytest.fixture
def relay(listen: str, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Where ``natgw console`` listens, and its token."""
    told = queue.SimpleQueue[str]()
    stop: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    async def serve() -> None:
        task = asyncio.create_task(serve_console(run_dir / "api.sock", 0, told.put))
        loop = asyncio.get_running_loop()
        stop.put(lambda: loop.call_soon_threadsafe(task.cancel))
        with contextlib.suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    url, _, token = told.get(timeout=PATIENCE).partition("/console/#token=")
    yield url.removeprefix("http://"), token
    stop.get(timeout=PATIENCE)()
    thread.join(PATIENCE)


@pytest.mark.parametrize(
    "sent",
    [
        "GET / HTTP/1.1\r\nHost: x\nX: y\n\n{wipe}X: y\r\n\r\n",
        "GET /console/ HTTP/1.1\r\nHost: x\r\nX: y\n\n{wipe}X: y\r\n\r\n",
        "GET / HTTP/1.1\n\n{wipe}X: y\r\n\r\n",
        "GET /console/\n\n{wipe} HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n{wipe}\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{wipe}\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nAccept: a\n\n{wipe}\r\n\r\n",
        "{wipe}\r\n",
        "GET /console/%2e%2e/v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /console/..%2fv1%2fstatus HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://x/console/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /v1/status?token={token} HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_natgw_console_passes_one_request_to_read_and_no_other(relay: tuple[str, str], sent: str) -> None:
    """A page of another site, or another user of the operator's machine, who does not know the token."""
    where, token = relay
    answers = statuses(where, sent.replace("{wipe}", WIPE).replace("{token}", token).encode())
    assert len(answers) == 1
    assert answers[0] in (200, 307, 400, 401, 404, 405)
    if "/v1/" in sent.partition("HTTP/1.1")[0]:
        assert answers[0] in (400, 401, 404, 405)


def test_a_problem_repeats_no_more_than_it_must(listen: str) -> None:
    for body in ({"x": "y" * 100_000}, {"eips": [{}] * 5000}):
        answer = ask("PUT", f"http://{listen}/v1/gateway", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 422
        assert len(answer.content) < 30_000
    assert answer.json()["detail"].endswith("; and 4900 more")


@pytest.mark.parametrize("value", ["{}", "[]", '"a":0', "1"])
def test_a_body_of_millions_of_tiny_values_is_not_parsed(listen: str, value: str) -> None:
    """Each would take hundreds of bytes of memory, and thousands to say what is wrong with it."""
    answer = ask("PUT", f"http://{listen}/v1/gateway", content=f'{{"eips":[{f"{value}," * 2_000_000}', headers=JSON)
    assert answer.status_code == 413
