"""The audit in a real browser."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_engineers_see_the_events(visit):
    page = visit("/audit", role="engineer")
    rows = page.locator("table tbody tr")
    expect(rows.first).to_contain_text("logged in")
    expect(rows.first).to_contain_text("engineer")
    expect(rows.first).to_contain_text("127.0.0.1")
    page.get_by_label("Event").click()
    page.get_by_role("option", name="bundle loaded").click()
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("server")


def test_operators_do_not(visit):
    page = visit("/audit")
    expect(page.get_by_text("This page is for engineers.")).to_be_visible()
    expect(page.locator("table")).to_have_count(0)
    expect(page.get_by_label("Pages").get_by_role("link", name="Audit")).to_have_count(0)
