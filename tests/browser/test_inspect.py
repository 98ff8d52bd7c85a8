"""The Inspect page in a real browser, against a real server."""

import re
import shutil
import socket
import time
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from browsing import carry, inspect, listed, stored

pytestmark = pytest.mark.browser
WORDS = {"normal": "Good", "anomalous": "Defective", "unknown": "Unknown product"}


@pytest.fixture
def sent_by_a_program(server):
    """Function that inspects an image over the REST interface."""

    def send(name, path):
        with server.client() as client:
            client.post("/v1/inspect", files={"images": (name, path.read_bytes())}).raise_for_status()

    return send


def test_dropped_images_are_inspected_and_shown(visit, parts):
    page = visit("/")
    carry(page, [(path.name, path) for path in (parts.normal, parts.anomalous, parts.unknown)])
    for verdict, word in WORDS.items():
        path = getattr(parts, verdict)
        row = listed(page, path.name)
        expect(row.locator(".tag")).to_have_text(word)  # a word
        expect(row.locator(f".tag svg.{verdict}")).to_be_visible()  # and a shape, not the colour alone
        row.click()
        expect(page.locator(".banner .word")).to_have_text(word)
        expect(page.locator("h2.name")).to_have_text(path.name)
        expect(page.locator(".facts")).to_contain_text("limit")
        expect(page.locator(".facts")).to_contain_text(re.compile(r"in \d+ good parts"))


def test_a_file_name_is_shown_as_text(visit, parts):
    page = visit("/")
    inspect(page, parts.anomalous.name, parts.anomalous)
    assert page.locator("img[onerror], img[src=x]").count() == 0


def test_a_pasted_image_and_a_chosen_one_are_inspected(visit, parts):
    page = visit("/")
    carry(page, [("image.png", parts.normal)], how="paste")  # the name of every image in a clipboard
    expect(page.locator("h2.name")).to_have_text(re.compile(r"^pasted-\d{8}-\d{6}\.png$"))
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Drop images here").click()
    chooser.value.set_files(parts.unknown)
    expect(page.locator("h2.name")).to_have_text(parts.unknown.name)


def test_a_page_that_is_closed_while_it_sends_leaves_no_error_in_the_log(visit, server):
    """The end of the fixture `server` reads the log."""
    cookies = "; ".join(f"{one['name']}={one['value']}" for one in visit("/").context.cookies())
    address = urlsplit(server.url)
    head = [f"POST /upload?name=a.png HTTP/1.1\r\nHost: {address.netloc}\r\nOrigin: {server.url}\r\nCookie: {cookies}"]
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall("\r\n".join([*head, "Content-Length: 1000", "", "cut"]).encode())
        time.sleep(0.5)  # its route reads
    with server.client() as client:
        client.get("/healthz").raise_for_status()


def test_an_unreadable_image_shows_the_reason(visit, parts, tmp_path):
    page = visit("/")
    (tmp_path / "cut.png").write_bytes(parts.normal.read_bytes()[:200])
    carry(page, [("cut.png", tmp_path / "cut.png")])
    expect(page.locator(".banner .word")).to_have_text("Not readable")
    expect(page.locator(".banner .meaning")).to_contain_text("could not be read")
    expect(page.locator(".viewer-empty")).to_have_text("The image could not be read.")


def word(page):
    return page.locator(".banner .word")


def test_images_of_every_source_are_shown_in_large_letters(visit, parts, server, sent_by_a_program):
    page = visit("/", width=1440)
    sent_by_a_program("by-program.png", parts.unknown)
    expect(page.locator("h2.name")).to_have_text("by-program.png")
    expect(listed(page, "by-program.png")).to_contain_text("other program")
    expect(word(page)).to_have_text("Unknown product")
    # Twenty millimetres on a screen of 24 inches with 1920 pixels, which is read from three metres.
    assert word(page).evaluate("word => parseFloat(getComputedStyle(word).fontSize)") > 95
    assert word(page).bounding_box()["y"] < 250
    page.set_viewport_size({"width": 1024, "height": 768})
    for part in (".viewer-stage", ".facts"):  # on a tablet, without scrolling
        assert page.locator(part).bounding_box()["y"] < 600
    other = visit("/")
    expect(other.locator("h2.name")).to_have_text("by-program.png")  # not only in the browser that was open


