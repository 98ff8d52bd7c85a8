"""Who gets in: with what, to which routes, and for how long."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from normweave.errors import DataError
from normweave.serve import create_app
from normweave.serve.access import Access
from normweave.serve.authentication import OPEN
from normweave.serve.records import NotFoundError


@pytest.fixture
def app(service, access, keys):
    return create_app(service, access=access, pages=False)


@pytest.fixture
def stranger(app):
    """A browser that nobody knows, at a fixed address."""
    with TestClient(app, base_url="http://line:8080", follow_redirects=False) as client:
        yield client


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def routes(app):
    """Every method and path of the document."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{id}", "1")


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_start_makes_a_token_for_each_role_and_no_other_does(access):
    made = access.create_first_tokens()
    assert [one.token.role for one in made] == ["engineer", "operator"]
    assert access.create_first_tokens() == []
    for one in made:
        assert len(one.secret) > 40
        assert access.authenticate(one.secret) == one.token


def test_the_secret_is_kept_nowhere(access, tmp_path):
    made = access.create_first_tokens()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert content
    assert not any(one.secret.encode() in content for one in made)


def test_expired_revoked_and_unknown(access):
    gone = access.create(name="guest", role="operator", days=1e-9)
    time.sleep(0.01)
    assert access.authenticate(gone.secret) is None
    made = access.create(name="guest", role="operator", days=1)
    assert access.authenticate(made.secret) == made.token
    access.revoke(made.token.id)
    assert access.authenticate(made.secret) is None
    assert access.authenticate("nw_unknown") is None
    assert access.authenticate("\udce9") is None
    with pytest.raises(NotFoundError, match="no token 99"):
        access.revoke(99)


def test_a_token_that_another_process_revokes_is_refused_soon(service, access, tmp_path, monkeypatch):
    made = access.create(name="guest", role="operator")
    assert access.authenticate(made.secret) is not None
    service.store.revoke(made.token.id, datetime.now(UTC))
    monkeypatch.setattr("normweave.serve.access.CACHE_SECONDS", 0.0)
    assert access.authenticate(made.secret) is None


# ── every route ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
def test_without_a_good_token_nothing_answers_but_health(app, stranger, headers):
    tried = set()
    for method, path in [*routes(app), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/")]:
        status = stranger.request(method, path, headers=headers).status_code
        assert status == (200 if path in OPEN else 401), (method, path)
        tried.add(path)
    assert len(tried) > 15


def test_an_expired_token_is_refused_on_every_route(app, stranger, access):
    made = access.create(name="guest", role="engineer", days=1e-9)
    for method, path in routes(app):
        status = stranger.request(method, path, headers=bearer(made.secret)).status_code
        assert status == (200 if path in OPEN else 401), (method, path)


def test_what_takes_an_engineer(app, stranger, keys):
    closed = {
        (method, path)
        for method, path in routes(app)
        if stranger.request(method, path, headers=bearer(keys["operator"])).status_code == 403
    }
    assert closed == {
        ("PUT", "/v1/model/false-alarm-rate"),
        ("GET", "/v1/model/rates"),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/1"),
    }
    for method, path in closed - {("DELETE", "/v1/tokens/1")}:
        status = stranger.request(method, path, headers=bearer(keys["engineer"])).status_code
        assert status in (200, 422), (method, path)


def test_without_tokens_everyone_is_an_engineer(service):
    with TestClient(
        create_app(service, access=None, pages=False), base_url="http://localhost:8080"
    ) as client:
        assert client.get("/v1/model/rates").status_code == 200
        assert client.get("/v1/tokens").status_code == 404
        evil = {"Origin": "http://evil.example"}
        assert client.put("/v1/model/false-alarm-rate", headers=evil, json={}).status_code == 403
        rebound = evil | {"Host": "evil.example"}  # a name that its owner lets point to this machine
        assert client.get("/v1/model", headers=rebound).status_code == 403
        for host in ("127.0.0.1:8080", "[::1]:8080", "LOCALHOST"):
            assert client.get("/v1/model", headers={"Host": host}).status_code == 200
        for host in ("", "127.0.0.1.evil.example", "[", "10.0.0.1"):
            assert client.get("/v1/model", headers={"Host": host}).status_code == 403, host


# ── people ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def login(client, secret):
    return client.post("/login", data={"token": secret})


def test_a_person_logs_in_and_out(stranger, keys):
    page = stranger.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert '<form method="post" action="/login">' in page.text
    wrong = login(stranger, "nw_wrong")
    assert (wrong.status_code, "unknown, expired or revoked" in wrong.text) == (401, True)
    assert "normweave" not in stranger.cookies

    good = login(stranger, f" {keys['operator']} ")
    assert (good.status_code, good.headers["location"]) == (303, "/")
    for word in ("HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"):
        assert word in good.headers["set-cookie"]
    assert keys["operator"] not in good.headers["set-cookie"]
    assert stranger.get("/v1/inspections").status_code == 200

    assert stranger.post("/logout").status_code == 303
    assert stranger.get("/v1/inspections").status_code == 401


def test_a_login_only_reads_over_rest(stranger, keys):
    login(stranger, keys["engineer"])
    assert stranger.get("/v1/tokens").status_code == 200
    for method, path in (
        ("PUT", "/v1/model/false-alarm-rate"),
        ("POST", "/v1/inspect"),
        ("POST", "/v1/tokens"),
    ):
        answer = stranger.request(method, path, json={})
        assert (answer.status_code, "A login only allows reading here" in answer.text) == (403, True)


def test_other_origins_cannot_work_the_page(stranger, keys):
    login(stranger, keys["engineer"])
    for origin, status in (
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://line:8080", 404),
    ):
        assert stranger.post("/elsewhere", headers={"Origin": origin}).status_code == status
    headers = {"Origin": "http://evil.example", "Cookie": f"normweave={stranger.cookies['normweave']}"}
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        stranger.websocket_connect("/_nicegui_ws/socket.io", headers=headers),
    ):
        pass
    assert closed.value.code == 4403


