"""What a person at the line sees and does, in a real browser before a real server."""

import base64
import csv
import io
import re
import shutil
import time

import httpx2
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

TRANSFER = """
([files, kind]) => {
  const carried = new DataTransfer();
  for (const [name, content] of files) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    carried.items.add(new File([bytes], name, { type: "image/png" }));
  }
  document.body.dispatchEvent(
    kind === "paste"
      ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true })
      : new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }),
  );
}
"""
WORDS = {"normal": "Normal", "anomalous": "Anomalous", "unknown": "Unknown"}


def carry(page, files, *, kind="drop"):
    """Drop or paste (name, path) somewhere on the page."""
    encoded = [[name, base64.b64encode(path.read_bytes()).decode()] for name, path in files]
    page.evaluate(TRANSFER, [encoded, kind])


def inspected(page, name):
    """The newest row of the list with this name."""
    return (
        page.locator(".inspected button")
        .filter(has=page.locator(".file", has_text=re.compile(f"^{re.escape(name)}$")))
        .first
    )


def kept(page, server, **query):
    """What the server has, by its REST, as the person who is logged in."""
    return page.request.get(f"{server.url}/v1/inspections", params=query).json()["inspections"]


# ── Inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_three_dropped_images_are_judged_and_shown(visit, parts):
    page = visit("/")
    carry(page, [(path.name, path) for path in (parts.normal, parts.anomalous, parts.unknown)])
    for verdict, word in WORDS.items():
        path = getattr(parts, verdict)
        row = inspected(page, path.name)
        expect(row.locator(".tag")).to_have_text(word)  # in words, not by colour alone
        expect(row.locator(f".tag svg.{verdict}")).to_be_visible()  # and by a shape of its own
        row.click()
        expect(page.locator(".banner .word")).to_have_text(word)
        expect(page.locator("h2.name")).to_have_text(path.name)
        expect(page.locator(".facts")).to_contain_text("line at")
        expect(page.locator(".facts")).to_contain_text(re.compile(r"in \d+ good parts"))


def test_the_name_of_a_file_is_shown_as_text(visit, parts):
    page = visit("/")
    carry(page, [(parts.anomalous.name, parts.anomalous)])
    expect(page.locator("h2.name")).to_have_text(parts.anomalous.name)
    assert page.locator("img[onerror], img[src=x]").count() == 0


def test_the_slider_fades_the_map_and_the_boxes_can_be_hidden(visit, parts):
    page = visit("/")
    carry(page, [("to-fade.png", parts.anomalous)])
    expect(page.locator("h2.name")).to_have_text("to-fade.png")
    heat = page.locator(".viewer-heat")
    expect(heat).to_be_visible()
    page.wait_for_function("document.querySelector('.viewer-heat').naturalWidth > 0")
    before = float(heat.evaluate("map => getComputedStyle(map).opacity"))
    page.get_by_label("Opacity of the map").fill("15")
    after = float(heat.evaluate("map => getComputedStyle(map).opacity"))
    assert (before, after) == (0.6, 0.15)
    boxes = page.locator(".viewer-plane rect:not(.under)")
    assert boxes.count() >= 1
    page.get_by_label("Boxes").uncheck()
    expect(boxes).to_have_count(0)


def test_the_image_zooms_by_buttons_wheel_keys_and_double_click(visit, parts):
    page = visit("/")
    carry(page, [("to-zoom.png", parts.normal)])
    expect(page.locator("h2.name")).to_have_text("to-zoom.png")
    plane = page.locator(".viewer-plane")

    def scale():
        return plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).a")

    assert scale() == 1
    page.get_by_label("Zoom in").click()
    assert scale() == pytest.approx(1.5)
    page.get_by_label("Whole image").click()
    page.locator(".viewer-stage").hover()
    page.mouse.wheel(0, -100)
    page.wait_for_function(
        "new DOMMatrix(getComputedStyle(document.querySelector('.viewer-plane')).transform).a > 1.1"
    )
    page.locator(".viewer-stage").press("0")
    assert scale() == 1
    page.locator(".viewer-stage").dblclick()
    assert scale() == pytest.approx(3)
    left = plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).e")
    page.locator(".viewer-stage").press("ArrowLeft")
    assert plane.evaluate("plane => new DOMMatrix(getComputedStyle(plane).transform).e") > left


def test_a_pasted_image_and_a_chosen_one_are_inspected(visit, parts):
    page = visit("/")
    carry(page, [("image.png", parts.normal)], kind="paste")  # as the clipboard calls every image
    expect(page.locator("h2.name")).to_have_text(re.compile(r"^pasted-\d{8}-\d{6}\.png$"))
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Drop images here").click()
    chooser.value.set_files(parts.unknown)
    expect(page.locator("h2.name")).to_have_text(parts.unknown.name)


