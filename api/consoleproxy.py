"""``natgw console``: the page of a gateway for a browser on this machine, for as long as the command runs.

The API's socket is root's and no browser can open it. This listens on the loopback address alone, lets only reading
requests through, and only with a token that is made for this run and stands behind the ``#`` of the address, which
browsers keep to themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import secrets
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10.0
PASSED = ("accept", "if-modified-since", "if-none-match", "last-event-id", "range")
"""Headers that are passed on."""


async def serve_console(api: Path, port: int, ready: Callable[[str], None]) -> None:
    """Pass requests to 127.0.0.1:``port`` (0: any free one) on to the socket ``api``, until cancelled.

    ``ready`` gets the address to open. Raises OSError where the port is taken.
    """
    token = secrets.token_urlsafe(24)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await _serve(api, token, reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=HEAD_BYTES)
    host, chosen = server.sockets[0].getsockname()
    ready(f"http://{host}:{chosen}/console/#token={token}")
    async with server:
        await server.serve_forever()


async def _serve(api: Path, token: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request: its head is looked at, the answer relayed as it comes."""
    async with asyncio.timeout(HEAD_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
    asked, refused = _asked(head, token)
    if refused:
        writer.write(f"HTTP/1.1 {refused}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        return
    try:
        answers, asking = await asyncio.open_unix_connection(str(api))
    except OSError:
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        return
    with contextlib.closing(asking):
        asking.write(asked)
        while part := await answers.read(HEAD_BYTES):
            writer.write(part)
            await writer.drain()


def _asked(head: bytes, token: str) -> tuple[bytes, str]:
    """The head to pass on, and the status that the request is refused with (empty: it may pass).

    What is passed on is written anew from what was looked at, never the caller's own bytes: the API takes a bare line
    feed for the end of a line, so a second request could hide behind one that is let through.
    """
    request, *lines = head.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"(GET|HEAD) (/[!-~]*) HTTP/1\.[01]", request)
    if found is None:
        return b"", "400 Bad Request" if request.startswith(("GET ", "HEAD ")) else "405 Method Not Allowed"
    method, target = found.groups()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    path = target.partition("?")[0]
    public = ".." not in path and (path == "/" or path.startswith("/console/"))
    given = headers.get("authorization", "").removeprefix("Bearer ")
    if not public and not hmac.compare_digest(given.encode("latin-1"), token.encode()):
        return b"", "401 Unauthorized"
    passed = [f"{method} {target} HTTP/1.1", "Host: gateway", "Connection: close"]
    passed += [f"{name}: {value}" for name in PASSED if (value := headers.get(name)) and value.isprintable()]
    return "\r\n".join([*passed, "", ""]).encode("latin-1"), ""
