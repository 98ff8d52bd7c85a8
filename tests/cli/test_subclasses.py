"""`add-subclass` and `remove-subclass` write a bundle, or say why they do not."""

import json
import shutil

import pytest

from normweave import bundle
from normweave.detector import Detector

from .conftest import run


@pytest.fixture(scope="module")
def third(cloth):
    """Folder of the good images of a subclass that the bundle does not know."""
    return sorted((cloth.parent / "cloth").glob("*/train/good"))[2]


def test_a_subclass_is_added_and_removed(fusion_bundle, third, tmp_path):
    names = ("--category", "cloth", "--subclass", "new")
    result = run("add-subclass", fusion_bundle, third, *names, "-o", tmp_path / "new", "--json")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output["bundle_hash"] == bundle.bundle_hash(tmp_path / "new")
    assert output["subclass"] == "cloth/new"
    assert output["images"] == 18
    assert output["check"]["tiles"] == output["check"]["equal"] > 0
    assert output["operating_point"]["guarantee"] in ("cross-validated", "uncalibrated")
    assert Detector.load(tmp_path / "new").subclass_names[2] == "cloth/new"

    result = run("add-subclass", fusion_bundle, third, *names, "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "allow replacing it (--overwrite)" in result.stderr

    result = run("remove-subclass", tmp_path / "new", *names, "-o", tmp_path / "old")
    assert result.exit_code == 0, result.output
    assert "cloth/new removed" in result.stdout
    assert "are the same in every bit" in result.stdout
    assert "stored image" in result.stdout
    assert bundle.weights_hash(tmp_path / "old") == bundle.weights_hash(fusion_bundle)


def test_too_few_images_write_nothing(fusion_bundle, third, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(third.iterdir())[:3]:
        shutil.copy(path, few)
    result = run(
        "add-subclass", fusion_bundle, few, "--category", "cloth", "--subclass", "new", "-o", tmp_path / "new", "--json"
    )
    assert result.exit_code == 2
    assert "at least 5 good images, got 3" in json.loads(result.stdout)["error"]
    assert not (tmp_path / "new").exists()
