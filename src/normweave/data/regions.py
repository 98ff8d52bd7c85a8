"""Regions of interest: which pixels of an image are inspected, and how the others are replaced.

A pixel belongs to a shape if its centre does. At the input of the network, a pixel is kept if no pixel outside the
region has a part in it, and takes the value of the nearest kept pixel otherwise. So no pixel outside the region changes
any number, and the edge of the region is no edge in the prepared image.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter

from normweave.config.regions import EVERY, MAX_MASK_LETTERS, RegionConfig, ShapesConfig
from normweave.data import alignment
from normweave.data.alignment import Aligner
from normweave.data.synthetic import coverage
from normweave.errors import ConfigError
from normweave.types import Tile

RASTER = 256
"""Side of the raster on which the size of a region is checked."""
LEAST_PIXELS = 64
"""Pixels of the raster that a region must cover, 0.1 % of the image."""
MAX_MASK_SIDE = 4096
"""Longest side of a mask in pixels."""
CACHED = 64
"""Tiles whose replaced pixels are kept in memory, about 1.5 MB each with the default settings."""

BLOCK = 2**15
"""Pixels whose nearest neighbours are computed together: as many as fit in the cache of a processor."""

Mask = NDArray[np.bool_]


class Region(NamedTuple):
    """The part of an image that is inspected, without its category."""

    include: ShapesConfig
    ignore: ShapesConfig
    align: str = "none"
    reference: str = ""

    @classmethod
    def of(cls, config: RegionConfig) -> Region:
        """Return the region of these settings."""
        return cls(config.include, config.ignore, config.align, config.reference)


def of(regions: Iterable[RegionConfig], category: str | None) -> Region | None:
    """Return the region of a category, or that of all categories; None: the whole image."""
    named = {each.category: Region.of(each) for each in regions}
    return named.get(category or EVERY, named.get(EVERY))


def check(regions: Sequence[RegionConfig], *, categories: Collection[str] | None = None) -> None:
    """Check that every region can be drawn and is large enough.

    Args:
        categories: those that regions may name; None: any.

    Raises:
        ConfigError: one is not, or one that follows the part cannot be found in its own reference image.
        MissingError: a region follows the part, and OpenCV is not installed.
    """
    for each in regions:
        name = f"The region of {'all categories' if each.category == EVERY else repr(each.category)}"
        if categories is not None and each.category not in (EVERY, *categories):
            raise ConfigError(
                f"{name} has no images. Categories of the data: {', '.join(sorted(categories))}. Correct the name of "
                "the category, or remove its region."
            )
        covered = int(mask(Region.of(each), RASTER, RASTER).sum())
        if covered < LEAST_PIXELS:
            raise ConfigError(
                f"{name} covers {covered} of {RASTER * RASTER:,} pixels of a raster over the image, and "
                f"{LEAST_PIXELS} is the least. Enlarge the included shapes, or remove ignored ones."
            )
        if each.align != "none":
            try:
                aligner(Region.of(each))
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error


@lru_cache(maxsize=CACHED)
def aligner(region: Region) -> Aligner:
    """Return what finds the part of a region that follows it.

    Raises:
        ConfigError: its reference image is none, or shows too little structure.
        MissingError: OpenCV is not installed.
    """
    reference = alignment.decode_reference(region.reference)
    return Aligner.checked(reference, mask(region, *reference.shape), rigid=region.align == "rigid")


@lru_cache(maxsize=2)
def mask(region: Region, height: int, width: int) -> Mask:
    """Return whether each pixel of an image of this size belongs to the region, (height, width); read-only.

    Raises:
        ConfigError: a mask of the region is not an image.
    """
    inside = ~_covered(region.ignore, height, width)
    if not region.include.empty:
        inside &= _covered(region.include, height, width)
    inside.flags.writeable = False
    return inside


@lru_cache(maxsize=CACHED)
def bounding_box(region: Region, height: int, width: int) -> Tile | None:
    """Return the smallest rectangle around the pixels of a region; None: no pixel of such an image belongs to it."""
    inside = mask(region, height, width)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Tile(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def _covered(shapes: ShapesConfig, height: int, width: int) -> Mask:
    """Return the pixels whose centre is in a shape, (height, width)."""
    result = np.zeros((height, width), dtype=np.bool_)
    for polygon in shapes.polygons:
        result |= _polygon(np.array(polygon) * [width, height], height, width)
    for x, y, across, down in shapes.rectangles:
        rows, columns = (
            slice(*np.ceil(np.array(ends) - 0.5).astype(int))  # the first pixel whose centre is not before
            for ends in ((y * height, (y + down) * height), (x * width, (x + across) * width))
        )
        result[rows, columns] = True
    if shapes.mask:
        drawn = decode_mask(shapes.mask)
        rows, columns = (
            (2 * np.arange(side) + 1) * old // (2 * side)
            for side, old in zip((height, width), drawn.shape, strict=True)
        )
        result |= drawn[np.ix_(rows, columns)]
    return result


def _polygon(corners: NDArray[np.float64], height: int, width: int) -> Mask:
    """Return the pixels whose centre is inside a polygon (n, 2) of x and y in pixels, by the even-odd rule.

    Each edge is crossed by the centre lines of the rows from its upper end to before its lower one; a centre on an edge
    counts as right of it. So a pixel is in exactly one of two polygons that share an edge.
    """
    crossed = np.zeros((height, width + 1), dtype=np.bool_)
    for (x, y), (next_x, next_y) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        first, last = np.ceil(np.sort([y, next_y]) - 0.5).astype(int)
        rows = np.arange(first, last)
        if len(rows):
            at = x + (rows + 0.5 - y) * (next_x - x) / (next_y - y)
            crossed[rows, np.clip(np.ceil(at - 0.5).astype(int), 0, width)] ^= True
    return np.asarray(np.logical_xor.accumulate(crossed[:, :width], axis=1))


def encode_mask(drawn: Mask) -> str:
    """Return a mask (H, W) as base64 text of a PNG with one bit a pixel, as `ShapesConfig.mask` holds it.

    Raises:
        ConfigError: no pixel is marked, or it is too large.
    """
    if not drawn.any():
        raise ConfigError("The mask marks no pixel. Save it with the part in white, and the rest in black.")
    image = Image.fromarray(np.asarray(drawn, dtype=np.uint8) * 255).convert("1")
    image.thumbnail((MAX_MASK_SIDE, MAX_MASK_SIDE), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    text = base64.b64encode(content.getvalue()).decode()
    if len(text) > MAX_MASK_LETTERS:
        raise ConfigError(
            f"A mask may have {MAX_MASK_LETTERS:,} letters of base64, got {len(text):,} for {drawn.shape[1]} x "
            f"{drawn.shape[0]} pixels (width x height). Shrink it, or remove single pixels."
        )
    return text


@lru_cache(maxsize=16)
def decode_mask(text: str) -> Mask:
    """Return the mask (H, W) of a PNG as base64 text; read-only.

    Raises:
        ConfigError: it is not such a text, or the image has more than 4,096 pixels a side.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > MAX_MASK_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, of {MAX_MASK_SIDE} a side at most")
            drawn = np.asarray(image.convert("L")) > 0
    except (binascii.Error, OSError, SyntaxError, UnidentifiedImageError, ValueError) as error:
        raise ConfigError(
            f"The mask of a region must be a PNG image as base64 text, got {text[:40]!r}…: {error}. "
            "Write it with: normweave data roi --mask"
        ) from error
    drawn.flags.writeable = False
    return drawn