def test_what_cannot_be_read_says_why(visit, parts, tmp_path):
    page = visit("/")
    (tmp_path / "cut.png").write_bytes(parts.normal.read_bytes()[:200])
    carry(page, [("cut.png", tmp_path / "cut.png")])
    expect(page.locator(".banner .word")).to_have_text("Not readable")
    expect(page.locator(".banner .meaning")).to_contain_text("could not be read")
    expect(page.locator(".viewer-empty")).to_have_text("The image could not be read.")


def test_many_images_all_get_through_and_the_list_stays_short(visit, parts, server):
    page = visit("/")
    carry(page, [(f"many-{number}.png", parts.normal) for number in range(80)])
    expect(page.locator(".progress")).not_to_be_empty()
    expect(page.locator(".progress")).to_be_empty(timeout=60_000)
    names = {one["name"] for one in kept(page, server, limit=200)}
    assert {f"many-{number}.png" for number in range(80)} <= names
    expect(page.locator(".inspected li")).to_have_count(50)  # the list is bounded


def test_the_watched_folder_is_followed_and_can_be_left_alone(visit, parts, server):
    page = visit("/")
    expect(page.locator(".path")).to_have_text(str(server.watched))
    shutil.copy(parts.unknown, server.watched / "from-camera.png")
    expect(page.locator("h2.name")).to_have_text("from-camera.png")
    expect(page.locator(".banner .word")).to_have_text("Unknown")
    switch = page.get_by_role("switch", name="Inspect what is put there")
    switch.click()
    expect(switch).not_to_be_checked()
    other = visit("/")
    expect(
        other.get_by_role("switch", name="Inspect what is put there")
    ).not_to_be_checked()  # it is the server's
    switch.click()
    expect(switch).to_be_checked()


# ── Review and History ───────────────────────────────────────────────────────────────────────────────────────────────


def left(page):
    """How many the page says are left."""
    expect(page.locator(".left")).to_have_text(re.compile(r"^\d+ left$"))
    return int(page.locator(".left").inner_text().split()[0])


@pytest.mark.usefixtures("sent")
def test_parts_are_reviewed_by_keyboard_and_seen_in_history(visit, parts, server):
    page = visit("/")
    carry(page, [("first.png", parts.anomalous)])
    expect(page.locator("h2.name")).to_have_text("first.png")
    carry(page, [("second.png", parts.unknown)])
    expect(page.locator("h2.name")).to_have_text("second.png")
    page.goto(f"{server.url}/review")
    name = page.locator("h2.name")
    expect(name).to_have_text("second.png")  # the newest first
    count = left(page)

    comment = page.get_by_label("Comment")
    comment.click()
    page.keyboard.type("a scratch, nur außen")  # holds a, r, n and u
    expect(name).to_have_text("second.png")
    page.locator("h1").click()
    page.keyboard.press("r")
    expect(name).to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")
    expect(comment).to_have_value("")
    (second,) = kept(page, server, name="second.png")
    assert second["review"]["decision"] == "reject"
    assert second["review"]["comment"] == "a scratch, nur außen"
    assert second["review"]["reviewer"] == "operator"

    page.keyboard.press("a")
    expect(page.locator(".left")).to_have_text(f"{count - 2} left")
    page.keyboard.press("u")
    expect(name).to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")
    (first,) = kept(page, server, name="first.png")
    assert first["review"] is None
    page.keyboard.press("n")
    expect(name).not_to_have_text("first.png")
    expect(page.locator(".left")).to_have_text(f"{count - 1} left")

    page.goto(f"{server.url}/history")
    row = page.locator("tr", has_text="second.png").first
    expect(row).to_contain_text("rejected")
    row.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".facts")).to_contain_text("defective part, said operator")
    expect(dialog.locator(".facts")).to_contain_text("a scratch, nur außen")
    expect(dialog.locator(".viewer-plane img").first).to_be_visible()
    dialog.get_by_text("Take back").click()
    expect(dialog.locator("ul")).to_contain_text("taken back by operator")
    expect(dialog.locator(".facts")).to_contain_text("nobody has looked at it yet")


def test_a_second_press_on_the_way_to_the_next_part_does_not_decide_it(visit, parts, server):
    page = visit("/")
    for name in ("pressed-1.png", "pressed-2.png"):
        carry(page, [(name, parts.anomalous)])
        expect(page.locator("h2.name")).to_have_text(name)
    page.goto(f"{server.url}/review")
    expect(page.locator("h2.name")).to_have_text("pressed-2.png")
    page.evaluate(
        "() => { const accept = document.querySelector('.accept'); accept.click(); accept.click(); }"
    )
    expect(page.locator("h2.name")).to_have_text("pressed-1.png")
    (one,) = kept(page, server, name="pressed-1.png")
    assert one["review"] is None


def test_history_filters_pages_and_exports(visit, parts, server):
    page = visit("/")
    carry(page, [("=HYPERLINK(1).png", parts.normal)])
    expect(page.locator("h2.name")).to_have_text("=HYPERLINK(1).png")
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
    assert row["name"] == "'=HYPERLINK(1).png"  # no spreadsheet takes it for a formula
    (one,) = kept(page, server, name="=HYPERLINK(1).png")
    assert float(row["pred_score"]) == one["pred_score"]
    assert (row["verdict"], row["actor"], row["source"]) == ("normal", "operator", "page")


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rate(page, server):
    """At which the server judges."""
    return page.request.get(f"{server.url}/v1/model").json()["false_alarm_rate"]


