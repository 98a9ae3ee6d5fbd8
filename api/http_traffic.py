"""The routes of the traffic and of the metrics, and the application of the listener that has nothing but metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fastapi import FastAPI, Response
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from api.metrics import CONTENT_TYPE, Exposition, ShapedReader, no_limits
from api.traffic import TrafficReader
from gateway.service import Service
from gateway.traffic import Traffic


@dataclass(frozen=True)
class Figures:
    """What gives the traffic, and the text of the metrics."""

    traffic: Callable[[], Traffic]
    metrics: Callable[[], bytes]

    @classmethod
    def of(cls, service: Service, watcher: Path | None = None, shaped: ShapedReader = no_limits) -> Self:
        """Those of a service; ``watcher`` is the flow watcher's socket, ``shaped`` reads the counters of limits."""
        return cls(TrafficReader(lambda: service.spec, watcher), Exposition(service, watcher, shaped))


def add_traffic(app: FastAPI, figures: Figures) -> None:
    """What flows through the gateway, and everything that it counts."""

    # Not async: they are read in a thread of FastAPI's pool, for they may wait for another process.
    @app.get("/v1/traffic")
    def traffic() -> Traffic:
        """Bytes, packets and flows of every EIP, floating IP, DNAT and SNAT, who talks most, and how full the table is.

        "in" comes from the external network, "out" goes to it; flows count in the direction in which they were opened.
        """
        return figures.traffic()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Everything that is counted, in Prometheus' text format; docs/metrics.md explains each."""
        return Response(figures.metrics(), media_type=CONTENT_TYPE)


def metrics_app(figures: Figures) -> Starlette:
    """``/metrics`` and ``/healthz`` and nothing else, for a listener without a token."""

    def metrics(_: Request) -> Response:
        return Response(figures.metrics(), media_type=CONTENT_TYPE)

    def alive(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", alive)])
