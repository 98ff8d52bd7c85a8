"""An engineer draws a region of interest over an image and downloads the file."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from browsing import broken, carry
from normweave import settings
from normweave.data import regions
from normweave.data.alignment import decode_reference
from normweave.errors import ConfigError
from normweave.serve.pages.region import read

pytestmark = pytest.mark.browser
STAGE = ".region-stage"


@pytest.fixture
def opened(visit, sent, parts):
    """The page, with an image to draw on."""
    page = visit("/region", role="engineer")
    carry(page, [("part.png", parts.normal)])
    expect(page.get_by_role("application", name="Region over part.png")).to_be_visible()
    page.wait_for_function("document.querySelector('.region-stage img').naturalWidth > 0")
    return page


def at(page, x, y):
    """The position of a share of the image on the page."""
    page.locator(STAGE).scroll_into_view_if_needed()
    box = page.locator(STAGE).bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def drag(page, *places):
    page.mouse.move(*at(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*at(page, *place), steps=8)
    page.mouse.up()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, category):
    page.locator(".q-select").first.click()
    page.get_by_role("option", name=category, exact=True).click()


def downloaded(page, folder):
    """The inside of the downloaded region, (100, 100)."""
    with page.expect_download() as waited:
        press(page, "Download regions.json")
    waited.value.save_as(folder / "regions.json")
    (found,) = settings.read_regions(folder / "regions.json")
    return found, regions.mask(regions.of([found], found.category), 100, 100)


def test_shapes_are_drawn_undone_and_downloaded(opened, tmp_path):
    page = opened
    expect(page.get_by_text("The whole image is inspected.")).to_be_visible()
    expect(page.get_by_role("button", name="Download regions.json")).to_be_disabled()
    press(page, "rectangle")
    drag(page, (0.1, 0.2), (0.9, 0.8))
    expect(page.get_by_text(re.compile(r"4[78]\.\d %"))).to_be_visible()
    press(page, "polygon")
    press(page, "leave out")
    for place in ((0.2, 0.3), (0.5, 0.3), (0.5, 0.6), (0.2, 0.3)):  # the first corner again closes it
        page.mouse.click(*at(page, *place))
    expect(page.get_by_text(re.compile(r"43\.\d %"))).to_be_visible()
    found, inside = downloaded(page, tmp_path)
    assert found.category == "*"
    assert len(found.include.rectangles) == len(found.ignore.polygons) == 1
    assert inside.mean() == pytest.approx(0.8 * 0.6 - 0.3 * 0.3 / 2, abs=0.02)
    assert not inside[35, 45]
    assert inside[55, 25]
    assert (found.align, found.reference) == ("none", "")
    page.locator(".q-select").last.click()
    page.get_by_role("option", name="where it is moved and turned", exact=True).click()
    follows, _ = downloaded(page, tmp_path)
    assert (follows.align, follows.include) == ("rigid", found.include)
    assert decode_reference(follows.reference).shape == (64, 64)
    press(page, "undo")
    expect(page.get_by_text(re.compile(r"4[78]\.\d %"))).to_be_visible()
    press(page, "redo")
    expect(page.get_by_text(re.compile(r"43\.\d %"))).to_be_visible()
    press(page, "clear")
    expect(page.get_by_text("The whole image is inspected.")).to_be_visible()
    press(page, "undo")
    expect(page.get_by_text(re.compile(r"43\.\d %"))).to_be_visible()
    assert broken(page) == []


def test_a_brush_paints_a_mask_for_one_category(opened, tmp_path):
    page = opened
    choose(page, "cloth")
    press(page, "brush")
    page.get_by_label("Width of the brush").fill("10")
    drag(page, (0.2, 0.5), (0.8, 0.5))
    expect(page.get_by_text("of the image is inspected")).to_be_visible()
    press(page, "leave out")
    page.get_by_label("Width of the brush").fill("4")
    drag(page, (0.5, 0.2), (0.5, 0.8))
    expect(page.locator(".region-stage .stroke")).to_have_count(2)
    found, inside = downloaded(page, tmp_path)
    assert found.category == "cloth"
    assert inside[50, 25]
    assert inside[53, 70]
    assert not inside[50, 50]
    assert not inside[40, 25]
    assert inside.mean() == pytest.approx(0.6 * 0.1 + np.pi * 0.05**2 - 0.04 * 0.1, abs=0.01)


def test_the_keyboard_draws_a_rectangle(opened, tmp_path):
    page = opened
    press(page, "rectangle")
    stage = page.locator(STAGE)
    stage.focus()
    for key in (
        "Shift+ArrowLeft",
        "Shift+ArrowUp",
        "Enter",
        "Shift+ArrowRight",
        "Shift+ArrowRight",
        "Shift+ArrowDown",
        "Enter",
    ):
        stage.press(key)
    expect(page.get_by_text("2.1 %")).to_be_visible()
    found, _ = downloaded(page, tmp_path)
    assert found.include.rectangles == ((0.4, 0.4, 0.2, 0.1),)
    stage.press("Control+z")
    expect(page.get_by_text("The whole image is inspected.")).to_be_visible()


def test_a_category_without_a_region_has_that_of_all_and_a_wrong_drawing_stays_named(opened):
    page = opened
    press(page, "rectangle")
    drag(page, (0.1, 0.2), (0.9, 0.8))
    choose(page, "cloth")
    expect(page.get_by_text("This is the region of all categories")).to_be_visible()
    expect(page.get_by_text(re.compile(r"4[78]\.\d %"))).to_be_visible()
    press(page, "leave out")
    drag(page, (0.05, 0.1), (0.95, 0.9))
    expect(page.locator(".problem")).to_contain_text("64 is the least")
    choose(page, "all that have no region of their own")
    expect(page.get_by_text("The last drawing of cloth is not kept")).to_be_visible()
    expect(page.get_by_role("button", name="Download regions.json")).to_be_disabled()
    choose(page, "cloth")
    expect(page.locator(".problem")).to_have_count(0)
    expect(page.get_by_role("button", name="Download regions.json")).to_be_enabled()


def test_a_region_that_is_too_small_is_refused(opened):
    page = opened
    press(page, "rectangle")
    drag(page, (0.3, 0.3), (0.6, 0.6))
    press(page, "leave out")
    drag(page, (0.2, 0.2), (0.7, 0.7))
    expect(page.locator(".problem")).to_contain_text("64 is the least")
    expect(page.get_by_role("button", name="Download regions.json")).to_be_disabled()
    press(page, "undo")
    press(page, "undo")
    expect(page.locator(".problem")).to_have_count(0)


@pytest.mark.parametrize(
    "drawn", [{"include": {"polygons": [[[0, 0]]]}}, {"other": {"mask": 1}}, {"include": {"mask": "x"}}]
)
def test_what_is_no_drawing_is_refused(drawn):
    with pytest.raises(ConfigError):
        read("cloth", drawn)
    assert read("cloth", {}) is None
    assert read("cloth", "nothing") is None
