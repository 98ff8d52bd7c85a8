"""Tokens and log-in by card in a real browser."""

import re

import cv2
import numpy as np
import pytest
from playwright.sync_api import expect

from browsing import broken

pytestmark = pytest.mark.browser


@pytest.fixture
def engineer(visit):
    return visit("/tokens", role="engineer")


def create(page, name, *, expires="after a week"):
    """Create a token on the page and return the address in the code of its card."""
    page.get_by_label("Name of the person").fill(name)
    page.get_by_label("Expires").click()
    page.get_by_role("option", name=expires).click()
    page.get_by_role("button", name="Create").click()
    expect(page.locator(".card .token")).to_have_text(name)
    picture = cv2.imdecode(np.frombuffer(page.locator(".card").screenshot(), np.uint8), cv2.IMREAD_COLOR)
    sizes = (cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for scale in (3, 2, 4, 1))
    texts = (cv2.QRCodeDetector().detectAndDecode(each)[0] for each in sizes)  # OpenCV misses one code in fifty
    return next(filter(None, texts), "")


def row(page, name):
    return page.locator(".tokens tbody tr").filter(has_text=name)


def revoke(page, name):
    row(page, name).get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()


def test_a_card_logs_in_until_it_is_revoked(engineer, chromium, server):
    address = create(engineer, "press 4")
    assert re.fullmatch(rf"{re.escape(server.url)}/login#nw_[\w-]{{43}}", address)
    assert address.endswith("#" + engineer.locator(".secret").inner_text())
    engineer.emulate_media(media="print")
    assert engineer.locator("h1, .top, .tokens, .secret, .plain-button").filter(visible=True).count() == 0
    expect(engineer.locator(".card svg")).to_be_visible()
    engineer.emulate_media(media="screen")

    context = chromium.new_context(color_scheme="dark")
    station = context.new_page()
    sent = []
    station.on("request", lambda request: request.method == "POST" and sent.append(request.url))
    station.goto(address, wait_until="commit")  # the page sends the form before it has loaded
    expect(station.locator(".who")).to_contain_text("press 4")
    assert station.url == f"{server.url}/"
    expect(station.get_by_label("Pages").get_by_role("link", name="Tokens")).to_have_count(0)
    station.goto(f"{server.url}/tokens")
    expect(station.get_by_text("This page is for engineers.")).to_be_visible()

    revoke(engineer, "press 4")
    expect(row(engineer, "press 4").get_by_role("button")).to_have_count(0)
    station.goto(server.url)
    expect(station.locator("#token")).to_be_visible()
    sent.clear()
    station.goto(address, wait_until="commit")
    expect(station.get_by_role("alert")).to_contain_text("revoked")
    # Also if the form is open already. Later, since the call itself fails if the page is left before it has returned.
    station.evaluate("window.left = false; void setTimeout(() => { location.hash = 'nw_wrong' }, 100)")
    station.wait_for_function("window.left === undefined")  # another document
    expect(station.get_by_role("alert")).to_contain_text("revoked")
    assert sent == [f"{server.url}/login"] * 2
    assert not [url for url in station.evaluate("navigation.entries().map((entry) => entry.url)") if "#" in url]
    context.close()

    engineer.goto(f"{server.url}/audit")
    expect(engineer.locator("tbody tr").filter(has_text="press 4").filter(has_text="token revoked")).to_have_count(1)
    created = engineer.locator("tbody tr").filter(has_text="press 4").filter(has_text="token created")
    expect(created).to_contain_text(re.compile("engineer token [0-9]"))


def test_the_last_engineer_is_kept(engineer):
    revoke(engineer, "engineer")
    expect(engineer.get_by_role("alert")).to_contain_text("the last valid one of an engineer")
    expect(engineer.get_by_role("alert")).to_contain_text(
        "First create another token with the role engineer that does not expire"
    )
    expect(row(engineer, "engineer").get_by_role("button")).to_be_visible()


def test_a_long_name_leaves_room_for_the_other_columns(engineer, server):
    create(engineer, "Ferdinand-" + "W" * 140)
    for path in ("/tokens", "/audit"):
        engineer.goto(server.url + path)
        table = engineer.locator(".scroll")
        expect(table).to_contain_text("Ferdinand")
        for width in (390, 1024, 1440):
            engineer.set_viewport_size({"width": width, "height": 900})
            assert broken(engineer) == [], f"{path} at {width} pixels"
            assert table.evaluate("table => table.scrollWidth - table.clientWidth") == 0, f"{path} at {width} pixels"


def test_without_script_the_form_is_as_before(login_form, server):
    page = login_form(java_script_enabled=False)
    page.goto(f"{server.url}/login#{server.tokens['operator']}")
    expect(page.locator("#token")).to_have_value("")
    page.fill("#token", server.tokens["operator"])
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{server.url}/")
