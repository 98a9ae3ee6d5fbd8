"""Requests made from our own OpenAPI document, right and wrong: none is answered by what the document does not say.

``make fuzz`` sends more of them (``NATGW_FUZZ_REQUESTS`` for each operation).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.http_app import build_app
from tests.gateway_kit import STATE, gateway
from tests.http_kit import call

REQUESTS = int(os.environ.get("NATGW_FUZZ_REQUESTS", "3"))
MANY = REQUESTS > 100
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS = "/v1/events"  # events are told for ever


@pytest.mark.timeout(0 if MANY else 120)
def test_every_answer_is_one_that_the_document_names(tmp_path: Path) -> None:
    made = gateway(tmp_path / "state")
    app = build_app(made.service)
    assert call(app, "PUT", "/v1/gateway", json=STATE).status_code == 201
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).exclude(path=ENDLESS)
    asked = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        asked.add(operation.path)

        @settings(
            max_examples=REQUESTS,
            deadline=None,
            database=None,
            derandomize=not MANY,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def requests(case: schemathesis.Case) -> None:
            answer = case.call_and_validate(checks=CHECKS)
            # The kernel may refuse what is asked for; a defect of ours is something else.
            assert answer.status_code != 500 or answer.json()["type"] == "urn:natgw:problem:refused"

        requests()
    made.service.close()
    assert len(asked) > 15
