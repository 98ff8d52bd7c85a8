"""A server with a small bundle and Chromium in front of it: fixtures and helpers of the tests of the pages."""

import base64
import dataclasses
import json
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from counterparts import Receiver
from normweave.detector import Detector
from required import absent
from serving import Server

expect.set_options(timeout=20_000)  # ms; a busy machine is slow
HOSTILE = "<img src=x onerror=alert(1)>.png"
TRANSFER = """
([files, type]) => {
  const carried = new DataTransfer();
  for (const [name, content] of files) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    carried.items.add(new File([bytes], name, { type: "image/png" }));
  }
  document.body.dispatchEvent(
    type === "paste"
      ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true })
      : new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }),
  );
}
"""
BROKEN = """
() => [
  ...document.querySelectorAll(".tag:not(.plain), thead th, dt, nav a, .decision b, .plain-button, .rare, td > span"),
]
  .filter((element) => element.checkVisibility())
  .filter((element) => {
    const inside = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    const lines = (text) => {
      const range = new Range();
      range.selectNodeContents(text);
      return range.getClientRects().length;
    };
    return (element.clientWidth && element.scrollWidth > element.clientWidth)
      || [...element.childNodes].filter(inside).some((text) => lines(text) > text.data.trim().split(/\\s+/).length);
  })
  .map((element) => element.outerHTML.slice(0, 120))
"""


@dataclass(frozen=True)
class Parts:
    """One image for each verdict of the bundle."""

    normal: Path
    anomalous: Path
    unknown: Path


@pytest.fixture(scope="session")
def server(bundle, tmp_path_factory):
    """`normweave serve` with a watched folder, in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    watched = folder / "camera"
    watched.mkdir()
    receiver = Receiver(folder)
    receiver.statuses = [410]  # of the first inspection
    receiver.listen()
    output = dataclasses.asdict(receiver.output(name="mes", refusals=1).config)
    line = folder / "line.yaml"
    line.write_text(json.dumps({"parts": {"seconds": 1}, "outputs": [output]}))
    server = Server(bundle, folder / "data", "--device=cpu", f"--watch={watched}", f"--config={line}")
    server.watched = watched
    yield server
    assert server.stop() in (0, -signal.SIGTERM)  # uvicorn re-raises the signal
    _, traceback, rest = server.log().partition("Traceback")
    assert not traceback, rest
    receiver.close()


@pytest.fixture(scope="session")
def parts(bundle, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((8, 8))) * 255  # a chessboard: no cloth
    Image.fromarray(board.astype(np.uint8)).convert("RGB").save(folder / "board.png")
    detector = Detector.load(bundle, threads=1, device="cpu")
    verdicts = {outcome.verdict: photo for photo, outcome in zip(photos, detector.score(photos), strict=True)}
    assert detector.score(str(folder / "board.png")).verdict == "unknown"
    shutil.copy(verdicts["normal"], folder / "good.png")
    shutil.copy(verdicts["anomalous"], folder / HOSTILE)
    return Parts(folder / "good.png", folder / HOSTILE, folder / "board.png")


@pytest.fixture(scope="session")
def sent(server, parts):
    """One image for each verdict, sent over the REST interface."""
    for path in (parts.normal, parts.anomalous, parts.unknown):
        httpx2.post(
            f"{server.url}/v1/inspect",
            headers={"Authorization": f"Bearer {server.tokens['operator']}"},
            files={"images": ("sent.png", path.read_bytes(), "image/png")},
        ).raise_for_status()


@pytest.fixture(scope="module")  # not longer: Playwright runs an event loop in this thread until it stops
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        absent("chromium", "no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Log in and open a page. A request to another host, an error in a script or a dialog fails the test."""
    contexts, wrong = [], []
    own = (server.url, server.url.replace("http", "ws", 1), "data:", f"blob:{server.url}")

    def opened(path="/", *, role="operator", width=1280, **settings):
        context = chromium.new_context(viewport={"width": width, "height": 860}, **settings)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        page.on("websocket", lambda socket: socket.url.startswith(own) or wrong.append(socket.url))
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{server.url}/login")
        page.fill("#token", server.tokens[role])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{server.url}/")
        page.on("console", lambda message: message.type == "error" and wrong.append(f"console: {message.text}"))
        if path != "/":
            page.goto(server.url + path)
        page.wait_for_selector(".page")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def login_form(chromium, server):
    """Open the server without a login."""
    contexts = []

    def opened(**settings):
        contexts.append(chromium.new_context(**settings))
        page = contexts[-1].new_page()
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()


def settle(page):
    """Wait until nothing fades, moves or changes its colour any more."""
    page.evaluate(
        """async () => {
          for (let frame = 0; frame < 2; frame += 1) await new Promise(requestAnimationFrame);
          await Promise.allSettled(document.getAnimations().map((animation) => animation.finished));
        }"""
    )


def broken(page):
    """The short texts of the page that are broken within a word, or wider than their place."""
    return page.evaluate(BROKEN)


def carry(page, files, *, how="drop"):
    """Drop or paste (name, path) somewhere on the page."""
    encoded = [[name, base64.b64encode(path.read_bytes()).decode()] for name, path in files]
    page.evaluate(TRANSFER, [encoded, how])


def inspect(page, name, path):
    """Drop one image and wait for its result."""
    carry(page, [(name, path)])
    expect(page.locator("h2.name")).to_have_text(name)


def listed(page, name):
    """The newest row of the list with this name."""
    exact = page.locator(".file", has_text=re.compile(f"^{re.escape(name)}$"))
    return page.locator(".inspected button").filter(has=exact).first


def stored(page, server, **query):
    """The inspections that the REST interface returns to the person who is logged in."""
    return page.request.get(f"{server.url}/v1/inspections", params=query).json()["inspections"]
