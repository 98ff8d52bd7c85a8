"""The Inspect page in a real browser, against a real server."""

import re
import shutil

import pytest
from playwright.sync_api import expect

from browsing import carry, inspect, listed, stored

pytestmark = pytest.mark.browser
WORDS = {"normal": "Good", "anomalous": "Defective", "unknown": "Unknown product"}


def test_dropped_images_are_inspected_and_shown(visit, parts):
    page = visit("/")
    carry(page, [(path.name, path) for path in (parts.normal, parts.anomalous, parts.unknown)])
    for verdict, word in WORDS.items():
        path = getattr(parts, verdict)
        row = listed(page, path.name)
        expect(row.locator(".tag")).to_have_text(word)  # a word
        expect(row.locator(f".tag svg.{verdict}")).to_be_visible()  # and a shape, not the colour alone
        row.click()
        expect(page.locator(".banner .word")).to_have_text(word)
        expect(page.locator("h2.name")).to_have_text(path.name)
        expect(page.locator(".facts")).to_contain_text("limit")
        expect(page.locator(".facts")).to_contain_text(re.compile(r"in \d+ good parts"))


def test_a_file_name_is_shown_as_text(visit, parts):
    page = visit("/")
    inspect(page, parts.anomalous.name, parts.anomalous)
    assert page.locator("img[onerror], img[src=x]").count() == 0


def test_a_pasted_image_and_a_chosen_one_are_inspected(visit, parts):
    page = visit("/")
    carry(page, [("image.png", parts.normal)], how="paste")  # the name of every image in a clipboard
    expect(page.locator("h2.name")).to_have_text(re.compile(r"^pasted-\d{8}-\d{6}\.png$"))
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Drop images here").click()
    chooser.value.set_files(parts.unknown)
    expect(page.locator("h2.name")).to_have_text(parts.unknown.name)


def test_an_unreadable_image_shows_the_reason(visit, parts, tmp_path):
    page = visit("/")
    (tmp_path / "cut.png").write_bytes(parts.normal.read_bytes()[:200])
    carry(page, [("cut.png", tmp_path / "cut.png")])
    expect(page.locator(".banner .word")).to_have_text("Not readable")
    expect(page.locator(".banner .meaning")).to_contain_text("could not be read")
    expect(page.locator(".viewer-empty")).to_have_text("The image could not be read.")


def test_many_images_are_all_inspected_and_the_list_is_bounded(visit, parts, server):
    page = visit("/")
    carry(page, [(f"many-{number}.png", parts.normal) for number in range(80)])
    expect(page.locator(".progress")).not_to_be_empty()
    expect(page.locator(".progress")).to_be_empty(timeout=60_000)
    names = {inspection["name"] for inspection in stored(page, server, limit=200)}
    assert {f"many-{number}.png" for number in range(80)} <= names
    expect(page.locator(".inspected li")).to_have_count(50)


def test_images_in_the_watched_folder_are_inspected_until_it_is_switched_off(visit, parts, server):
    page = visit("/")
    expect(page.locator(".path")).to_have_text(str(server.watched))
    shutil.copy(parts.unknown, server.watched / "from-camera.png")
    expect(page.locator("h2.name")).to_have_text("from-camera.png")
    expect(page.locator(".banner .word")).to_have_text("Unknown product")
    switch = page.get_by_role("switch", name="Inspect new images")
    switch.click()
    expect(switch).not_to_be_checked()
    other = visit("/")
    expect(other.get_by_role("switch", name="Inspect new images")).not_to_be_checked()  # one for all browsers
    switch.click()
    expect(switch).to_be_checked()
