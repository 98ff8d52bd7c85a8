"""The page Drift in a real browser."""

import io

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def darkened(server, photos):
    """Good images, then the same under a lamp that has lost a fifth of its light."""
    good = [path for path in photos if "/good/" in path]
    with httpx2.Client(headers={"Authorization": f"Bearer {server.tokens['operator']}"}, timeout=120) as client:
        for number in range(15):
            gain = 1.0 if number < 5 else 0.8
            files = []
            for path in good[:8]:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                content = io.BytesIO()
                Image.fromarray(np.rint(gain * pixels).astype(np.uint8)).save(content, "png")
                files.append(("images", ("line.png", content.getvalue(), "image/png")))
            client.post(f"{server.url}/v1/inspect", files=files).raise_for_status()


@pytest.mark.usefixtures("darkened")
def test_an_engineer_sees_the_change_its_pictures_and_its_inspections(visit):
    page = visit("/drift", role="engineer")
    alarm = page.locator(".drift.alarm").first
    expect(alarm).to_be_visible(timeout=60_000)
    expect(alarm).to_contain_text("Since")
    expect(alarm.locator("img").first).to_be_visible()
    assert alarm.locator("img").first.evaluate("picture => picture.decode().then(() => picture.naturalWidth)") > 0
    expect(page.locator(".statistics tbody tr").first).to_be_visible()
    page.locator(".statistics a").first.click()
    expect(page.locator("h1")).to_have_text("History")
    expect(page.locator(".inspections tbody tr").first).to_be_visible()


def test_operators_do_not_see_it(visit):
    page = visit("/drift")
    expect(page.get_by_text("This page is for engineers.")).to_be_visible()
