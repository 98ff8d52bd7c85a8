"""The login form."""

from contextlib import closing

import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from normweave.serve import login
from normweave.serve.access import Access
from normweave.serve.authentication import AuthenticationMiddleware
from normweave.serve.store import Store


def test_a_person_logs_in_and_out(browser, keys, log_in):
    page = browser.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert '<form method="post" action="/login">' in page.text
    wrong = log_in(browser, "nw_wrong")
    assert (wrong.status_code, "unknown, expired or revoked" in wrong.text) == (401, True)
    assert not browser.cookies

    good = log_in(browser, f" {keys['operator']} ")
    assert (good.status_code, good.headers["location"]) == (303, "/")
    for word in ("HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=604800"):
        assert word in good.headers["set-cookie"]
    assert keys["operator"] not in good.headers["set-cookie"]
    assert browser.get("/v1/inspections").status_code == 200

    assert browser.post("/logout").status_code == 303
    assert browser.get("/v1/inspections").status_code == 401


def test_a_scanner_types_the_address_of_a_card(browser, keys, log_in):
    good = log_in(browser, f"http://line-pc:8080/login#{keys['operator']}\r")
    assert (good.status_code, good.headers["location"]) == (303, "/")


def test_logins_are_in_the_audit(browser, keys, log_in, service):
    log_in(browser, "nw_wrong")
    log_in(browser, keys["operator"])
    browser.post("/logout")
    browser.post("/logout")  # no one is logged in any more
    browser.get("/v1/model", headers={"Authorization": "Bearer nw_wrong"})
    browser.get("/v1/model")  # without a token, so not a failed login
    out, in_, failed = service.store.audit(limit=3)
    assert [(one.event, one.actor, one.token, one.address) for one in (in_, out)] == [
        ("login", "operator", 2, "testclient"),
        ("logout", "operator", 2, "testclient"),
    ]
    assert (failed.event, failed.detail) == ("login_failed", {"attempts": 1, "addresses": ["testclient"]})


def test_cookies_over_tls_are_secure(app, keys, log_in):
    with TestClient(app, base_url="https://line", follow_redirects=False) as client:
        assert "; Secure" in log_in(client, keys["operator"]).headers["set-cookie"]


def test_a_form_that_is_too_long_is_refused(browser):
    assert browser.post("/login", data={"token": "x" * 100_000}).status_code == 401


def test_other_methods_are_answered_with_those_that_are_allowed(browser):
    for method, path, allowed in (("DELETE", "/login", "GET, HEAD, POST"), ("GET", "/logout", "POST")):
        wrong = browser.request(method, path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)
        assert wrong.json()["code"] == "method_not_allowed"


def scope(method="GET", path="/", type_="http"):
    return {"type": type_, "method": method, "path": path}


BROWSER = Headers({"accept": "text/html,*/*;q=0.8"})


def test_the_form_is_for_browsers_that_open_a_page():
    assert login.is_page_request(scope(), BROWSER)
    assert login.is_page_request(scope(path="/history"), BROWSER)


@pytest.mark.parametrize(
    ("request_", "headers"),
    [
        (scope(), Headers({"accept": "application/json"})),
        (scope(), Headers({})),
        (scope(method="POST"), BROWSER),
        (scope(path="/v1/inspections"), BROWSER),
        (scope(path="/_nicegui/static/x.js"), BROWSER),
        (scope(type_="websocket"), BROWSER),
    ],
)
def test_programs_get_an_error_instead_of_the_form(request_, headers):
    assert not login.is_page_request(request_, headers)


@pytest.mark.parametrize(
    ("host", "line", "name"),
    [
        ("line-pc", "", "normweave"),
        ("line-pc:8080", "", "normweave_8080"),
        ("line-pc:8081", "Press 4, <Süd>", "normweave_Press_4_S_d_8081"),
        ("[::1]:8080", "", "normweave_8080"),
        ("line-pc:x", "", "normweave"),
        ("[", "", "normweave"),
    ],
)
def test_the_name_of_the_cookie_has_line_and_port(host, line, name):
    assert login.cookie_name(Headers({"host": host}), line) == name


def test_two_lines_on_one_pc_do_not_log_each_other_out(service, access, keys, tmp_path, log_in):
    """One browser, two servers on the same host; a real browser sends each cookie to all ports of the host."""
    with (
        closing(Store.open(tmp_path / "second.sqlite", line="Press 5")) as second,
        closing(Store.open(tmp_path / "third.sqlite")) as third,
    ):
        apps = {"http://line:8080": (AuthenticationMiddleware(hello, access=access), keys["engineer"])}
        for port, store in ((8081, second), (8082, third)):
            other = Access(store, session_hours=1)
            (engineer, _) = other.create_first_tokens()
            apps[f"http://line:{port}"] = AuthenticationMiddleware(hello, access=other), engineer.secret
        jar = {}
        for base_url, (app, secret) in apps.items():
            client = TestClient(app, base_url=base_url, follow_redirects=False)
            jar |= log_in(client, secret).cookies
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        for base_url, (app, _) in apps.items():
            client = TestClient(app, base_url=base_url, headers={"Cookie": cookies})
            assert client.get("/").text == "hello"
        assert "<b>Press 5</b>" in TestClient(apps["http://line:8081"][0]).get("/login").text


async def hello(scope, receive, send):
    await PlainTextResponse("hello")(scope, receive, send)


def test_the_form_is_not_cached_and_reports_a_wrong_token():
    first, again = login.page(status=401, line=""), login.page(status=401, line="<b>", wrong=True)
    assert b"&lt;b&gt;" in again.body
    assert first.headers["cache-control"] == "no-store"
    assert b'role="alert"' not in first.body
    assert b"unknown, expired or revoked" in again.body
