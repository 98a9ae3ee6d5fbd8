"""What stands before the HTTP face: a limit on the size of requests and, on TCP, a bearer token."""

from __future__ import annotations

import hmac
import logging
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http_console import is_public
from api.http_problems import problem
from api.listen import CannotListen, TokenFile
from gateway import meters
from gateway.journal import Asker

log = logging.getLogger(__name__)

_METHODS = {"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"}
_REFUSALS = {401: "token", 403: "user", 413: "size", 429: "rate"}

LONGEST_WORDS = 200
"""Characters of a request that the journal keeps."""
PEER = "peer:"
"""What the client's name begins with where it came by a Unix socket: its process and user follow."""


def asker(request: Request) -> Asker:
    """Who makes the request, for the journal: of a local one the process and user, else the address."""
    words = f"HTTP {request.method} {quote(request.url.path, safe='/:')}"[:LONGEST_WORDS]
    host = request.client.host if request.client else None
    if host and host.startswith(PEER):
        pid, _, uid = host.removeprefix(PEER).partition(",")
        return Asker(words, int(pid) or None, int(uid))
    return Asker(words, client=host)


class SizeLimit:
    """Refuses request bodies of more than ``limit`` bytes or ``values`` values (413), whether announced or only sent.

    A value of two bytes becomes one of hundreds once it is parsed, and of thousands if it is wrong.
    """

    def __init__(self, app: ASGIApp, limit: int, values: int) -> None:
        self._app = app
        self._limit, self._values = limit, values
        self._detail = f"the body is larger than {limit} bytes, or has more than {values} values"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit:
            await problem(413, "too-large", "Too large", self._detail)(scope, receive, send)
            return
        received = values = 0

        async def counted() -> Message:
            nonlocal received, values
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            values += sum(map(body.count, (b",", b"{", b"[")))  # each begins one; in a text they count as well
            if received > self._limit or values > self._values:
                raise HTTPException(413, self._detail)
            return message

        await self._app(scope, counted, send)


class Counted:
    """Counts answered requests by method and status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                meters.HTTP_REQUESTS.add(method, str(message["status"]))
                if message["status"] in _REFUSALS:
                    meters.REFUSED_CONNECTIONS.add("http", _REFUSALS[message["status"]])
            await send(message)

        await self._app(scope, receive, counting)


class LocalUsers:
    """Lets only these users' processes pass on a Unix socket; the socket's mode should have kept others out before."""

    def __init__(self, app: ASGIApp, users: frozenset[int]) -> None:
        self._app = app
        self._users = users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = str((scope.get("client") or ("",))[0])
        user = name.removeprefix(PEER).partition(",")[2]
        if scope["type"] != "http" or (name.startswith(PEER) and user.isdecimal() and int(user) in self._users):
            await self._app(scope, receive, send)
            return
        detail = f"user {user or 'unknown'} may not use this gateway"
        await problem(403, "forbidden", "Forbidden", detail)(scope, receive, send)


class SameOrigin:
    """Refuses what a page of another site makes a browser send (403); the console's own requests and programs pass.

    A browser shows its user's certificate to whatever a page asks for. It says where the page is from.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host", "")
        foreign = foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if scope["type"] != "http" or not foreign:
            await self._app(scope, receive, send)
            return
        detail = "a page of another site may not use this gateway"
        await problem(403, "forbidden", "Forbidden", detail)(scope, receive, send)


class BearerToken:
    """Lets only requests with the right ``Authorization: Bearer`` pass (RFC 6750); all others get 401."""

    def __init__(self, app: ASGIApp, tokens: TokenFile) -> None:
        self._app = app
        self._tokens = tokens
        self._said = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or is_public(scope["path"])
            or self._admits(Headers(scope=scope).get("authorization", ""))
        ):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        detail = "this listener needs the bearer token of the gateway"
        await problem(401, "unauthorized", "Unauthorized", detail, headers=headers)(scope, receive, send)

    def _admits(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        try:
            token = self._tokens.read()
        except CannotListen as error:
            if self._said != str(error):  # once, however often somebody calls
                log.error("requests over TCP are refused: %s", error)
            self._said = str(error)
            return False
        self._said = ""
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token)
        return scheme.lower() == "bearer" and right
