"""Cut images of any size into tiles and resize them to the network's input; replace what is outside a region."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.config import PrepareConfig, RegionConfig
from normweave.config.regions import EVERY
from normweave.data import alignment, regions
from normweave.data.alignment import Limits, Placement
from normweave.data.regions import Region, TileRegion
from normweave.errors import ImageError
from normweave.types import Tile

MAX_TILES = 1024
"""Tiles of an image; with the default settings an image of 150 million pixels has fewer."""


@dataclass(frozen=True)
class Preparation:
    """Image preparation with the settings of `PrepareConfig`; saved with the detector.

    Args:
        region: the part of the image that is inspected; None: all of it.
        limits: what an image must reach to be inspected under a region that follows the part.
    """

    config: PrepareConfig
    region: Region | None = None
    limits: Limits = field(default=alignment.FEWEST, compare=False)

    def of(self, category: str | None) -> Preparation:
        """Return itself: it is the same for all categories."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        if self.region is None:
            return asdict(self.config)
        shapes = {"include": asdict(self.region.include), "ignore": asdict(self.region.ignore)}
        return asdict(self.config) | shapes | regions.alignment_of(self.region)

    @property
    def follows(self) -> bool:
        """Whether the region follows the part."""
        return self.region is not None and self.region.align != "none"

    def place(self, image: NDArray[np.uint8]) -> Placement | None:
        """Return where an image (H, W, 3) shows the part; None: the region does not follow it.

        Raises:
            ImageError: the image does not show the part as well as it must.
        """
        if self.region is None or not self.follows:
            return None
        placement = regions.aligner(self.region).place(image)
        self.limits.check(placement)
        return placement

    def tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        """Return the tiles of an image of (height, width) pixels, row by row; together they cover every pixel.

        Under a region they cover its bounding box, as if the image had been cut to it, and tiles that are wholly
        outside the region are left out.

        All tiles have the same size. A side up to `tile_beyond` times the input's is not cut. A longer side is cut into
        n = ceil(side / (tile_beyond * input side)) tiles of length ceil(side / (n - (n - 1) * tile_overlap)), so that
        neighbours share `tile_overlap` of a tile, up to a pixel of rounding.
        """
        box = Tile(0, 0, height, width) if self.region is None else regions.bounding_box(self.region, height, width)
        if box is None:
            return ()
        tiles = tuple(
            Tile(box.top + top, box.left + left, rows, columns)
            for top, rows in self._cuts(box.height, self.config.height)
            for left, columns in self._cuts(box.width, self.config.width)
        )
        if self.region is None or len(tiles) > MAX_TILES:
            return tiles
        return tuple(tile for tile in tiles if self._under_region((height, width), tile) is not False)

    def checked_tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        """Return the tiles of an image, of which there may be at most 1,024: this bounds the time and the memory.

        Raises:
            ImageError: there are more, or none has a pixel in the region.
        """
        tiles = self.tiles(height, width)
        if not tiles:
            raise ImageError(
                f"no pixel of the image, {height} x {width} pixels (height x width), lies in the region of interest. "
                "Give larger images, or train with another region."
            )
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

    def part_inside(self, size: tuple[int, int], tile: Tile) -> TileRegion | None:
        """Return how a tile is prepared and scored under the region; None: as it is.

        Args:
            size: (height, width) of the image.
        """
        found = self._under_region(size, tile)
        return found if isinstance(found, TileRegion) else None

    def _under_region(self, size: tuple[int, int], tile: Tile) -> TileRegion | bool:
        if self.region is None:
            return True
        return regions.of_tile(self.region, size, tile, (self.config.height, self.config.width))

    def apply(self, image: NDArray[np.uint8], tile: Tile) -> NDArray[np.uint8]:
        """Return a tile of an image (H, W, 3) as the network's input (3, height, width), resized to fit.

        Bilinear with antialiasing. Pixels outside the region are replaced by their nearest neighbour inside.
        """
        rows = slice(tile.top, tile.top + tile.height)
        crop = image[rows, tile.left : tile.left + tile.width]  # (rows, columns, 3)
        part = self.part_inside(image.shape[:2], tile)
        if part is not None:
            crop = np.where(part.outside[..., None], np.uint8(0), crop)
        size = self.config.width, self.config.height
        resized = Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR)
        prepared = np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))  # (3, height, width)
        return prepared if part is None else part.fill(prepared)


@dataclass(frozen=True)
class Preparations(Preparation):
    """The image preparation of each category. They differ in the region; on its own it prepares whole images.

    Args:
        regions: by category.
        limits_of: of each category of `regions`.
    """

    regions: tuple[RegionConfig, ...] = ()
    limits_of: Mapping[str, Limits] = field(default_factory=dict, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; those of the regions by category, without the pixels of masks."""
        return super().as_dict() | ({"regions": regions.described(self.regions)} if self.regions else {})

    def of(self, category: str | None) -> Preparation:
        """Return the preparation of images of a category."""
        own = category if any(each.category == category for each in self.regions) else EVERY
        limits = self.limits_of.get(str(own), alignment.FEWEST)
        return Preparation(self.config, regions.of(self.regions, category), limits)
