"""The Review page in a real browser, against a real server."""

import re

import pytest
from playwright.sync_api import expect

from browsing import inspect, stored

pytestmark = pytest.mark.browser


def left(page):
    """The number of parts left, from the page."""
    expect(page.locator(".left")).to_have_text(re.compile(r"^\d+ left$"))
    return int(page.locator(".left").inner_text().split()[0])


@pytest.mark.usefixtures("sent")
def test_parts_are_reviewed_by_keyboard_and_seen_in_history(visit, parts, server):
    page = visit("/")
    inspect(page, "first.png", parts.anomalous)
    inspect(page, "second.png", parts.unknown)
    page.goto(f"{server.url}/review")
    name = page.locator("h2.name")
    expect(name).to_have_text("second.png")  # the newest first
    count = left(page)

    comment = page.get_by_label("Comment")
    comment.click()
    page.keyboard.type("a scratch, nur außen")  # contains a, r, n and u
    expect(name).to_have_text("second.png")
    page.locator("h1").click()
    page.keyboard.press("r")
    expect(name).to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")
    expect(comment).to_have_value("")
    (second,) = stored(page, server, name="second.png")
    assert second["review"]["decision"] == "reject"
    assert second["review"]["comment"] == "a scratch, nur außen"
    assert second["review"]["reviewer"] == "operator"

    page.keyboard.press("a")
    expect(page.locator(".left")).to_have_text(f"{count - 2} left")
    page.keyboard.press("u")
    expect(name).to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")
    (first,) = stored(page, server, name="first.png")
    assert first["review"] is None
    page.keyboard.press("n")
    expect(name).not_to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")

    page.goto(f"{server.url}/history")
    row = page.locator("tr", has_text="second.png").first
    expect(row).to_contain_text("rejected")
    row.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".facts")).to_contain_text("defective part, decided by operator")
    expect(dialog.locator(".facts")).to_contain_text("a scratch, nur außen")
    expect(dialog.locator(".viewer-plane img").first).to_be_visible()
    dialog.get_by_role("button", name="Undo").click()
    expect(dialog.locator("ul")).to_contain_text("undone by operator")
    expect(dialog.locator(".facts")).to_contain_text("not reviewed yet")


def test_a_second_press_before_the_next_part_arrives_does_not_decide_it(visit, parts, server):
    page = visit("/")
    for name in ("pressed-1.png", "pressed-2.png"):
        inspect(page, name, parts.anomalous)
    page.goto(f"{server.url}/review")
    expect(page.locator("h2.name")).to_have_text("pressed-2.png")
    page.evaluate("() => { const accept = document.querySelector('.accept'); accept.click(); accept.click(); }")
    expect(page.locator("h2.name")).to_have_text("pressed-1.png")
    (first,) = stored(page, server, name="pressed-1.png")
    assert first["review"] is None
