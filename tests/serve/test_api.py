"""The REST interface."""

import base64
import hashlib
import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from inspections import inspect_files
from normweave.errors import BundleError, DataError
from normweave.maps.overlay import outlined_crop, overlay
from normweave.references import GoodImage, References
from normweave.serve import api, create_app, write_probe
from normweave.serve.records import Inspection
from normweave.types import DefectBox


def form(*paths):
    return [("images", (Path(path).name, Path(path).read_bytes())) for path in paths]


def encoded(path, name=""):
    return {"name": name, "data": base64.b64encode(Path(path).read_bytes()).decode()}


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_content_type_gives_the_same_result(client, loaded, photos):
    path = photos[0]
    expected = loaded.score(path)
    answers = [
        client.post("/v1/inspect", files=form(path)),
        client.post("/v1/inspect", json={"images": [encoded(path, "part.png")]}),
        client.post(
            "/v1/inspect?name=part.png",
            content=Path(path).read_bytes(),
            headers={"Content-Type": "image/png"},
        ),
        client.post(
            "/v1/inspect",
            content=Path(path).read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        ),
    ]
    for number, answer in enumerate(answers, 1):
        assert answer.status_code == 200
        (one,) = answer.json()["inspections"]
        assert one["id"] == number
        assert (one["verdict"], one["subclass"]) == (expected.verdict, expected.subclass)
        assert one["pred_score"] == pytest.approx(expected.pred_score, rel=1e-4)
        assert one["threshold"] == expected.threshold
        assert one["image_hash"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    names = [answer.json()["inspections"][0]["name"] for answer in answers]
    assert names == [Path(path).name, "part.png", "part.png", ""]


def test_inspections_are_in_the_order_of_the_images(client, photos):
    files = [*form(*photos[:3]), ("images", ("bad.png", b"nothing")), *form(photos[3])]
    inspections = client.post("/v1/inspect", files=files).json()["inspections"]
    assert [one["name"] for one in inspections] == [given[1][0] for given in files]
    assert [one["error"] is None for one in inspections] == [True, True, True, False, True]
    bad = inspections[3]
    assert "not an image that can be read" in bad["error"]
    assert (bad["verdict"], bad["image_url"]) == (None, None)


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x.png", "/etc/x", "a\x00b", "<img src=x>", "x" * 500])
def test_a_name_is_never_a_path(client, service, photos, name):
    content = Path(photos[0]).read_bytes()
    (one,) = client.post("/v1/inspect", files=[("images", (name, content))]).json()["inspections"]
    assert len(one["name"]) <= 500
    kept = {path.name for path in service.files.folder.rglob("*") if path.is_file()}
    inspection = service.store.inspection(one["id"])
    assert kept == {".lock", inspection.image.image_hash, inspection.image.grids_hash}


def test_a_name_has_the_same_limit_everywhere(client, photos):
    content = Path(photos[0]).read_bytes()
    for length, status in ((500, 200), (501, 422)):
        name = "ä" * length
        answers = [
            client.post("/v1/inspect", files=[("images", (name, content))]),
            client.post("/v1/inspect", json={"images": [encoded(photos[0], name)]}),
            client.post("/v1/inspect", params={"name": name}, content=content, headers={"Content-Type": "image/png"}),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3
    found = client.get("/v1/inspections", params={"name": "ä" * 500}).json()["inspections"]
    assert [one["name"] for one in found] == ["ä" * 500] * 3


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"content": b"x"}, 415, "The content type must be multipart/form-data"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "got 'text/plain'"),
        ({"files": [("other", ("a", b"x"))]}, 422, "The form has the unknown field 'other'"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        (
            {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "The request has no image",
        ),
        ({"data": {"images": "text"}, "files": {"other": b""}}, 422, "must contain files, got text"),
        (
            {"data": {"part_id": "17"}, "files": {"images": b"x"}},
            422,
            "The form has the unknown field 'part_id'. Allowed are 'images', 'part' and 'view': correct its name",
        ),
        ({"files": [("images", ("a", b"x"))] * 33}, 413, "Too many files. Maximum number of files is 32"),
        ({"json": {"images": [{"data": ""}] * 33}}, 413, "has 33 images, but at most 32"),
        ({"json": {}}, 422, "images: Field required"),
        ({"json": {"images": []}}, 422, "images: List should have at least 1 item"),
        ({"json": {"images": [{"data": "%%"}]}}, 422, "is not base64"),
        ({"json": {"images": [{"data": "é"}]}}, 422, "is not base64"),
        ({"json": {"images": [{"path": "/etc/passwd"}]}}, 422, "images.0.data: Field required"),
        (
            {"json": {"images": [{"data": "eA==", "name": "17.png", "view": "back"}]}},
            422,
            "The image '17.png' has the view 'back', but no part. Give the id of its part too, or leave out the view.",
        ),
        ({"data": {"view": "back", "part": ""}, "files": {"images": b"x"}}, 422, "has the view 'back', but no part"),
        ({"content": b"x", "params": {"view": "back"}, "headers": {"Content-Type": "image/png"}}, 422, "but no part"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "Invalid JSON"),
        ({"content": b"\xff", "headers": {"Content-Type": "application/json"}}, 422, "Invalid JSON"),
    ],
)
def test_malformed_requests(client, request_, status, words):
    answer = client.post("/v1/inspect", **request_)
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text


