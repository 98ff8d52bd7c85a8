"""The page Parts in a real browser."""

import httpx2
import pytest
from playwright.sync_api import expect

from browsing import broken, settle

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def part(server, parts):
    """A part with a good, a defective and an unreadable view."""
    files = [("images", (path.name, path.read_bytes(), "image/png")) for path in (parts.normal, parts.anomalous)]
    files.append(("images", ("torn.png", b"\x89PNG", "image/png")))
    httpx2.post(
        f"{server.url}/v1/inspect",
        headers={"Authorization": f"Bearer {server.tokens['operator']}"},
        files=files,
        data={"part": "A-17", "view": ["front", "back", "top"]},
        timeout=60,
    ).raise_for_status()


@pytest.mark.usefixtures("part")
def test_the_views_of_a_part_side_by_side(visit):
    page = visit("/parts")
    row = page.locator(".inspections tbody tr", has_text="A-17").first
    expect(row).to_contain_text("Defective", timeout=40_000)  # it is closed when its time is over
    expect(row).to_contain_text("back: defective, top: not readable")
    row.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".views li")).to_have_count(3)
    for view, word in (("front", "Good"), ("back", "Defective"), ("top", "Not readable")):
        expect(dialog.locator(".views li", has_text=view)).to_contain_text(word)
    widths = "list => Promise.all(list.map(one => one.decode().then(() => one.naturalWidth)))"
    assert all(dialog.locator(".views img").evaluate_all(widths))
    settle(page)
    assert broken(page) == []
    dialog.locator(".views a").first.click()
    expect(page.locator("h1")).to_have_text("History")
    expect(page.get_by_role("dialog")).to_contain_text("A-17, view")
