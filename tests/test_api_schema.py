"""The service keeps to its own description: requests are made of the OpenAPI document, sound ones and others.

Whatever is sent, the answer has a status and a form that the document names, and the service does not fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from guarded import TOKEN, send
from hypothesis import HealthCheck, settings
from job_host import grown_run, job, service
from some_cases import ALL

from g2rpo_trainer.service.api_document import document

schemathesis = pytest.importorskip("schemathesis", reason="makes the requests")
from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

KEPT = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]
"""What every answer keeps. A form cannot say all that a recipe refuses, so sound requests may be refused."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve, with a job that has a run."""
    with service(tmp_path_factory.mktemp("served")) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        grown_run(made, "one", 3)
        made.spool.end("one", "done")
        yield f"http://127.0.0.1:{port}"


SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.config.phases.coverage.enabled = ALL
"""Thousands of systematic requests, which take minutes."""


@SCHEMA.parametrize()
@settings(
    max_examples=300 if ALL else 5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_the_service_does_as_it_says(case: Any, address: str) -> None:
    answer = case.call(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)
    if answer.status_code != 413:  # which the tool does not count among refusals
        case.validate_response(answer, checks=KEPT)