def test_a_request_with_an_image_that_is_too_large(start, access, keys, photos):
    app = create_app(start(max_image_bytes=1000), access=access, pages=False)
    with TestClient(app, headers={"Authorization": f"Bearer {keys['operator']}"}) as client:
        answer = client.post("/v1/inspect", files=form(photos[0]))
        assert answer.status_code == 413
        assert "but at most 1,000 are allowed for one image" in answer.json()["detail"]


def test_a_full_queue_answers_429(start, access, keys, photos, monkeypatch):
    service = start(max_waiting=1, max_images=1)
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])
    app = create_app(service, access=access, pages=False)
    with TestClient(app, headers={"Authorization": f"Bearer {keys['operator']}"}) as client:
        first = threading.Thread(target=lambda: client.post("/v1/inspect", files=form(photos[0])))
        first.start()
        while not service.waiting:
            pass
        answer = client.post("/v1/inspect", files=form(photos[0]))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "1 images are waiting and 1 more were sent" in answer.json()["detail"]
        free.set()
        first.join()
        assert client.post("/v1/inspect", files=form(photos[0])).status_code == 200


def test_a_timeout_answers_503_and_the_images_are_inspected(start, access, keys, photos, monkeypatch):
    service = start(answer_seconds=0.2)
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])
    app = create_app(service, access=access, pages=False)
    with TestClient(app, headers={"Authorization": f"Bearer {keys['operator']}"}) as client:
        answer = client.post("/v1/inspect", files=form(photos[0]))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "The images were accepted and may still be inspected" in answer.json()["detail"]
        free.set()
        while service.waiting:
            pass
        assert [one["id"] for one in client.get("/v1/inspections").json()["inspections"]] == [1]


# ── inspections ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def inspected(client, photos):
    """Answers for all photos, newest first."""
    answers = [client.post("/v1/inspect", files=form(path)).json()["inspections"][0] for path in photos]
    return answers[::-1]


def test_pages_of_inspections(client, inspected):
    got, before = [], None
    while True:
        answer = client.get("/v1/inspections", params={"limit": 4} | ({"before": before} if before else {}))
        page = answer.json()
        got += page["inspections"]
        before = page["next"]
        if before is None:
            break
    assert got == inspected


def test_pages_after_an_id(client, inspected):
    got, after = [], 0
    while page := client.get("/v1/inspections", params={"limit": 4, "after": after}).json()["inspections"]:
        got += page
        after = page[-1]["id"]
    assert got == inspected[::-1]
    some = client.get("/v1/inspections", params={"after": 2, "before": 5, "limit": 2}).json()
    assert ([one["id"] for one in some["inspections"]], some["next"]) == ([3, 4], 4)


def test_filters(client, inspected):
    for key, values in (("verdict", ["anomalous", "unknown"]), ("subclass", None), ("name", None)):
        for value in values or {one[key] for one in inspected}:
            answer = client.get("/v1/inspections", params={key: value})
            assert answer.json()["inspections"] == [one for one in inspected if one[key] == value][:100]
    both = client.get("/v1/inspections", params={"verdict": ["anomalous", "unknown"]}).json()["inspections"]
    assert both == [one for one in inspected if one["verdict"] != "normal"]
    assert client.get("/v1/inspections", params={"source": "api"}).json()["inspections"] == inspected
    assert client.get("/v1/inspections", params={"source": "folder"}).json()["inspections"] == []
    middle = inspected[3]["received_at"]
    since = client.get("/v1/inspections", params={"since": middle}).json()["inspections"]
    until = client.get("/v1/inspections", params={"until": middle}).json()["inspections"]
    assert since + until == inspected
    assert len(since) == 4
    for moment in (middle, middle.removesuffix("Z"), middle.replace("Z", "+00:00")):  # without a zone: UTC
        assert client.get("/v1/inspections", params={"since": moment}).json()["inspections"] == since
    assert client.get("/v1/inspections", params={"since": "2026-11-22"}).status_code == 200


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "before=0", "since=yesterday", "verdict=good", "before=99999999999999999999"],
)
def test_malformed_filters(client, query):
    answer = client.get(f"/v1/inspections?{query}")
    assert answer.status_code == 422
    assert query.partition("=")[0] in answer.json()["detail"]


