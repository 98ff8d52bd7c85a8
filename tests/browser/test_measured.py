"""Rates measured by reviews on the page Model, in a real browser, against a real server of its own."""

import httpx2
import pytest
from playwright.sync_api import expect

from serving import Server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(bundle, parts, tmp_path_factory):
    """A server at 20 % false alarms with an inspection for each verdict, all of them reviewed."""
    server = Server(bundle, tmp_path_factory.mktemp("measured") / "data", "--device=cpu")
    operator, engineer = ({"Authorization": f"Bearer {server.tokens[role]}"} for role in ("operator", "engineer"))
    path, body = f"{server.url}/v1/model/false-alarm-rate", {"false_alarm_rate": 0.2}
    httpx2.put(path, headers=engineer, json=body).raise_for_status()
    for image in (parts.normal, parts.anomalous, parts.unknown):
        files = {"images": ("sent.png", image.read_bytes(), "image/png")}
        answer = httpx2.post(f"{server.url}/v1/inspect", headers=operator, files=files).raise_for_status()
        (one,) = answer.json()["inspections"]
        body = {"decision": "accept" if image == parts.normal else "reject"}
        httpx2.post(f"{server.url}/v1/inspections/{one['id']}/review", headers=operator, json=body).raise_for_status()
    yield server
    server.stop()


def test_an_engineer_measures_the_rates_and_looks_at_the_proposed_one(visit, server):
    page = visit("/model", role="engineer")
    section = page.locator("section", has=page.get_by_role("heading", name="Measured by reviews"))
    proposed = section.get_by_role("button", name="Look at")
    expect(proposed).to_be_hidden()
    section.get_by_role("button", name="Measure").click()
    expect(section).to_contain_text("3 images were inspected with this bundle")
    expect(section.locator("dd").first).to_contain_text("100.0\u00a0% (")
    expect(section.locator("dd").first).to_contain_text("2 reviewed defective parts")
    expect(proposed).to_have_text("Look at 10\u00a0%")
    proposed.click()
    expect(page.get_by_label("Rate in percent")).to_have_value("10")
    expect(page.locator(".main-button")).to_have_text("Apply 10\u00a0%")
    assert page.request.get(f"{server.url}/v1/model").json()["false_alarm_rate"] == pytest.approx(0.2)