def test_a_websocket_needs_a_login(stranger):
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        stranger.websocket_connect("/_nicegui_ws/socket.io"),
    ):
        pass
    assert closed.value.code == 4401


def test_a_login_cannot_be_made_up_or_stretched(access):
    made = access.create(name="Ada", role="operator")
    other = access.create(name="Eve", role="engineer")
    good = access.create_session(made.token)
    assert access.authenticate_session(good) == made.token
    number, until, proof = good.split(".")
    for forged in (
        f"{other.token.id}.{until}.{proof}",
        f"{number}.{int(until) + 1}.{proof}",
        f"{number}.{until}.{proof[:-1]}0" if proof[-1] != "0" else f"{number}.{until}.{proof[:-1]}1",
        f"{number}.{until}.",
        f"{number}.{until}",
        f"{number}..{proof}",
        f"²{number}.{until}.{proof}",
        "",
        "..",
        f"{number}.{'9' * 400}.{proof}",
    ):
        assert access.authenticate_session(forged) is None, forged


def test_a_login_ends_with_its_time_and_with_its_token(service, tmp_path):
    access = Access(service.store, folder=tmp_path, session_hours=0)
    made = access.create(name="Ada", role="operator")
    assert access.authenticate_session(access.create_session(made.token, expires_at=time.time() - 1)) is None
    lasting = Access(service.store, folder=tmp_path, session_hours=1)
    cookie = lasting.create_session(made.token)
    assert lasting.authenticate_session(cookie) == made.token
    lasting.revoke(made.token.id)
    assert lasting.authenticate_session(cookie) is None


def test_a_login_in_use_is_renewed(app, access, keys):
    token = access.authenticate(keys["operator"])
    with TestClient(app) as client:
        fresh = client.get("/v1/model", headers={"Cookie": f"normweave={access.create_session(token)}"})
        assert "set-cookie" not in fresh.headers
        late = access.create_session(token, expires_at=time.time() + access.session_seconds / 3)
        renewed = client.get("/v1/model", headers={"Cookie": f"normweave={late}"})
        cookie = renewed.headers["set-cookie"].split(";")[0].removeprefix("normweave=")
        assert access.authenticate_session(cookie) == token
        assert not access.needs_renewal(cookie)


def test_a_login_outlives_the_server_but_not_its_key(service, access, tmp_path):
    made = access.create(name="Ada", role="operator")
    cookie = access.create_session(made.token)
    assert Access(service.store, folder=tmp_path, session_hours=1).authenticate_session(cookie) == made.token
    key = tmp_path / "session.key"
    assert key.stat().st_mode & 0o077 == 0
    key.unlink()
    assert Access(service.store, folder=tmp_path, session_hours=1).authenticate_session(cookie) is None
    key.write_bytes(b"short")
    with pytest.raises(DataError, match=r"session\.key has 5 bytes, but a key has 32\. Remove the file"):
        Access(service.store, folder=tmp_path, session_hours=1)


def test_cookies_say_that_they_are_for_tls(app, keys):
    with TestClient(app, base_url="https://line", follow_redirects=False) as client:
        assert "; Secure" in login(client, keys["operator"]).headers["set-cookie"]


def test_a_long_form_is_no_login(stranger):
    assert stranger.post("/login", data={"token": "x" * 100_000}).status_code == 401
    assert stranger.delete("/login").status_code == 405


def test_every_answer_tells_the_browser_to_stay_here(stranger):
    for path in ("/healthz", "/login", "/v1/model"):
        headers = stranger.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]


def test_who_inspected_is_kept(stranger, keys, service, photos):
    content = Path(photos[0]).read_bytes()
    answer = stranger.post("/v1/inspect", headers=bearer(keys["operator"]), files={"images": ("a", content)})
    assert answer.json()["inspections"][0]["actor"] == "operator"
    assert asyncio.run(service.inspection(1)).actor == "operator"


def test_the_token_of_a_request_is_not_taken_from_its_address(stranger, keys):
    assert stranger.get(f"/v1/model?token={keys['engineer']}").status_code == 401
