"""The header of the pages and the login in a real browser, against a real server."""

import re
import time

import httpx2
import pytest
from playwright.sync_api import expect

from browsing import settle

pytestmark = pytest.mark.browser


def test_light_and_dark_follow_the_system_until_one_is_chosen(visit, server):
    page = visit("/", color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    body = page.locator("body")
    expect(body).to_have_class(re.compile("body--dark"))
    settle(page)
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    expect(body).not_to_have_class(re.compile("body--dark"))
    settle(page)
    light = page.evaluate(ground)
    theme = page.get_by_label("Light or dark")
    expect(theme).to_have_text("system")
    theme.click()
    expect(theme).to_have_text("light")
    theme.click()
    expect(theme).to_have_text("dark")
    page.wait_for_function(f"dark => ({ground})() === dark", arg=dark)
    page.goto(f"{server.url}/model")
    expect(page.get_by_label("Light or dark")).to_have_text("dark")  # stored in the browser
    page.wait_for_function(f"dark => ({ground})() === dark", arg=dark)
    assert light != dark


def test_after_log_out_nothing_is_served(login_form, server):
    page = login_form()
    page.fill("#token", "nw_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown, expired or revoked")
    page.fill("#token", server.tokens["operator"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".who")).to_contain_text("operator")
    assert page.request.get(f"{server.url}/history.csv").status == 200
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("#token")).to_be_visible()
    assert page.request.get(f"{server.url}/history.csv").status == 401


def test_log_out_ends_the_other_tabs_too(login_form, server):
    page = login_form()
    page.fill("#token", server.tokens["engineer"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".who")).to_contain_text("engineer")
    other = page.context.new_page()
    other.goto(f"{server.url}/audit")
    expect(other.locator("table tbody tr").first).to_be_visible()
    cookies = page.context.cookies()
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("#token")).to_be_visible()
    other.get_by_label("Event").click()  # the socket is closed with this message
    expect(other.locator("#token")).to_be_visible()
    page.context.add_cookies(cookies)  # a copy of the cookie is worth nothing
    assert page.request.get(f"{server.url}/history.csv").status == 401


def test_a_tab_of_the_person_before_does_not_act_with_the_new_login(login_form, server):
    page = login_form()
    page.fill("#token", server.tokens["engineer"])
    page.get_by_role("button", name="Log in").click()
    other = page.context.new_page()
    other.goto(f"{server.url}/audit")
    expect(other.locator("table tbody tr").first).to_be_visible()
    page.context.clear_cookies()
    page.goto(server.url)
    page.fill("#token", server.tokens["operator"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".who")).to_contain_text("operator")
    other.evaluate("window.socket.disconnect().connect()")
    expect(other.get_by_text("This page is for engineers.")).to_be_visible()


@pytest.mark.slow
def test_a_revoked_token_closes_its_pages(login_form, server):
    page = login_form()
    engineer = {"Authorization": f"Bearer {server.tokens['engineer']}"}
    given = {"name": "guest", "role": "operator"}
    made = httpx2.post(f"{server.url}/v1/tokens", headers=engineer, json=given).json()
    page.fill("#token", made["token"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".drop")).to_be_visible()
    httpx2.delete(f"{server.url}/v1/tokens/{made['id']}", headers=engineer).raise_for_status()
    expect(page.locator("#token")).to_be_visible(timeout=50_000)
    time.sleep(12)  # NiceGUI removes the page ten seconds after the browser left; the log must not have an error
