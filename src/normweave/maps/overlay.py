"""Anomaly maps as colours over an image.

Heat maps use inferno, whose lightness rises with the score: they can be read in grey and with any colour vision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_INFERNO = np.array(
    [  # of matplotlib (S. van der Walt and N. Smith, CC0), every sixteenth colour
        [0, 0, 4],
        [12, 8, 38],
        [36, 12, 79],
        [66, 10, 104],
        [93, 18, 110],
        [120, 28, 109],
        [147, 38, 103],
        [174, 48, 92],
        [199, 62, 76],
        [221, 81, 58],
        [237, 105, 37],
        [248, 133, 15],
        [252, 165, 10],
        [250, 198, 45],
        [242, 230, 97],
        [252, 255, 164],
    ],
    dtype=np.float32,
)
THUMBNAIL = 320
"""Longest side of a thumbnail in pixels."""
OPACITY = 0.65
"""Opacity of the heat map over a grey thumbnail."""
HIDDEN = 0.25
"""Heat at and below which `heat` is transparent; the threshold is at 0.5."""
CROP = 200
"""Longer side of a crop in pixels."""
CONTEXT, LEAST_CONTEXT = 2.0, 0.25
"""A crop is this many times as long as the region in it, and at least this share of the longer side of the image."""
BAND = 128
"""Rows of pixels that are coloured at a time."""
WHITE, CYAN, BLUE = (255, 255, 255), (0, 229, 255), (80, 160, 255)
DIMMED = 0.35
"""Brightness of an image outside of a region."""
THICK = 640
"""The edge of a region is a line of one pixel, and of one more for each `THICK` pixels of the image's longer side."""
SMALLEST_SPAN = 1e-12
"""Smallest divisor, for maps with a single value."""


def heat(
    anomaly_map: NDArray[np.float32], *, threshold: float, inside: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return colours (H, W, 4) to draw over the image.

    The threshold has the colour in the middle of the colour map. The lightest colour is as far above the threshold as
    the lowest score is below it. Pixels far below the threshold are transparent.

    Args:
        inside: (H, W) the region of interest, whose edge is drawn in blue; None: the whole image.
    """
    span = max(threshold - float(anomaly_map.min()), SMALLEST_SPAN)
    result = np.empty((*anomaly_map.shape, 4), dtype=np.uint8)
    for rows in _bands(anomaly_map):
        level = np.clip(0.5 + (anomaly_map[rows] - threshold) / (2 * span), 0, 1).astype(np.float32)
        alpha = np.clip((level - HIDDEN) / (0.5 - HIDDEN), 0, 1)[..., None] * 255
        result[rows] = np.concatenate([inferno(level), alpha], axis=2).round()
    return with_edge(result, inside)


def overlay(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    *,
    threshold: float,
    inside: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) in grey, with the pixels above the threshold in yellow to red.

    Args:
        inside: as of `heat`.
    """
    span = max(threshold - float(anomaly_map.min()), SMALLEST_SPAN)
    result = np.empty_like(image)
    for rows in _bands(anomaly_map):
        scores, grey = anomaly_map[rows, :, None], image[rows].mean(axis=2, keepdims=True)
        level = np.clip((scores - threshold) / span, 0, 1)  # 0 at the threshold
        colour = np.concatenate([np.full_like(level, 255), 220 * (1 - level), np.zeros_like(level)], axis=2)
        result[rows] = np.where(scores > threshold, 0.5 * grey + 0.5 * colour, grey).round()
    return with_edge(result, inside)


def with_edge(image: NDArray[np.uint8], inside: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return the image (H, W, 3 or 4) with a blue line just inside the edge of a region; None: no line."""
    if inside is None:
        return image
    outside = grown = ~inside
    for _ in range(1 + max(inside.shape) // THICK):
        grown = _dilate(grown)
    result = image.copy()
    result[grown & ~outside] = (*BLUE, 255)[: image.shape[2]]
    return result


def _bands(anomaly_map: NDArray[np.float32]) -> list[slice]:
    """Return slices of rows, which bound the memory for the steps between."""
    return [slice(top, top + BAND) for top in range(0, len(anomaly_map), BAND)]


def dimmed_outside(image: NDArray[np.uint8], inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the image (H, W, 3), darker outside a region, with a blue line at the edge of the region."""
    dark = (image * np.float32(DIMMED)).astype(np.uint8)
    return with_edge(np.where(inside[..., None], image, dark), inside)


def thumbnails(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    *,
    threshold: float,
    inside: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[np.uint8]]:
    """Return the image, its heat map and its marked defect, (h, w, 3) each, by caption.

    The heat map covers the grey image, from the lowest score to the threshold or the highest score, whichever is
    higher. Pixels above the threshold have a white outline, marked defects a cyan one.

    Args:
        image: (H, W, 3).
        anomaly_map: (H, W).
        mask: (H, W), True where defective. The marked defect is left out if it is None or empty.
        threshold: in units of the map.
        inside: as of `heat`.
    """
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    scores = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    lowest = float(anomaly_map.min())
    span = max(float(anomaly_map.max()), threshold) - lowest
    colours = inferno(np.clip((scores - lowest) / max(span, SMALLEST_SPAN), 0, 1))
    mixed = ((1 - OPACITY) * small.mean(axis=2, keepdims=True) + OPACITY * colours).astype(np.uint8)
    if inside is not None:
        mixed = with_edge(mixed, np.asarray(Image.fromarray(inside).resize(size, Image.Resampling.NEAREST)))
    made = {"image": small, "heat map": _outline(mixed, scores > threshold, WHITE)}
    if mask is not None and mask.any():
        covered = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)) > 0
        made["marked defect"] = _outline(small, covered, CYAN)
    return made


