"""Anomaly maps from patch scores: upsample, smooth and stitch tiles. numpy only.

Bilinear upsampling and Gaussian smoothing are linear and separable. Together they are one matrix for the rows and one
for the columns: map = M_h · scores · M_wᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from normweave.errors import DataError
from normweave.types import Tile

REFERENCE = 256
"""Side in pixels of an image for which `smoothing` is the std of the Gaussian in pixels."""
TRUNCATE = 4.0
"""Radius of the Gaussian in multiples of its std."""


@lru_cache(maxsize=64)
def map_matrix(cells: int, pixels: int, *, smoothing: float) -> NDArray[np.float32]:
    """Return the matrix (pixels, cells) that upsamples and smooths one axis; every row adds up to 1.

    Bilinear interpolation with cell c at pixel (c + ½) · pixels / cells − ½ (torch's align_corners=False), then a
    Gaussian with std `smoothing * pixels / 256` and replicate padding. Padding with zeros would lower
    the scores at the border. The result is cached and read-only.
    """
    at = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    below = at.astype(np.int64)
    above = np.minimum(below + 1, cells - 1)
    share = at - below
    rows = np.arange(pixels)
    matrix = np.zeros((pixels, cells))
    np.add.at(matrix, (rows, below), 1 - share)
    np.add.at(matrix, (rows, above), share)

    std = smoothing * pixels / REFERENCE
    radius = int(TRUNCATE * std + 0.5)
    if radius > 0:
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
        kernel /= kernel.sum()
        padded = np.pad(matrix, ((radius, radius), (0, 0)), mode="edge")
        for cell in range(cells):
            matrix[:, cell] = np.convolve(padded[:, cell], kernel, mode="valid")
    result = matrix.astype(np.float32)
    result.flags.writeable = False
    return result


def upsample(scores: NDArray[np.float32], height: int, width: int, *, smoothing: float) -> NDArray[np.float32]:
    """Return smooth maps (B, height, width) of patch scores (B, h, w)."""
    _, h, w = scores.shape
    rows = map_matrix(h, height, smoothing=smoothing)
    columns = map_matrix(w, width, smoothing=smoothing)
    wide = scores.astype(np.float32, copy=False) @ columns.T  # (B, h, W)
    return rows @ wide  # (B, H, W)


def stitch(
    maps: Iterable[NDArray[np.float32]],
    tiles: Sequence[Tile],
    height: int,
    width: int,
    *,
    complete: bool = True,
) -> NDArray[np.float32]:
    """Return one map (height, width) of the maps of its tiles: a weighted mean where tiles overlap.

    The weight of a pixel rises with its distance to the edges of its tile, so that no seam is visible.

    Args:
        complete: whether the tiles must cover the image; if not, the map is 0 where none is.

    Raises:
        DataError: a map has another shape than its tile, or the tiles do not cover the image.
    """
    total = np.zeros((height, width), dtype=np.float32)
    weights = np.zeros((height, width), dtype=np.float32)
    weight = np.zeros((0, 0), dtype=np.float32)
    for part, tile in zip(maps, tiles, strict=True):
        if part.shape != (tile.height, tile.width):
            raise DataError(f"The map of {tile} must have shape {(tile.height, tile.width)}, got {part.shape}.")
        if weight.shape != part.shape:
            weight = np.outer(_tent(tile.height), _tent(tile.width))
        window = (slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width))
        total[window] += weight * part
        weights[window] += weight
    missing = weights == 0
    uncovered = int(missing.sum())
    if complete and uncovered:
        raise DataError(f"{len(tiles)} tiles leave {uncovered} pixels of a {height}x{width} image uncovered.")
    weights[missing] = 1
    total /= weights
    return total


def _tent(length: int) -> NDArray[np.float32]:
    """Return weights (length,) in (0, 1] that rise linearly from both ends to the middle."""
    distance = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1))
    weights: NDArray[np.float32] = (distance / distance.max()).astype(np.float32)
    return weights
