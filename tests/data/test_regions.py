"""Regions of interest become masks, and pixels outside of them are replaced."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from normweave.config import RegionConfig, ShapesConfig
from normweave.data import regions
from normweave.data.regions import Region
from normweave.errors import ConfigError
from normweave.types import Tile

NONE = ShapesConfig()


def region(*, ignore=NONE, **include):
    return Region(ShapesConfig(**include), ignore)


def corners(count, seed):
    return tuple(map(tuple, np.random.default_rng(seed).random((count, 2)).tolist()))


def in_polygon(x, y, polygon):
    """Whether a ray from a point to the left crosses an odd number of edges (Shimrat 1962, Algorithm 112)."""
    odd = False
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if (ay <= y) != (by <= y) and x >= ax + (y - ay) / (by - ay) * (bx - ax):
            odd = not odd
    return odd


@pytest.mark.parametrize(("count", "size"), [(3, (9, 13)), (5, (40, 31)), (12, (17, 64))])
def test_a_pixel_belongs_to_a_polygon_if_its_centre_does(count, size):
    height, width = size
    polygon = corners(count, seed=count)
    expected = [
        [in_polygon((c + 0.5) / width, (r + 0.5) / height, polygon) for c in range(width)] for r in range(height)
    ]
    np.testing.assert_array_equal(regions.mask(region(polygons=(polygon,)), height, width), expected)


def test_two_polygons_with_a_common_edge_divide_the_pixels():
    left = region(polygons=(((0, 0), (0.25, 0), (0.75, 1), (0, 1)),))
    right = region(polygons=(((1, 0), (0.25, 0), (0.75, 1), (1, 1)),))
    for size in ((8, 8), (31, 57), (100, 4)):
        np.testing.assert_array_equal(regions.mask(left, *size), ~regions.mask(right, *size))


def test_a_rectangle_has_the_pixels_of_the_polygon_with_its_corners():
    for x, y, w, h in ((0.125, 0.25, 0.5, 0.5), (0.3, 0.1, 0.7, 0.33), (0.0, 0.0, 1.0, 1.0)):
        polygon = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
        found = regions.mask(region(rectangles=((x, y, w, h),)), 24, 40)
        np.testing.assert_array_equal(found, regions.mask(region(polygons=(polygon,)), 24, 40))
    edge = regions.mask(region(rectangles=((0.25, 0.0, 0.5, 1.0),)), 1, 8)
    assert edge[0].tolist() == [False, False, True, True, True, True, False, False]
    half = regions.mask(region(rectangles=((0.3125, 0.0, 0.25, 1.0),)), 1, 8)  # from 2.5 to 4.5: centre 2.5 is inside
    assert half[0].tolist() == [False, False, True, True, False, False, False, False]


def test_ignored_shapes_are_taken_from_the_included_ones_or_from_the_image():
    ignore = ShapesConfig(rectangles=((0.5, 0.0, 0.5, 1.0),))
    np.testing.assert_array_equal(regions.mask(Region(NONE, ignore), 1, 4), [[True, True, False, False]])
    both = region(rectangles=((0.25, 0.0, 0.75, 1.0),), ignore=ignore)
    np.testing.assert_array_equal(regions.mask(both, 1, 4), [[False, True, False, False]])


def test_a_mask_is_stretched_over_images_of_any_size():
    drawn = np.random.default_rng(0).random((12, 20)) > 0.5
    marked = region(mask=regions.encode_mask(drawn))
    np.testing.assert_array_equal(regions.mask(marked, 12, 20), drawn)
    np.testing.assert_array_equal(regions.mask(marked, 36, 60), drawn.repeat(3, axis=0).repeat(3, axis=1))
    np.testing.assert_array_equal(regions.mask(marked, 4, 4), drawn[1::3, 2::5])
    assert max(regions.decode_mask(regions.encode_mask(np.ones((5000, 50), dtype=bool))).shape) == 4096


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no base64!", ("must be a PNG image as base64", "data roi --mask")),
        (base64.b64encode(b"GIF89a").decode(), ("must be a PNG image",)),
        (png(Image.new("L", (5000, 1))), ("5000 x 1 pixels", "4096")),
        (png(Image.new("L", (40, 40))), ("'bolt' covers 0 of 65,536 pixels", "64 is the least")),
    ],
    ids=["text", "gif", "large", "black"],
)
def test_masks_that_cannot_be_used_are_refused(text, words):
    with pytest.raises(ConfigError) as caught:
        regions.check([RegionConfig(category="bolt", include=ShapesConfig(mask=text))])
    assert all(word in str(caught.value) for word in words), caught.value


def test_regions_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match="marks no pixel"):
        regions.encode_mask(np.zeros((4, 4), dtype=bool))
    with pytest.raises(ConfigError, match="Shrink it, or remove single pixels"):
        regions.encode_mask(np.random.default_rng(0).random((4096, 4096)) > 0.5)
    everything = ShapesConfig(rectangles=((0.0, 0.0, 1.0, 1.0),))
    with pytest.raises(ConfigError, match="all categories covers 0 of"):
        regions.check([RegionConfig(ignore=everything)])
    with pytest.raises(ConfigError, match=r"'nut' has no images\. Categories of the data: bolt, screw"):
        regions.check([RegionConfig(category="nut", include=everything)], categories={"screw", "bolt"})
    regions.check([RegionConfig(category="nut", include=everything)])


def test_a_category_has_its_own_region_or_that_of_all():
    own, every = (ShapesConfig(rectangles=((0.0, 0.0, side, 1.0),)) for side in (0.5, 0.75))
    listed = [RegionConfig(category="bolt", include=own), RegionConfig(include=every)]
    assert regions.of(listed, "bolt").include == own
    assert regions.of(listed, "nut").include == regions.of(listed, None).include == every
    assert regions.of(listed[:1], "nut") is None
    assert regions.from_json(regions.to_json(regions.of(listed, "bolt"))) == regions.of(listed, "bolt")


@pytest.mark.parametrize(
    ("size", "share"), [((5, 7), 0.2), ((30, 21), 0.02), ((16, 40), 0.6), ((1, 9), 0.3), ((300, 200), 0.0005)]
)
def test_the_nearest_kept_pixel_is_the_nearest(size, share):
    kept = np.random.default_rng(2).random(size) < share
    kept[size[0] // 2, 3] = True
    rows, columns = np.divmod(regions.nearest(kept), size[1])
    assert kept[rows, columns].all()
    all_rows, all_columns = np.nonzero(kept)
    here = np.indices(size)
    distances = np.hypot(here[0][..., None] - all_rows, here[1][..., None] - all_columns)
    np.testing.assert_allclose(np.hypot(here[0] - rows, here[1] - columns), distances.min(axis=2))


def test_cells_outside_take_the_score_of_the_nearest_cell_inside():
    part = regions.of_tile(region(rectangles=((0.0, 0.0, 0.5, 1.0),)), (32, 64), Tile(0, 0, 32, 64), (32, 64))
    scores = np.arange(32, dtype=np.float32).reshape(4, 8)
    np.testing.assert_array_equal(part.fill_cells(scores), scores[:, [0, 1, 2, 3, 3, 3, 3, 3]])
    np.testing.assert_array_equal(part.fill_cells(scores[:1, :1]), scores[:1, :1])  # an image-level head
    inside = regions.cells_inside([part, None], (4, 8))
    assert inside[0].sum(axis=1).tolist() == [4] * 4
    assert inside[1].all()
    assert regions.cells_inside([None], (4, 8)) is None


def test_a_tile_is_wholly_inside_partly_inside_or_wholly_outside():
    half = region(rectangles=((0.0, 0.0, 0.5, 1.0),))
    assert regions.of_tile(half, (64, 128), Tile(0, 0, 64, 64), (32, 32)) is True
    assert regions.of_tile(half, (64, 128), Tile(0, 64, 64, 64), (32, 32)) is False
    part = regions.of_tile(half, (64, 128), Tile(0, 32, 64, 64), (32, 32))
    assert part.kept[:, :15].all()
    assert not part.kept[:, 16:].any()
    thin = regions.of_tile(region(rectangles=((0.5, 0.5, 0.02, 0.02),)), (64, 64), Tile(0, 0, 64, 64), (32, 32))
    assert 1 <= thin.kept.sum() <= 4  # no input pixel is wholly inside: those with the largest part


def test_described_regions_name_the_hash_of_a_mask():
    text = regions.encode_mask(np.eye(4, dtype=bool))
    listed = [RegionConfig(category="nut", include=ShapesConfig(mask=text, rectangles=((0.0, 0.0, 1.0, 0.5),)))]
    found = regions.described(listed)["nut"]
    assert found["include"]["rectangles"] == [[0, 0, 1, 0.5]]
    assert len(found["include"]["mask_sha256"]) == 64
    assert "ignore" not in found