def outlined_crop(
    image: NDArray[np.uint8], region: tuple[int, int, int, int], *, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return the surroundings of a region of an image, (h, w, 3), with a white outline of the region.

    Args:
        image: (H, W, 3), possibly shrunk.
        region: x, y, width and height in pixels of the image before it was shrunk.
        size: (height, width) of the image before it was shrunk.
    """
    left, top, width, height = region
    side = max(CONTEXT * max(width, height), LEAST_CONTEXT * max(size))
    window_height, window_width = min(side, size[0]), min(side, size[1])
    y = min(max(0.0, top + (height - window_height) / 2), size[0] - window_height)
    x = min(max(0.0, left + (width - window_width) / 2), size[1] - window_width)
    scale_y, scale_x = image.shape[0] / size[0], image.shape[1] / size[1]
    zoom = CROP / max(window_height, window_width)
    shown = (max(1, round(window_width * zoom)), max(1, round(window_height * zoom)))
    part = (x * scale_x, y * scale_y, (x + window_width) * scale_x, (y + window_height) * scale_y)
    crop = np.asarray(Image.fromarray(image).resize(shown, Image.Resampling.BICUBIC, box=part))
    rows, columns = (np.arange(length) / zoom for length in shown[::-1])
    inside_rows = (rows >= top - y) & (rows < top - y + height)
    inside_columns = (columns >= left - x) & (columns < left - x + width)
    return _outline(crop, inside_rows[:, None] & inside_columns, WHITE)


def inferno(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return colours (..., 3) in [0, 255] for levels in [0, 1]."""
    position = level * (len(_INFERNO) - 1)
    below = np.minimum(position.astype(np.int64), len(_INFERNO) - 2)
    share = (position - below)[..., None]
    colours: NDArray[np.float32] = _INFERNO[below] * (1 - share) + _INFERNO[below + 1] * share
    return colours


def _outline(image: NDArray[np.uint8], region: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Draw a line just outside the region, with a black line around it for contrast."""
    inner = _dilate(_dilate(region))
    result = image.copy()
    result[_dilate(inner) & ~inner] = 0
    result[inner & ~region] = colour
    return result


def _dilate(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add one pixel on all sides and corners."""
    around = np.pad(region, 1)
    tall = around[:-2] | around[1:-1] | around[2:]
    return np.asarray(tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:])
