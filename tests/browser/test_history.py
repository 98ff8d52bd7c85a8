"""The History page in a real browser, against a real server."""

import csv
import io

import pytest
from playwright.sync_api import expect

from browsing import carry, inspect, stored

pytestmark = pytest.mark.browser


def test_the_table_is_filtered_paged_and_exported(visit, parts, server):
    page = visit("/")
    inspect(page, "=HYPERLINK(1).png", parts.normal)
    carry(page, [(f"paged-{number}.png", parts.normal) for number in range(30)])
    expect(page.locator(".progress")).to_be_empty(timeout=30_000)
    page.wait_for_function("document.querySelectorAll('.inspected li').length >= 31")
    page.goto(f"{server.url}/history")
    rows = page.locator(".inspections tbody tr")
    expect(rows).to_have_count(25)
    first = rows.first.locator("td.name").inner_text()
    page.get_by_role("button", name="Older").click()
    expect(rows.first.locator("td.name")).not_to_have_text(first)
    page.get_by_role("button", name="Newer").click()
    expect(rows.first.locator("td.name")).to_have_text(first)

    page.get_by_label("File name, exactly").fill("=HYPERLINK(1).png")
    expect(rows).to_have_count(1)
    expect(page.locator(".stack")).to_have_count(1)  # a day
    with page.expect_download() as download:
        page.get_by_text("Export CSV").click()
    text = download.value.path().read_text(encoding="utf-8")
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["name"] == "'=HYPERLINK(1).png"  # not a formula in a spreadsheet
    (inspection,) = stored(page, server, name="=HYPERLINK(1).png")
    assert float(row["pred_score"]) == inspection["pred_score"]
    assert (row["verdict"], row["actor"], row["source"]) == ("normal", "operator", "page")
