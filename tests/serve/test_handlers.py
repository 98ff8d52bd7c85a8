"""Errors of all routes, unknown routes and methods, and a database that is down."""

import time
from pathlib import Path

import pytest

from normweave.serve import access as access_module
from normweave.serve import write_probe
from normweave.serve.database import StoreError
from serving import Server

MEDIA_TYPE = "application/problem+json"
HTML = {"Accept": "text/html"}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/v1/nowhere", 404, None),
        ("POST", "/v1/nowhere", 404, None),
        ("GET", "/v1/model/", 404, None),
        ("GET", "/healthz/", 404, None),
        ("DELETE", "/v1/model", 405, "GET, HEAD"),
        ("HEAD", "/v1/inspect", 405, "POST"),
        ("PUT", "/v1/tokens", 405, "GET, HEAD, POST"),
        ("POST", "/healthz", 405, "GET, HEAD"),
        ("GET", "/v1/inspect", 405, "POST"),
        ("TRACE", "/v1/inspections/7", 405, "GET, HEAD"),
    ],
)
def test_unknown_routes_and_methods(client, method, path, status, allow):
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, MEDIA_TYPE)
    assert answer.headers.get("allow") == allow
    if method != "HEAD":
        problem = answer.json()
        assert set(problem) == {"type", "title", "status", "detail", "code"}
        assert (problem["status"], problem["code"]) == (status, "not_found" if status == 404 else "method_not_allowed")


def test_head_is_answered_as_get_without_the_body(client, browser, photos):
    file = {"images": Path(photos[0]).read_bytes()}
    (made,) = client.post("/v1/inspect", files=file).json()["inspections"]
    one = f"/v1/inspections/{made['id']}"
    for path in ("/v1/model", "/v1/inspections", one, f"{one}/image", f"{one}/map", "/v1/inspections/0", "/nowhere"):
        answer, head = client.get(path), client.head(path)
        assert (head.status_code, head.headers, head.content) == (answer.status_code, answer.headers, b"")
    assert client.head("/v1/inspections/events").headers["content-type"].startswith("text/event-stream")  # and ends
    for path in ("/healthz", "/readyz"):
        assert browser.head(path).status_code == 200
    assert browser.head("/v1/model").status_code == 401


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/inspections?verdicts=anomalous", "verdicts"),
        ("/v1/inspections/1/map?size=3", "size"),
        ("/v1/model?x=1", "x"),
        ("/v1/tokens?role=operator", "role"),
    ],
)
def test_unknown_query_parameters_are_refused(client, path, name):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_parameter")
    assert f"Unknown query parameter {name!r}" in answer.json()["detail"]
    assert "Known: " in client.get("/v1/inspections?x=1").json()["detail"]


def test_a_database_that_is_down_and_back(bundle, photos, postgres, tmp_path):
    url = postgres.database()
    with Server(bundle, tmp_path / "data", "--database", url) as server, server.client("engineer") as client:
        file = {"images": Path(photos[0]).read_bytes()}
        assert client.post("/v1/inspect", files=file).status_code == 200
        cookie = {"Cookie": client.post("/login", data={"token": server.tokens["operator"]}).headers["set-cookie"]}
        postgres.stop()
        try:
            with server.client(None) as person:
                down = [
                    client.post("/v1/inspect", files=file),
                    client.get("/v1/inspections"),
                    client.get("/readyz"),
                    person.get("/", headers=HTML | cookie),
                    person.get("/review", headers=HTML | cookie),
                ]
                assert [(one.status_code, one.headers["retry-after"]) for one in down] == [(503, "1")] * len(down)
                types = [one.headers["content-type"].partition(";")[0] for one in down]
                assert types == [MEDIA_TYPE] * 3 + ["text/html"] * 2
                assert client.get("/healthz").status_code == 200
        finally:
            postgres.start()
        answer = client.post("/v1/inspect", files=file)
        assert answer.status_code == 200, answer.text
        time.sleep(0.4)  # until the last result is no longer used
        assert client.get("/readyz").status_code == 200
        with server.client(None) as person:
            assert person.get("/", headers=HTML | cookie).status_code == 200
            # Requests that no route of the REST interface answers go to the pages.
            missing = [client.get("/nowhere"), client.get("/v1/nowhere", headers=HTML), client.get("/v1/model/")]
            assert [(one.status_code, one.headers["content-type"]) for one in missing] == [(404, MEDIA_TYPE)] * 3
            assert person.get("/nowhere", headers=HTML | cookie).headers["content-type"].startswith("text/html")
            wrong = [
                client.delete("/v1/model"),
                client.put("/v1/model"),
                client.get("/upload"),
                client.post("/review"),
            ]
            assert [(one.status_code, one.headers["content-type"]) for one in wrong] == [(405, MEDIA_TYPE)] * 4


def test_log_in_while_the_database_is_down(browser, service, keys, monkeypatch, caplog):
    def away(*_):
        raise StoreError("The database postgresql://user@host/name failed.")

    monkeypatch.setattr(service.store, "tokens", away)
    monkeypatch.setattr(service.store, "session", away)
    monkeypatch.setattr(access_module, "CACHE_SECONDS", 0)
    answers = [
        browser.post("/login", data={"token": keys["operator"]}, headers=HTML),
        browser.get("/review", headers=HTML | {"Cookie": "normweave_8080=1.9999999999.abc"}),
        browser.get("/v1/model", headers={"Authorization": f"Bearer {keys['operator']}"}),
    ]
    assert [(one.status_code, one.headers["retry-after"]) for one in answers] == [(503, "1")] * 3
    assert [one.headers["content-type"].partition(";")[0] for one in answers] == ["text/html"] * 2 + [MEDIA_TYPE]
    assert not [one for one in answers if "postgresql" in one.text]  # anyone may read the answer
    assert caplog.text.count("postgresql://user@host/name failed") == 3


@pytest.mark.parametrize("part", ["store", "files"])
def test_ready_tells_that_the_store_cannot_be_written(client, service, monkeypatch, part):
    if part == "files":
        service.files.folder.rename(service.files.folder.with_name("away"))
    else:
        with service.store.database.writing() as connection:
            connection.exec_driver_sql("DROP TABLE probe")
    answers = [client.get("/readyz") for _ in range(2)]  # the second has the result of the first
    assert [(one.status_code, one.json()["code"]) for one in answers] == [(503, "store_unavailable")] * 2
    assert client.get("/v1/inspections").status_code == 200  # reading goes on
    if part == "files":
        service.files.folder.with_name("away").rename(service.files.folder)
        monkeypatch.setattr(write_probe, "PROBE_SECONDS", 0)
        assert client.get("/readyz").status_code == 200