def test_image_map_and_overlay(client, loaded, photos, inspected):
    one, path = inspected[0], photos[-1]
    image = client.get(one["image_url"])
    assert (image.content, image.headers["content-type"]) == (Path(path).read_bytes(), "image/png")
    small = Image.open(io.BytesIO(client.get(one["image_url"], params={"format": "png", "max_side": 32}).content))
    assert small.size == (32, 32)
    numbers = client.get(one["map_url"], params={"format": "npy"})
    anomaly_map = np.load(io.BytesIO(numbers.content), allow_pickle=False)
    np.testing.assert_allclose(anomaly_map, loaded.score(path).anomaly_map, rtol=1e-4, atol=1e-5)
    colours = np.asarray(Image.open(io.BytesIO(client.get(one["map_url"]).content)))
    assert colours.shape == (64, 64, 4)
    # The threshold has the middle colour of the scale, so lighter pixels are above it.
    assert ((colours[..., 1] > 55) & (colours[..., 3] == 255) == (anomaly_map > one["threshold"])).mean() > 0.99
    assert Image.open(io.BytesIO(client.get(one["overlay_url"]).content)).size == (64, 64)
    for url in (one["overlay_url"], one["map_url"]):
        assert Image.open(io.BytesIO(client.get(url, params={"max_side": 16}).content)).size == (16, 16)


def test_maps_and_overlays_of_large_images_are_drawn_small(client, service, photos, monkeypatch):
    """At most 2048 pixels a side, unless more is asked for; the numbers have the size of the image."""
    content = io.BytesIO()
    Image.open(photos[0]).resize((2400, 1200)).save(content, "JPEG")
    (one,) = client.post("/v1/inspect", files=[("images", ("large", content.getvalue()))]).json()["inspections"]
    drawn = []
    monkeypatch.setattr(
        api, "overlay", lambda *given, **named: (drawn.append(given[0].shape), overlay(*given, **named))[1]
    )
    for url in (one["overlay_url"], one["map_url"]):
        assert Image.open(io.BytesIO(client.get(url).content)).size == (2048, 1024)
        assert Image.open(io.BytesIO(client.get(url, params={"max_side": 2400}).content)).size == (2400, 1200)
    assert drawn == [(1024, 2048, 3), (1200, 2400, 3)]  # shrunk before it is drawn
    numbers = client.get(one["map_url"], params={"format": "npy"}).content
    assert np.load(io.BytesIO(numbers), allow_pickle=False).shape == (1200, 2400)


def test_a_box_and_the_good_image_that_it_was_compared_with(client, service, photos, monkeypatch):
    (one,) = inspect_files(service, photos[-1])
    box = DefectBox(8, 8, 16, 8, 3.0, "good/1.png", 0, 0, 16, 8)
    outcome = replace(one.outcome, boxes=(box, box._replace(reference="gone.png")))
    (kept,) = service.store.add([replace(one, id=0, outcome=outcome)])
    (other,) = service.store.add([replace(one, id=0, outcome=replace(outcome, bundle_hash="0" * 64))])
    good = GoodImage("good/1.png", (64, 64), (64, 64), Path(photos[0]))
    references = References((good, good._replace(name="gone.png", picture=None)), np.zeros((1, 3), np.int64))
    monkeypatch.setattr(service.detector.network, "references", references)

    def answer(number, side, id=kept.id):
        return client.get(f"/v1/inspections/{id}/boxes/{number}/{side}")

    for side, image in (("seen", photos[-1]), ("expected", photos[0])):
        pixels = np.asarray(Image.open(io.BytesIO(answer(0, side).content)))
        region = (box[:4], box[6:10])[side == "expected"]
        drawn = outlined_crop(np.asarray(Image.open(image).convert("RGB")), region, size=(64, 64))
        np.testing.assert_allclose(pixels, drawn, atol=1)
    assert answer(1, "seen").status_code == 200
    for missing in (answer(1, "expected"), answer(2, "seen"), answer(0, "expected", id=other.id)):
        assert missing.status_code == 404
        assert missing.json()["detail"]


