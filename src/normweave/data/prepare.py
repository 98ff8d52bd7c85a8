"""Cut images of any size into tiles and resize them to the network's input."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.config import PrepareConfig
from normweave.errors import ImageError
from normweave.types import Tile

MAX_TILES = 1024
"""Tiles of an image; with the default settings an image of 150 million pixels has fewer."""


@dataclass(frozen=True)
class Preparation:
    """Image preparation with the settings of `PrepareConfig`; saved with the detector."""

    config: PrepareConfig

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self.config)

    def tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        """Return the tiles of an image of (height, width) pixels, row by row; together they cover every pixel.

        All tiles have the same size. A side up to `tile_beyond` times the input's is not cut. A longer side is cut into
        n = ceil(side / (tile_beyond * input side)) tiles of length ceil(side / (n - (n - 1) * tile_overlap)), so that
        neighbours share `tile_overlap` of a tile, up to a pixel of rounding.
        """
        return tuple(
            Tile(top, left, rows, columns)
            for top, rows in self._cuts(height, self.config.height)
            for left, columns in self._cuts(width, self.config.width)
        )

    def checked_tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        """Return the tiles of an image, of which there may be at most 1,024: this bounds the time and the memory.

        Raises:
            ImageError: there are more.
        """
        tiles = self.tiles(height, width)
        if len(tiles) > MAX_TILES:
            raise ImageError(
                f"too many tiles: {height} x {width} pixels (height x width) give {len(tiles):,} tiles of up to "
                f"{tiles[0].height} x {tiles[0].width} pixels. Allowed: {MAX_TILES:,}. Shrink the image, cut it into "
                "pieces, or train with a higher prepare.tile_beyond."
            )
        return tiles

    def _cuts(self, side: int, input_side: int) -> list[tuple[int, int]]:
        """Return (start, length) of each tile along one side."""
        longest = self.config.tile_beyond * input_side
        if longest == 0 or side <= longest:
            return [(0, side)]
        count = math.ceil(side / longest)
        length = math.ceil(side / (count - (count - 1) * self.config.tile_overlap))
        return [(number * (side - length) // (count - 1), length) for number in range(count)]

    def apply(self, image: NDArray[np.uint8], tile: Tile) -> NDArray[np.uint8]:
        """Return a tile of an image (H, W, 3) as the network's input (3, height, width), resized to fit.

        Bilinear with antialiasing.
        """
        rows = slice(tile.top, tile.top + tile.height)
        crop = image[rows, tile.left : tile.left + tile.width]  # (rows, columns, 3)
        size = self.config.width, self.config.height
        resized = Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))  # (3, height, width)
