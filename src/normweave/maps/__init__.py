"""Patch scores to anomaly maps: upsample, smooth, and put tiles together. numpy only.

Bilinear upsampling and Gaussian smoothing are both linear and separable, so that together they are one small
matrix for the rows and one for the columns: map = M_h · scores · M_wᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from normweave.errors import DataError
from normweave.types import Tile

REFERENCE = 256
"""The side in pixels at which `smoothing` is the Gaussian's deviation in pixels."""
TRUNCATE = 4.0
"""The Gaussian ends after this many deviations."""


@lru_cache(maxsize=64)
def map_matrix(cells: int, pixels: int, *, smoothing: float) -> NDArray[np.float32]:
    """One side of the way from a grid of scores to a smooth map, (pixels, cells); every row adds up to 1.

    Gaussian with replicate padding, of deviation `smoothing * pixels / 256`, after bilinear interpolation in
    which cell c lies at pixel (c + ½) · pixels / cells − ½ (torch's align_corners=False). Padding with zeros
    would hide the border. The result is shared by all callers and read-only.
    """
    at = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    below = at.astype(np.int64)
    above = np.minimum(below + 1, cells - 1)
    share = at - below
    rows = np.arange(pixels)
    matrix = np.zeros((pixels, cells))
    np.add.at(matrix, (rows, below), 1 - share)
    np.add.at(matrix, (rows, above), share)

    deviation = smoothing * pixels / REFERENCE
    radius = int(TRUNCATE * deviation + 0.5)
    if radius > 0:
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
        kernel /= kernel.sum()
        padded = np.pad(matrix, ((radius, radius), (0, 0)), mode="edge")
        for cell in range(cells):
            matrix[:, cell] = np.convolve(padded[:, cell], kernel, mode="valid")
    result = matrix.astype(np.float32)
    result.flags.writeable = False
    return result


def upsample(
    scores: NDArray[np.float32], height: int, width: int, *, smoothing: float
) -> NDArray[np.float32]:
    """Smooth maps (B, height, width) from grids of patch scores (B, h, w)."""
    _, h, w = scores.shape
    rows = map_matrix(h, height, smoothing=smoothing)
    columns = map_matrix(w, width, smoothing=smoothing)
    wide = scores.astype(np.float32, copy=False) @ columns.T  # (B, h, W)
    return rows @ wide  # (B, H, W)


def stitch(
    maps: Sequence[NDArray[np.float32]], tiles: Sequence[Tile], height: int, width: int
) -> NDArray[np.float32]:
    """One map (height, width) from the maps of its tiles; where they overlap, a mean without a seam.

    A pixel weighs in its tile by its distance to the tile's nearer edges: one map fades into the next.

    Raises:
        DataError: a map does not fit its tile, or the tiles leave a part of the image uncovered.
    """
    total = np.zeros((height, width), dtype=np.float32)
    weights = np.zeros((height, width), dtype=np.float32)
    for part, tile in zip(maps, tiles, strict=True):
        if part.shape != (tile.height, tile.width):
            raise DataError(
                f"The map of {tile} must have shape {(tile.height, tile.width)}, got {part.shape}."
            )
        weight = np.outer(_tent(tile.height), _tent(tile.width))
        there = (slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width))
        total[there] += weight * part
        weights[there] += weight
    if not weights.all():
        bare = int((weights == 0).sum())
        raise DataError(f"{len(tiles)} tiles leave {bare} pixels of a {height}x{width} image uncovered.")
    total /= weights
    return total


def _tent(length: int) -> NDArray[np.float32]:
    """Distance to the nearer end, in shares of the longest, > 0."""
    away = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1))
    shares: NDArray[np.float32] = (away / away.max()).astype(np.float32)
    return shares
