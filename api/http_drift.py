"""What others changed in the kernel: the comparison of now, and what was found and repaired lately."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from pydantic import Field
from starlette.exceptions import HTTPException

from api.http_models import NOT_INITIALIZED
from gateway.service import Service
from gateway.status import DriftEntry, DriftStatus
from rules.differences import differences
from rules.edit import NotInitialized
from rules.spec import Part
from rules.state import Actual

LISTED = 1000


class DriftReport(Part):
    """``now``: how the kernel differs at this moment, one line an object (the first thousand of ``count``).

    ``history``: what was found and, unless the policy is to report, repaired; the newest first.
    """

    now: list[str]
    count: int
    status: DriftStatus
    history: list[DriftEntry] = Field(default_factory=list)


def add_drift(app: FastAPI, service: Service) -> None:
    """GET /v1/drift."""

    @app.get("/v1/drift", responses=NOT_INITIALIZED)
    async def drift() -> DriftReport:
        """Read the whole kernel, compare it with the desired state, and say what differs; nothing is written."""
        if service.spec is None and service.load_balancer is None:
            raise HTTPException(404, str(NotInitialized()))
        compared = await asyncio.wrap_future(service.compare())
        found = differences(compared.plan, compared.read or Actual())
        return DriftReport(
            now=list(found[:LISTED]),
            count=len(found),
            status=service.drift.status(),
            history=service.drift.entries(),
        )
