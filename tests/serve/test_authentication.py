"""Which requests are allowed: by token, by session, and without either."""

import asyncio
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from normweave.serve import create_app, events
from normweave.serve.authentication import OPEN, AuthenticationMiddleware


@pytest.fixture
def app(service, access, keys, monkeypatch):
    monkeypatch.setattr(events, "STREAM_SECONDS", 0.0)  # the client of the tests reads answers to their end
    return create_app(service, access=access, pages=False)


@pytest.fixture
def browser(app):
    """A browser without a login."""
    with TestClient(app, base_url="http://line:8080", follow_redirects=False) as client:
        yield client


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def routes(app):
    """Yield the method and path of all routes."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{id}", "1")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nw_wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic b3A6b3A="},
        {"Authorization": ""},
        {"Cookie": "normweave_8080=1.9999999999.abc"},
        {"Cookie": "normweave_8080=x"},
        {"Cookie": 'normweave_8080="; a\\'},
    ],
)
def test_without_a_valid_token_only_the_health_routes_answer(app, browser, headers):
    tried = set()
    for method, path in [*routes(app), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/")]:
        status = browser.request(method, path, headers=headers).status_code
        assert status == (200 if path in OPEN else 401), (method, path)
        tried.add(path)
    assert len(tried) > 15


def test_an_expired_token_is_refused_on_every_route(app, browser, access):
    made = access.create(name="guest", role="engineer", days=1e-9)
    for method, path in routes(app):
        status = browser.request(method, path, headers=bearer(made.secret)).status_code
        assert status == (200 if path in OPEN else 401), (method, path)


def test_routes_for_engineers(app, browser, keys):
    closed = {
        (method, path)
        for method, path in routes(app)
        if browser.request(method, path, headers=bearer(keys["operator"])).status_code == 403
    }
    assert closed == {
        ("PUT", "/v1/model/false-alarm-rate"),
        ("GET", "/v1/model/rates"),
        ("GET", "/v1/audit"),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/1"),
        ("POST", "/v1/models/{bundle_hash}/shadow"),
        ("DELETE", "/v1/models/{bundle_hash}/shadow"),
        ("POST", "/v1/models/{bundle_hash}/promote"),
        ("POST", "/v1/models/rollback"),
        ("POST", "/v1/line/outputs/{name}/acknowledge-removed"),
        ("POST", "/v1/line/outputs/{name}/send-again"),
        ("GET", "/v1/teach"),
        ("POST", "/v1/teach"),
        ("GET", "/v1/teach/1"),
        ("DELETE", "/v1/teach/1"),
        ("POST", "/v1/teach/1/keep"),
        ("GET", "/v1/teach/1/held-out/{number}/map"),
    }
    for method, path in closed - {("DELETE", "/v1/tokens/1")}:
        status = browser.request(method, path, headers=bearer(keys["engineer"])).status_code
        assert status in (200, 404, 409, 422), (method, path)  # there is no library and no such job


def test_without_tokens_everyone_is_an_engineer(service):
    with TestClient(create_app(service, access=None, pages=False), base_url="http://localhost:8080") as client:
        assert client.get("/v1/model/rates").status_code == 200
        assert client.get("/v1/tokens").status_code == 404
        evil = {"Origin": "http://evil.example"}
        assert client.put("/v1/model/false-alarm-rate", headers=evil, json={}).status_code == 403
        rebound = evil | {"Host": "evil.example"}  # a host name of an attacker that resolves to this machine
        assert client.get("/v1/model", headers=rebound).status_code == 403
        for host in ("127.0.0.1:8080", "[::1]:8080", "LOCALHOST"):
            assert client.get("/v1/model", headers={"Host": host}).status_code == 200
        for host in ("", "127.0.0.1.evil.example", "[", "10.0.0.1"):
            assert client.get("/v1/model", headers={"Host": host}).status_code == 403, host


def test_a_session_allows_only_reading_over_rest(browser, keys, log_in):
    log_in(browser, keys["engineer"])
    assert browser.get("/v1/tokens").status_code == 200
    for method, path in (
        ("PUT", "/v1/model/false-alarm-rate"),
        ("POST", "/v1/inspect"),
        ("POST", "/v1/tokens"),
    ):
        answer = browser.request(method, path, json={})
        assert (answer.status_code, "A login only allows reading here" in answer.text) == (403, True)


def test_pages_of_other_origins_are_refused(browser, keys, log_in):
    log_in(browser, keys["engineer"])
    for origin, status in (
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://line:8080", 404),
    ):
        assert browser.post("/elsewhere", headers={"Origin": origin}).status_code == status
    headers = {"Origin": "http://evil.example", "Cookie": f"normweave={browser.cookies['normweave_8080']}"}
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        browser.websocket_connect("/_nicegui_ws/socket.io", headers=headers),
    ):
        pass
    assert closed.value.code == 4403


def test_a_websocket_needs_a_session(browser):
    with pytest.raises(WebSocketDisconnect) as closed, browser.websocket_connect("/_nicegui_ws/socket.io"):
        pass
    assert closed.value.code == 4401


def test_pages_of_other_origins_neither_log_in_nor_out(browser, keys, log_in):
    log_in(browser, keys["engineer"])
    for origin in ("http://evil.example", "null", "http://line:8081"):
        headers = {"Origin": origin}
        assert browser.post("/logout", headers=headers).status_code == 403
        answer = browser.post("/login", headers=headers, data={"token": keys["operator"]})
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert browser.get("/v1/tokens").status_code == 200
    assert browser.post("/logout", headers={"Origin": "http://line:8080"}).status_code == 303
    assert browser.get("/v1/tokens").status_code == 401


def test_a_websocket_does_nothing_more_after_its_session_has_ended(service, access):
    """The application behind the middleware answers each message with the same text."""

    async def echo(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            done.append(message["text"])
            await send({"type": "websocket.send", "text": message["text"]})

    made = access.create(name="Ada", role="operator")
    for end in (
        lambda cookie: access.log_out(cookie, address=""),
        lambda cookie: access.revoke(made.token.id),
    ):
        done = []
        cookie = access.log_in(made.token, address="")
        client = TestClient(AuthenticationMiddleware(echo, access=access))
        with client.websocket_connect("/socket", headers={"Cookie": f"normweave={cookie}"}) as socket:
            socket.send_text("42first")
            assert socket.receive_text() == "42first"
            end(cookie)
            socket.send_text("42second")
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_text()
        assert (closed.value.code, done) == (4401, ["42first"])


def test_a_websocket_sends_nothing_more_after_its_session_has_ended(service, access):
    async def push(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "first"})
        await asyncio.to_thread(access.log_out, cookie, address="")
        await send({"type": "websocket.send", "text": "second"})

    cookie = access.log_in(access.create(name="Ada", role="operator").token, address="")
    client = TestClient(AuthenticationMiddleware(push, access=access))
    with client.websocket_connect("/socket", headers={"Cookie": f"normweave={cookie}"}) as socket:
        assert socket.receive_text() == "first"
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 4401


def test_the_name_of_the_token_is_stored(browser, keys, service, photos):
    content = Path(photos[0]).read_bytes()
    answer = browser.post("/v1/inspect", headers=bearer(keys["operator"]), files={"images": ("a", content)})
    assert answer.json()["inspections"][0]["actor"] == "operator"
    assert asyncio.run(service.inspection(1)).actor == "operator"


def test_a_token_in_the_url_is_ignored(browser, keys):
    assert browser.get(f"/v1/model?token={keys['engineer']}").status_code == 401
