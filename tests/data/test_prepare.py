"""Tiles cover the image, and a mark in the image is at the same position of the input."""

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normweave.config import PrepareConfig, RegionConfig, ShapesConfig
from normweave.data import regions
from normweave.data.prepare import Preparation, Preparations
from normweave.data.regions import Region
from normweave.errors import ImageError
from normweave.types import Tile


def preparation(**settings):
    return Preparation(PrepareConfig(**settings))


@given(
    height=st.integers(8, 20_000),
    width=st.integers(8, 20_000),
    beyond=st.sampled_from([0, 1, 1.5, 4]),
    overlap=st.sampled_from([0, 0.125, 0.5]),
)
def test_tiles_cover_every_pixel_and_overlap_as_promised(height, width, beyond, overlap):
    settings = preparation(height=128, width=256, tile_beyond=beyond, tile_overlap=overlap)
    tiles = settings.tiles(height, width)
    assert len({(tile.height, tile.width) for tile in tiles}) == 1
    for side, begin, length, edge in ((height, 0, 2, 128), (width, 1, 3, 256)):
        spans = sorted({(tile[begin], tile[begin] + tile[length]) for tile in tiles})
        assert len(spans) == (1 if beyond == 0 or side <= beyond * edge else -(-side // (beyond * edge)))
        assert spans[0][0] == 0
        assert spans[-1][1] == side
        for (_, stop), (start, further) in pairwise(spans):
            assert stop - start >= overlap * (further - start) - 1
    assert len(tiles) == len({tile[:2] for tile in tiles})


def test_up_to_the_limit_an_image_is_one_tile():
    settings = preparation(height=256, width=128, tile_beyond=4.0)
    assert settings.tiles(100, 100) == (Tile(0, 0, 100, 100),)
    assert settings.tiles(1024, 512) == (Tile(0, 0, 1024, 512),)
    assert len(settings.tiles(1025, 512)) == len(settings.tiles(1024, 513)) == 2
    assert preparation(tile_beyond=0).tiles(9000, 9000) == (Tile(0, 0, 9000, 9000),)


def test_the_number_of_tiles_is_bounded():
    strip, photo, largest = (256, 4096), (7000, 7000), (12_247, 12_247)  # the last one has 150 million pixels
    assert [len(preparation().checked_tiles(*size)) for size in (strip, photo, largest)] == [4, 49, 144]
    fine = preparation(tile_beyond=1.0)
    assert len(fine.checked_tiles(8192, 8192)) == 1024
    with pytest.raises(
        ImageError, match=r"8193 x 8192 pixels .* give 1,056 tiles .*\. Allowed: 1,024\. Shrink the image"
    ):
        fine.checked_tiles(8193, 8192)


def test_tiles_by_hand():
    """350 wide, 100 high, input 100 x 100 and at most 1.75 of it: two of ceil(350 / (2 - 0.25)) = 200."""
    settings = preparation(height=100, width=100, tile_beyond=1.75, tile_overlap=0.25)
    assert settings.tiles(100, 350) == (Tile(0, 0, 100, 200), Tile(0, 150, 100, 200))
    assert settings.tiles(350, 100) == (Tile(0, 0, 200, 100), Tile(150, 0, 200, 100))


@pytest.mark.parametrize("row", [0, 3, 7])
@pytest.mark.parametrize("column", [0, 5, 9])
def test_a_mark_keeps_its_position(row, column):
    """A cell of 16 x 16 pixels marked in a tile is in the cell of 8 x 8 at the same position, and in no other."""
    image = np.zeros((300, 400, 3), np.uint8)
    tile = Tile(40, 60, 8 * 16, 10 * 16)
    top, left = tile.top + row * 16, tile.left + column * 16
    image[top : top + 16, left : left + 16, 1] = 255
    got = preparation(height=64, width=80).apply(image, tile)
    assert got.shape == (3, 64, 80)
    assert got.dtype == np.uint8
    assert not got[[0, 2]].any()
    cells = got[1].reshape(8, 8, 10, 8).mean(axis=(1, 3))
    inside = cells[row, column]
    cells[row, column] = 0
    assert inside > 200
    assert cells.max() < 20


def test_a_tile_of_the_inputs_size_is_not_changed():
    image = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    got = preparation(height=40, width=32).apply(image, Tile(5, 7, 40, 32))
    np.testing.assert_array_equal(got, image[5:45, 7:39].transpose(2, 0, 1))


def test_shrinking_averages_instead_of_skipping_pixels():
    """Stripes finer than a pixel of the input become grey; taken pixel by pixel they would be black or white."""
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, ::2] = 255
    got = preparation(height=64, width=64).apply(image, Tile(0, 0, 512, 512))
    assert np.abs(got.astype(float) - 127.5).max() < 6


def test_the_settings_are_json_values():
    settings = preparation(height=96, width=160, tile_beyond=2.5, tile_overlap=0.3)
    assert json.loads(json.dumps(settings.as_dict())) == {
        "height": 96,
        "width": 160,
        "tile_beyond": 2.5,
        "tile_overlap": 0.3,
    }


# ── regions of interest ──────────────────────────────────────────────────────────────────────────────────────────────

POLYGON = ShapesConfig(polygons=(((0.1, 0.2), (0.9, 0.1), (0.7, 0.95)),))
HOLE = ShapesConfig(rectangles=((0.4, 0.3, 0.2, 0.2),))


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (200, 150), (20, 24), (500, 700)])
def test_no_pixel_outside_a_region_changes_a_prepared_pixel(size):
    region = Region(POLYGON, HOLE)
    preparation = Preparation(PrepareConfig(height=64, width=64, tile_beyond=4), region)
    random = np.random.default_rng(0)
    image, other = random.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    inside = regions.mask(region, *size)[..., None]
    whole = Preparation(preparation.config)
    tiles = preparation.checked_tiles(*size)
    assert len(tiles) == (6 if size == (500, 700) else 1)
    box = [pixels.any(axis=axis).nonzero()[0] for axis in (1, 0) for pixels in (inside[..., 0],)]
    for (start, length), used in zip((("top", "height"), ("left", "width")), box, strict=True):
        assert min(getattr(tile, start) for tile in tiles) == used[0]
        assert max(getattr(tile, start) + getattr(tile, length) for tile in tiles) == used[-1] + 1
    for tile in tiles:
        prepared = preparation.apply(image, tile)
        np.testing.assert_array_equal(preparation.apply(np.where(inside, image, other), tile), prepared)
        part = preparation.part_inside(size, tile)
        np.testing.assert_array_equal(prepared[:, part.kept], whole.apply(image, tile)[:, part.kept])
        assert not np.array_equal(prepared, preparation.apply(np.where(inside, other, image), tile))