@dataclass(frozen=True, eq=False)
class TileRegion:
    """How a tile that is partly outside of a region is prepared and scored. (H, W) is the input of the network."""

    outside: Mask
    """(tile height, tile width) pixels of the image outside of the region."""
    kept: Mask
    """(H, W) input pixels in which no pixel outside has a part; where there are none, those with the least."""
    scored: Mask
    """(H, W) input pixels of which half or more lies inside: the score of the tile is the highest of the map there."""
    nearest: NDArray[np.int32]
    """(H, W) the nearest kept pixel of each, as index of the flattened input."""

    def fill(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return prepared pixels (3, H, W) with the nearest kept pixel in the place of the others."""
        filled: NDArray[np.uint8] = pixels.reshape(len(pixels), -1)[:, self.nearest]
        return filled

    def cells(self, grid: tuple[int, ...]) -> Mask:
        """Return the cells of a grid (h, w) that have a part inside, (h, w)."""
        return np.asarray(coverage(self.kept, (grid[0], grid[1])) > 0)

    def fill_cells(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return patch scores (h, w) with the nearest cell inside in the place of those outside."""
        inside = self.cells(scores.shape)
        return scores if inside.all() else scores.ravel()[nearest(inside)]


def cells_inside(parts: Sequence[TileRegion | None], grid: tuple[int, ...]) -> Mask | None:
    """Return the cells of the grids (h, w) of tiles that have a part inside, (n, h, w); None: all of them."""
    if all(part is None for part in parts):
        return None
    return np.stack([np.ones(grid, dtype=np.bool_) if part is None else part.cells(grid) for part in parts])


def filled(tiles: NDArray[np.uint8], parts: Sequence[TileRegion | None]) -> NDArray[np.uint8]:
    """Return prepared tiles (n, 3, H, W) with the nearest kept pixel in the place of those outside."""
    if all(part is None for part in parts):
        return tiles
    return np.stack([tile if part is None else part.fill(tile) for tile, part in zip(tiles, parts, strict=True)])


@lru_cache(maxsize=CACHED)
def of_tile(region: Region, size: tuple[int, int], tile: Tile, input_size: tuple[int, int]) -> TileRegion | bool:
    """Return how a tile is prepared under a region; True: as it is, since all of it is inside; False: all is outside.

    Args:
        size: (height, width) of the image.
        input_size: (height, width) of the input of the network.
    """
    rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
    outside = ~mask(region, *size)[rows, columns]
    if outside.all() or not outside.any():
        return not outside.any()
    shown = Image.fromarray(outside.astype(np.float32))
    share = np.asarray(shown.resize(input_size[::-1], Image.Resampling.BILINEAR))  # as pixels are resized
    least = share.min()
    kept = share == least
    return TileRegion(outside, kept, (share <= 0.5) | kept, nearest(kept))


def nearest(kept: Mask) -> NDArray[np.int32]:
    """Return for each pixel the nearest kept one (Euclidean), as index of the flattened mask, (H, W).

    Of equally near ones, the choice does not depend on anything but the mask. Distances along the columns first, then
    the smallest sum of squares along each row.

    Args:
        kept: (H, W), True somewhere.
    """
    height, width = kept.shape
    rows = np.arange(height)[:, None]
    above = np.maximum.accumulate(np.where(kept, rows, -1), axis=0)
    below = np.minimum.accumulate(np.where(kept, rows, height)[::-1], axis=0)[::-1]
    far = height + width
    up, down = np.where(above < 0, far, rows - above), np.where(below >= height, far, below - rows)
    row = np.where(up <= down, above, below)  # of the nearest kept pixel of the column
    steps = 2 * width  # to the right and to the left
    along = np.minimum(up, down).astype(np.int64) ** 2 * steps
    best = along.copy()  # squared distance * steps + number of the step
    size = max(1, BLOCK // width)
    for block in (slice(start, start + size) for start in range(0, height, size)):
        given, found = along[block], best[block]
        for shift in range(1, width):
            step = shift * shift * steps + 2 * shift
            if step > found.max():
                break
            np.minimum(found[:, :-shift], given[:, shift:] + step, out=found[:, :-shift])
            np.minimum(found[:, shift:], given[:, :-shift] + (step + 1), out=found[:, shift:])
    number = best % steps
    column = np.arange(width) + np.where(number % 2, -(number // 2), number // 2)
    source = np.take_along_axis(row, column, axis=1) * width + column
    return np.asarray(source, dtype=np.int32)


def to_json(region: Region) -> bytes:
    """Return the shapes of a region as JSON, for `from_json`."""
    return TypeAdapter(RegionConfig).dump_json(RegionConfig(include=region.include, ignore=region.ignore))


def from_json(text: bytes) -> Region:
    """Return the region that `to_json` wrote; it does not follow the part."""
    found = TypeAdapter(RegionConfig).validate_json(text)
    return Region(found.include, found.ignore)


def described(regions: Sequence[RegionConfig]) -> dict[str, Any]:
    """Return the regions by category as JSON values, with the hash in the place of each picture."""

    def shapes(part: ShapesConfig) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        if part.polygons:
            drawn["polygons"] = [[list(point) for point in polygon] for polygon in part.polygons]
        if part.rectangles:
            drawn["rectangles"] = [list(rectangle) for rectangle in part.rectangles]
        if part.mask:
            drawn["mask_sha256"] = _hash(part.mask)
        return drawn

    return {
        each.category: {
            name: shapes(part) for name, part in (("include", each.include), ("ignore", each.ignore)) if not part.empty
        }
        | alignment_of(Region.of(each))
        for each in regions
    }


def alignment_of(region: Region) -> dict[str, str]:
    """Return how a region follows the part as JSON values; nothing if it does not."""
    if region.align == "none":
        return {}
    return {"align": region.align, "reference_sha256": _hash(region.reference)}


def _hash(picture: str) -> str:
    return hashlib.sha256(base64.b64decode(picture)).hexdigest()
