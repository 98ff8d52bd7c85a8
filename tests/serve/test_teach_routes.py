"""The routes that teach a new product: for engineers, from stored inspections and from files."""

import base64
import time
from pathlib import Path

import pytest

from inspections import inspect_files


@pytest.fixture
def body(service, photos):
    """Six stored inspections and two files."""
    found = inspect_files(service, *photos[:6])
    images = [{"name": "a.png", "data": base64.b64encode(Path(path).read_bytes()).decode()} for path in photos[6:8]]
    return {"category": "cloth", "subclass": "new", "inspections": [one.id for one in found], "images": images}


def test_a_job_over_rest(client, body, monkeypatch):
    """With a program that does not exist, so that nothing is trained."""
    assert client.get("/v1/teach").json() == {"missing": None, "job": None}
    teaching = client.app.state.teaching
    monkeypatch.setattr(teaching, "program", ("normweave-is-not-here",))
    answer = client.post("/v1/teach", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["category"], job["subclass"], job["state"], job["images"]) == ("cloth", "new", "training", 6)
    assert [one["name"] for one in job["held_out"]] == [
        "a.png",
        client.get(f"/v1/inspections/{body['inspections'][3]}").json()["name"],
    ]
    end = time.monotonic() + 60
    while (job := client.get(f"/v1/teach/{job['id']}").json())["state"] == "training" and time.monotonic() < end:
        time.sleep(0.02)
    assert job["state"] == "failed"
    assert "normweave-is-not-here" in job["error"]
    refused = client.post(f"/v1/teach/{job['id']}/keep")
    assert (refused.status_code, refused.json()["code"]) == (409, "teach_state")
    assert client.get(f"/v1/teach/{job['id']}/held-out/0/map").status_code == 404
    assert client.delete(f"/v1/teach/{job['id']}").status_code == 204
    assert client.get(f"/v1/teach/{job['id']}").status_code == 404
    assert client.delete(f"/v1/teach/{job['id']}").json()["code"] == "teach_unknown"


def test_wrong_bodies(client, body):
    assert client.post("/v1/teach", json=body | {"inspections": [1000]}).status_code == 404
    assert client.post("/v1/teach", json=body | {"images": [{"data": "%"}]}).status_code == 422
    assert client.post("/v1/teach", json=body | {"subclass": "../x"}).status_code == 422
    assert client.get("/v1/teach").json()["job"] is None


def test_operators_may_not(client, keys, body):
    operator = {"Authorization": f"Bearer {keys['operator']}"}
    for method, path in (("GET", ""), ("POST", ""), ("GET", "/1"), ("POST", "/1/keep"), ("DELETE", "/1")):
        answer = client.request(method, f"/v1/teach{path}", headers=operator, json=body if path == "" else None)
        assert answer.status_code == 403, (method, path)
