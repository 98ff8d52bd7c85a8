"""Regions of interest from the command line. That a detector follows them: tests/end_to_end/test_regions.py."""

import json

import numpy as np
import pytest
from PIL import Image

from normweave import settings
from normweave.data import alignment, regions
from normweave.errors import ConfigError

from .conftest import run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "part.png"
    Image.new("RGB", (80, 60), "grey").save(path)
    return path


def inside(file, category="*"):
    return regions.mask(regions.of(settings.read_regions(file), category), 60, 80)


def test_shapes_are_written_for_one_category_after_the_other(image, tmp_path):
    file, drawn = tmp_path / "regions.json", np.zeros((60, 80), dtype=np.uint8)
    drawn[:30] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    options = ("--rectangle", "0,0,0.5,1", "--ignore-polygon", "0,0 0.25,0 0,0.5")
    result = run("data", "roi", image, "-o", file, *options, "--preview", tmp_path / "seen.png")
    assert result.exit_code == 0, result.output
    assert "the region of * is 43." in result.stdout
    with Image.open(tmp_path / "seen.png") as seen:
        assert seen.size == (80, 60)
    again = run("data", "roi", image, "-o", file, *options, "--preview", tmp_path / "seen.png")
    assert again.exit_code == 2
    assert "seen.png exists. Choose another path, or give --overwrite. Nothing" in " ".join(again.stderr.split())
    assert not run("data", "roi", image, "-o", file, "--preview", tmp_path / "seen.png", "--overwrite").exit_code
    every = inside(file)
    assert every[59, 39]
    assert not every[0, 0]
    assert not every[:, 40:].any()
    result = run("data", "roi", image, "-o", file, "--category", "nut", "--mask", tmp_path / "mask.png", "--json")
    found = json.loads(result.stdout)
    assert (found["category"], found["inside"]) == ("nut", 0.5)
    assert list(found["regions"]) == ["*", "nut"]
    np.testing.assert_array_equal(inside(file, "nut"), drawn > 0)
    np.testing.assert_array_equal(inside(file), every)
    again = run("data", "roi", image, "-o", file, "--category", "nut")
    assert again.stdout.startswith(f"{file}: the region of nut is 50.0% of {image}")
    assert settings.read(file).regions == settings.read_regions(file)  # it is a part of a file of settings


def test_a_grey_mask_is_refused_with_its_values(image, tmp_path):
    Image.new("L", (80, 60), 100).save(tmp_path / "grey.png")
    result = run("data", "roi", image, "-o", tmp_path / "regions.json", "--mask", tmp_path / "grey.png")
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert "values up to 100, none of them above half of the range" in words
    assert "The mask of a region has two values: 255 (white) where to look, 0 (black) elsewhere." in words


def test_a_region_that_follows_the_part_holds_the_image_as_reference(tmp_path):
    path, file = tmp_path / "print.png", tmp_path / "regions.json"
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(pixels).save(path)
    options = ("--rectangle", "0.1,0.1,0.8,0.8")
    result = run("data", "roi", path, "-o", file, *options, "--align", "rigid")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{file}: the region of * is 64.0% of {path}, and follows the part (rigid)")
    assert "other proportions" not in result.stderr
    Image.fromarray(pixels[:, :40]).save(tmp_path / "tall.png")
    warned = " ".join(run("data", "roi", path, "-o", file, *options, "--align", "rigid").stderr.split())
    assert f"tall.png has 60 x 40 pixels (height x width), and the reference {path} has 60 x 80: images of" in warned
    (found,) = settings.read_regions(file)
    assert found.align == "rigid"
    np.testing.assert_array_equal(alignment.decode_reference(found.reference), pixels)
    run("data", "roi", path, "-o", file, *options)  # drawn again, without
    assert settings.read_regions(file)[0].align == "none"
    assert "align" not in file.read_text()
    result = run("data", "roi", path, "-o", file, "--align", "rigid")
    assert result.exit_code == 2
    assert "--align rigid is about a region that is drawn now" in result.stderr


def test_a_region_without_structure_cannot_follow(image, tmp_path):
    result = run("data", "roi", image, "-o", tmp_path / "regions.json", "--rectangle", "0,0,1,1", "--align", "rigid")
    assert result.exit_code == 2
    assert "shows too little structure in its reference image" in " ".join(result.stderr.split())
    assert not (tmp_path / "regions.json").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"align": "rigid"}, "align=rigid must have a reference image: write the region with normweave data roi IMAGE"),
        ({"reference": "abcd"}, "reference must be empty with align=none"),
        ({"align": "affine", "reference": "abcd"}, "'none', 'translation' or 'rigid'"),
    ],
)
def test_settings_of_the_alignment_that_cannot_be_used(values, words):
    region = {"include": {"rectangles": [[0, 0, 1, 1]]}} | values
    with pytest.raises(ConfigError) as caught:
        settings.from_dict({"regions": [region]})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "holds no region of '*'"),
        (("--rectangle", "a,b"), "must be numbers between commas"),
        (("--rectangle", "0,0,1"), "rectangles[0][3]"),
        (("--rectangle", "0.6,0,0.6,1"), "must lie inside the image"),
        (("--rectangle", "0,0,nan,1"), "must be a finite number, got nan"),
        (("--polygon", "0,0 1,1"), "polygons[0] must have at least 3 items"),
        (("--polygon", "0,0 1,0 1,1.5"), "must be less than or equal to 1, got 1.5"),
        (("--ignore-rectangle", "0,0,1,1"), "covers 0 of 65,536 pixels"),
        (("--rectangle", "0,0,0.5,1", "--preview", "seen.unknown"), "The preview must end in .png or .jpg or .jpeg"),
        (("--rectangle", "0,0,0.5,1", "--preview", "no/folder/seen.png"), "Cannot write the preview"),
    ],
)
def test_shapes_that_cannot_be_used_are_refused(image, tmp_path, options, words):
    result = run("data", "roi", image, "-o", tmp_path / "regions.json", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split()), result.stderr
    assert (tmp_path / "regions.json").exists() == ("no/folder/seen.png" in options)


def test_a_file_that_is_no_file_of_regions_is_refused(image, tmp_path):
    file = tmp_path / "regions.json"
    for text, words in (("seed: 1", "must have the key regions alone, got seed"), ("[", "is not YAML")):
        file.write_text(text)
        result = run("data", "roi", image, "-o", file, "--rectangle", "0,0,1,1")
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
        assert file.read_text() == text
