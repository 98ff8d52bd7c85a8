"""Images and anomaly maps of stored inspections, computed again from their files when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import scoring
from normweave.data import alignment, images, regions
from normweave.data.alignment import Placement
from normweave.data.regions import Region
from normweave.scoring import PreparedImage, TileScores
from normweave.serve.files import ImageStore
from normweave.serve.records import StoredImage
from normweave.types import Tile


class ImageReader:
    """The image of an inspection and its anomaly map, both computed on each call."""

    def __init__(self, files: ImageStore, stored: StoredImage) -> None:
        self._files = files
        self._stored = stored

    def image(self, *, max_side: int | None = None) -> NDArray[np.uint8]:
        """Return the image, (H, W, 3); with `max_side` shrunk so that height and width are at most that."""
        content = self._files.read(self._stored.image_hash)
        size = shrunk(self.size, max_side)
        if size == self.size:
            return images.decode(content)
        if content.startswith(_JPEG):
            with Image.open(io.BytesIO(content)) as image:
                image.draft(None, size[::-1])  # decoded at a half, a quarter or an eighth of its size
                pixels = images.decode(image)
        else:
            pixels = images.decode(content)
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX))

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of the image."""
        if self._stored.size is not None:
            return self._stored.size
        tiles = self._stored.tiles
        return max(tile.top + tile.height for tile in tiles), max(tile.left + tile.width for tile in tiles)

    def anomaly_map(self, *, max_side: int | None = None) -> NDArray[np.float32]:
        """Return the anomaly map, (H, W); with `max_side` computed at the size of the shrunk image."""
        stored = self._stored
        return self.map_of(
            self._grids, stored.tiles, smoothing=stored.smoothing, threshold=stored.map_threshold, max_side=max_side
        )

    def inside(self, grids: bytes | None = None, *, max_side: int | None = None) -> NDArray[np.bool_] | None:
        """Return whether each pixel lies in the region of interest, (H, W); None: no region.

        Args:
            grids: of another model, as for `map_of`.
        """
        content, size = self._grids if grids is None else grids, shrunk(self.size, max_side)
        inside = self._inside_reference(content, size)
        if inside is None:
            return None
        _, _, placement = _read_grids(content)
        return np.asarray(alignment.to_image(inside, placement and placement.resized(self.size, size)))

    def _inside_reference(self, grids: bytes, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """Return the region before it is moved to the part, (H, W); None: no region."""
        _, region, _ = _read_grids(grids)
        return None if region is None else regions.mask(region, *size)

    def map_of(
        self, grids: bytes, tiles: Sequence[Tile], *, smoothing: float, threshold: float, max_side: int | None = None
    ) -> NDArray[np.float32]:
        """Return the anomaly map, (H, W), of the patch scores that another model may have computed.

        Args:
            grids: what `grids_file` returned.
            threshold: of the map.
        """
        scores, _, placement = _read_grids(grids)
        whole, size = self.size, shrunk(self.size, max_side)
        if size != whole:
            tiles = [_shrunk_tile(tile, whole, size) for tile in tiles]
        return scoring.anomaly_map(
            scores,
            tuple(tiles),
            size,
            smoothing=smoothing,
            inside=self._inside_reference(grids, size),
            threshold=threshold,
            placement=placement and placement.resized(whole, size),
        )

    @cached_property
    def _grids(self) -> bytes:
        return self._files.read(self._stored.grids_hash)


def grids_file(image: PreparedImage, tiles: TileScores) -> bytes:
    """Return the patch scores of an image, (n, h, w) float32, as an .npy file.

    The region under which it was scored follows as a second array, the bytes of its JSON; nothing without one. If the
    region follows the part, the fields of its placement are a third array.
    """
    region, placement = image.preparations[0].region, image.placement
    text = b"" if region is None else npy(np.frombuffer(regions.to_json(region), dtype=np.uint8))
    return npy(tiles.raw.scores) + text + (b"" if placement is None else npy(np.array(placement)))


def _read_grids(content: bytes) -> tuple[NDArray[np.float32], Region | None, Placement | None]:
    """Return what `grids_file` wrote."""
    stream = io.BytesIO(content)
    found = [np.load(stream, allow_pickle=False)]
    while stream.tell() < len(content):
        found.append(np.load(stream, allow_pickle=False))
    region = regions.from_json(found[1].tobytes()) if len(found) > 1 else None
    return found[0], region, Placement(*found[2].tolist()) if len(found) > 2 else None


def shrunk(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Return (height, width) with the same ratio and both sides at most `max_side`, at least 1; never enlarged."""
    scale = 1.0 if max_side is None else min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shrunk_tile(tile: Tile, whole: tuple[int, int], size: tuple[int, int]) -> Tile:
    """Return the tile in the shrunk image. Edges are rounded alike, so that the tiles still cover it."""
    spans = []
    for start, length, old, new in zip((tile.top, tile.left), (tile.height, tile.width), whole, size, strict=True):
        first = min(start * new // old, new - 1)
        spans.append((first, max(1, -(-(start + length) * new // old) - first)))
    (top, height), (left, width) = spans
    return Tile(top, left, height, width)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3 or 4) pixels as PNG."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=3)
    return content.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    """Encode an array as an .npy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


_JPEG = b"\xff\xd8"
_MEDIA_TYPES = (
    (b"\x89PNG", "image/png"),
    (_JPEG, "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"II", "image/tiff"),
    (b"MM", "image/tiff"),
    (b"RIFF", "image/webp"),
)


def media_type(content: bytes) -> str:
    """Return the MIME type of an image file by its first bytes."""
    return next((name for start, name in _MEDIA_TYPES if content.startswith(start)), "application/octet-stream")
