"""Requests with an Idempotency-Key."""

import asyncio
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from normweave.serve import create_app
from normweave.serve.problems import ProblemError
from normweave.serve.records import Filter
from normweave.serve.repeats import KeyedRequests
from normweave.serve.service import InspectionService, Upload


def form(*paths):
    return [("images", (Path(path).name, Path(path).read_bytes())) for path in paths]


def keyed(key):
    return {"Idempotency-Key": key}


def test_the_same_request_is_answered_from_the_store(client, service, photos):
    first = client.post("/v1/inspect", files=form(*photos[:2]), headers=keyed("a"))
    again = client.post("/v1/inspect", files=form(*photos[:2]), headers=keyed("a"))
    assert (again.status_code, again.json()) == (200, first.json())
    assert service.store.count(Filter()) == 2
    client.post("/v1/inspect", files=form(*photos[:2]), headers=keyed("b"))
    client.post("/v1/inspect", files=form(*photos[:2]))
    assert service.store.count(Filter()) == 6


def test_another_request_with_the_same_key_is_refused(client, service, photos):
    client.post("/v1/inspect", files=form(*photos[:2]), headers=keyed("a"))
    for other in (form(photos[0]), form(*photos[1::-1]), [("images", ("x", form(photos[0])[0][1][1]))]):
        answer = client.post("/v1/inspect", files=other, headers=keyed("a"))
        assert (answer.status_code, answer.json()["code"]) == (422, "key_reused")
    assert service.store.count(Filter()) == 2
    for wrong in ("", "k" * 256):
        assert client.post("/v1/inspect", files=form(photos[0]), headers=keyed(wrong)).status_code == 422


def test_keys_of_other_tokens_are_independent(client, service, keys, photos):
    operator = keyed("a") | {"Authorization": f"Bearer {keys['operator']}"}
    client.post("/v1/inspect", files=form(photos[0]), headers=keyed("a"))
    assert client.post("/v1/inspect", files=form(photos[1]), headers=operator).status_code == 200
    assert service.store.count(Filter()) == 2


def test_a_key_survives_a_restart(client, service, access, keys, photos):
    first = client.post("/v1/inspect", files=form(photos[0]), headers=keyed("a")).json()
    restarted = InspectionService(service.detector, store=service.store, files=service.files, config=service.config)
    headers = {"Authorization": f"Bearer {keys['engineer']}"} | keyed("a")
    with TestClient(create_app(restarted, access=access, pages=False), headers=headers) as other:
        assert other.post("/v1/inspect", files=form(photos[0])).json() == first
        assert other.post("/v1/inspect", files=form(photos[1])).status_code == 422
    assert service.store.count(Filter()) == 1


def test_of_an_interrupted_request_only_the_missing_images_are_inspected(client, service, photos):
    """As after a crash between two batches: the second of three images was not stored."""
    first = client.post("/v1/inspect", files=form(*photos[:3]), headers=keyed("a")).json()["inspections"]
    with service.store.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM inspections WHERE request_place = 1")
    again = client.post("/v1/inspect", files=form(*photos[:3]), headers=keyed("a")).json()["inspections"]
    assert [again[0], again[2]] == [first[0], first[2]]
    assert (again[1]["name"], again[1]["id"]) == (first[1]["name"], 4)


def test_a_request_that_is_repeated_while_it_runs(service, photos, monkeypatch):
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])
    upload, requests = Upload("a", Path(photos[0]).read_bytes()), KeyedRequests(service)

    async def walk():
        first, second, other = (
            asyncio.ensure_future(requests.inspect([one], key="a", actor="test", token=1))
            for one in (upload, upload, upload._replace(name="b"))
        )
        with pytest.raises(ProblemError, match="was sent before with other names or images"):
            await other
        first.cancel()  # the client gave up
        free.set()
        (inspection,) = await second
        assert await requests.inspect([upload], key="a", actor="test", token=1) == [inspection]

    asyncio.run(walk())
    assert service.store.count(Filter()) == 1
