"""The routes of the whole state, the views and the probes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from api import http_examples as examples
from api.http_guards import asker
from api.http_models import NOT_INITIALIZED, NOT_READY, WRITE_PROBLEMS, Result, result
from api.http_problems import problem
from api.rendered import rendered_text
from api.traffic import conntrack, warnings
from gateway.service import Edit, Service
from gateway.status import Status
from rules.commands import Command, EipAdd, Init
from rules.edit import NotInitialized, edit_all
from rules.loadbalancer import LoadBalancerSpec
from rules.spec import GatewaySpec, Interfaces

DryRun = Annotated[bool, Query(alias="dryRun", description="only say what would be done")]


class Committer:
    """Hands an edit to the writer and waits for it without holding up the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(
        self, request: Request, edit: Edit, *, dry_run: bool = False, announce: Collection[str] = ()
    ) -> tuple[GatewaySpec | None, Result]:
        """The spec that stood before the edit, and what the edit did; raises what the service's change raises."""
        before: list[GatewaySpec | None] = []

        def noting(spec: GatewaySpec | None) -> GatewaySpec:
            before.append(spec)
            return edit(spec)

        changing = self._service.change(noting, by=asker(request), dry_run=dry_run, announce=announce)
        outcome = await asyncio.wrap_future(changing)
        changed = bool(outcome.plan) or outcome.spec != before[0]
        return before[0], result(outcome, changed=changed, dry_run=dry_run)


def add_gateway(app: FastAPI, service: Service, commit: Committer) -> None:
    """GET, PUT and PATCH of the whole state."""

    @app.get("/v1/gateway", responses=NOT_INITIALIZED)
    async def export() -> GatewaySpec:
        """The whole desired state; putting it back changes nothing."""
        return _standing(service)

    @app.put("/v1/gateway", responses={201: {"model": Result, "description": "Initialized so"}, **WRITE_PROBLEMS})
    async def replace(
        request: Request,
        response: Response,
        wanted: Annotated[GatewaySpec, Body(openapi_examples=examples.GATEWAY)],
        dry_run: DryRun = False,
    ) -> Result:
        """Make the gateway exactly this, in one transaction; it initializes a gateway that is not.

        Without `interfaces`, those that stand (or that the daemon was started with) stay.
        """
        spec = wanted.model_copy(update={"initialized": True})
        if "interfaces" not in wanted.model_fields_set:
            spec = spec.model_copy(update={"interfaces": service.status().interfaces})
        before, done = await commit(request, lambda _: spec, dry_run=dry_run)
        fresh = before is None or not before.initialized
        response.status_code = 201 if fresh and not dry_run else 200
        return done

    @app.patch("/v1/gateway", responses=WRITE_PROBLEMS)
    async def change(
        request: Request,
        commands: Annotated[list[Command], Body(openapi_examples=examples.COMMANDS)],
        dry_run: DryRun = False,
    ) -> Result:
        """Apply the commands in order, in one transaction: all of them or none.

        They are those that the verbs of nat-gateway.sh give: an add that contradicts what stands is a conflict,
        deleting what is not there is no error. EIPs named by `eip-add` are announced even if nothing changes.
        """
        interfaces = service.status().interfaces
        complete = [_complete(command, interfaces) for command in commands]

        def edit(spec: GatewaySpec | None) -> GatewaySpec:
            edited = edit_all(spec, complete)
            if edited is None:
                raise NotInitialized
            return edited

        announce = [command.ip for command in commands if isinstance(command, EipAdd)]
        _, done = await commit(request, edit, dry_run=dry_run, announce=announce)
        return done


def _complete(command: Command, interfaces: Interfaces) -> Command:
    """An ``init`` that names no interfaces means those that stand, or that the daemon was started with."""
    if isinstance(command, Init) and command.interfaces is None:
        return Init(interfaces=interfaces)
    return command


def add_views(app: FastAPI, service: Service) -> None:
    """What the gateway says of itself."""

    @app.get("/v1/status")
    async def status() -> Status:
        """One look at the gateway: readiness, interfaces, ARP, counts, address conflicts, warnings, the last error."""
        found = service.status()
        return found.model_copy(update={"warnings": [*found.warnings, *warnings(conntrack())]})

    @app.get("/v1/load-balancer", responses=NOT_INITIALIZED)
    async def load_balancer() -> LoadBalancerSpec:
        """The whole desired state of a pod that is a Service's load balancer (lb-svc); 404 in a NAT gateway's."""
        if service.load_balancer is None:
            raise HTTPException(404, "this pod is no load balancer")
        return service.load_balancer

    @app.get("/v1/ruleset", response_class=PlainTextResponse, responses=NOT_INITIALIZED)
    async def ruleset() -> str:
        """What is rendered from the desired state, as iptables-save (and, for its tables, nft) prints it."""
        spec = service.load_balancer or _standing(service)
        return rendered_text(spec, service.facts, maps=service.actual.maps.stands)


def add_probes(app: FastAPI, service: Service) -> None:
    """Liveness and readiness."""

    @app.get("/healthz", response_class=PlainTextResponse)
    async def alive() -> str:
        """The daemon answers."""
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses=NOT_READY)
    async def ready() -> Any:
        """The kernel is as wanted and nothing that follows a change is outstanding."""
        status = service.status()
        if status.ready:
            return "ok\n"
        last = f" (last error: {status.last_error.message})" if status.last_error else ""
        return problem(503, "not-ready", "Not ready", "; ".join(status.pending) + last, pending=status.pending)


def _standing(service: Service) -> GatewaySpec:
    spec = service.spec
    if spec is None or not spec.initialized:
        raise HTTPException(404, str(NotInitialized()))
    return spec
