"""Harmless variations: what each one changes, that grey stays grey, and reproducibility."""

import numpy as np
import pytest

from normweave.data import variations
from normweave.data.variations import VARIATIONS, applicable, vary
from normweave.errors import ConfigError


def scene(channels: int = 3, height: int = 48, width: int = 64) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(40, 180, (channels, height // 8, width // 8), dtype=np.uint8)
    return np.broadcast_to(coarse.repeat(8, axis=1).repeat(8, axis=2), (3, height, width)).copy()


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_image_changes_little_and_always_in_the_same_way(name: str) -> None:
    pixels = scene()
    before = pixels.copy()

    varied = vary(pixels, variation=name)

    assert (varied.dtype, varied.shape) == (np.uint8, pixels.shape)
    assert 0.1 < np.abs(varied.astype(int) - pixels).mean() < 60
    np.testing.assert_array_equal(vary(pixels, variation=name), varied)
    np.testing.assert_array_equal(before, pixels)


@pytest.mark.parametrize("name", VARIATIONS)
def test_grey_stays_grey(name: str) -> None:
    varied = vary(scene(channels=1), variation=name)
    np.testing.assert_array_equal(varied, np.broadcast_to(varied[:1], varied.shape))


def test_colour_temperature_applies_to_coloured_images_only() -> None:
    grey = scene(channels=1)

    assert applicable(scene()) == VARIATIONS
    assert set(VARIATIONS) - set(applicable(grey)) == {"warmer", "cooler"}
    for name in applicable(grey):
        assert (vary(grey, variation=name) != grey).any()
    np.testing.assert_array_equal(vary(grey, variation="warmer"), grey)


def test_direction_of_each_variation() -> None:
    pixels = scene()
    means = {name: vary(pixels, variation=name).mean(axis=(1, 2)) / pixels.mean(axis=(1, 2)) for name in VARIATIONS}

    assert (means["darker"] < 0.75).all()
    assert (means["brighter"] > 1.15).all()
    assert (means["gamma-low"] > 1.05).all()  # an exponent below 1 makes an image lighter
    assert (means["gamma-high"] < 0.95).all()
    assert means["warmer"][0] > 1.05 > 0.95 > means["warmer"][2]
    assert means["cooler"][0] < 0.95 < 1.05 < means["cooler"][2]


def test_light_images_keep_their_structure() -> None:
    light = np.broadcast_to(np.arange(200, 240, dtype=np.uint8), (3, 40, 40)).copy()
    for name in VARIATIONS:
        assert np.unique(vary(light, variation=name)).size > 15


def test_blur_lowers_contrast_at_the_scale_of_256_pixels() -> None:
    lines = np.zeros((3, 256, 256), dtype=np.uint8)
    lines[:, :, ::2] = 200
    assert vary(lines, variation="blurred").std() < 0.2 * lines.std()
    np.testing.assert_allclose(vary(lines, variation="blurred").mean(), lines.mean(), atol=1)


def test_shift_keeps_the_upper_left_corner_and_moves_the_lower_right_one() -> None:
    pixels = np.zeros((3, 200, 100), dtype=np.uint8)
    pixels[:, 150, 60] = 255
    shifted = vary(pixels, variation="shifted")[0]
    row, column = np.unravel_index(shifted.argmax(), shifted.shape)
    assert (row, column) == (round(150.5 / 0.97 - 0.5), round(60.5 / 0.97 - 0.5))


def test_gradient_falls_from_left_to_right() -> None:
    columns = vary(np.full((3, 32, 101), 100, dtype=np.uint8), variation="gradient")[0, 0]
    assert (columns[0], columns[50], columns[100]) == (100, 82, 65)


@pytest.mark.parametrize(("name", "at_the_centre"), [("lit", 255 * (1 - (155 / 255) ** 1.6)), ("shaded", 70)])
def test_a_spot_of_light_or_a_shadow_fades_from_its_centre_whose_place_differs(name: str, at_the_centre: float) -> None:
    places = []
    for corner in (0, 1, 2):
        pixels = np.full((3, 60, 100), 100, dtype=np.uint8)
        pixels[:, 0, 0] = corner
        change = np.abs(vary(pixels, variation=name)[0].astype(int) - 100)
        change[0, 0] = 0
        row, column = np.argwhere(change == change.max()).mean(axis=0)
        assert change.max() == pytest.approx(abs(at_the_centre - 100), abs=1)
        assert 0.18 < row / 60 < 0.82
        assert 0.18 < column / 100 < 0.82
        far = np.hypot((np.arange(60)[:, None] - row) / 60, (np.arange(100) - column) / 100) > 0.25
        assert change[far].max() == pytest.approx(change.max() * np.exp(-0.5), abs=3)
        places.append((row, column))
    assert len(set(places)) == 3


def test_noise_has_its_strength_and_differs_between_images() -> None:
    noises = []
    for level in (120, 121):
        pixels = np.full((3, 128, 128), level, dtype=np.uint8)
        noises.append(vary(pixels, variation="noisy").astype(int) - pixels)
    assert abs(noises[0].std() - variations.NOISE) < 0.3
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.05


def test_an_unknown_variation_is_refused() -> None:
    with pytest.raises(ConfigError, match="sepia") as error:
        vary(scene(), variation="sepia")
    assert "darker" in str(error.value)


def test_some_variations_of_all_tiles_start_at_the_first() -> None:
    tiles = np.stack([scene(), scene()[:, ::-1]])
    names = applicable(tiles[0])
    got = list(variations.some(tiles, first=len(names) - 1, count=2))
    for pixels, name in zip(got, (names[-1], names[0]), strict=True):
        np.testing.assert_array_equal(pixels, [vary(tile, variation=name) for tile in tiles])
    assert len(list(variations.some(tiles, first=0, count=99))) == len(names)
