import numpy as np
import pytest
import torch

from normweave.errors import DataError
from normweave.maps import map_matrix, stitch, upsample
from normweave.types import Tile


def literal_gaussian(image, std, mode):
    """Convolve with exp(-(dy² + dx²) / 2σ²), cut off at 4σ, pixel by pixel."""
    radius = int(4 * std + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * std**2))
    kernel /= kernel.sum()
    padded = np.pad(image, radius, mode=mode)
    height, width = image.shape
    out = np.zeros_like(image)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            out += kernel[dy, dx] * padded[dy : dy + height, dx : dx + width]
    return out


def bilinear(scores, height, width):
    return torch.nn.functional.interpolate(
        torch.from_numpy(scores)[:, None], size=(height, width), mode="bilinear", align_corners=False
    )[:, 0].numpy()


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (5, 3)])
def test_without_smoothing_it_is_bilinear_interpolation(size):
    scores = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    np.testing.assert_allclose(upsample(scores, *size, smoothing=0), bilinear(scores, *size), atol=1e-5)


def test_smoothing_is_a_gaussian_with_replicate_padding():
    scores = np.random.default_rng(1).normal(size=(1, 6, 6)).astype(np.float32)
    sharp = bilinear(scores, 96, 96)[0].astype(np.float64)
    smooth = upsample(scores, 96, 96, smoothing=6.0)[0]
    std = 6.0 * 96 / 256
    np.testing.assert_allclose(smooth, literal_gaussian(sharp, std, "edge"), atol=1e-5)
    assert np.abs(smooth - literal_gaussian(sharp, std, "constant")).max() > 0.1


def test_rows_add_up_to_one_and_a_constant_stays_constant():
    for cells, pixels in ((32, 256), (32, 1000), (1, 50), (7, 3)):
        np.testing.assert_allclose(map_matrix(cells, pixels, smoothing=4.0).sum(axis=1), 1, atol=1e-6)
    constant = upsample(np.full((2, 4, 4), 3.5, dtype=np.float32), 90, 70, smoothing=4.0)
    np.testing.assert_allclose(constant, 3.5, rtol=1e-6)


@pytest.mark.parametrize("cell", [(0, 0), (0, 5), (3, 4), (7, 9)])
def test_the_map_of_one_cell_peaks_in_that_cell(cell):
    scores = np.zeros((1, 8, 10), dtype=np.float32)
    scores[0][cell] = 1
    peak = np.unravel_index(upsample(scores, 160, 200, smoothing=4.0)[0].argmax(), (160, 200))
    assert (peak[0] // 20, peak[1] // 20) == cell


def test_a_defect_at_the_border_keeps_its_score():
    """With zero padding its maximum would be lower than inside the image."""
    scores = np.zeros((2, 8, 8), dtype=np.float32)
    scores[0, 0, 4] = scores[1, 4, 4] = 1
    at_border, inside = upsample(scores, 256, 256, smoothing=4.0)
    assert at_border.max() >= inside.max()


def test_smoothing_grows_with_the_image():
    """A map of twice the size has the same content."""
    scores = np.random.default_rng(2).normal(size=(1, 8, 8)).astype(np.float32)
    small, large = (upsample(scores, side, side, smoothing=8.0)[0] for side in (256, 512))
    np.testing.assert_allclose(large.reshape(256, 2, 256, 2).mean(axis=(1, 3)), small, atol=0.01)


def test_an_image_does_not_depend_on_its_batch():
    scores = np.random.default_rng(3).normal(size=(4, 8, 8)).astype(np.float32)
    together = upsample(scores, 100, 90, smoothing=4.0)
    for one, expected in zip(scores, together, strict=True):
        np.testing.assert_array_equal(upsample(one[None], 100, 90, smoothing=4.0)[0], expected)
    assert together.dtype == np.float32


def test_the_cached_matrix_is_read_only():
    matrix = map_matrix(8, 64, smoothing=4.0)
    assert map_matrix(8, 64, smoothing=4.0) is matrix
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1


def test_one_tile_is_the_map():
    only = np.random.default_rng(4).normal(size=(9, 7)).astype(np.float32)
    np.testing.assert_allclose(stitch([only], [Tile(0, 0, 9, 7)], 9, 7), only, rtol=1e-6)


def test_equal_tiles_give_the_map_they_were_cut_from():
    full = np.random.default_rng(5).normal(size=(50, 80)).astype(np.float32)
    tiles = [Tile(top, left, 30, 45) for top in (0, 20) for left in (0, 35)]
    parts = [full[t.top : t.top + t.height, t.left : t.left + t.width] for t in tiles]
    np.testing.assert_allclose(stitch(parts, tiles, 50, 80), full, atol=1e-5)


def test_different_tiles_blend_without_a_seam():
    tiles = [Tile(0, 0, 4, 60), Tile(0, 40, 4, 60)]
    row = stitch([np.zeros((4, 60), np.float32), np.ones((4, 60), np.float32)], tiles, 4, 100)[0]
    assert (row[:40] == 0).all()
    assert (row[60:] == 1).all()
    assert (np.diff(row[39:61]) > 0).all()
    assert np.diff(row).max() < 0.1


def test_uncovered_pixels_and_wrong_shapes_are_errors():
    with pytest.raises(DataError, match="1 tiles leave 12 pixels of a 5x6 image uncovered"):
        stitch([np.zeros((3, 6), np.float32)], [Tile(0, 0, 3, 6)], 5, 6)
    with pytest.raises(DataError, match=r"must have shape \(3, 6\), got \(3, 5\)"):
        stitch([np.zeros((3, 5), np.float32)], [Tile(0, 0, 3, 6)], 3, 6)


def test_tiles_that_leave_pixels_out_are_stitched_if_they_may():
    part = np.ones((1, 4, 4), dtype=np.float32)
    with pytest.raises(DataError, match="leave 16 pixels of a 4x8 image uncovered"):
        stitch(part, [Tile(0, 0, 4, 4)], 4, 8)
    found = stitch(part, [Tile(0, 0, 4, 4)], 4, 8, complete=False)
    assert found[:, :4].min() == found[:, :4].max() == pytest.approx(1)
    assert not found[:, 4:].any()
