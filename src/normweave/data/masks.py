"""Which pixels a mask marks: grey and colour values, palettes, alpha channels, boxes. Ambiguous masks are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normweave.data.tables import encoding_of
from normweave.errors import DataError

MAX_DEFECT_TYPES = 15
"""A mask without higher values holds the numbers of defect types."""
MAX_GREYS = 8
"""A palette with more greys than that may be a grey image rather than defect types."""
FEW_VALUES = 8
"""A mask with more different values has soft edges, from a brush, resizing or smoothing."""
NARROW, WIDE = 3, 8
"""Pixels that a soft edge reaches beyond the defect: as far as Lanczos' filter; as far as the blocks of JPEG."""
JPEG_NOISE = 64
"""Lower values in masks with lossy compression are noise."""

_CURE = "Save the mask as black and white: 0 for background, 255 for the defect."

Marked = NDArray[np.bool_]


def from_values(values: NDArray[Any], name: str, *, bits: int = 8, is_lossy: bool = False) -> Marked:
    """Return the defect pixels (H, W) of integers or floats in 0..1, (H, W) or (H, W, 3): its brightest channel counts.

    If no value is above 15, every pixel above 0 is defective: such masks number the types of defect (VisA) or mark
    defects with 1; with 2 or 4 `bits` all values are numbers. Otherwise pixels above 127 of 255 are defective.

    Raises:
        DataError: values outside the range, none above 127, or darker regions beside those above 127, which would be
            lost. Darker pixels at the edge of a brighter region are a soft edge.
    """
    if values.ndim == 3:
        if bits == 16:
            raise DataError(f"{name}: a mask with 16 bits per colour; Pillow reads only the higher 8. {_CURE}")
        values = values.max(axis=2)
    values = _integers(values, name)
    if bits in (2, 4):
        return np.asarray(values > 0)  # Pillow multiplies them to 0..255
    highest = int(values.max())
    if highest <= MAX_DEFECT_TYPES:
        return np.asarray(values > 0)
    mask = (values if highest <= 255 else (values + 128) // 257) > 127
    if not mask.any():
        raise DataError(
            f"{name}: the mask has values up to {highest}, none of them above half of the range. Defect pixels are "
            "those above 127 of 255, or above 0 where no value is above 15. Save the mask as black and white."
        )
    dim = ~mask & (values >= JPEG_NOISE * (1 if highest <= 255 else 257) if is_lossy else values > 0)
    if dim.any():
        different = np.count_nonzero(np.bincount(values.ravel()))
        if is_lossy:
            lost = dim & ~near(mask, WIDE)
        elif different > FEW_VALUES:
            lost = dim & ~near(mask, NARROW) & _is_flat(values)
        else:
            is_class = _is_flat(values) | ((different <= 3) & (values <= MAX_DEFECT_TYPES))
            lost = dim & (is_class | ~near(mask, NARROW))
        if lost.any():
            raise DataError(
                f"{name}: a region of value {values[lost][0]} beside brighter ones, up to {highest}. Only values above "
                f"half of the range would count. {_CURE}"
            )
    return np.asarray(mask)


def from_indices(indices: NDArray[np.uint8], colours: NDArray[np.int64], name: str) -> Marked:
    """Return the defect pixels (H, W) of palette indices (H, W): all but index 0. Colours (256, 4) are RGBA.

    A palette whose used colours are the greys of their indices is read as grey values.

    Raises:
        DataError: index 0 may not be the background.
    """
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    greys = colours[used, 0]
    is_grey = bool((colours[used, :3] == greys[:, None]).all())
    if is_grey and (greys == used).all():
        return from_values(indices, name)
    if is_grey and len(used) > MAX_GREYS:
        raise DataError(f"{name}: a palette of {len(used)} greys, not in order; they may be a grey image. {_CURE}")
    if used[0] > 0:
        raise DataError(f"{name}: no pixel has index 0 of the palette, the background. {_CURE}")
    for index in used[1:]:
        for what, value in (("less transparent", colours[:, 3]), ("brighter", colours[:, :3].max(axis=1))):
            if value[0] > value[index]:
                raise DataError(
                    f"{name}: index 0 is {what} than index {index} of the palette, so it may not be the background. "
                    f"{_CURE}"
                )
    return np.asarray(indices > 0)


def with_alpha(pixels: NDArray[np.uint8], name: str, *, bits: int = 8, is_lossy: bool = False) -> Marked:
    """Return the defect pixels (H, W) of grey and alpha (H, W, 2) or RGBA (H, W, 4): by the one that is not constant.

    Raises:
        DataError: as `from_values`, or colours and alpha mark other pixels.
    """
    colour, alpha = pixels[..., :-1], pixels[..., -1]
    if bits == 16:
        raise DataError(f"{name}: a mask with 16 bits per colour; Pillow reads only the higher 8. {_CURE}")
    if (alpha == alpha[0, 0]).all():
        return from_values(colour, name, is_lossy=is_lossy)
    if (colour == colour[0, 0]).all():
        return from_values(alpha, name, is_lossy=is_lossy)
    coloured, opaque = from_values(colour, name, is_lossy=is_lossy), alpha > 127
    mask = coloured & opaque
    if ((coloured ^ opaque) & ~near(mask, NARROW)).any():
        raise DataError(f"{name}: its colours and its alpha channel mark other pixels. {_CURE}")
    return np.asarray(mask)


def from_boxes(path: Path, *, height: int, width: int) -> Marked:
    """Return the pixels (H, W) inside the boxes of a text file: x1 y1 x2 y2 in each line, rows y1..y2-1.

    Numbers are separated by spaces, tabs, commas or semicolons. The text may begin with a byte order mark; without
    one it is UTF-8, or another encoding that has the digits of ASCII.

    Raises:
        DataError: a line is no box inside the image.
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    encoding = encoding_of(path)
    text = path.read_text(encoding, errors="strict" if encoding == "utf-16" else "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            left, top, right, bottom = (_whole(value) for value in line.replace(",", " ").replace(";", " ").split()[:4])
        except ValueError:
            raise DataError(
                f"{path}: line {number} is {line.strip()!r}. Allowed: four integers x1 y1 x2 y2 in pixels, and "
                "anything after them. Correct the line."
            ) from None
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(
                f"{path}: line {number}, box {left} {top} {right} {bottom} (x1 y1 x2 y2) is empty or exceeds "
                f"its image of {height} x {width} (height x width). Allowed: 0 <= x1 < x2 <= {width} and "
                f"0 <= y1 < y2 <= {height}."
            )
        mask[top:bottom, left:right] = True
    return mask


def near(mask: Marked, distance: int) -> Marked:
    """Return the pixels (H, W) at most `distance` rows and columns from a marked one."""
    for transposed in (False, True):
        mask = mask.T if transposed else mask
        grown = mask.copy()
        for shift in range(1, distance + 1):
            grown[shift:] |= mask[:-shift]
            grown[:-shift] |= mask[shift:]
        mask = grown.T if transposed else grown
    return mask


def _integers(values: NDArray[Any], name: str) -> NDArray[np.int32]:
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise DataError(f"{name}: NaN or infinite values. Allowed: floats in 0..1. {_CURE}")
        if values.max() <= 1:
            values = np.rint(values * np.float32(255)) if (values % 1).any() else values
        elif (values % 1).any():
            raise DataError(f"{name}: floats up to {values.max():g}. Allowed: floats in 0..1. {_CURE}")
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{name}: values from {values.min()} to {values.max()}. Allowed: 0..65535. {_CURE}")
    return values.astype(np.int32)


def _is_flat(values: NDArray[np.int32]) -> Marked:
    """Return the pixels (H, W) whose eight neighbours all have their value: the inside of a region, not an edge."""
    flat = np.zeros(values.shape, dtype=np.bool_)
    height, width = values.shape
    if min(height, width) >= 3:
        inner = values[1:-1, 1:-1]
        flat[1:-1, 1:-1] = np.logical_and.reduce(
            [inner == values[top : height - 2 + top, left : width - 2 + left] for top in range(3) for left in range(3)]
        )
    return flat


def _whole(value: str) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)
