"""The route of the traffic."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from gateway.traffic import Traffic


def add_traffic(app: FastAPI, read: Callable[[], Traffic]) -> None:
    """What flows through the gateway."""

    # Not async: it is read in a thread of FastAPI's pool, for it may wait for another process.
    @app.get("/v1/traffic")
    def traffic() -> Traffic:
        """Bytes, packets and flows of every EIP, floating IP, DNAT and SNAT, who talks most, and how full the table is.

        "in" comes from the external network, "out" goes to it; flows count in the direction in which they were opened.
        """
        return read()
