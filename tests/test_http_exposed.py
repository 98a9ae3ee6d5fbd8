"""HTTP over TCP in the face of strangers: where it listens, TLS and callers' certificates, how often one may call."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.http import serve_http
from api.http_guards import PEER, LocalUsers
from api.listen import ANYWHERE, CannotListen, check_place, own_addresses
from api.rate import CALLERS, Buckets
from api.settings import BadSetting, Settings
from api.tls import Exposure, TlsFiles
from tests.gateway_kit import Gateway, gateway
from tests.http_kit import PATIENCE, ask, assert_problem, serving, unix
from tests.ports import free_port
from tests.test_http_server import TOKEN, token_file


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path / "state")
    yield made
    made.service.close()


# --- certificates -----------------------------------------------------------------------------------------


def certificate(directory: Path, name: str, signer: Path | None = None) -> TlsFiles:
    """A certificate for 127.0.0.1 with its key; without a signer it is its own authority."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    argv += ["-keyout", str(key), "-out", str(cert)]
    if signer is not None:
        argv += ["-CA", str(signer.with_suffix(".pem")), "-CAkey", str(signer.with_suffix(".key"))]
        argv += ["-addext", "basicConstraints=CA:FALSE"]
    subprocess.run(argv, check=True, capture_output=True)
    return TlsFiles(cert, key)


def caller(trusts: TlsFiles, shows: TlsFiles | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trusts.cert))
    if shows:
        context.load_cert_chain(shows.cert, shows.key)
    return context


