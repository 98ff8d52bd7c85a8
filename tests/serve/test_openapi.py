"""The server agrees with its OpenAPI document for requests that schemathesis generates."""

import base64
import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from starlette.testclient import TestClient

from normweave.serve import create_app, events
from normweave.serve.authentication import OPEN
from required import absent

GENERATOR = shutil.which("openapi-python-client")
CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.fixture
def schema(service, access, keys, photos, monkeypatch):
    monkeypatch.setattr(events, "STREAM_SECONDS", 0.0)  # the client of the tests reads answers to their end
    app = create_app(service, access=access, pages=False)
    headers = {"Authorization": f"Bearer {keys['engineer']}"}
    with TestClient(app, headers=headers) as client:
        with open(photos[0], "rb") as file:
            client.post("/v1/inspect", files={"images": file})
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)


def references(node):
    """Yield every $ref of a document."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_every_reference_can_be_resolved_and_every_operation_names_its_token(app):
    document = app.openapi()
    found = set(references(document))
    assert "#/components/schemas/EncodedImage" in found
    for reference in found:
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert (path in OPEN) == ("security" not in operation), path
            if method in ("post", "put"):
                assert {"400", "408", "413", "422", "429", "503"} <= operation["responses"].keys(), path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert set(answer["content"]) == {"application/problem+json"}, path


@pytest.fixture
def generated(app, tmp_path, monkeypatch):
    """A client made from the document by openapi-python-client."""
    if GENERATOR is None:
        absent("openapi-python-client", "openapi-python-client was not found: pipx install openapi-python-client")
    source, settings = tmp_path / "openapi.json", tmp_path / "settings.json"
    source.write_text(json.dumps(app.openapi()))
    settings.write_text(
        json.dumps(
            {
                "post_hooks": [],
                "package_name_override": "generated_client",
                "content_type_overrides": dict.fromkeys(("image/png", "image/*"), "application/octet-stream"),
            }
        )
    )
    options = ["--meta", "none", "--config", settings, "--output-path", tmp_path / "generated_client"]
    done = subprocess.run(
        [GENERATOR, "generate", "--fail-on-warning", "--path", source, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("generated_client")
    for name in [name for name in sys.modules if name.partition(".")[0] == "generated_client"]:
        del sys.modules[name]


def test_a_generated_client(generated, live, keys, photos):
    models, types = (importlib.import_module(f"generated_client.{name}") for name in ("models", "types"))
    given = generated.AuthenticatedClient(base_url=live, token=keys["engineer"], httpx_args={"trust_env": False})
    with given as client:
        use_generated(client, models, types, Path(photos[0]).read_bytes())


def use_generated(client, models, types, content):
    """Call some of its operations."""

    def call(operation, *path, **given):
        function = importlib.import_module(f"generated_client.api.{operation}").sync
        return function(*path, client=client, **given)

    encoded = models.EncodedImage(data=base64.b64encode(content).decode(), name="a.png")
    bodies = [
        models.InspectIn(images=[encoded]),
        models.InspectV1InspectPostFilesInspectForm(images=[types.File(io.BytesIO(content), "a.png", "image/png")]),
        types.File(io.BytesIO(content)),
    ]
    for number, body in enumerate(bodies, 1):
        answer = call("default.inspect_v1_inspect_post", body=body, name="a.png", idempotency_key=f"key {number}")
        (one,) = answer.inspections
        assert (one.id, one.name, one.error) == (number, "a.png", None)
    listed = call(
        "default.inspections_v1_inspections_get", after=1, source=models.InspectionsV1InspectionsGetSourceType0.API
    )
    assert [one.id for one in listed.inspections] == [2, 3]
    assert listed.inspections[0].received_at.tzinfo is not None
    reviewed = models.ReviewIn(decision=models.ReviewInDecision.REJECT, comment="a scratch")
    assert call("default.review_v1_inspections_id_review_post", 1, body=reviewed).review.comment == "a scratch"
    assert call("default.image_v1_inspections_id_image_get", 1).payload.read() == content
    problem = call("default.inspection_v1_inspections_id_get", 99)
    assert (type(problem), problem.code, problem.status) == (models.Problem, "not_found", 404)
    assert call("health.readyz_readyz_get").status == "ok"
    assert call("tokens.make_v1_tokens_post", body=models.TokenIn(name="camera")).role == "operator"


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