def test_an_image_is_cut_to_the_bounding_box_and_tiles_wholly_outside_are_left_out():
    config = PrepareConfig(height=32, width=32, tile_beyond=1, tile_overlap=0)
    corners = ((0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0.25, 0.25))
    preparation = Preparation(config, Region(ShapesConfig(rectangles=corners), ShapesConfig()))
    assert preparation.checked_tiles(128, 128) == (Tile(32, 32, 32, 32), Tile(64, 64, 32, 32))
    assert preparation.part_inside((128, 128), Tile(32, 32, 32, 32)) is None  # all of it is inside
    corner = Preparation(config, Region(ShapesConfig(rectangles=corners[:1]), ShapesConfig()))
    with pytest.raises(ImageError, match="no pixel of the image, 1 x 1 pixels"):
        corner.checked_tiles(1, 1)


@pytest.mark.parametrize("size", [(60, 80), (400, 600)])
def test_a_rectangle_gives_the_pixels_of_the_cut_image(size):
    config = PrepareConfig(height=64, width=64, tile_beyond=4)
    rectangle = Region(ShapesConfig(rectangles=((0.25, 0.1, 0.6, 0.75),)), ShapesConfig())
    cut, whole = Preparation(config, rectangle), Preparation(config)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    top, left, height, width = regions.bounding_box(rectangle, *size)
    inner = image[top : top + height, left : left + width]
    tiles = cut.checked_tiles(*size)
    assert tiles == tuple(Tile(y + top, x + left, h, w) for y, x, h, w in whole.checked_tiles(height, width))
    for tile, same in zip(tiles, whole.checked_tiles(height, width), strict=True):
        np.testing.assert_array_equal(cut.apply(image, tile), whole.apply(inner, same))
        assert cut.part_inside(size, tile) is None


def test_categories_have_their_own_regions_and_keys():
    config = PrepareConfig(height=64, width=64)
    preparations = Preparations(config, regions=(RegionConfig(category="nut", include=POLYGON),))
    assert preparations.of("bolt") == Preparation(config) == preparations.of("bolt").of("any")
    assert preparations.of("nut").region == Region(POLYGON, ShapesConfig())
    assert preparations.of("bolt").as_dict() == Preparations(config).as_dict() == asdict(config)
    assert preparations.of("nut").as_dict() != preparations.of("bolt").as_dict()
    assert list(preparations.as_dict()["regions"]) == ["nut"]
