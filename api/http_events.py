"""``/v1/events``: what happened, as a stream that can be resumed (server-sent events) or as a list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from gateway.journal import Event, Journal, Subscription, TooManyReaders

HEARTBEAT_SECONDS = 15.0
"""So often a silent stream says that it lives: proxies close what is silent, often after a minute."""
RETRY_MILLISECONDS = 2000

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "server-sent events: `id`, `event` (the kind) and `data` (the event as JSON); an event `gap` "
        "tells how many were lost because the reader was too slow, or came back too late",
        "content": {"text/event-stream": {}},
    },
    503: {"description": "As many readers as there may be follow already"},
}


def add_events(app: FastAPI, journal: Journal) -> None:
    """The one route, in its two forms."""

    @app.get("/v1/events", response_model=list[Event], responses=_STREAM)
    async def events(
        follow: Annotated[bool, Query(description="stream what happens from now on; false: list what did")] = True,
        after: Annotated[int | None, Query(description="only events with a higher number")] = None,
        limit: Annotated[int, Query(ge=1, le=10_000, description="of a list: so many, the newest")] = 1000,
        last_event_id: Annotated[str | None, Header(description="where a stream broke off")] = None,
    ) -> Any:
        """What happened: changes with who asked and what became of it, repairs, refusals, other holders of EIPs.

        A stream that broke off is resumed with the header Last-Event-ID, as browsers do by themselves.
        """
        if not follow:
            return journal.events(after, limit=limit)
        if last_event_id and last_event_id.isdecimal():
            after = int(last_event_id)
        waking = _Waking()
        try:
            subscription = journal.subscribe(after, wake=waking.wake)
        except TooManyReaders as error:
            raise HTTPException(503, str(error)) from error
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = _stream(subscription, waking)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


class _Waking:
    """Wakes a coroutine of this loop from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = asyncio.Event()

    def wake(self) -> None:
        self._loop.call_soon_threadsafe(self._due.set)

    async def wait(self, seconds: float) -> bool:
        """Whether it was woken within ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                await self._due.wait()
        except TimeoutError:
            return False
        self._due.clear()
        return True


async def _stream(subscription: Subscription, waking: _Waking) -> AsyncIterator[str]:
    lost = 0
    with subscription:
        yield f"retry: {RETRY_MILLISECONDS}\n\n"
        while True:
            taken = subscription.take()
            if subscription.lost > lost:
                yield f'event: gap\ndata: {{"lost": {subscription.lost - lost}}}\n\n'
                lost = subscription.lost
            for event in taken:
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
            if subscription.ended:
                return
            if not await waking.wait(HEARTBEAT_SECONDS):
                yield ": still here\n\n"