def test_tls_is_spoken_and_a_new_certificate_holds_at_once(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    files, other = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    right = {"authorization": f"Bearer {TOKEN}"}
    with serving(made, tmp_path, listen, token_file(tmp_path), Exposure(TlsFiles(files.cert, files.key))):
        url = f"https://{listen}/healthz"
        assert ask("GET", url, headers=right, verify=caller(files)).text == "ok\n"
        assert_problem(ask("GET", url, verify=caller(files)), 401, "unauthorized")
        with pytest.raises(httpx.ConnectError):
            ask("GET", url, headers=right, verify=caller(other))
        with pytest.raises(httpx.RemoteProtocolError):
            ask("GET", f"http://{listen}/healthz", headers=right)
        files.key.write_bytes(b"")  # half replaced: what was in use stays so
        assert ask("GET", url, headers=right, verify=caller(files)).text == "ok\n"
        old = caller(files)
        other.key.replace(files.key)
        other.cert.replace(files.cert)
        assert ask("GET", url, headers=right, verify=caller(files)).text == "ok\n"
        with pytest.raises(httpx.ConnectError):
            ask("GET", url, headers=right, verify=old)


def test_callers_show_a_certificate_of_the_right_authority(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    server = certificate(tmp_path, "server")
    authority, stranger = certificate(tmp_path, "authority"), certificate(tmp_path, "stranger")
    good = certificate(tmp_path, "good", authority.cert)
    bad = certificate(tmp_path, "bad", stranger.cert)
    mutual = TlsFiles(server.cert, server.key, authority.cert)
    with serving(made, tmp_path, listen, None, Exposure(mutual)):

        def status(shows: TlsFiles | None) -> int:
            return ask("GET", f"https://{listen}/healthz", verify=caller(server, shows)).status_code

        assert status(good) == 200  # without a token: the certificate is enough
        for shows in (None, bad):
            with pytest.raises(httpx.TransportError):
                status(shows)
        stranger.cert.replace(authority.cert)  # the authority changes: so does who is let in, at once
        assert status(bad) == 200
        with pytest.raises(httpx.TransportError):
            status(good)


def test_with_both_both_are_asked_for(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    own = certificate(tmp_path, "own")
    exposure = Exposure(TlsFiles(own.cert, own.key, own.cert))
    with serving(made, tmp_path, listen, token_file(tmp_path), exposure):
        url, context = f"https://{listen}/healthz", caller(own, own)
        assert ask("GET", url, verify=context).status_code == 401
        assert ask("GET", url, verify=context, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_unusable_files_are_refused_before_anything_listens(made: Gateway, tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "none.pem", tmp_path / "none.key")
    listen = "127.0.0.1:0"
    with pytest.raises(CannotListen, match=r"none\.pem"):
        asyncio.run(
            serve_http(made.service, tmp_path, listen, token_file(tmp_path), asyncio.Event(), exposure=Exposure(tls))
        )
    assert not (tmp_path / "api.sock").exists()


# --- where ------------------------------------------------------------------------------------------------


def test_every_own_address_is_known() -> None:
    assert ("lo", "127.0.0.1") in set(own_addresses())


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "127.0.0.1:8080"])
def test_it_does_not_listen_where_tenants_or_outsiders_call(made: Gateway, tmp_path: Path, listen: str) -> None:
    """As if loopback were the tenants' side."""
    with pytest.raises(CannotListen, match=f"NATGW_LISTEN_ANYWHERE={ANYWHERE}"):
        check_place(listen, ("lo",))
    if not listen.startswith("127"):
        with pytest.raises(CannotListen, match="every address"):
            asyncio.run(serve_http(made.service, tmp_path, listen, token_file(tmp_path), asyncio.Event()))


def test_it_listens_there_if_told_so_in_so_many_words(made: Gateway, tmp_path: Path) -> None:
    port = free_port()
    with serving(made, tmp_path, f"0.0.0.0:{port}", token_file(tmp_path), Exposure(anywhere=True)):
        assert ask("GET", f"http://127.0.0.1:{port}/healthz").status_code == 401


# --- how often, and who -----------------------------------------------------------------------------------


def test_a_caller_that_calls_too_often_is_told_when_to_come_back(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    exposure = Exposure(rate=(0.01, 5))  # so slowly that a test that stands still gets none back
    with serving(made, tmp_path, listen, token_file(tmp_path), exposure), httpx.Client(timeout=PATIENCE) as client:
        answers = [client.get(f"http://{listen}/healthz") for _ in range(8)]
        assert [answer.status_code for answer in answers[:5]] == [401] * 5
        assert 1 <= int(assert_and_header(answers[7])) <= 100
        assert unix(tmp_path / "api.sock").get("/healthz").status_code == 200


def assert_and_header(answer: httpx.Response) -> str:
    assert_problem(answer, 429, "too-many-requests")
    return str(answer.headers["retry-after"])


def test_the_buckets_fill_at_their_rate_and_remember_a_bounded_number() -> None:
    buckets = Buckets(2, 3)
    assert [buckets.take("a", 0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", 0) == 0
    assert [buckets.take("a", 0.5), buckets.take("a", 0.5)] == [0, 0.5]
    for n in range(3 * CALLERS):
        buckets.take(str(n), 1)
    assert len(buckets._callers) == CALLERS


def test_of_local_users_only_root_and_our_own_pass(made: Gateway, tmp_path: Path) -> None:
    """The socket's mode keeps others out; should that ever fail, this does."""
    asked = []

    async def app(scope: object, receive: object, send: object) -> None:
        asked.append(scope)

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    guard = LocalUsers(app, frozenset({0, os.geteuid()}))
    clients = [(f"{PEER}7,0", 0), (f"{PEER}7,{os.geteuid()}", 0), (f"{PEER}7,65534", 0), ("127.0.0.1", 5), None]
    for client in clients:
        asyncio.run(guard({"type": "http", "client": client}, nothing, send))
    assert len(asked) == 2
    assert [message["status"] for message in sent if isinstance(message, dict) and "status" in message] == [403] * 3
    with serving(made, tmp_path):
        assert unix(tmp_path / "api.sock").get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        {"NATGW_TLS_CERT": "a"},
        {"NATGW_TLS_KEY": "a"},
        {"NATGW_TLS_CLIENT_CA": "a"},
        {"NATGW_LISTEN_ANYWHERE": "yes"},
        {"NATGW_LISTEN_RATE": "5"},
        {"NATGW_LISTEN_RATE": "0:5"},
    ],
)
def test_half_a_setting_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(BadSetting):
        Settings.from_environment(said)


def test_settings_in_full() -> None:
    names = ("NATGW_TLS_CERT", "NATGW_TLS_KEY", "NATGW_TLS_CLIENT_CA")
    said = dict(zip(names, ("/c", "/k", "/a"), strict=True))
    more = {"NATGW_LISTEN_ANYWHERE": ANYWHERE, "NATGW_LISTEN_RATE": "5:10"}
    expected = Exposure(TlsFiles(Path("/c"), Path("/k"), Path("/a")), True, (5, 10))
    assert Settings.from_environment(said | more).exposure == expected
