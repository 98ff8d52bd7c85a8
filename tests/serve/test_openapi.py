"""The server agrees with its OpenAPI document for requests that schemathesis generates."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from starlette.testclient import TestClient

from normweave.serve import create_app

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.fixture
def schema(service, access, keys, photos):
    app = create_app(service, access=access, pages=False)
    headers = {"Authorization": f"Bearer {keys['engineer']}"}
    with TestClient(app, headers=headers) as client:
        with open(photos[0], "rb") as file:
            client.post("/v1/inspect", files={"images": file})
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)


@pytest.mark.slow
def test_every_answer_is_in_the_openapi_document(schema, keys):
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(headers={"Authorization": f"Bearer {keys['engineer']}"}, checks=CHECKS)

        check()
        tried.add(operation.label)
    assert len(tried) > 15
