"""The routes that look into the kernel: one packet's story, the whole state, what surrounds the gateway."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query
from starlette.exceptions import HTTPException

from api.explain import (
    Endpoint,
    Explanation,
    Question,
    endpoint,
    explain,
    explain_flow,
    filters_for,
    has_end,
)
from api.http_models import WRITE_PROBLEMS, Problem, Responses
from api.http_problems import bad_field
from api.state import State, read_now, state_of
from gateway.service import Service
from rules.edit import NotInitialized
from rules.fields import InterfaceName
from rules.surroundings import Surroundings

_EXPLAIN: Responses = {
    404: {"model": Problem, "description": "The gateway is not initialized, or no such connection is tracked"},
    422: WRITE_PROBLEMS[422],
}


def add_explain(app: FastAPI, service: Service) -> None:
    """They are not async: each waits for the writer or for programs, in a thread of FastAPI's pool."""

    @app.get("/v1/explain", responses=_EXPLAIN)
    def explain_packet(
        protocol: Annotated[Literal["tcp", "udp", "icmp"], Query()],
        src: Annotated[
            str | None, Query(description="address:port, or an address", examples=["10.0.1.10:40000"])
        ] = None,
        dst: Annotated[str | None, Query(description="address:port, or an address", examples=["192.0.2.1:443"])] = None,
        in_interface: Annotated[
            InterfaceName | None, Query(alias="in", description="by default where the source lies")
        ] = None,
        flow: Annotated[
            str | None, Query(description="instead of src and dst: one end of a tracked connection")
        ] = None,
    ) -> Explanation:
        """What becomes of a connection's first packet: its walk through the kernel's rules, and its story.

        With `flow`, a live connection is looked for that has this address (and port) on any of its ends, translated or
        not: who is 203.0.113.7:40211?
        """
        if flow is not None:
            return _of_flow(service, protocol, _endpoint("flow", flow))
        if src is None or dst is None:
            raise bad_field("query", "src" if src is None else "dst", "required")
        source, destination = _endpoint("src", src), _endpoint("dst", dst)
        if protocol != "icmp" and destination.port is None:
            raise bad_field("query", "dst", f"{protocol} needs a port (192.0.2.1:443)")
        _initialized(service)
        question = Question(protocol=protocol, source=source, destination=destination, in_interface=in_interface)
        return explain(question, read_now(service))

    @app.get("/v1/state")
    def state() -> State:
        """Everything at once, read now: what is wanted, the rules, links, addresses, routes, settings, neighbours.

        `natgw explain --offline` takes it back.
        """
        return state_of(service)

    @app.get("/v1/surroundings")
    def surroundings() -> Surroundings:
        """What surrounds the gateway in its namespace: settings, the ARP table, rules of others. Nobody is asked."""
        return service.around()


def _of_flow(service: Service, protocol: str, end: Endpoint) -> Explanation:
    _initialized(service)
    filters = filters_for(protocol, end)
    matching = service.ask(lambda kernel: list(kernel.flows.matching(filters))).result()
    found = [flow for flow in matching if has_end(flow, end)]
    if not found:
        which = f"{end.address}:{end.port}" if end.port else end.address
        raise HTTPException(404, f"no {protocol} connection with the end {which} is tracked")
    return explain_flow(found, read_now(service))


def _endpoint(name: str, text: str) -> Endpoint:
    try:
        return endpoint(text)
    except ValueError:
        raise bad_field("query", name, f"{text!r} is not an IPv4 address with a port (192.0.2.1:443)") from None


def _initialized(service: Service) -> None:
    spec = service.spec or service.load_balancer
    if spec is None or not spec.initialized:
        raise HTTPException(404, str(NotInitialized()))
