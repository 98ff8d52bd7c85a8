"""Which requests are allowed: by token, by session, and without either."""

import asyncio
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from normweave.serve import create_app
from normweave.serve.authentication import OPEN


@pytest.fixture
def app(service, access, keys):
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
        {"Cookie": "normweave=1.9999999999.abc"},
        {"Cookie": "normweave=x"},
        {"Cookie": 'normweave="; a\\'},
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
    }
    for method, path in closed - {("DELETE", "/v1/tokens/1")}:
        status = browser.request(method, path, headers=bearer(keys["engineer"])).status_code
        assert status in (200, 422), (method, path)


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
    headers = {"Origin": "http://evil.example", "Cookie": f"normweave={browser.cookies['normweave']}"}
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


def test_a_session_in_use_is_renewed(app, access, keys):
    token = access.authenticate(keys["operator"])
    with TestClient(app) as client:
        fresh = client.get("/v1/model", headers={"Cookie": f"normweave={access.create_session(token)}"})
        assert "set-cookie" not in fresh.headers
        late = access.create_session(token, expires_at=time.time() + access.session_seconds / 3)
        renewed = client.get("/v1/model", headers={"Cookie": f"normweave={late}"})
        cookie = renewed.headers["set-cookie"].split(";")[0].removeprefix("normweave=")
        assert access.authenticate_session(cookie) == token
        assert not access.needs_renewal(cookie)


def test_the_name_of_the_token_is_stored(browser, keys, service, photos):
    content = Path(photos[0]).read_bytes()
    answer = browser.post("/v1/inspect", headers=bearer(keys["operator"]), files={"images": ("a", content)})
    assert answer.json()["inspections"][0]["actor"] == "operator"
    assert asyncio.run(service.inspection(1)).actor == "operator"


def test_a_token_in_the_url_is_ignored(browser, keys):
    assert browser.get(f"/v1/model?token={keys['engineer']}").status_code == 401
