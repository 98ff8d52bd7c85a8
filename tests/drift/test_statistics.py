"""Statistics of an image and of its map."""

import time

import numpy as np
import pytest

from normweave.data.variations import vary
from normweave.drift.statistics import of_image, of_map
from normweave.textiles import Textile, render
from normweave.types import Tile

CLOTH = np.ascontiguousarray(
    render(Textile("plain", "ecru", "diffuse"), seed=7, size=(64, 64)).image.transpose(2, 0, 1)
)


def test_the_statistics_of_an_image_that_is_computed_by_hand():
    tile = np.zeros((3, 8, 8), np.uint8)
    tile[0], tile[1] = 102, 51  # 0.4 and 0.2 of white
    tile[:, :, ::2] = 0  # every second column is black
    found = of_image(tile[None])
    grey = np.tile([0, 0.2], 32)
    assert found.brightness == pytest.approx(0.1)
    assert found.contrast == pytest.approx(grey.std())
    assert found.warmth == pytest.approx(np.log((0.2 + 1 / 255) / (1 / 255)))
    assert found.tint == pytest.approx(np.log((0.1 + 1 / 255) / (0.1 + 1 / 255)), abs=1e-6)
    assert found.sharpness == pytest.approx(np.log(0.2**2 / 0.1**2), abs=0.01)


def test_an_image_of_one_colour_has_finite_statistics():
    for level in (0, 255):
        assert np.isfinite(of_image(np.full((2, 3, 8, 8), level, np.uint8))).all()


@pytest.mark.parametrize(
    ("variation", "name", "sign"),
    [
        ("brighter", "brightness", 1),
        ("darker", "brightness", -1),
        ("darker", "contrast", -1),
        ("warmer", "warmth", 1),
        ("cooler", "warmth", -1),
        ("blurred", "sharpness", -1),
    ],
)
def test_each_statistic_follows_its_variation(variation, name, sign):
    before, after = (of_image(pixels[None]) for pixels in (CLOTH, vary(CLOTH, variation=variation)))
    assert sign * (getattr(after, name) - getattr(before, name)) > 0.005


def test_another_gain_leaves_the_sharpness():
    before, after = of_image(CLOTH[None]), of_image(vary(CLOTH, variation="darker")[None])
    assert after.sharpness == pytest.approx(before.sharpness, abs=0.01)


def test_the_level_is_the_median_and_the_peak_has_its_place_in_the_image():
    grids = np.zeros((2, 4, 4), np.float32)
    grids[0] = 1.0
    grids[1, 1, 3] = 5.0
    tiles = [Tile(0, 0, 40, 40), Tile(0, 40, 40, 40)]
    found = of_map(grids, tiles, (40, 80))
    assert found.map_level == pytest.approx(np.median(grids))
    assert (found.peak_x, found.peak_y) == pytest.approx(((40 + 35) / 80, 15 / 40))


def test_they_cost_little():
    """Less than 1 % of the 25 ms of an image at 256 pixels, on a machine that is four times slower than ours."""
    pixels = np.random.default_rng(0).integers(0, 255, (1, 3, 256, 256), dtype=np.uint8)
    grids = np.zeros((1, 32, 32), np.float32)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        of_image(pixels)
        of_map(grids, [Tile(0, 0, 256, 256)], (256, 256))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_the_statistics_of_a_map_are_those_of_the_cells_inside_a_region():
    grids = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    inside = np.zeros((1, 4, 4), dtype=bool)
    inside[0, :2, :2] = True  # 0, 1, 4, 5
    found = of_map(grids, [Tile(0, 0, 8, 8)], (8, 8), inside=inside)
    assert found == (2.5, 1.5 / 4, 1.5 / 4)
