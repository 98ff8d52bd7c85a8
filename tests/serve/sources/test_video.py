"""Video files, written by the tests."""

import numpy as np
import pytest
from PIL import Image

from feeders import until, write_video
from inspections import ALL
from normweave.serve.source import check
from normweave.serve.sources.video import Config
from normweave.serve.trigger import SecondsTrigger, StillTrigger


def film(path, **given):
    return Config(type="video", name="film", path=str(path), retry_seconds=0.05, **given)


@pytest.fixture
def pictures(photos):
    return [np.asarray(Image.open(path).convert("RGB")) for path in photos[:8]]


def test_every_frame_is_inspected_with_the_pixels_of_the_video(run, service, pictures, tmp_path):
    write_video(tmp_path / "film.mkv", pictures)
    runner = run(film(tmp_path / "film.mkv"))
    until(lambda: runner.state.text == "the stream ended, 8 images were inspected")
    found = service.store.inspections(ALL, after=0, limit=99)
    for one, pixels in zip(found, pictures, strict=True):
        with Image.open(service.files.folder / one.image.image_hash[:2] / one.image.image_hash) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)
    assert check(film(tmp_path / "film.mkv")).startswith("first image of 64 x 64 pixels")


def test_triggers_use_the_time_and_the_motion_of_the_video(run, pictures, tmp_path):
    still = np.full((64, 64, 3), 90, np.uint8)
    moving = [np.roll(pictures[0], 7 * n, axis=1) for n in range(4)]
    write_video(tmp_path / "film.mkv", [still] * 10 + moving + [pictures[1]] * 10, rate=10)
    slow = run(film(tmp_path / "film.mkv", trigger=SecondsTrigger(type="seconds", seconds=1.0)))
    until(lambda: slow.state.text == "the stream ended, 3 images were inspected")
    quiet = run(film(tmp_path / "film.mkv", trigger=StillTrigger(type="still", frames=3)))
    until(lambda: quiet.state.text == "the stream ended, 1 images were inspected")


def test_a_missing_a_damaged_and_a_cut_file(run, pictures, tmp_path):
    missing = run(film(tmp_path / "film.mkv"))
    until(lambda: "There is no video file" in missing.state.text)
    assert missing.state.status == "no images"
    (tmp_path / "torn.mkv").write_bytes(b"no video" * 1000)
    damaged = run(film(tmp_path / "torn.mkv"))
    until(lambda: "cannot be read" in damaged.state.text)
    write_video(tmp_path / "film.mkv", pictures)
    until(lambda: missing.counts["inspected"] == 8)  # the file came later
