"""The login form."""

from starlette.testclient import TestClient


def test_a_person_logs_in_and_out(browser, keys, log_in):
    page = browser.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert '<form method="post" action="/login">' in page.text
    wrong = log_in(browser, "nw_wrong")
    assert (wrong.status_code, "unknown, expired or revoked" in wrong.text) == (401, True)
    assert "normweave" not in browser.cookies

    good = log_in(browser, f" {keys['operator']} ")
    assert (good.status_code, good.headers["location"]) == (303, "/")
    for word in ("HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"):
        assert word in good.headers["set-cookie"]
    assert keys["operator"] not in good.headers["set-cookie"]
    assert browser.get("/v1/inspections").status_code == 200

    assert browser.post("/logout").status_code == 303
    assert browser.get("/v1/inspections").status_code == 401


def test_cookies_over_tls_are_secure(app, keys, log_in):
    with TestClient(app, base_url="https://line", follow_redirects=False) as client:
        assert "; Secure" in log_in(client, keys["operator"]).headers["set-cookie"]


def test_a_form_that_is_too_long_is_refused(browser):
    assert browser.post("/login", data={"token": "x" * 100_000}).status_code == 401
    assert browser.delete("/login").status_code == 405
