"""The Compare page in a real browser, against a server with a library."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from browsing import broken, settle
from bundles import make_library, wait_for
from contracts.test_every_page import LONG, SMALL, violations
from serving import Server

pytestmark = pytest.mark.browser
OVERFLOW = """
() => [document.documentElement, ...document.querySelectorAll(".scroll:has(.bundles), .pair")]
  .filter((element) => element.scrollWidth > element.clientWidth)
  .map((element) => `${element.className}: ${element.scrollWidth} > ${element.clientWidth}`)
"""


@pytest.fixture(scope="module")
def server(bundle, photos, tmp_path_factory):
    """A server whose active bundle is `old`."""
    folder = tmp_path_factory.mktemp("library")
    library = make_library(bundle, folder / "bundles")
    options = (f"--library={library}", "--active=old", "--device=cpu", "--shadow-share=1")
    with Server(None, folder / "data", *options) as server:
        server.photos = [Path(path).read_bytes() for path in photos[:16]]
        yield server


def row(page, name):
    return page.locator(".bundles tbody tr").filter(has=page.locator("th", has_text=name))


def confirm(page, name, word):
    row(page, name).get_by_role("button", name=word).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(name)
    dialog.get_by_role("button", name=word).click()
    expect(dialog).to_be_hidden()


def expect_no_other_images(page):
    for word in ("Newer", "Older"):
        expect(page.get_by_role("button", name=word)).to_be_disabled()


def active(server):
    with server.client() as client:
        return next(one["name"] for one in client.get("/v1/models").json()["models"] if one["state"] == "active")


def test_a_bundle_is_compared_promoted_and_rolled_back(visit, server):
    page = visit("/compare", role="engineer")
    expect(row(page, "torn")).to_contain_text("damaged")
    expect(page.locator(".reason")).to_contain_text("not the file that was saved")
    expect(row(page, "old")).to_contain_text("inspects")
    expect_no_other_images(page)
    row(page, "new").get_by_role("button", name="Start shadow").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    confirm(page, "new", "Start shadow")
    expect(row(page, "new")).to_contain_text("in the shadow")
    expect(page.get_by_text("No image was judged by both old and new yet.")).to_be_visible()
    expect_no_other_images(page)
    with server.client() as client:
        for number, content in enumerate(server.photos):
            client.post("/v1/inspect", files={"images": (f"{number}_{LONG}", content)}).raise_for_status()
        wait_for(lambda: client.get("/v1/models/compare").json()["judged"] == len(server.photos))
        compared = client.get("/v1/models/compare").json()
        first = compared["inspections"][0]
        decision = "accept" if first["candidate"]["verdict"] == "normal" else "reject"
        client.post(f"/v1/inspections/{first['inspection']['id']}/review", json={"decision": decision})
    n = compared["differences"]
    expect(page.get_by_text(f"{n} of {len(server.photos)}")).to_be_visible()
    expect(page.get_by_text("Of 1 reviewed images, old had 0 right and new 1")).to_be_visible()
    expect(page.locator(".pair")).to_have_count(min(n, 8))
    for image in page.locator(".pair img").all():
        image.scroll_into_view_if_needed()
        wait_for(lambda image=image: image.evaluate("image => image.complete && image.naturalWidth > 0"))
    assert violations(page) == []
    for width in (360, 390, 768, 1024, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(OVERFLOW) == [], width
        assert page.evaluate(SMALL) == [], width
        assert broken(page) == [], width
    page.get_by_label("Product").click()
    page.get_by_role("option").nth(1).click()
    expect(page.get_by_text(f"{n} of {len(server.photos)}")).to_be_hidden()

    confirm(page, "new", "Promote")
    expect(row(page, "new")).to_contain_text("inspects")
    assert active(server) == "new"
    confirm_back = row(page, "new").get_by_role("button", name="Roll back")
    confirm_back.click()
    expect(page.get_by_role("dialog")).to_contain_text("Roll back to old?")
    settle(page)
    assert violations(page, ["dark"]) == []
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(row(page, "old")).to_contain_text("inspects")
    assert active(server) == "old"
    confirm(page, "new", "Start shadow")
    confirm(page, "new", "Stop")
    expect(row(page, "new")).to_contain_text("ready")


def test_an_operator_does_not_get_it(visit):
    page = visit("/compare")
    expect(page.get_by_text("This page is for engineers.")).to_be_visible()
    assert page.locator("[data-action]").count() == 0


def test_the_page_of_the_model_shows_the_new_one_after_a_promotion(visit, server):
    page = visit("/model", role="engineer")
    with server.client("engineer") as client:
        hashes = {one["name"]: one["bundle_hash"] for one in client.get("/v1/models").json()["models"]}
        expect(page.get_by_text(hashes["old"])).to_be_visible()
        client.post(f"/v1/models/{hashes['new']}/shadow").raise_for_status()
        client.post(f"/v1/models/{hashes['new']}/promote").raise_for_status()
        expect(page.get_by_text(hashes["new"])).to_be_visible()
        client.post("/v1/models/rollback").raise_for_status()
        expect(page.get_by_text(hashes["old"])).to_be_visible()
