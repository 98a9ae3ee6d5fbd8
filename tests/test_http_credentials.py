"""Tokens and certificates that change, are not valid, or have been withdrawn."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.tls import Exposure, TlsFiles
from tests.gateway_kit import Gateway, gateway
from tests.http_kit import PATIENCE, serving
from tests.ports import free_port
from tests.test_http_exposed import caller, certificate
from tests.test_http_server import TOKEN, token_file

FAST = Exposure(rate=(100_000, 100_000))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Gateway]:
    made = gateway(tmp_path / "state")
    yield made
    made.service.close()


def test_a_token_that_changes_all_the_time_lets_only_its_bearers_in(made: Gateway, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    path = token_file(tmp_path)
    ended = threading.Event()

    def rewrite() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            if number % 2:
                path.write_text(f"{number:04}" if number % 3 else "")  # in place: empty for a moment
            else:
                path.with_name("fresh").write_text(TOKEN)
                path.with_name("fresh").replace(path)

    def asked(token: str) -> set[int]:
        with httpx.Client(timeout=PATIENCE, headers={"authorization": f"Bearer {token}"}) as client:
            return {client.get(f"http://{listen}/healthz").status_code for _ in range(150)}

    writer = threading.Thread(target=rewrite)
    with serving(made, tmp_path, listen, path, FAST):
        writer.start()
        try:
            seen: set[int] = set()
            while seen != {200, 401}:  # that it comes to that is the rewriter's business
                seen |= asked(TOKEN)
                assert seen <= {200, 401}
            assert asked("none of them") == {401}
        finally:
            ended.set()
            writer.join()
        path.write_text("last")
        assert asked("last") == {200}
        assert asked(TOKEN) == {401}


def signed(directory: Path, name: str, signer: TlsFiles, *more: str) -> TlsFiles:
    """A caller's certificate with further options of ``openssl x509``."""
    cert, key, request = (directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
    argv = [
        "openssl",
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        f"/CN={name}",
    ]
    subprocess.run([*argv, "-keyout", str(key), "-out", str(request)], check=True, capture_output=True)
    argv = ["openssl", "x509", "-req", "-in", str(request), "-CA", str(signer.cert), "-CAkey", str(signer.key), *more]
    subprocess.run([*argv, "-out", str(cert)], check=True, capture_output=True)
    return TlsFiles(cert, key)


@pytest.fixture
def mutual(made: Gateway, tmp_path: Path) -> Iterator[tuple[str, TlsFiles, TlsFiles]]:
    """Where callers must show certificates, the server's own, and the authority's."""
    listen = f"127.0.0.1:{free_port()}"
    server, authority = certificate(tmp_path, "server"), certificate(tmp_path, "authority")
    with serving(made, tmp_path, listen, None, Exposure(TlsFiles(server.cert, server.key, authority.cert))):
        yield listen, server, authority


def let_in(listen: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
    """The session of a caller that gets an answer; raises OSError for one that is not let in."""
    host, port = listen.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE) as sock,
        context.wrap_socket(sock, server_hostname=host, session=session) as secured,
    ):
        secured.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if not secured.recv(100).startswith(b"HTTP/1.1 200"):
            raise ConnectionError
        return secured.session


def test_a_certificate_must_be_valid_now_and_for_callers(
    mutual: tuple[str, TlsFiles, TlsFiles], tmp_path: Path
) -> None:
    listen, server, authority = mutual
    let_in(listen, caller(server, signed(tmp_path, "good", authority, "-days", "1")))
    purpose = tmp_path / "purpose"
    purpose.write_text("extendedKeyUsage=serverAuth\n")
    for name, options in (("expired", ("-days", "-1")), ("a server's", ("-days", "1", "-extfile", str(purpose)))):
        with pytest.raises(OSError):
            let_in(listen, caller(server, signed(tmp_path, name, authority, *options)))


def test_a_withdrawn_authority_lets_nobody_resume(mutual: tuple[str, TlsFiles, TlsFiles], tmp_path: Path) -> None:
    """A session that is resumed shows no certificate again."""
    listen, server, authority = mutual
    context = caller(server, signed(tmp_path, "good", authority, "-days", "1"))
    session = let_in(listen, context)
    certificate(tmp_path, "stranger").cert.replace(authority.cert)
    for kept in (None, session):
        with pytest.raises(OSError):
            let_in(listen, context, kept if kept and kept.has_ticket else None)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        let_in(listen, context)
