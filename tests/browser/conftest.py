"""A server with a small bundle, and Chromium in front of it."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from builders import bundle, cloth, detector, photos  # noqa: F401 - fixtures
from normweave.detector import Detector
from required import absent

HOSTILE = "<img src=x onerror=alert(1)>.png"


@dataclass(frozen=True)
class Server:
    """A running `normweave serve`."""

    url: str
    tokens: dict[str, str]  # by role
    watched: Path


@dataclass(frozen=True)
class Parts:
    """Images of which the bundle says what their names say."""

    normal: Path
    anomalous: Path
    unknown: Path


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("server")
    watched = folder / "camera"
    watched.mkdir()
    command = [sys.executable, "-m", "normweave", "serve", str(bundle), "--port=0", "--json", "--threads=1"]
    command += ["--device=cpu", f"--data={folder / 'kept'}", f"--watch={watched}"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        said = json.loads(line)
        tokens = {one["role"]: one["token"] for one in said["tokens"]}
        yield Server(said["url"], tokens, watched)
        process.terminate()
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="session")
def parts(bundle, photos, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("parts")
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((8, 8))) * 255  # no cloth
    Image.fromarray(board.astype(np.uint8)).convert("RGB").save(folder / "board.png")
    runtime = Detector.load(bundle, threads=1, device="cpu")
    verdicts = {outcome.verdict: photo for photo, outcome in zip(photos, runtime.score(photos), strict=True)}
    assert runtime.score(str(folder / "board.png")).verdict == "unknown"
    shutil.copy(verdicts["normal"], folder / "good.png")
    shutil.copy(verdicts["anomalous"], folder / HOSTILE)
    return Parts(folder / "good.png", folder / HOSTILE, folder / "board.png")


@pytest.fixture(scope="module")
def sent(server, parts):
    """One image of each verdict, sent by a program."""
    for path in (parts.normal, parts.anomalous, parts.unknown):
        httpx2.post(
            f"{server.url}/v1/inspect",
            headers={"Authorization": f"Bearer {server.tokens['operator']}"},
            files={"images": ("sent.png", path.read_bytes(), "image/png")},
        ).raise_for_status()


@pytest.fixture(
    scope="module"
)  # not longer: Playwright runs an event loop in this thread as long as it lives
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
    """Log somebody in and open a page; nothing may be asked of another host, and nothing may go wrong unseen."""
    contexts, wrong = [], []
    ours = (server.url, server.url.replace("http", "ws", 1), "data:", f"blob:{server.url}")

    def opened(path="/", *, role="operator", width=1280, **settings):
        context = chromium.new_context(viewport={"width": width, "height": 860}, **settings)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("request", lambda sent: sent.url.startswith(ours) or wrong.append(f"asked {sent.url}"))
        page.on("websocket", lambda made: made.url.startswith(ours) or wrong.append(f"asked {made.url}"))
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{server.url}/login")
        page.fill("#token", server.tokens[role])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{server.url}/")
        page.on("console", lambda said: said.type == "error" and wrong.append(f"console: {said.text}"))
        if path != "/":
            page.goto(server.url + path)
        page.wait_for_selector("main.page")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def stranger(chromium, server):
    """The page for somebody who is not logged in."""
    contexts = []

    def opened():
        contexts.append(chromium.new_context())
        page = contexts[-1].new_page()
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
