"""The page Live in a real browser, with the snapshots of an HTTP server as the source."""

import pytest
from playwright.sync_api import expect

from browsing import broken, settle
from feeders import Snapshots
from serving import Server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def snapshots():
    with Snapshots() as server:
        yield server


@pytest.fixture(scope="module")
def server(bundle, snapshots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    line = folder / "line.yaml"
    line.write_text(
        f"sources:\n- {{type: http, name: top, url: '{snapshots.url}', poll_seconds: 0.1, retry_seconds: 0.1}}\n"
        "- {type: video, name: film, path: missing.mkv}\n"
    )
    with Server(bundle, folder / "data", "--device=cpu", f"--config={line}") as server:
        yield server
    assert "Traceback" not in server.log()


def test_the_last_image_of_a_source_is_shown_until_the_next_one(visit, snapshots, parts):
    snapshots.content = parts.normal.read_bytes()
    page = visit("/live")
    top, film = page.locator(".live").first, page.locator(".live").nth(1)
    expect(top.locator(".banner")).to_contain_text("Good")
    expect(top.locator(".source-state")).to_contain_text("Running")
    expect(film.locator(".source-state")).to_contain_text("No images There is no video file missing.mkv")
    picture = top.locator(".viewer-plane img").first
    expect(picture).to_be_visible()
    first = picture.get_attribute("src")
    snapshots.content = parts.anomalous.read_bytes()
    expect(top.locator(".banner")).to_contain_text("Defective")
    expect(picture).not_to_have_attribute("src", first)
    settle(page)
    assert broken(page) == []
    snapshots.stop()
    expect(top.locator(".source-state")).to_contain_text("No images")
    snapshots.start()
    expect(top.locator(".source-state")).not_to_contain_text("No images")


def test_the_page_line_and_the_rest_interface_have_the_state_of_each_source(visit, server):
    page = visit("/line")
    film = page.locator(".source").nth(1)
    expect(film).to_contain_text("film video No images There is no video file missing.mkv")
    expect(film.locator(".light.red")).to_be_visible()
    _, source = page.request.get(f"{server.url}/v1/line").json()["sources"]
    assert (source["name"], source["type"], source["status"], source["inspected"]) == ("film", "video", "no images", 0)
