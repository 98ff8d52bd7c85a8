"""Synthetic anomalies: the size of the defect, the exact mask, and reproducibility."""

import numpy as np
import pytest
from PIL import Image

from normweave.data import synthetic
from normweave.data.synthetic import add_defect, coverage, mask, seeded

SIZES = [(256, 256), (32, 32), (64, 160), (300, 48)]


def gravel(seed: int, height: int = 96, width: int = 96, channels: int = 3) -> np.ndarray:
    """A texture with a grain of a few pixels, in colours or grey."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 4, width // 4, channels), dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(coarse, (*coarse.shape[:2], 3)).copy())
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mask_is_small_and_never_empty(height: int, width: int) -> None:
    shares = np.array([mask(height, width, rng=seeded(0, 0, i)).mean() for i in range(150)])

    assert shares.min() > 0
    assert shares.max() < 0.15
    assert (shares > 0.05).any()


def test_blobs_cover_the_share_in_range() -> None:
    shares = [synthetic.blobs(60, 100, np.random.default_rng(i)).mean() for i in range(100)]

    assert 0.0149 < min(shares) < 0.025
    assert 0.09 < max(shares) < 0.1001


def test_blobs_are_connected() -> None:
    """A thresholded white noise of the same area has about 90 of 100 borders to other pixels; blobs have far fewer."""
    for index in range(30):
        region = synthetic.blobs(128, 128, np.random.default_rng(index))
        borders = (region[1:] != region[:-1]).sum() + (region[:, 1:] != region[:, :-1]).sum()
        assert borders < 0.35 * 4 * region.sum()


def test_scratches_are_long_and_thin() -> None:
    for index in range(50):
        region = synthetic.scratches(256, 256, np.random.default_rng(index))
        rows, columns = np.nonzero(region)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert extent > 30
        # Two lines of 0.9 x 256 pixels, at most 6 pixels wide, and the joints of their parts.
        assert 60 < region.sum() < 2 * 0.9 * 256 * 8


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_exactly_the_pixels_of_the_mask_change(height: int, width: int) -> None:
    for index in range(40):
        pixels, other = gravel(index, height, width), gravel(index + 1000, height, width)
        before = pixels.copy(), other.copy()

        defective, visible = add_defect(pixels, other, rng=seeded(3, 0, index))

        assert (defective.dtype, defective.shape) == (np.uint8, (3, height, width))
        assert (visible.dtype, visible.shape) == (np.bool_, (height, width))
        np.testing.assert_array_equal(visible, (defective != pixels).any(axis=0))
        assert synthetic.LEAST_SHARE <= visible.mean() < 0.25
        np.testing.assert_array_equal(before[0], pixels)
        np.testing.assert_array_equal(before[1], other)


def test_invisible_change_is_removed() -> None:
    pixels = gravel(0)
    left = np.zeros((96, 96), dtype=np.bool_)
    left[20:60, 10:80] = True
    fill = pixels.astype(np.float32)
    fill[:, :, :40] += 4
    fill[:, :, 40:] = 255 - fill[:, :, 40:]

    defective, visible = synthetic.blend(pixels, fill, left, opacity=1.0)

    # The mean over 5 x 5 pixels reaches two pixels across the border at column 40.
    np.testing.assert_array_equal(defective[:, :, :38], pixels[:, :, :38])
    assert not visible[:, :38].any()
    assert visible[20:60, 42:78].mean() > 0.8


def test_edge_is_soft_for_one_pixel() -> None:
    pixels = np.zeros((3, 64, 64), dtype=np.uint8)
    region = np.zeros((64, 64), dtype=np.bool_)
    region[:, 32:] = True

    defective, visible = synthetic.blend(pixels, np.full_like(pixels, 200, dtype=np.float32), region, opacity=0.5)

    profile = defective[0, 30]
    assert (profile[32:] == 100).all()
    assert 25 < profile[31] < 40  # a third
    assert not profile[:31].any()
    np.testing.assert_array_equal(visible[30], np.arange(64) >= 31)


@pytest.mark.parametrize("level", [0, 255, 128])
@pytest.mark.parametrize("alike", [True, False])
def test_defects_in_uniform_images_are_visible(level: int, alike: bool) -> None:
    """Black on black, the shifted image and darkening change nothing: the defect is drawn again."""
    pixels = np.full((3, 64, 64), level, dtype=np.uint8)
    other = pixels if alike else gravel(0, 64, 64)
    for index in range(60):
        defective, visible = add_defect(pixels, other, rng=seeded(0, 0, index))
        assert visible.mean() >= synthetic.LEAST_SHARE
        change = np.abs(defective.astype(int) - pixels).max(axis=0)[visible]
        assert change.mean() >= 0.8 * synthetic.VISIBLE


@pytest.mark.parametrize("level", [0, 255])
def test_strong_shift_ends_the_attempts(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.full((3, 48, 48), level, dtype=np.uint8)
    drawn = []

    def nothing(pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn.append(None)
        return pixels.astype(np.float32)

    monkeypatch.setattr(synthetic, "FILLS", (nothing,))
    defective, visible = add_defect(pixels, pixels, rng=seeded(0, 0, 0))

    assert len(drawn) == synthetic.ATTEMPTS
    assert visible.mean() >= 0.014
    assert np.abs(defective.astype(int) - level).max() == 120


def test_every_fill_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(fill):  # type: ignore[no-untyped-def]
        def call(*inputs):  # type: ignore[no-untyped-def]
            seen.add(fill)
            return fill(*inputs)

        return call

    fills = synthetic.FILLS
    monkeypatch.setattr(synthetic, "FILLS", tuple(watched(fill) for fill in fills))
    for index in range(40):
        add_defect(gravel(1), gravel(2), rng=seeded(0, 0, index))

    assert seen == set(fills)


def test_pixels_are_copied_from_the_other_image() -> None:
    pixels = np.full((3, 64, 64), 20, dtype=np.uint8)
    other = np.zeros((3, 64, 64), dtype=np.uint8)
    other[0] = 200  # red, which `pixels` is not

    for index in range(20):
        fill = synthetic.from_other(pixels, other, np.random.default_rng(index))
        np.testing.assert_array_equal(np.unique(fill[0]), [200])
        assert not fill[1:].any()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96)])
def test_the_shifted_image_has_the_same_pixels_at_other_positions(height: int, width: int) -> None:
    pixels = gravel(5, height, width)
    for index in range(20):
        moved = synthetic.from_other(np.zeros_like(pixels), pixels, np.random.default_rng(index))
        np.testing.assert_array_equal(np.sort(moved, axis=None), np.sort(pixels, axis=None))
        assert (moved != pixels).any(axis=0).mean() > 0.9


def test_grey_images_stay_grey() -> None:
    for index in range(40):
        defective, _ = add_defect(gravel(1, channels=1), gravel(2, channels=1), rng=seeded(0, 0, index))
        np.testing.assert_array_equal(defective, np.broadcast_to(defective[:1], defective.shape))


def test_the_same_seed_gives_the_same_defect_in_any_order() -> None:
    pixels = [gravel(i) for i in range(6)]

    def row(variant: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        return add_defect(pixels[index], pixels[(index + 1) % 6], rng=seeded(7, variant, index))

    wanted = [(variant, index) for variant in range(2) for index in range(6)]
    forwards = {key: row(*key) for key in wanted}
    for key in reversed(wanted):
        for one, again in zip(forwards[key], row(*key), strict=True):
            np.testing.assert_array_equal(one, again)

    assert (forwards[0, 0][1] != forwards[1, 0][1]).any()
    assert (add_defect(pixels[0], pixels[1], rng=seeded(8, 0, 0))[1] != forwards[0, 0][1]).any()


@pytest.mark.parametrize(
    ("height", "width", "least", "most"), [(200, 320, 25, 100), (40, 40, 32, 32), (32, 900, 32, 32)]
)
def test_a_small_defect_is_in_a_window_and_nothing_else_changes(height: int, width: int, least: int, most: int) -> None:
    extents = []
    for index in range(30):
        pixels, other = gravel(index, height, width), gravel(index + 1000, 48, 64)
        before = pixels.copy()
        defective, visible = synthetic.add_small_defect(pixels, other, rng=seeded(0, 0, index))
        np.testing.assert_array_equal(pixels, before)
        np.testing.assert_array_equal((defective != pixels).any(axis=0), visible)
        rows, columns = np.nonzero(visible)
        extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(extents) > 0
    assert max(extents) <= most
    assert max(extents) > least / 2


def test_the_window_of_a_small_defect_is_bounded() -> None:
    pixels = gravel(0, 1600, 1600)
    for index in range(6):
        _, visible = synthetic.add_small_defect(pixels, pixels, rng=seeded(0, 0, index))
        rows, columns = np.nonzero(visible)
        assert max(np.ptp(rows), np.ptp(columns)) < 512


@pytest.mark.parametrize(
    ("size", "grid"), [((32, 32), (4, 4)), ((33, 50), (4, 7)), ((5, 9), (5, 9)), ((6, 5), (4, 10))]
)
def test_coverage_is_the_exact_average_over_each_cell(size: tuple[int, int], grid: tuple[int, int]) -> None:
    covered = np.random.default_rng(0).random(size) < 0.3

    # Brute force: each pixel divided into so many parts that no cell's border crosses a part.
    (height, width), (h, w) = size, grid
    parts = np.repeat(np.repeat(covered, h, axis=0), w, axis=1)  # (H h, W w)
    wanted = parts.reshape(h, height, w, width).mean(axis=(1, 3))

    share = coverage(covered, grid)
    assert share.dtype == np.float32
    np.testing.assert_allclose(share, wanted, atol=1e-6)


def test_coverage_of_all_and_of_nothing() -> None:
    np.testing.assert_allclose(coverage(np.ones((30, 41), dtype=np.bool_), (7, 16)), 1, atol=1e-6)
    assert not coverage(np.zeros((30, 41), dtype=np.bool_), (7, 16)).any()


@pytest.mark.parametrize("shape", ["disc", "strip", "dot"])
def test_a_defect_is_added_inside_a_region(shape):
    """Whatever its form, almost every defect is visible, and none reaches outside."""
    rows, columns = np.ogrid[:64, :64]
    inside = {
        "disc": np.hypot(rows - 40, columns - 20) < 15,
        "strip": np.broadcast_to((columns >= 50) & (columns < 56), (64, 64)),
        "dot": (rows < 8) & (columns < 8),
    }[shape]
    random = np.random.default_rng(0)
    pixels, other = random.integers(60, 200, (2, 3, 64, 64), dtype=np.uint8)
    visible = 0
    for number in range(40):
        defective, changed = add_defect(pixels, other, rng=seeded(0, 0, number), inside=inside)
        assert not changed[~inside].any()
        np.testing.assert_array_equal(defective[:, ~changed], pixels[:, ~changed])
        visible += changed.any()
    assert visible >= 32


def test_a_bounding_box_has_at_least_32_pixels():
    inside = np.zeros((64, 100), dtype=bool)
    inside[60:, 3:70] = True
    assert synthetic.bounding_box(inside) == (slice(32, 64), slice(3, 70))
    assert synthetic.bounding_box(inside[55:]) == (slice(0, 9), slice(3, 70))
