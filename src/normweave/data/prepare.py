"""From an image of any size to the network's input: cut into tiles, resize. Saved with the detector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.config import PrepareConfig
from normweave.types import Tile


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The settings of `PrepareConfig`, and what they do to an image."""

    height: int
    width: int
    tile_beyond: float
    tile_overlap: float

    @classmethod
    def of(cls, config: PrepareConfig) -> Self:
        """The preparation that `config` describes."""
        return cls(**asdict(config))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `as_dict` gave; raises ConfigError where a value is out of range."""
        return cls.of(PrepareConfig(**record))

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        """The rectangles that an image of this size is looked at in, row by row; together they cover every pixel.

        All tiles are equally large. A side up to `tile_beyond` times the input's is not cut; a longer one into
        n = ceil(side / (tile_beyond * input side)) tiles of length ceil(side / (n - (n - 1) * tile_overlap)), so that
        neighbours share `tile_overlap` of a tile, give or take a pixel of rounding.
        """
        return tuple(
            Tile(top, left, rows, columns)
            for top, rows in self._cuts(height, self.height)
            for left, columns in self._cuts(width, self.width)
        )

    def _cuts(self, side: int, input_side: int) -> list[tuple[int, int]]:
        """(start, length) along one side."""
        if self.tile_beyond == 0 or side <= self.tile_beyond * input_side:
            return [(0, side)]
        count = math.ceil(side / (self.tile_beyond * input_side))
        length = math.ceil(side / (count - (count - 1) * self.tile_overlap))
        return [(number * (side - length) // (count - 1), length) for number in range(count)]

    def apply(self, image: NDArray[np.uint8], tile: Tile) -> NDArray[np.uint8]:
        """The tile of an image (H, W, 3) as the network's input (3, height, width), stretched to fit it.

        Bilinear; where it shrinks, over all pixels that a pixel of the input stands for (antialiased).
        """
        crop = image[
            tile.top : tile.top + tile.height, tile.left : tile.left + tile.width
        ]  # (rows, columns, 3)
        resized = Image.fromarray(crop).resize((self.width, self.height), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))  # (3, height, width)
