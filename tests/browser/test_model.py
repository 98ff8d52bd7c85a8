"""The Model page in a real browser, against a real server."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def rate(page, server):
    """The false-alarm rate of the server."""
    return page.request.get(f"{server.url}/v1/model").json()["false_alarm_rate"]


@pytest.mark.usefixtures("sent")
def test_an_operator_previews_another_rate_but_cannot_apply_it(visit, server):
    page = visit("/model")
    apply = page.locator(".main-button")
    expect(page.locator(".preview")).to_contain_text("stored inspections")
    page.get_by_label("Rate in percent").fill("25")
    expect(page.locator(".preview")).to_contain_text("at 25")
    expect(apply).to_be_disabled()
    expect(page.get_by_text("Only an engineer may apply another rate")).to_be_visible()
    before = rate(page, server)
    # the event of the disabled button
    number = apply.evaluate("button => Number(button.id.slice(1))")
    page.evaluate("number => getElement(number).$emit('click', {})", number)
    page.get_by_label("Rate in percent").fill("30")
    expect(page.locator(".preview")).to_contain_text("at 30")  # the server has answered the event before
    assert rate(page, server) == before
    page.set_viewport_size({"width": 390, "height": 860})
    limit = page.locator("svg.histogram .strong").bounding_box()  # in view, and large enough to read
    assert 0 <= limit["x"] <= limit["x"] + limit["width"] <= 390
    assert limit["height"] >= 12


@pytest.mark.usefixtures("sent")
def test_an_engineer_applies_another_rate(visit, server):
    page = visit("/model", role="engineer")
    apply = page.locator(".main-button")
    before = rate(page, server)
    number = page.get_by_label("Rate in percent")
    number.fill("0.5")
    expect(page.locator(".refused")).to_contain_text("needs at least 199 independent groups")
    expect(apply).to_be_disabled()
    expect(page.locator(".refused")).not_to_contain_text("_")
    number.fill("100")
    expect(page.locator(".refused")).to_contain_text("below 100")
    expect(number).to_have_value("100")  # the slider ends at 50 %
    number.fill("30")
    expect(page.locator(".preview")).to_contain_text("would get another verdict at 30")
    expect(page.get_by_text("new limit")).to_be_visible()
    expect(apply).to_have_text("Apply 30\u00a0%")
    apply.click()
    expect(apply).to_be_disabled()
    assert rate(page, server) == pytest.approx(0.3)
    page.locator(".rate-slider [tabindex='0']").focus()
    page.keyboard.press("ArrowLeft")
    expect(number).not_to_have_value("30")
    number.fill(str(100 * before))
    expect(apply).to_have_text(f"Apply {100 * before:g}\u00a0%")
    apply.click()
    expect(apply).to_be_disabled()
    assert rate(page, server) == pytest.approx(before)
