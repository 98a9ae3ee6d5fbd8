"""The application of the HTTP face: FastAPI over the service.

The routes are in ``api.http_gateway`` (the whole state, views, probes) and ``api.http_items`` (one object); errors
are problem documents (RFC 9457). ``api.http`` puts it on sockets.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.http_console import add_console
from api.http_drift import add_drift
from api.http_events import add_events
from api.http_explain import add_explain
from api.http_gateway import Committer, add_gateway, add_probes, add_views
from api.http_guards import SizeLimit
from api.http_items import add_items
from api.http_models import PROBLEM_JSON
from api.http_problems import install
from api.http_traffic import Figures, add_traffic
from gateway.service import Service

MAX_BODY_BYTES = 32 * 2**20
MAX_VALUES = 1_000_000  # some 150,000 objects

ABOUT = """The desired state of one NAT gateway.

Every write is one transaction: a whole state (PUT /v1/gateway), a list of commands (PATCH /v1/gateway) or one
object. PUT on an object means "make it so": it creates, replaces or changes nothing. Exporting the state
(GET /v1/gateway) and putting it back changes nothing. Errors are problem documents (RFC 9457)."""


def build_app(service: Service, *, max_body: int = MAX_BODY_BYTES, figures: Figures | None = None) -> FastAPI:
    """The application over a started service. It asks nobody who they are: see ``api.http``."""
    app = FastAPI(
        title="vpc-nat-gateway",
        version=service.status().version or "0",
        description=ABOUT,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    install(app)
    app.add_middleware(SizeLimit, limit=max_body, values=MAX_VALUES)
    commit = Committer(service)
    add_gateway(app, service, commit)
    add_items(app, service, commit)
    add_views(app, service)
    add_explain(app, service)
    add_drift(app, service)
    add_events(app, service.journal)
    add_probes(app, service)
    add_traffic(app, figures or Figures.of(service))
    add_console(app)
    _say_problem_json(app)
    return app


def _say_problem_json(app: FastAPI) -> None:
    """FastAPI declares every model as application/json; problems have a media type of their own."""
    declare = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            operations = (operation for path in declare()["paths"].values() for operation in path.values())
            for response in (r for operation in operations for r in operation["responses"].values()):
                content = response.get("content", {})
                for media, said in list(content.items()):
                    if said.get("schema", {}).get("$ref", "").endswith("/Problem"):
                        del content[media]
                        content[PROBLEM_JSON] = said
        return declare()

    app.openapi = openapi  # type: ignore[method-assign]
