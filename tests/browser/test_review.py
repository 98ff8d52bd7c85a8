"""The Review page in a real browser, against a real server."""

import re
from threading import Event

import pytest
from playwright.sync_api import expect

from browsing import inspect, stored

pytestmark = pytest.mark.browser


def left(page):
    """The number of parts left, from the page."""
    expect(page.locator(".left")).to_have_text(re.compile(r"^\d+ left$"))
    return int(page.locator(".left").inner_text().split()[0])


def ready(page):
    """Wait until the picture is shown and can be decided."""
    expect(page.locator(".accept")).to_have_attribute("aria-disabled", "false")


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
    ready(page)
    page.keyboard.press("r")
    expect(name).to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")
    expect(comment).to_have_value("")
    (second,) = stored(page, server, name="second.png")
    assert second["review"]["decision"] == "reject"
    assert second["review"]["comment"] == "a scratch, nur außen"
    assert second["review"]["reviewer"] == "operator"

    ready(page)
    page.keyboard.press("a")
    expect(page.locator(".left")).to_have_text(f"{count - 2} left")
    expect(page.locator("[data-decision=undo]")).to_be_enabled()
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


def test_a_double_tap_decides_only_the_part_that_was_seen(visit, parts, server):
    page = visit("/")
    for name in ("pressed-1.png", "pressed-2.png"):
        inspect(page, name, parts.anomalous)
    page.goto(f"{server.url}/review")
    expect(page.locator("h2.name")).to_have_text("pressed-2.png")
    ready(page)
    taps = "for (const after of [0, 30, 150, 250]) setTimeout(() => document.querySelector('.accept').click(), after)"
    page.evaluate(f"() => {{ {taps} }}")
    expect(page.locator("h2.name")).to_have_text("pressed-1.png")
    ready(page)
    (first,) = stored(page, server, name="pressed-1.png")
    assert first["review"] is None


def test_a_decision_waits_for_the_picture(visit, parts, server):
    page = visit("/")
    inspect(page, "unseen.png", parts.anomalous)
    held, released = [], Event()
    page.route("**/image?**", lambda route: route.continue_() if released.is_set() else held.append(route))
    with page.expect_request("**/image?**"):
        page.goto(f"{server.url}/review", wait_until="domcontentloaded")
    expect(page.locator("h2.name")).to_have_text("unseen.png")
    expect(page.locator(".accept")).to_have_attribute("aria-disabled", "true")
    page.wait_for_timeout(400)  # longer than a picture must be shown
    page.keyboard.press("a")
    page.locator(".reject").click(force=True)
    released.set()
    for route in held:
        route.continue_()
    ready(page)
    expect(page.locator("h2.name")).to_have_text("unseen.png")
    (unseen,) = stored(page, server, name="unseen.png")
    assert unseen["review"] is None
    page.keyboard.press("a")
    expect(page.locator("h2.name")).not_to_have_text("unseen.png")


def test_unreadable_images_are_reviewed_and_undo_survives_a_reload(visit, parts, server, tmp_path):
    page = visit("/")
    (tmp_path / "cut.png").write_bytes(parts.normal.read_bytes()[:200])
    inspect(page, "not-readable.png", tmp_path / "cut.png")
    page.goto(f"{server.url}/review")
    expect(page.locator("h2.name")).to_have_text("not-readable.png")
    ready(page)
    page.keyboard.press("r")
    expect(page.locator("h2.name")).not_to_have_text("not-readable.png")
    page.reload()
    expect(page.locator("[data-decision=undo]")).to_be_enabled()
    expect(page.locator("h2.name")).not_to_have_text("not-readable.png")
    page.keyboard.press("u")
    expect(page.locator("h2.name")).to_have_text("not-readable.png")
    (cut,) = stored(page, server, name="not-readable.png")
    assert cut["review"] is None
