"""Images and anomaly maps of stored inspections, computed again from their files when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import scoring
from normweave.data import images
from normweave.serve.files import Files
from normweave.serve.records import StoredImage
from normweave.types import Tile


class ImageReader:
    """The image of an inspection and its anomaly map, both computed on each call."""

    def __init__(self, files: Files, stored: StoredImage) -> None:
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
        tiles = self._stored.tiles
        return max(tile.top + tile.height for tile in tiles), max(tile.left + tile.width for tile in tiles)

    def anomaly_map(self, *, max_side: int | None = None) -> NDArray[np.float32]:
        """Return the anomaly map, (H, W); with `max_side` computed at the size of the shrunk image."""
        stored = self._stored
        grids = self._files.read(stored.grids_hash)
        return self.map_of(grids, stored.tiles, smoothing=stored.smoothing, max_side=max_side)

    def map_of(
        self, grids: bytes, tiles: Sequence[Tile], *, smoothing: float, max_side: int | None = None
    ) -> NDArray[np.float32]:
        """Return the anomaly map, (H, W), of patch scores in an .npy file, which another model may have computed."""
        scores = np.load(io.BytesIO(grids), allow_pickle=False)
        whole, size = self.size, shrunk(self.size, max_side)
        if size != whole:
            tiles = [_shrunk_tile(tile, whole, size) for tile in tiles]
        return scoring.anomaly_map(scores, tuple(tiles), size, smoothing=smoothing)


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


def npy(array: NDArray[np.float32]) -> bytes:
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