def test_an_unreadable_image_has_no_image_map_and_overlay(client, service):
    client.post("/v1/inspect", files=[("images", ("bad", b"x"))])
    for what in ("image", "map", "overlay"):
        answer = client.get(f"/v1/inspections/1/{what}")
        assert (answer.status_code, answer.json()["detail"]) == (
            404,
            "The image of inspection 1 could not be read.",
        )


def test_an_image_that_retention_removed(client, service, inspected):
    list(service.store.shrink(max_bytes=0))
    answer = client.get("/v1/inspections/1/image")
    assert (answer.status_code, answer.json()["code"]) == (410, "image_gone")
    assert "was removed by retention" in answer.json()["detail"]
    assert client.get("/v1/inspections/1").json()["verdict"] == inspected[-1]["verdict"]


def test_a_changed_file_answers_503_and_a_missing_one_410(client, service, inspected):
    stored = service.store.inspection(1).image
    path = service.files.folder / stored.image_hash[:2] / stored.image_hash
    path.write_bytes(b"changed")
    answer = client.get("/v1/inspections/1/image")
    assert (answer.status_code, "changed on disk" in answer.json()["detail"]) == (503, True)
    path.unlink()
    answer = client.get("/v1/inspections/1/overlay")
    assert (answer.status_code, answer.json()["code"]) == (410, "image_gone")


def test_reviews(client, inspected):
    given = {"decision": "reject", "comment": "a scratch"}
    answer = client.post("/v1/inspections/1/review", json=given).json()
    assert {key: answer["review"][key] for key in given} == given
    assert client.post("/v1/inspections/1/review", json={"decision": "accept"}).status_code == 200
    detail = client.get("/v1/inspections/1").json()
    assert [review["decision"] for review in detail["reviews"]] == ["reject", "accept"]
    assert detail["review"]["decision"] == "accept"
    for review in detail["reviews"]:  # the client does not choose who it is
        assert (review["reviewer"], review["token"]) == ("engineer", 1)
    assert client.post("/v1/inspections/1/review", json=given | {"reviewer": "Eve"}).status_code == 422
    undone = client.post("/v1/inspections/1/review", json={"decision": "undo"}).json()
    assert undone["review"] is None
    reviewed = client.get("/v1/inspections", params={"reviewed": True}).json()["inspections"]
    assert reviewed == []
    assert client.post("/v1/inspections/99/review", json=given).status_code == 404
    assert client.post("/v1/inspections/1/review", json={"decision": "scrap"}).status_code == 422
    assert client.post("/v1/inspections/1/review", json=given | {"more": 1}).status_code == 422


def test_not_found(client):
    answer = client.get("/v1/inspections/99")
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "There is no inspection 99. GET /v1/inspections lists them.",
    )
    assert client.get("/nowhere").json()["code"] == "not_found"
    assert client.delete("/v1/model").status_code == 405


# ── model, tokens, health ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_model(client, loaded):
    model = client.get("/v1/model").json()
    assert model["model"] == "adapted_moe"
    assert model["bundle_hash"] == loaded.bundle_hash
    assert model["false_alarm_rate"] == 0.1
    assert model["operating_points"] == loaded.calibration.as_dict()["operating_points"]
    assert model["fit_images"] == loaded.record["fit_images"]


def test_change_of_the_false_alarm_rate(client, inspected):
    preview = client.get("/v1/model/preview", params={"false_alarm_rate": 0.3}).json()
    assert preview["n"] == sum(preview["now"].values()) == sum(preview["then"].values()) == len(inspected)
    assert client.put("/v1/model/false-alarm-rate", json={"false_alarm_rate": 0.3}).status_code == 200
    assert client.get("/v1/model").json()["false_alarm_rate"] == 0.3
    (change,) = client.get("/v1/model/rates").json()
    assert (change["false_alarm_rate"], change["actor"]) == (0.3, "engineer")
    refused = client.put("/v1/model/false-alarm-rate", json={"false_alarm_rate": 0.001})
    assert (
        refused.status_code,
        "at least 999 independent groups of held-out normal images" in refused.json()["detail"],
    ) == (
        422,
        True,
    )
    for wrong in (0, 1, -1, "nan", None):
        assert client.put("/v1/model/false-alarm-rate", json={"false_alarm_rate": wrong}).status_code == 422


