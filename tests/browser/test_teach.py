"""An engineer teaches a new product from ten images, while another page inspects."""

import shutil
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import expect

from browsing import broken, carry, inspect, settle
from normweave.config import DataConfig
from normweave.data import layouts
from normweave.detector import Detector
from normweave.serve.pages.teach import not_images
from serving import Server

pytestmark = pytest.mark.browser
TRAINING = 300_000
"""Longest training in ms; a busy machine is slow."""


@pytest.fixture(scope="module")
def server(fusion_bundle, tmp_path_factory):
    """`normweave serve` with a library of one bundle."""
    folder = tmp_path_factory.mktemp("teaching")
    shutil.copytree(fusion_bundle, folder / "library" / "cloth")
    data = folder / "data"
    server = Server(f"--library={folder / 'library'}", data, "--active=cloth", "--device=cpu")
    server.library = folder / "library"
    yield server
    server.stop()
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def new_cloth(cloth):
    """Ten good images of the subclass that the bundle does not know, in the order of their names."""
    samples = [one for one in layouts.read(cloth, DataConfig(subclass_from="column")) if one.split == "train"]
    third = sorted({one.subclass for one in samples})[2]
    return [one.image_path for one in samples if one.subclass == third][:10]


def test_a_new_product_is_taught_while_another_page_inspects(visit, server, photos, new_cloth):
    before = {path.name: path.read_bytes() for path in (server.library / "cloth").iterdir()}
    page = visit("/teach", role="engineer")
    start = page.get_by_role("button", name="Teach")
    expect(start).to_be_disabled()
    carry(page, [(path.name, path) for path in new_cloth])
    expect(page.get_by_text("10 chosen")).to_be_visible()
    expect(page.get_by_text("Enter the subclass.")).to_be_visible()
    expect(start).to_be_disabled()
    page.get_by_label("Subclass").fill("new cloth")
    start.click()
    expect(page.get_by_text("Training…")).to_be_visible()
    assert broken(page) == []

    other = visit("/")
    inspect(other, "meanwhile.png", Path(photos[0]))

    expect(page.get_by_role("button", name="Keep")).to_be_visible(timeout=TRAINING)
    expect(page.locator(".held-out img")).to_have_count(2)
    assert page.locator(".held-out img").evaluate_all("found => found.every((one) => one.complete && one.naturalWidth)")
    settle(page)
    assert broken(page) == []
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_text("It judges in the shadow of the present model now.")).to_be_visible()

    (made,) = [path for path in server.library.iterdir() if path.name != "cloth"]
    detector = Detector.load(made, threads=1, device="cpu")
    outcome = detector.score(str(new_cloth[1]))  # one that it was trained on
    assert (outcome.category, outcome.subclass) == ("cloth", "new cloth")
    assert {path.name: path.read_bytes() for path in (server.library / "cloth").iterdir()} == before
    models = page.request.get(f"{server.url}/v1/models").json()
    states = {model["name"]: model["state"] for model in models["models"]}
    assert states == {"cloth": "active", made.name: "candidate"}
    entries = page.request.get(f"{server.url}/v1/audit").json()["entries"]
    assert {"teach_started", "teach_kept", "shadow_started"} <= {entry["event"] for entry in entries}


def test_files_that_are_not_images_are_named_in_one_message(visit, tmp_path, photos):
    page = visit("/teach", role="engineer")
    (tmp_path / "fake.png").write_text("no image")
    carry(page, [("fake.png", tmp_path / "fake.png")])
    expect(page.get_by_text("fake.png is not an image.")).to_be_visible()
    (tmp_path / "torn.png").write_bytes(Path(photos[0]).read_bytes()[:900])
    carry(page, [("torn.png", tmp_path / "torn.png")])
    expect(page.get_by_text("fake.png and torn.png are not images.")).to_be_visible()
    expect(page.get_by_text("0 chosen")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_text("are not images.")).to_be_hidden()
    (tmp_path / "note.txt").write_text("no image")
    carry(page, [("note.txt", tmp_path / "note.txt")])
    expect(page.get_by_text("note.txt is not an image.")).to_be_visible()


def test_a_message_names_some_files():
    assert not_images(list("abcde")) == "a, b, c, d and e are not images."
    assert not_images(list("abcdefg")) == "a, b, c, d, e and 2 more are not images."


def test_a_training_is_stopped_only_after_a_confirmation(visit, server, new_cloth):
    page = visit("/teach", role="engineer")
    carry(page, [(path.name, path) for path in new_cloth])
    page.get_by_label("Subclass").fill("stopped")
    page.get_by_role("button", name="Teach").click()
    page.get_by_role("button", name="Stop").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Stop the training of cloth/stopped?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert page.request.get(f"{server.url}/v1/teach").json()["job"]["state"] == "training"
    page.get_by_role("button", name="Stop").click()
    dialog.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("heading", name="cloth/stopped", exact=True)).to_be_hidden()


def test_the_server_ends_while_it_trains(server, new_cloth):
    headers = {"Authorization": f"Bearer {server.tokens['engineer']}"}
    files = [("images", (path.name, path.read_bytes(), "image/png")) for path in new_cloth]
    found = httpx2.post(f"{server.url}/v1/inspect", headers=headers, files=files, timeout=60).json()
    ids = [one["id"] for one in found["inspections"]]
    body = {"category": "cloth", "subclass": "a", "inspections": ids}
    answer = httpx2.post(f"{server.url}/v1/teach", headers=headers, json=body, timeout=60)
    assert answer.status_code == 202, answer.text
    library = sorted(path.name for path in server.library.iterdir())
    server.kill()
    server.start()
    job = httpx2.get(f"{server.url}/v1/teach", headers=headers, timeout=60).json()["job"]
    assert job["state"] == "interrupted"
    assert "Nothing of it is kept" in job["error"]
    assert sorted(path.name for path in server.library.iterdir()) == library


def test_it_is_for_engineers(visit):
    page = visit("/teach")
    expect(page.get_by_text("This page is for engineers.")).to_be_visible()
