"""Parts over the REST interface: sent with the images, read when they are closed."""

import base64
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from normweave.outcome.parts import PartRule
from normweave.serve import create_app


@pytest.fixture
def client(service, access, keys):
    service.part_rule = PartRule(views=2, seconds=0.2)
    app = create_app(service, access=access, pages=False)
    headers = {"Authorization": f"Bearer {keys['operator']}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def content(photos):
    return Path(photos[0]).read_bytes()


def closed(client, part, *, verdicts=1):
    """Return the verdicts on a part, newest first, when there are so many."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = client.get("/v1/parts", params={"part_id": part}).json()["parts"]
        if len(found) >= verdicts:
            return found
        time.sleep(0.02)
    raise AssertionError(f"part {part} was not closed")


def send(client, content, *names, **fields):
    files = [("images", (name, content, "image/png")) for name in names]
    return client.post("/v1/inspect", files=files, data=fields)


def test_the_images_of_a_part_in_one_request(client, content):
    answer = send(client, content, "a.png", "b.png", part="17", view=["front", "back"])
    shown = [(one["part_id"], one["view"]) for one in answer.json()["inspections"]]
    assert shown == [("17", "front"), ("17", "back")]
    (part,) = closed(client, "17")
    assert (part["images"], part["expected"], part["corrects"]) == (2, 2, None)
    detail = client.get(f"/v1/parts/{part['id']}").json()
    assert {one["view"] for one in detail["inspections"]} == {"front", "back"}
    assert [one["id"] for one in detail["verdicts"]] == [part["id"]]


def test_the_images_of_two_parts_in_one_request_as_a_form_and_as_json(client, content):
    send(client, content, "a.png", "b.png", part=["17", "18"])
    encoded = base64.b64encode(content).decode()
    images = [{"name": "c.png", "data": encoded, "part": "17"}, {"data": encoded, "part": "18", "view": "d"}]
    found = client.post("/v1/inspect", json={"images": images}).json()["inspections"]
    assert [(one["part_id"], one["view"]) for one in found] == [("17", "c"), ("18", "d")]
    assert [closed(client, part)[0]["images"] for part in ("17", "18")] == [2, 2]


def test_an_image_as_the_body_and_a_view_that_never_comes(client, content):
    headers = {"Content-Type": "image/png"}
    client.post("/v1/inspect", params={"part": "17", "view": "front"}, content=content, headers=headers)
    (part,) = closed(client, "17")
    assert part["verdict"] in ("incomplete", "anomalous", "unknown")
    assert part["reasons"][-1] == {"reason": "missing", "view": None, "inspection": None}


def test_fields_that_match_no_images_are_refused(client, content):
    answer = send(client, content, "a.png", "b.png", part=["1", "2", "3"])
    assert answer.status_code == 422
    assert "once for all 2 images or once for each" in answer.json()["detail"]
    assert send(client, content, "a.png", part="x" * 501).status_code == 422


def test_a_request_with_a_key_and_another_part_is_another_request(client, content):
    headers = {"Idempotency-Key": "1"}
    files = [("images", ("a.png", content, "image/png"))]
    first = client.post("/v1/inspect", files=files, data={"part": "17"}, headers=headers)
    again = client.post("/v1/inspect", files=files, data={"part": "17"}, headers=headers)
    assert first.json() == again.json()
    other = client.post("/v1/inspect", files=files, data={"part": "18"}, headers=headers)
    assert other.json()["code"] == "key_reused"


def test_a_part_that_is_not_there(client):
    answer = client.get("/v1/parts/99")
    assert (answer.status_code, "GET /v1/parts" in answer.json()["detail"]) == (404, True)
