"""The console: one page that shows the gateway, from files in this package. It only reads, through the API itself.

The files hold nothing of the gateway, so they need no token; what the page asks for does.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

PATH = "/console"
ASSETS = Path(__file__).parent / "console"

# The page loads nothing from elsewhere, runs no script but its own, and stands in nobody's frame.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
]


def add_console(app: FastAPI) -> None:
    """The page at ``/console/``; ``/`` leads there."""

    @app.get("/", include_in_schema=False)
    def home() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    app.mount(PATH, _Assets(directory=ASSETS, html=True))


def is_public(path: str) -> bool:
    """Whether a path is one of the page's own files, which are no secret."""
    return path in ("/", PATH) or path.startswith(f"{PATH}/")


class _Assets(StaticFiles):
    """Files, with headers that say what the page may do."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await super().__call__(scope, receive, sending)
