"""The REST interface of a library."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from bundles import ADA, wait_for
from inspections import inspect_files
from normweave.serve import create_app
from normweave.serve.access import Access
from normweave.serve.model_store import Actor


@pytest.fixture
def tokens(library_service):
    access = Access(library_service.store, session_hours=12)
    return access, {made.token.role: made.secret for made in access.create_first_tokens()}


@pytest.fixture
def rest(library_service, tokens):
    """Client with the token of an engineer."""
    access, secrets = tokens
    app = create_app(library_service, access=access, pages=False)
    headers = {"Authorization": f"Bearer {secrets['engineer']}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client


def problem(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def test_without_a_library_the_routes_name_the_way_to_one(client):
    answer = client.get("/v1/models")
    assert problem(answer) == (409, "no_library")
    assert "--library DIR" in answer.json()["detail"]
    for method, path in (("POST", "/v1/models/rollback"), ("GET", "/v1/models/compare")):
        assert problem(client.request(method, path)) == (409, "no_library")


def test_the_whole_way(rest, hashes, photos, library_service):
    listed = rest.get("/v1/models").json()
    assert (listed["active"], listed["candidate"], listed["roll_back_to"]) == (hashes["old"], None, None)
    assert [(one["name"], one["state"]) for one in listed["models"]] == [
        ("new", "ready"),
        ("old", "active"),
        ("torn", "damaged"),
    ]
    assert "not the file that was saved" in listed["models"][2]["reason"]
    started = rest.post(f"/v1/models/{hashes['new']}/shadow").json()
    assert started["candidate"] == hashes["new"]
    assert started["shadow"]["actor"] == "engineer"
    sent = [rest.post("/v1/inspect", files={"images": Path(path).read_bytes()}) for path in photos[:12]]
    inspections = [answer.json()["inspections"][0] for answer in sent]
    wait_for(lambda: rest.get("/v1/models/compare").json()["judged"] == 12)
    compared = rest.get("/v1/models/compare").json()
    assert compared["differences"] == len(compared["inspections"]) > 0
    assert sum(pair["n"] for pair in compared["pairs"]) == 12
    first = compared["inspections"][0]
    assert first["inspection"]["verdict"] != first["candidate"]["verdict"]

    # a reviewer decides: the candidate was right on the first, wrong on the others
    right = {"normal": "accept", "anomalous": "reject", "unknown": "reject"}
    for number, one in enumerate(compared["inspections"]):
        decision = right[one["candidate" if number == 0 else "inspection"]["verdict"]]
        rest.post(f"/v1/inspections/{one['inspection']['id']}/review", json={"decision": decision})
    reviewed = rest.get("/v1/models/compare").json()["reviewed"]
    verdicts = [(one["inspection"]["verdict"], one["candidate"]["verdict"]) for one in compared["inspections"]]
    both = sum("normal" not in pair for pair in verdicts)  # rejected, and neither found it normal
    assert reviewed["n"] == len(verdicts)
    assert reviewed["candidate_right"] == 1 + sum("normal" not in pair for pair in verdicts[1:])
    assert reviewed["active_right"] == len(verdicts) - 1 + both * ("normal" not in verdicts[0])

    overlay = rest.get(first["candidate"]["overlay_url"], params={"max_side": 32})
    assert np.asarray(Image.open(io.BytesIO(overlay.content))).shape == (32, 32, 3)
    own = rest.get(first["inspection"]["overlay_url"], params={"max_side": 32})
    assert own.content != overlay.content
    equal = next(
        one for one in inspections if one["id"] not in [each["inspection"]["id"] for each in compared["inspections"]]
    )
    missing = rest.get(f"/v1/models/{hashes['new']}/inspections/{equal['id']}/overlay")
    assert problem(missing) == (404, "no_candidate_map")

    page = rest.get("/v1/models/compare", params={"limit": 1}).json()
    assert page["next"] == first["inspection"]["id"]
    rest_of = rest.get("/v1/models/compare", params={"before": page["next"]}).json()["inspections"]
    assert [one["inspection"]["id"] for one in rest_of] == [
        one["inspection"]["id"] for one in compared["inspections"][1:]
    ]
    subclass = first["inspection"]["subclass"]
    only = rest.get("/v1/models/compare", params={"subclass": subclass}).json()
    assert {pair["subclass"] for pair in only["pairs"]} == {subclass}
    assert rest.get("/v1/models/compare", params={"since": "2999-01-01T00:00:00"}).json()["judged"] == 0

    promoted = rest.post(f"/v1/models/{hashes['new']}/promote").json()
    assert (promoted["active"], promoted["roll_back_to"]) == (hashes["new"], hashes["old"])
    assert rest.get("/v1/model").json()["bundle_hash"] == hashes["new"]
    assert rest.get(f"/v1/inspections/{inspections[0]['id']}").json()["bundle_hash"] == hashes["old"]
    rolled = rest.post("/v1/models/rollback").json()
    assert (rolled["active"], rolled["roll_back_to"]) == (hashes["old"], None)
    events = [one["event"] for one in rest.get("/v1/audit").json()["entries"]]
    assert events[:3] == ["model_rolled_back", "model_promoted", "shadow_started"]


def test_problems(rest, hashes):
    unknown = "0" * 64
    for method, path, expected in (
        ("POST", f"/v1/models/{unknown}/shadow", (404, "unknown_model")),
        ("POST", f"/v1/models/{hashes['torn']}/shadow", (409, "bundle_damaged")),
        ("POST", f"/v1/models/{hashes['old']}/shadow", (409, "already_active")),
        ("DELETE", f"/v1/models/{hashes['new']}/shadow", (409, "not_candidate")),
        ("POST", f"/v1/models/{hashes['new']}/promote", (409, "not_candidate")),
        ("POST", "/v1/models/rollback", (409, "nothing_to_roll_back_to")),
        ("GET", "/v1/models/compare", (409, "no_candidate")),
        ("GET", "/v1/models/compare?verdict=normal", (422, "unknown_parameter")),
    ):
        assert problem(rest.request(method, path)) == expected, path


def test_an_operator_looks_and_changes_nothing(rest, hashes, tokens):
    _, secrets = tokens
    headers = {"Authorization": f"Bearer {secrets['operator']}"}
    assert rest.get("/v1/models", headers=headers).status_code == 200
    for method, path in (
        ("POST", f"/v1/models/{hashes['new']}/shadow"),
        ("DELETE", f"/v1/models/{hashes['new']}/shadow"),
        ("POST", f"/v1/models/{hashes['new']}/promote"),
        ("POST", "/v1/models/rollback"),
    ):
        assert problem(rest.request(method, path, headers=headers)) == (403, "not_allowed")


def test_a_repeated_request_names_the_bundle_that_judged_it(rest, models, hashes, photos, library_service):
    with open(photos[0], "rb") as file:
        content = file.read()
    request = {"content": content, "headers": {"Content-Type": "image/png", "Idempotency-Key": "part 1"}}
    first = rest.post("/v1/inspect", **request).json()["inspections"]
    models.records.start_shadow(hashes["new"], active_hash=hashes["old"], actor=ADA)  # without its process
    models.promote(hashes["new"], Actor("Ada"))
    assert rest.post("/v1/inspect", **request).json()["inspections"] == first
    assert first[0]["bundle_hash"] == hashes["old"]
    assert inspect_files(library_service, photos[0])[0].outcome.bundle_hash == hashes["new"]