@pytest.mark.usefixtures("sent")
def test_an_operator_looks_at_another_rate_but_does_not_change_it(visit, server):
    page = visit("/model")
    apply = page.locator(".main-button")
    expect(page.locator(".preview")).to_contain_text("stored inspections")
    page.get_by_label("Rate in percent").fill("25")
    expect(page.locator(".preview")).to_contain_text("at 25")
    expect(apply).to_be_disabled()
    expect(page.get_by_text("Only an engineer may apply another rate")).to_be_visible()
    before = rate(page, server)
    # a browser may send whatever it likes
    number = apply.evaluate("button => Number(button.id.slice(1))")
    page.evaluate("number => getElement(number).$emit('click', {})", number)
    page.wait_for_timeout(500)
    assert rate(page, server) == before


@pytest.mark.usefixtures("sent")
def test_an_engineer_moves_the_line(visit, server):
    page = visit("/model", role="engineer")
    apply = page.locator(".main-button")
    before = rate(page, server)
    number = page.get_by_label("Rate in percent")
    number.fill("0.5")
    expect(page.locator(".refused")).to_contain_text("needs at least 199 held-out normal images")
    expect(apply).to_be_disabled()
    number.fill("30")
    expect(page.locator(".preview")).to_contain_text("would get another verdict at 30")
    expect(page.locator(".mark.moved").first).to_be_visible()
    expect(apply).to_have_text("Apply 30\u00a0%")
    apply.click()
    expect(apply).to_be_disabled()
    assert rate(page, server) == pytest.approx(0.3)
    page.locator(".rate-slider [tabindex='0']").focus()
    page.keyboard.press("ArrowLeft")
    expect(number).not_to_have_value("30")
    number.fill(str(100 * before))
    expect(apply).to_be_enabled()
    apply.click()
    expect(apply).to_be_disabled()
    assert rate(page, server) == pytest.approx(before)


# ── everywhere ───────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = """
() => [...document.querySelectorAll("button, a, input:not([type=checkbox]), .viewer-check, .q-toggle")]
  .filter((one) => one.offsetParent && !one.closest(".drop, .q-field"))
  .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
  .filter(([, box]) => box.height < 43.5 || box.width < 43.5)
  .map(([what, box]) => `${box.width} x ${box.height}: ${what}`)
"""


@pytest.mark.parametrize("path", ["/", "/review", "/model", "/history"])
def test_pages_fit_every_screen_and_every_finger(visit, parts, server, path):
    page = visit("/")
    carry(page, [("w" * 150 + ".png", parts.anomalous)])
    expect(page.locator("h2.name")).to_have_text("w" * 150 + ".png")
    page.goto(server.url + path)
    page.wait_for_selector(".viewer-stage" if path in ("/", "/review") else "table", state="attached")
    for width in (360, 390, 768, 1024, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        beyond = page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert beyond <= 0, f"{beyond} pixels beyond {width}"
        assert page.evaluate(SMALL) == [], f"at {width} pixels"


def test_light_and_dark_follow_the_system_until_somebody_chooses(visit, server):
    page = visit("/", color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"dark => ({ground})() !== dark", arg=dark)
    light = page.evaluate(ground)
    theme = page.get_by_label("Light or dark")
    expect(theme).to_have_text("system")
    theme.click()
    expect(theme).to_have_text("light")
    theme.click()
    expect(theme).to_have_text("dark")
    assert page.evaluate(ground) == dark
    page.goto(f"{server.url}/model")
    expect(page.get_by_label("Light or dark")).to_have_text("dark")  # it is kept
    page.wait_for_function(f"dark => ({ground})() === dark", arg=dark)
    assert light != dark


def test_who_logs_out_sees_nothing_more(stranger, server):
    page = stranger()
    page.fill("#token", "nw_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown, expired or revoked")
    page.fill("#token", server.tokens["operator"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".who")).to_contain_text("operator")
    assert page.request.get(f"{server.url}/history.csv").status == 200
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("#token")).to_be_visible()
    assert page.request.get(f"{server.url}/history.csv").status == 401


@pytest.mark.slow
def test_a_revoked_token_closes_its_pages(stranger, server):
    page = stranger()
    engineer = {"Authorization": f"Bearer {server.tokens['engineer']}"}
    given = {"name": "guest", "role": "operator"}
    # not with the cookies of the page
    made = httpx2.post(f"{server.url}/v1/tokens", headers=engineer, json=given).json()
    page.fill("#token", made["token"])
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".drop")).to_be_visible()
    httpx2.delete(f"{server.url}/v1/tokens/{made['id']}", headers=engineer).raise_for_status()
    expect(page.locator("#token")).to_be_visible(timeout=50_000)
    time.sleep(
        12
    )  # NiceGUI clears up when ten seconds have gone without the browser; the log says if it could not
