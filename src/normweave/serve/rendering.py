"""Images and anomaly maps of stored inspections, computed again from their files when they are asked for."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import scoring
from normweave.data import images
from normweave.serve.files import Files
from normweave.serve.records import StoredImage


class ImageReader:
    """The image of an inspection and its anomaly map, both computed on each call."""

    def __init__(self, files: Files, stored: StoredImage) -> None:
        self._files = files
        self._stored = stored

    def image(self) -> NDArray[np.uint8]:
        """Return the image, (H, W, 3)."""
        return images.decode(self._files.read(self._stored.image_hash))

    def anomaly_map(self) -> NDArray[np.float32]:
        """Return the anomaly map, (H, W)."""
        grids = np.load(io.BytesIO(self._files.read(self._stored.grids_hash)), allow_pickle=False)
        tiles = self._stored.tiles
        size = (max(tile.top + tile.height for tile in tiles), max(tile.left + tile.width for tile in tiles))
        return scoring.anomaly_map(grids, tiles, size, smoothing=self._stored.smoothing)


def png(pixels: NDArray[np.uint8], *, max_side: int | None = None) -> bytes:
    """Encode (H, W, 3 or 4) pixels as PNG, shrunk so that height and width are at most `max_side`."""
    image = Image.fromarray(pixels)
    if max_side is not None:
        image.thumbnail((max_side, max_side))
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=3)
    return content.getvalue()


def npy(array: NDArray[np.float32]) -> bytes:
    """Encode an array as an .npy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


_MEDIA_TYPES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8", "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"II", "image/tiff"),
    (b"MM", "image/tiff"),
    (b"RIFF", "image/webp"),
)


def media_type(content: bytes) -> str:
    """Return the MIME type of an image file by its first bytes."""
    return next((name for start, name in _MEDIA_TYPES if content.startswith(start)), "application/octet-stream")
