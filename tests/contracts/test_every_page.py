"""Contract of every page. A new page is found in `normweave.serve.pages` and needs no test of its own for this."""

import re

import pytest
from playwright.sync_api import expect

from browsing import broken, chromium, inspect, login_form, parts, sent, server, settle, visit  # noqa: F401
from normweave.serve.pages import every_page

pytestmark = pytest.mark.browser
PAGES = every_page()
LONG = "w" * 150 + ".png"
INTERNAL = re.compile(r"\b(experts?|adapted|adaption|kinds?|anomalous|threshold)\b", re.IGNORECASE)

SMALL = """
() => [...document.querySelectorAll("button, a, input:not([type=checkbox]), .viewer-check, .q-toggle")]
  .filter((element) => element.offsetParent && !element.closest(".drop, .q-field"))
  .map((element) => [element.outerHTML.slice(0, 80), element.getBoundingClientRect()])
  .filter(([, box]) => box.height < 43.5 || box.width < 43.5)
  .map(([html, box]) => `${box.width} x ${box.height}: ${html}`)
"""
# Elements that a mouse can use, numbered, so that they are recognised when the keyboard reaches them.
USABLE = """
() => {
  const usable = [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex='0']")].filter(
    (element) => element.checkVisibility() && !element.disabled && !element.closest("[aria-disabled=true]")
      && element.tabIndex >= 0,
  );
  usable.forEach((element, number) => (element.dataset.number = number));
  return usable.map((element) => element.outerHTML.slice(0, 120));
}
"""
CLICKABLE_ONLY = """
() => [...document.querySelectorAll(".q-btn, .q-toggle, .q-select, .q-slider, summary, [onclick]")]
  .filter((element) => element.checkVisibility() && !element.matches("[tabindex='0'], button, a, label")
    && !element.querySelector("[tabindex='0'], input, button, a"))
  .map((element) => element.outerHTML.slice(0, 120))
"""


@pytest.fixture(params=PAGES, ids=lambda page: page.__name__)
def page_class(request):
    return request.param


@pytest.fixture
def filled(visit, sent, parts, page_class):  # noqa: F811
    """Open the page after images of all verdicts, one with a very long name."""

    def opened(**settings):
        page = visit("/", role="engineer" if page_class.engineers_only else "operator", **settings)
        inspect(page, LONG, parts.anomalous)
        if page_class.path != "/":
            page.goto(page.url.rstrip("/") + page_class.path)
        page.wait_for_selector(".page h1")
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(500)  # for what a page reads after the browser has connected
        return page

    return opened


def test_it_has_a_name_a_purpose_and_an_address_of_its_own():
    for names in (
        {page.path for page in PAGES},
        {page.title for page in PAGES},
        {page.position for page in PAGES},
    ):
        assert len(names) == len(PAGES) >= 4


def test_it_renders_without_internal_terms_and_the_navigation_marks_it(filled, page_class):
    page = filled()
    expect(page).to_have_title(f"{page_class.title} · normweave")
    expect(page.locator("h1")).to_have_text(page_class.title)
    expect(page.locator("nav a[aria-current=page]")).to_have_text(page_class.title)
    shown = [one.title for one in PAGES if page_class.engineers_only or not one.engineers_only]
    assert page.locator("nav a").all_inner_texts() == shown
    assert INTERNAL.findall(page.locator("body").inner_text()) == []


def test_the_keyboard_reaches_everything_that_a_mouse_can_use(filled):
    page = filled()
    assert page.evaluate(CLICKABLE_ONLY) == []
    usable = page.evaluate(USABLE)
    reached = set()
    for _ in range(len(usable) + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    assert [html for number, html in enumerate(usable) if str(number) not in reached] == []


def violations(page, schemes=("light", "dark")):
    """What axe-core finds in light and dark, as text."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", exc_type=ImportError)
    found = []
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        settle(page)
        # preload=False: axe does not request the style sheets again, which would show a loading bar
        results = axe.Axe().run(page, options={"resultTypes": ["violations"], "preload": False})
        found += [
            f"{scheme}: {rule['id']}: {node['html'][:200]} {node['failureSummary']}"
            for rule in results.response["violations"]
            for node in rule["nodes"]
        ]
    return found


def test_it_has_no_accessibility_violation(filled):
    assert violations(filled()) == []


def test_the_login_form_has_no_accessibility_violation(login_form):  # noqa: F811
    assert violations(login_form()) == []


def test_no_state_of_a_page_has_an_accessibility_violation(visit, sent, parts):  # noqa: F811
    page = visit("/")
    inspect(page, "held.png", parts.anomalous)
    expect(page.locator(".held")).to_be_visible()
    page.evaluate(f"emitEvent('not_inspected', '{LONG}: too large.')")
    expect(page.get_by_role("button", name="Close")).to_be_visible()
    assert page.locator(".q-notification").evaluate("toast => toast.scrollWidth - toast.clientWidth") <= 0
    found = violations(page)
    page.goto(page.url + "model")
    page.get_by_label("Rate in percent").fill("0.1")
    expect(page.locator(".refused")).to_be_visible()
    page.locator(".q-select").click()
    expect(page.get_by_role("listbox")).to_be_visible()
    settle(page)
    assert page.get_by_role("option").first.bounding_box()["height"] >= 44
    found += [one for one in violations(page, ["light"]) if ": region:" not in one]  # a list box is below the body
    page.goto(page.url.replace("model", "review"))
    page.locator(".accept[aria-disabled=false]").hover()
    found += violations(page, ["dark"])
    page.goto(page.url.replace("review", "history"))
    page.locator(".inspections button").first.click()
    expect(page.get_by_role("dialog").locator(".viewer-plane img").first).to_be_visible()
    found += violations(page, ["light"])
    page = visit("/tokens", role="engineer")
    page.get_by_label("Name of the person").fill(LONG)
    page.get_by_role("button", name="Create").click()
    expect(page.locator(".card")).to_be_visible()
    found += violations(page)
    page.locator(".tokens tbody button").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert found + violations(page) == []


def test_it_fits_every_screen_and_every_finger(filled):
    page = filled()
    for width in (360, 390, 768, 1024, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        beyond = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert beyond <= 0, f"{beyond} pixels beyond {width}"
        assert page.evaluate(SMALL) == [], f"at {width} pixels"
        assert broken(page) == [], f"at {width} pixels"