def test_tokens(client, keys):
    made = client.post("/v1/tokens", json={"name": "camera 3", "role": "operator", "expires_in_days": 30})
    assert made.status_code == 201
    new = {"Authorization": f"Bearer {made.json()['token']}"}
    assert client.get("/v1/model", headers=new).status_code == 200
    listed = client.get("/v1/tokens").json()
    assert [token["name"] for token in listed] == ["engineer", "operator", "camera 3"]
    assert made.json()["token"] not in json.dumps(listed)
    assert client.delete(f"/v1/tokens/{made.json()['id']}").json()["revoked_at"] is not None
    assert client.get("/v1/model", headers=new).status_code == 401
    assert client.delete("/v1/tokens/99").status_code == 404


def test_the_last_engineer_is_not_revoked(client, access):
    refused = client.delete("/v1/tokens/1")
    assert refused.status_code == 409
    assert "First create another token with the role engineer that does not expire" in refused.text
    access.create(name="was here", role="engineer", days=1e-9)
    assert client.delete("/v1/tokens/1").status_code == 409
    guest = access.create(name="guest", role="engineer", days=1).token
    assert "that does not expire" in client.delete("/v1/tokens/1").json()["detail"]
    assert client.delete(f"/v1/tokens/{guest.id}").status_code == 200
    access.create(name="Ada", role="engineer")
    assert client.delete("/v1/tokens/1").status_code == 200


def test_the_audit(client, inspected):
    before = client.get("/v1/audit").json()["entries"]
    assert [(one["event"], one["actor"]) for one in before] == [
        ("token_created", "server"),
        ("token_created", "server"),
        ("bundle_loaded", "server"),
    ]
    made = client.post("/v1/tokens", json={"name": "Ada"}).json()
    client.delete(f"/v1/tokens/{made['id']}")
    client.put("/v1/model/false-alarm-rate", json={"false_alarm_rate": 0.3})
    page = client.get("/v1/audit", params={"limit": 2}).json()
    rest = client.get("/v1/audit", params={"before": page["next"]}).json()
    assert rest["next"] is None
    entries = page["entries"] + rest["entries"]
    assert entries[3:] == before
    assert [one["event"] for one in entries[:3]] == ["rate_changed", "token_revoked", "token_created"]
    assert {(one["actor"], one["token"]) for one in entries[:3]} == {("engineer", 1)}
    assert entries[0]["detail"]["false_alarm_rate"] == 0.3
    assert entries[1]["detail"]["name"] == "Ada"
    assert made["token"] not in json.dumps(entries)
    (only,) = client.get("/v1/audit", params={"event": "rate_changed"}).json()["entries"]
    assert only == entries[0]
    for wrong in ("event=deleted", "before=0", "limit=0"):
        assert client.get(f"/v1/audit?{wrong}").status_code == 422


def test_health_and_metrics(client, service, monkeypatch, photos):
    assert client.get("/readyz").json() == {"status": "ok"}
    client.post("/v1/inspect", files=form(photos[0]))
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'normweave_inspections_total{category="cloth"' in metrics.text

    def away():
        raise DataError("the database is away")

    monkeypatch.setattr(service.store, "check_writable", away)
    monkeypatch.setattr(write_probe, "PROBE_SECONDS", 0)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["detail"]) == (503, "the database is away")
    assert client.get("/healthz").status_code == 200


# ── internal errors ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (BundleError("the graph cannot be computed"), 503, "the graph cannot be computed"),
        (ValueError("a secret"), 500, "Internal error of the server: ValueError"),
    ],
)
def test_internal_errors_are_answered_without_details(client, service, photos, monkeypatch, error, status, words):
    def fail(batch):
        raise error

    monkeypatch.setattr(service.detector, "scores", fail)
    answer = client.post("/v1/inspect", files=form(photos[0]))
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True)
    assert "secret" not in answer.text


def test_the_openapi_document_has_every_content_type(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    content_types = document["paths"]["/v1/inspect"]["post"]["requestBody"]["content"]
    assert set(content_types) == {"multipart/form-data", "application/json", "application/octet-stream"}
    assert client.get("/docs").status_code == 404  # its scripts would be loaded from another host


def test_the_token_of_an_inspection_is_kept(client, photos):
    (answer,) = client.post("/v1/inspect", files=form(photos[0])).json()["inspections"]
    assert (answer["actor"], answer["token"]) == ("engineer", 1)


def test_an_inspection_is_answered_as_stored(client, service, photos):
    (answer,) = client.post("/v1/inspect", files=form(photos[-1])).json()["inspections"]
    kept = service.store.inspection(1)
    assert isinstance(kept, Inspection)
    fields = kept.outcome.as_dict()
    del fields["image_path"], fields["anomaly_map"]
    assert {key: answer[key] for key in fields} == json.loads(json.dumps(fields))
