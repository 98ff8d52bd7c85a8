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

    page.get_by_label("File name contains").fill("=hyperlink(1)")
    expect(rows).to_have_count(1)
    expect(page.locator(".stack")).to_have_count(1)  # a day
    with page.expect_download() as download:
        page.get_by_text("Export CSV").click()
    text = download.value.path().read_text(encoding="utf-8")
    assert text.startswith("\ufeff")  # by which a spreadsheet knows the encoding
    text = text.removeprefix("\ufeff")
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["name"] == "'=HYPERLINK(1).png"  # not a formula in a spreadsheet
    (inspection,) = stored(page, server, name="=HYPERLINK(1).png")
    assert float(row["pred_score"]) == inspection["pred_score"]
    assert (row["verdict"], row["actor"], row["source"]) == ("normal", "operator", "page")


def test_filters_and_the_open_inspection_are_in_the_address(visit, parts, server):
    page = visit("/")
    for name in ("linked-1.png", "linked-2.png"):
        inspect(page, name, parts.unknown)
    page.goto(f"{server.url}/history")
    page.get_by_label("File name contains").fill("LINKED")
    rows = page.locator(".inspections tbody tr")
    expect(rows).to_have_count(2)
    rows.first.locator("img.thumb").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.inspections img.thumb').naturalWidth > 0")
    rows.first.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("h2.name")).to_have_text("linked-2.png")
    dialog.get_by_role("button", name="Next").click()
    expect(dialog.locator("h2.name")).to_have_text("linked-1.png")
    dialog.get_by_label("Comment").fill("a new product")
    expect(dialog.locator(".reject")).to_have_attribute("aria-disabled", "false")
    dialog.get_by_role("button", name="Reject").click()
    expect(dialog.locator("ul")).to_contain_text("a new product")
    (one,) = stored(page, server, name="linked-1.png")
    assert one["review"]["comment"] == "a new product"
    expect(dialog.get_by_role("link", name=f"Inspection {one['id']}")).to_have_attribute(
        "href", f"/history?id={one['id']}"
    )

    page.wait_for_function("id => location.search.endsWith(`id=${id}`)", arg=one["id"])
    page.reload()
    expect(page.get_by_label("File name contains")).to_have_value("LINKED")
    expect(rows).to_have_count(2)
    expect(dialog.locator("h2.name")).to_have_text("linked-1.png")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
    page.wait_for_function("!location.search.includes('id=')")
