"""The viewer of an image and its map in a real browser, against a real server."""

import pytest
from playwright.sync_api import expect

from browsing import inspect

pytestmark = pytest.mark.browser


def test_the_slider_sets_the_opacity_of_the_map_and_boxes_can_be_hidden(visit, parts):
    page = visit("/")
    inspect(page, "to-fade.png", parts.anomalous)
    heat = page.locator(".viewer-heat")
    expect(heat).to_be_visible()
    page.wait_for_function("document.querySelector('.viewer-heat').naturalWidth > 0")
    before = float(heat.evaluate("map => getComputedStyle(map).opacity"))
    page.get_by_label("Opacity of the map").fill("15")
    after = float(heat.evaluate("map => getComputedStyle(map).opacity"))
    assert (before, after) == (0.6, 0.15)
    boxes = page.locator(".viewer-plane rect:not(.under)")
    expect(boxes).not_to_have_count(0)
    page.get_by_label("Boxes").uncheck()
    expect(boxes).to_have_count(0)


def test_the_image_zooms_by_buttons_wheel_keys_and_double_click(visit, parts):
    page = visit("/")
    inspect(page, "to-zoom.png", parts.normal)
    plane = page.locator(".viewer-plane")

    def scale():
        return plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).a")

    assert scale() == 1
    page.get_by_label("Zoom in").click()
    assert scale() == pytest.approx(1.5)
    page.get_by_label("Whole image").click()
    page.locator(".viewer-stage").hover()
    page.mouse.wheel(0, -100)
    page.wait_for_function("new DOMMatrix(getComputedStyle(document.querySelector('.viewer-plane')).transform).a > 1.1")
    page.locator(".viewer-stage").press("0")
    assert scale() == 1
    page.locator(".viewer-stage").dblclick()
    assert scale() == pytest.approx(3)
    left = plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).e")
    page.locator(".viewer-stage").press("ArrowLeft")
    assert plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).e") > left
