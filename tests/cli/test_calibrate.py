"""New operating points: the bundle changes in nothing else, and only if there are enough images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from normweave import bundle as bundles
from normweave.textiles import SEEN, render

from .conftest import run

SMALL_SET = ("--size=64", "--test-images=0", "--defect-images=0", "--seed=9")


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the bundle."""
    return shutil.copytree(trained.bundle, tmp_path / "own.bundle")


def test_calibrating_replaces_the_operating_points_only(trained, own, tmp_path):
    with_test = ("--train-images=2", "--test-images=1", "--defect-images=1")
    run("data", "make-textures", tmp_path / "more", *SMALL_SET, *with_test)
    result = run("calibrate", own, tmp_path / "more", "--false-alarm-rate", "0.25", "--json")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output["false_alarm_rate"] == 0.25
    assert output["calibration_images"] == 12  # no test image
    assert output["bundle_hash"] == bundles.bundle_hash(own) != bundles.bundle_hash(trained.bundle)
    assert bundles.weights_hash(own) == bundles.weights_hash(trained.bundle)


def test_calibrating_with_too_few_keeps_the_bundle(trained, tmp_path):
    run("data", "make-textures", tmp_path / "more", *SMALL_SET, "--train-images=1")
    before = bundles.bundle_hash(trained.bundle)
    result = run("calibrate", trained.bundle, tmp_path / "more", "--false-alarm-rate", "0.01")
    assert result.exit_code == 3, result.output
    assert bundles.bundle_hash(trained.bundle) == before


def test_unreadable_images_are_listed_and_change_the_exit_code(own, tmp_path):
    run("data", "make-textures", tmp_path / "more", *SMALL_SET, "--train-images=2")
    broken = min((tmp_path / "more").rglob("*.png"))
    broken.write_bytes(b"no image")
    arguments = ("calibrate", own, tmp_path / "more", "--false-alarm-rate", "0.25")
    result = run(*arguments, "--json")
    assert result.exit_code == 4, result.output
    output = json.loads(result.stdout)
    assert [refusal["image_path"] for refusal in output["refused"]] == [str(broken)]
    assert output["calibration_images"] == 11
    result = run(*arguments)
    assert result.exit_code == 4
    assert f"unreadable  {broken}: " in result.stdout
    assert result.stdout.count(str(broken)) == 1
    assert "calibrated on 11 others for a false-alarm rate of 0.25" in result.stdout


def test_images_of_the_fit_are_refused(own, textiles):
    before = bundles.bundle_hash(own)
    result = run("calibrate", own, textiles)
    assert result.exit_code == 2
    assert "was used in training, so it cannot be used for calibration" in result.output
    assert bundles.bundle_hash(own) == before


@pytest.mark.parametrize("other", [False, True])
def test_images_that_were_far_from_every_subclass_are_named(bundle, tmp_path, other):
    """With them another product counts as known."""
    own = shutil.copytree(bundle, tmp_path / "own.bundle")
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(7)
    for number in range(12):
        pixels = render(SEEN[number % 2], seed=900 + number, size=(64, 64)).image
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise if other and number % 2 else pixels).save(images / f"{number}.png")
    result = run("calibrate", own, images, "--false-alarm-rate", "0.25")
    assert result.exit_code == 0, result.output
    assert ("6 of 12 images were far from every known subclass before." in result.stderr) == other
    assert ("were far from" in result.stderr) == other


def test_subclasses_that_lose_their_own_threshold_are_named(bundle, tmp_path):
    """Images of all subclasses, then of one only."""
    own = shutil.copytree(bundle, tmp_path / "own.bundle")
    for count in (3, 1):
        images = tmp_path / f"of-{count}"
        images.mkdir()
        for number in range(24):
            pixels = render(SEEN[number % count], seed=900 + 100 * count + number, size=(64, 64)).image
            Image.fromarray(pixels).save(images / f"{number}.png")
        result = run("calibrate", own, images, "--false-alarm-rate", "0.25")
        assert result.exit_code == 0, result.output
        assert ("Too few images for a threshold of its own" in result.stderr) == (count == 1)
    assert "threshold of its own, which it had before: cloth/" in result.stderr
