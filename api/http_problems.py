"""Errors as problem documents (RFC 9457): one shape for every refusal, whoever refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.http_models import PROBLEM_JSON, FieldError, Problem
from gateway.ports import Busy, Refused
from gateway.transaction import NotReverted
from rules.appliance import OtherAppliance
from rules.commands import Command
from rules.edit import Conflict, NotInitialized
from rules.spec import EipLimit, InterfaceLimit

log = logging.getLogger(__name__)

TOLD_ERRORS = 100
"""Of what is wrong with one request; the number of the others is told."""

# pydantic puts the variant it chose into the path of an error; the sender never wrote that.
OPS = frozenset(variant.model_fields["op"].default for variant in get_args(get_args(Command)[0]))
VARIANTS = OPS | {EipLimit.__name__, InterfaceLimit.__name__}


def problem(
    status: int, kind: str, title: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> Response:
    """A response with a problem document; ``more`` are its extension members."""
    document = Problem(type=f"urn:natgw:problem:{kind}", title=title, status=status, detail=detail, **more)
    body = document.model_dump_json(by_alias=True, exclude_none=True)
    return Response(body, status, headers=dict(headers or {}), media_type=PROBLEM_JSON)


def install(app: FastAPI) -> None:
    """Make the app answer every error as a problem."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(NotInitialized, _not_initialized)
    app.add_exception_handler(OtherAppliance, _other_appliance)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def bad_field(where: str, field: str, message: str) -> RequestValidationError:
    """The error to raise for what the models cannot see; ``where`` is body, path or query."""
    return RequestValidationError([{"type": "value_error", "loc": (where, field), "msg": message}])


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors: Sequence[Mapping[str, Any]] = error.errors()
    for found in errors:
        if found["type"] == "conflict":
            # One body that holds two objects which cannot both stand.
            return problem(409, "conflict", "Conflict", found["msg"], **found["ctx"])
    fields = [FieldError(field=_field(e), message=_message(e)) for e in errors[:TOLD_ERRORS]]
    detail = "; ".join(f"{f.field}: {f.message}" for f in fields)
    if len(errors) > TOLD_ERRORS:
        detail += f"; and {len(errors) - TOLD_ERRORS} more"
    return problem(422, "invalid", "Invalid input", detail, errors=fields)


def _field(error: Mapping[str, Any]) -> str:
    """The dotted path of a field, without the part of the request that it stood in and without names of variants."""
    path = () if error["type"] == "json_invalid" else error["loc"][1:]
    return ".".join(str(part) for part in path if part not in VARIANTS) or "body"


def _message(error: Mapping[str, Any]) -> str:
    kind, text = error["type"], str(error["msg"])
    if kind == "json_invalid":
        return f"not JSON: {error.get('ctx', {}).get('error', text)}"
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "missing":
        return "required"
    return text.removeprefix("Value error, ")


def _conflict(_: Request, error: Exception) -> Response:
    assert isinstance(error, Conflict)
    wanted, standing = str(error.wanted), str(error.standing)
    return problem(409, "conflict", "Conflict", str(error), wanted=wanted, standing=standing)


def _not_initialized(_: Request, error: Exception) -> Response:
    return problem(409, "not-initialized", "Not initialized", str(error))


def _other_appliance(_: Request, error: Exception) -> Response:
    return problem(409, "other-appliance", "Other appliance", str(error))


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    if isinstance(error, Busy):
        return problem(503, "busy", "Busy", str(error), headers={"Retry-After": "1"}, retryable=True)
    return problem(
        500,
        "refused",
        "The kernel refused",
        str(error),
        step=error.step,
        reason=error.reason,
        retryable=error.retryable,
        restored=not isinstance(error, NotReverted),
    )


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = {404: "Not found", 405: "Method not allowed", 413: "Too large"}.get(error.status_code, "Request failed")
    kind = title.lower().replace(" ", "-")
    return problem(error.status_code, kind, title, error.detail, headers=error.headers)


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(500, "internal", "Internal error", f"{type(error).__name__}: {error}")
