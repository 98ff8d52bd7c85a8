"""Encoding of images and maps."""

import io
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from inspections import stored_image
from normweave.config import Config, PrepareConfig, ShapesConfig
from normweave.data import regions
from normweave.data.alignment import Placement
from normweave.data.prepare import Preparation
from normweave.data.regions import Region
from normweave.scoring import PreparedImage, TileScores
from normweave.serve.files import Files
from normweave.serve.rendering import ImageReader, grids_file, media_type, npy, png, shrunk
from normweave.types import RawOutput, Tile


def test_sizes_shrink_and_are_never_enlarged():
    assert shrunk((40, 80), None) == shrunk((40, 80), 200) == (40, 80)
    assert shrunk((40, 80), 20) == (10, 20)
    assert shrunk((8, 60_000), 16) == (1, 16)
    assert Image.open(io.BytesIO(png(np.zeros((40, 80, 3), np.uint8)))).size == (80, 40)


@pytest.mark.parametrize(
    ("size", "max_side"), [((700, 900), 100), ((16, 3000), 1500), ((1500, 333), 1499), ((64, 64), 16)]
)
def test_a_small_map_is_the_large_one_shrunk(tmp_path, size, max_side):
    """The map is computed at the small size, from tiles that still cover it."""
    tiles = Preparation(PrepareConfig(height=64, width=64)).tiles(*size)
    cells = np.arange(8) + 0.5
    rows = [np.sin(4 * (tile.top + cells * tile.height / 8) / size[0]) for tile in tiles]
    columns = [np.cos(4 * (tile.left + cells * tile.width / 8) / size[1]) for tile in tiles]
    grids = np.stack([np.add.outer(*pair) for pair in zip(rows, columns, strict=True)]).astype(np.float32)
    with closing(Files(tmp_path)) as files:
        stored = replace(stored_image(), grids_hash=files.put(npy(grids)), tiles=tiles, smoothing=4.0)
        reader = ImageReader(files, stored)
        large, small = reader.anomaly_map(), reader.anomaly_map(max_side=max_side)
        assert reader.anomaly_map(max_side=16).shape == shrunk(size, 16)
    assert large.shape == size
    assert small.shape == shrunk(size, max_side)
    expected = np.asarray(Image.fromarray(large).resize(small.shape[::-1], Image.Resampling.BOX))
    assert np.abs(small - expected).mean() < 0.05  # of values in -2..2


@pytest.mark.parametrize("name", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_media_type(name):
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, name)
    assert media_type(content.getvalue()) == f"image/{name.lower()}"
    assert media_type(b"<svg onload=alert(1)>") == "application/octet-stream"


def test_a_small_image_is_the_large_one_shrunk_and_upright(tmp_path):
    """A JPEG is decoded at a fraction of its size; both are turned as its orientation says."""
    pixels = np.zeros((300, 500, 3), np.uint8)
    pixels[:, :200], pixels[:100] = (200, 40, 0), (0, 90, 160)
    turned = Image.Exif()
    turned[0x0112] = 6
    with closing(Files(tmp_path)) as files:
        small = []
        for name in ("JPEG", "PNG"):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, name, exif=turned)
            stored = replace(stored_image(), image_hash=files.put(content.getvalue()), tiles=(Tile(0, 0, 500, 300),))
            small.append(ImageReader(files, stored).image(max_side=50).astype(int))
    assert small[0].shape == small[1].shape == (50, 30, 3)
    assert np.abs(small[0] - small[1]).mean() < 3


def test_a_stored_map_has_the_region_under_which_it_was_scored(tmp_path):
    """Also if the tiles do not cover the image, which was cut to the region."""
    region = Region(ShapesConfig(rectangles=((0.0, 0.0, 0.45, 1.0),)), ShapesConfig())
    preparation = Preparation(PrepareConfig(height=64, width=64, tile_beyond=1, tile_overlap=0), region)
    tiles = preparation.checked_tiles(64, 128)
    assert len(tiles) == 1
    raw = RawOutput(np.ones((1, 8, 8), dtype=np.float32))
    image = PreparedImage(None, (64, 128), tiles, None, None, (preparation,))
    scores = TileScores.of(raw, Config(prepare=preparation.config), image.parts_inside)
    content = grids_file(image, scores)
    assert grids_file(image._replace(preparations=(Preparation(preparation.config),)), scores) == npy(raw.scores)
    with closing(Files(tmp_path)) as files:
        stored = replace(stored_image(), grids_hash=files.put(content), tiles=tiles, size=(64, 128), map_threshold=0.5)
        reader = ImageReader(files, stored)
        for side, width in ((None, 128), (32, 32)):
            inside, found = reader.inside(max_side=side), reader.anomaly_map(max_side=side)
            assert inside.shape == found.shape == (width // 2, width)
            np.testing.assert_array_equal(inside, regions.mask(region, width // 2, width))
            np.testing.assert_allclose(found[inside], 1, rtol=1e-6)
            assert (found[~inside] < 0.5).all()
    moved = image._replace(placements=(Placement(32, 0, 0, 0.9, 1.0),))
    with closing(Files(tmp_path)) as files:
        reader = ImageReader(files, replace(stored, grids_hash=files.put(grids_file(moved, scores))))
        for side, width in ((None, 128), (32, 32)):
            inside, found = reader.inside(max_side=side), reader.anomaly_map(max_side=side)
            expected = np.roll(regions.mask(region, width // 2, width), width // 4, axis=1)
            np.testing.assert_array_equal(inside, expected)
            assert found[inside].max() == pytest.approx(1, rel=1e-6)
            assert (found[~inside] < 0.5).all()
    plain = replace(stored, grids_hash="x", size=None)
    assert ImageReader(files, plain).size == (64, 58)  # of an inspection without a size: that of its tiles
