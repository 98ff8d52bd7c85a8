"""Layouts of TIFF (TIFF 6.0, Adobe 1992) that Pillow misreads: choose the page, refuse or correct the rest.

Numbers are tags of the file; `tag_v2` is Pillow's mapping of the tags of the current page.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.errors import ImageError

MAX_PAGES = 1000
"""Files with more pages are refused: reading the tags of all of them takes seconds."""
UNKNOWN = (
    "not an image that can be read, damaged or a TIFF of an unusual layout. Allowed: grey with 1, 2, 4, 8, 12 or 16 "
    "bits or 32-bit floats, palettes, and colours with 8 or 16 bits. Save it as one of them, or as PNG."
)

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 320, 322, 323, 324, 325
_EXTRA, _FORMAT, _SUBSAMPLING = 338, 339, 530
_WHITE_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 2, 3, 6
_SIGNED = 2


def is_tiff(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a TIFF or BigTIFF."""
    return start[:2] in (b"II", b"MM") and (b"*" in start[2:4] or b"+" in start[2:4])


def select_page(image: Any, name: str) -> None:
    """Go to the first page of full resolution: tags 254 and 255 mark previews and transparency masks.

    Raises:
        ImageError: there is no such page, a later one is larger, or the file has more than `MAX_PAGES`.
    """
    full: list[tuple[int, int, int]] = []  # page, height, width
    for number in range(MAX_PAGES + 1):
        if number == MAX_PAGES:
            raise ImageError(f"{name}: more than {MAX_PAGES} pages. Save the page that is the image as its own file.")
        try:
            image.seek(number)
        except EOFError:
            break
        except SyntaxError:  # the samples of this page cannot be read, but its tags can
            pass
        tags = image.tag_v2
        if not tags.get(254, 0) & 0b101 and tags.get(255) != 2:
            full.append((number, tags[_HEIGHT], tags[_WIDTH]))
    if not full:
        raise ImageError(f"{name}: all pages are previews or masks (tag 254). Save the image itself.")
    first, height, width = full[0]
    for page, other_height, other_width in full:
        if other_height * other_width > height * width:
            raise ImageError(
                f"{name}: page {first + 1} has {height} x {width} pixels, page {page + 1} has {other_height} x "
                f"{other_width} (height x width), so the first may be a preview. Save the image without other pages."
            )
    image.seek(first)


def check_layout(image: Any, name: str, length: int | None) -> None:
    """Refuse pages that Pillow would misread. `length`: bytes of the file, or None if they are not known.

    Raises:
        ImageError: the layout is not read.
        ValueError: pixels are missing.
    """
    tags = image.tag_v2
    bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    reason = None
    if _PHOTOMETRIC not in tags:
        reason = "does not say whether its lowest value is black or white (tag 262 is missing)"
    elif tags.get(_PLANAR, 1) == 2 and samples > 1 and not _planes_are_read(tags):
        reason = f"separate planes of {', '.join(map(str, bits))} bits are not read (tag 284)"
    elif tags[_PHOTOMETRIC] == _PALETTE and max(tags.get(_COLOURS, (0,))) < 256:
        reason = "its colour map has 8 bits or is black (tag 320). Allowed: 16 bits"
    elif (
        tags[_PHOTOMETRIC] == _YCBCR
        and samples > 1
        and tags.get(_COMPRESSION, 1) == 1
        and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1)
    ):
        reason = "uncompressed YCbCr with fewer samples of colour is not read (tag 530)"
    elif (
        tags.prefix == b"MM" and tags.get(_COMPRESSION, 1) != 1 and (max(bits) == 32 or tags.get(_FORMAT) == (_SIGNED,))
    ):
        reason = "compressed floats, 32-bit or signed integers with the highest byte first are not read"
    if reason is not None:
        raise ImageError(f"{name}: {reason}. Save it as RGB or grey with samples side by side, or as PNG.")
    if length is not None:
        _check_length(tags, samples, length)


def _planes_are_read(tags: Any) -> bool:
    is_colour = tags[_PHOTOMETRIC] == _RGB and set(tags.get(_BITS, ())) == {8}
    return is_colour and set(tags.get(_EXTRA, ())) <= {0, 2}


def _check_length(tags: Any, samples: int, length: int) -> None:
    """Compare the numbers and places of strips or tiles with the size of the image and of the file."""
    width, height = tags[_WIDTH], tags[_HEIGHT]
    if _STRIPS in tags:
        what, needed = "strips", math.ceil(height / min(tags.get(_ROWS, height), height))
        offsets, lengths = tags[_STRIPS], tags.get(_STRIP_BYTES, ())
    else:
        what, needed = "tiles", math.ceil(width / tags[_TILE_WIDTH]) * math.ceil(height / tags[_TILE_HEIGHT])
        offsets, lengths = tags[_TILES], tags.get(_TILE_BYTES, ())
    if tags.get(_PLANAR, 1) == 2:
        needed *= samples
    if len(offsets) < needed:
        raise ValueError(f"it has {len(offsets)} {what}, but its size needs {needed}")
    if not all(offsets[:needed]):
        raise ValueError("a strip or tile without pixels")
    if len(lengths) == len(offsets) and any(
        start + bytes_ > length for start, bytes_ in zip(offsets, lengths, strict=True)
    ):
        raise ValueError(f"a strip or tile lies beyond the end of the file of {length} bytes")


def bits(image: Any) -> int:
    """Return the most bits that a sample of the page has in the file."""
    return int(max(image.tag_v2.get(_BITS, (1,))))


def is_white_zero(image: Any) -> bool:
    """Return whether the file is a TIFF that stores white as 0."""
    return bool(image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def corrected(pixels: NDArray[Any], image: Image.Image) -> NDArray[Any]:
    """Return the values that the tags describe, from those that Pillow returns.

    12 bits are scaled to 16, zero is black, and integers of 8 and 32 bits are signed as in the file.
    """
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None or pixels.ndim != 2:
        return pixels
    if tags.get(_BITS) == (12,):
        pixels = ((pixels.astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
    signed = tags.get(_FORMAT, (1,)) == (_SIGNED,)
    if signed and pixels.dtype == np.uint8:
        pixels = pixels.view(np.int8)
    if not signed and pixels.dtype == np.int32:
        pixels = pixels.view(np.uint32)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and pixels.dtype.itemsize > 1:  # Pillow inverts 8 bits and fewer
        pixels = (1 if np.issubdtype(pixels.dtype, np.floating) else 65535) - pixels
    return pixels