def test_an_image_that_is_not_good_stays_until_a_person_continues(visit, parts, sent_by_a_program):
    page = visit("/")
    carry(page, [("hole.png", parts.anomalous), ("fine-1.png", parts.normal), ("fine-2.png", parts.normal)])
    expect(page.locator(".progress")).to_be_empty(timeout=30_000)
    expect(listed(page, "fine-1.png")).to_be_visible()
    expect(listed(page, "fine-2.png")).to_be_visible()
    expect(word(page)).to_have_text("Defective")
    expect(page.locator("h2.name")).to_have_text("hole.png")
    expect(page.locator(".held")).to_contain_text("1 not good since")
    expect(page.locator(".held")).to_contain_text("The newest image: Good.")
    sent_by_a_program("strange.png", parts.unknown)
    expect(page.locator(".held")).to_contain_text("2 not good since")
    expect(word(page)).to_have_text("Unknown product")
    sent_by_a_program("fine-3.png", parts.normal)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("h2.name")).to_have_text("fine-3.png")
    expect(word(page)).to_have_text("Good")
    expect(page.locator(".held")).to_be_hidden()


TONES = """() => {
  window.tones = 0;
  const start = OscillatorNode.prototype.start;
  OscillatorNode.prototype.start = function (...given) {
    window.tones += 1;
    start.apply(this, given);
  };
}"""


def test_a_sound_for_images_that_are_not_good(visit, parts, sent_by_a_program):
    page = visit("/")
    page.evaluate(TONES)
    sent_by_a_program("quiet.png", parts.anomalous)
    expect(page.locator("h2.name")).to_have_text("quiet.png")
    assert page.evaluate("tones") == 0  # nobody wants it
    page.get_by_label("Sound if not good").check()
    page.wait_for_function("tones === 3")
    page.reload()
    page.evaluate(TONES)
    expect(page.get_by_label("Sound if not good")).to_be_checked()
    sent_by_a_program("fine.png", parts.normal)
    sent_by_a_program("loud.png", parts.anomalous)
    expect(page.locator("h2.name")).to_have_text("loud.png")
    page.wait_for_function("tones === 3")


def test_the_progress_counts_every_image_once(visit, parts):
    page = visit("/")
    page.evaluate(
        """() => {
          window.seen = new Set();
          const progress = document.querySelector(".progress");
          new MutationObserver(() => window.seen.add(progress.textContent)).observe(progress, { childList: true });
        }"""
    )
    carry(page, [("one.png", parts.normal), ("two.png", parts.normal)])
    expect(listed(page, "one.png")).to_be_visible()
    expect(listed(page, "two.png")).to_be_visible()
    expect(page.locator(".progress")).to_be_empty()
    assert set(page.evaluate("[...window.seen]")) <= {"0 of 2 inspected …", "1 of 2 inspected …", ""}


def test_many_images_are_all_inspected_and_the_list_is_bounded(visit, parts, server):
    page = visit("/")
    carry(page, [(f"many-{number}.png", parts.normal) for number in range(80)])
    expect(page.locator(".progress")).to_be_empty(timeout=60_000)
    names = {inspection["name"] for inspection in stored(page, server, limit=200)}
    assert {f"many-{number}.png" for number in range(80)} <= names
    expect(page.locator(".inspected li")).to_have_count(50)


def test_images_in_the_watched_folder_are_inspected_until_it_is_switched_off(visit, parts, server):
    page = visit("/")
    expect(page.locator(".path")).to_have_text(str(server.watched))
    shutil.copy(parts.unknown, server.watched / "from-camera.png")
    expect(page.locator("h2.name")).to_have_text("from-camera.png")
    expect(page.locator(".banner .word")).to_have_text("Unknown product")
    switch = page.get_by_role("switch", name="Inspect new images")
    switch.click()
    expect(switch).not_to_be_checked()
    other = visit("/")
    expect(other.get_by_role("switch", name="Inspect new images")).not_to_be_checked()  # one for all browsers
    folder = other.locator(".folder")
    expect(folder).to_contain_text("Paused")
    switch.click()
    expect(switch).to_be_checked()
    expect(folder).to_contain_text("Watching")
    server.watched.rename(server.watched.with_name("away"))
    expect(folder).to_contain_text("Folder missing")
    expect(folder).to_contain_text("No such file or directory")
    server.watched.with_name("away").rename(server.watched)
    expect(folder).to_contain_text("Watching")
