"""Synthetic anomalies: normal images with a synthetic defect and its mask.

    mask -> fill (another image, the shifted image, its colours changed, noise) -> blend -> visible change

The masks of thresholded noise follow DRAEM (Zavrtanik et al. 2021, arXiv:2108.07610, section 3.2); the scratches and
the choice of fills are our own. Images are channels first, (3, H, W); H and W are at least 32 pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]  # (3, H, W)
Field = NDArray[np.floating[Any]]  # float32
Mask = NDArray[np.bool_]  # (H, W)

FORMAT = 1  # raised whenever the same draws would give other defects
BLOB_SHARE = (0.015, 0.10)  # of the image, covered by blobs
SCRATCH_LENGTH = (0.3, 0.9)  # shares of the image's shorter side
SCRATCH_WIDTH = (0.01, 0.022)  # likewise
SCRATCHES = 0.35  # share of the masks that are scratches
OPACITY = (0.4, 1.0)
VISIBLE = 10.0  # grey levels (0..255), mean of 5 x 5 pixels: a smaller change does not count
LEAST_SHARE = 0.002  # of the image, smallest visible change
ATTEMPTS = 5
WINDOW_SHARE = (0.125, 0.5)  # of the image's shorter side: side of the window of a small defect
WINDOW_PIXELS = (32, 512)  # likewise, smallest and largest


def seeded(seed: int, variant: int, index: int) -> np.random.Generator:
    """Return the random generator of one variant of one image, independent of the order of images."""
    return np.random.default_rng([seed, variant, index])


def mask(height: int, width: int, *, rng: np.random.Generator) -> Mask:
    """Return a random mask, (H, W): blobs on 1.5 to 10 % of the image, or one or two scratches on less."""
    return scratches(height, width, rng) if rng.random() < SCRATCHES else blobs(height, width, rng)


def blobs(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Return the pixels of the highest noise; a hill added to the noise joins them into a small number of blobs."""
    hill = rng.uniform(0, 4) * _hill(height, width, rng)
    noise = _noise(height, width, cells=int(rng.integers(3, 9)), rng=rng) + hill
    count = round(height * width * rng.uniform(*BLOB_SHARE))
    highest = np.argpartition(noise, -count, axis=None)[-count:]
    chosen = np.zeros(height * width, dtype=np.bool_)
    chosen[highest] = True
    return chosen.reshape(height, width)


def _hill(height: int, width: int, rng: np.random.Generator) -> Field:
    """Return exp(-r^2 / 2) around a random centre, r in quarters of the shorter side, (H, W)."""
    scale = min(height, width) / 4
    rows = (np.arange(height, dtype=np.float32) - rng.uniform(0, height)) / scale
    columns = (np.arange(width, dtype=np.float32) - rng.uniform(0, width)) / scale
    return np.outer(np.exp(-(rows**2) / 2), np.exp(-(columns**2) / 2))


def _noise(height: int, width: int, *, cells: int, rng: np.random.Generator) -> Field:
    """Return value noise of three octaves, (H, W): each grid has half the cell size and half the amplitude.

    `cells` is the number of cells of the coarsest grid along the shorter side.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        side = min(height, width) / (cells * 2**octave)  # pixels of a cell
        grid = rng.standard_normal((math.ceil(height / side), math.ceil(width / side)), dtype=np.float32)
        image = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(image) / 2**octave
    return total


def scratches(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Return one or two bent lines with random start and little change of direction."""
    shorter = min(height, width)
    canvas = Image.new("1", (width, height))
    for _ in range(rng.integers(1, 3)):
        step = shorter * rng.uniform(*SCRATCH_LENGTH) / 6
        point = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        # Towards the centre, so that a line that starts at a border stays inside.
        heading = math.atan2(height / 2 - point[1], width / 2 - point[0]) + rng.uniform(-0.8, 0.8)
        points = [tuple(point)]
        for _ in range(6):
            heading += rng.normal(0, 0.35)
            point = point + step * np.array([math.cos(heading), math.sin(heading)])
            points.append(tuple(point))
        line_width = max(1, round(shorter * rng.uniform(*SCRATCH_WIDTH)))
        ImageDraw.Draw(canvas).line(points, fill=1, width=line_width, joint="curve")
    return np.asarray(canvas)


def add_defect(
    pixels: Pixels, other: Pixels, *, rng: np.random.Generator, inside: Mask | None = None
) -> tuple[Pixels, Mask]:
    """Return an image with a synthetic defect and the mask of the visible change: (3, H, W) and (H, W).

    Outside the mask all pixels equal `pixels`. Inside, the change is visible: its mean over the blended ones of the
    5 x 5 pixels around is at least `VISIBLE`. The mask covers at least `LEAST_SHARE` of the image, except if all
    attempts fail and the strong shift of brightness that follows changes less.

    Args:
        pixels: a normal image.
        other: another image of the same size, of any category, to copy pixels from.
        rng: source of all random draws.
        inside: (H, W) the pixels that a defect may cover, in whose bounding box it is drawn; None: all.
    """
    if inside is not None:
        return _add_inside(pixels, other, rng=rng, inside=inside)
    height, width = pixels.shape[1:]
    for _ in range(ATTEMPTS):
        region = mask(height, width, rng=rng)
        fill = FILLS[rng.integers(len(FILLS))](pixels, other, rng)
        defective, visible = blend(pixels, fill, region, opacity=rng.uniform(*OPACITY))
        if visible.mean() >= LEAST_SHARE:
            return defective, visible
    region = blobs(height, width, rng)
    shift = 120 if pixels[:, region].mean() < 128 else -120
    return blend(pixels, pixels.astype(np.float32) + shift, region, opacity=1.0)


def _add_inside(pixels: Pixels, other: Pixels, *, rng: np.random.Generator, inside: Mask) -> tuple[Pixels, Mask]:
    """Add a defect to the bounding box of a region, and take back what is outside the region.

    A defect of which too little is inside is drawn again.
    """
    rows, columns = bounding_box(inside)
    box, allowed = (slice(None), rows, columns), inside[rows, columns]
    result, visible = pixels.copy(), np.zeros(inside.shape, dtype=np.bool_)
    for _ in range(ATTEMPTS):
        defective, changed = add_defect(pixels[box], other[box], rng=rng)
        changed &= allowed
        result[box] = np.where(changed, defective, pixels[box])
        visible[rows, columns] = changed
        if changed.sum() >= LEAST_SHARE * allowed.sum():
            break
    return result, visible


def bounding_box(inside: Mask) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest rectangle around a mask (H, W), 32 pixels or more where H, W are."""
    box = []
    for axis, side in ((1, inside.shape[0]), (0, inside.shape[1])):
        used = np.flatnonzero(inside.any(axis=axis))
        length = max(int(used[-1] - used[0]) + 1, min(WINDOW_PIXELS[0], side))
        start = min(int(used[0]), side - length)
        box.append(slice(start, start + length))
    return box[0], box[1]


def add_small_defect(pixels: Pixels, other: Pixels, *, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """Return an image with a defect as of `add_defect` in a random square window, and the mask: (3, H, W) and (H, W).

    The side of the window is 1/8 to 1/2 of the image's shorter side, between 32 and 512 pixels.

    Args:
        pixels: a normal image.
        other: another image of any size, to copy pixels from.
        rng: source of all random draws.
    """
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    wanted = shorter * math.exp(rng.uniform(*np.log(WINDOW_SHARE)))
    side = min(round(min(max(wanted, WINDOW_PIXELS[0]), WINDOW_PIXELS[1])), shorter)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    window = (slice(None), slice(top, top + side), slice(left, left + side))
    scale = np.array([other.shape[2] / width, other.shape[1] / height] * 2)
    box = tuple(scale * [left, top, left + side, top + side])  # the same part of the other image
    filling = Image.fromarray(other.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BILINEAR, box=box)
    defective, visible = pixels.copy(), np.zeros((height, width), dtype=np.bool_)
    defective[window], visible[window[1:]] = add_defect(pixels[window], np.asarray(filling).transpose(2, 0, 1), rng=rng)
    return defective, visible


def blend(pixels: Pixels, fill: Field, region: Mask, *, opacity: float) -> tuple[Pixels, Mask]:
    """Blend `fill` over `pixels` in a region and, weaker, one pixel around it; also return the visible change."""
    around = Image.fromarray(region.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(1))
    share = np.where(region, 1, np.asarray(around, dtype=np.float32) / 255) * np.float32(opacity)  # (H, W)
    blended = np.rint(pixels + share * (np.clip(fill, 0, 255) - pixels)).astype(np.uint8)
    change = np.abs(blended.astype(np.int32) - pixels).max(axis=0)  # (H, W)
    touched = share > 0
    visible = touched & (change > 0) & (_sums(change) >= VISIBLE * _sums(touched.astype(np.int32)))
    return np.where(visible, blended, pixels), visible


def _sums(numbers: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the sum of the 5 x 5 numbers around each pixel, (H, W); zeros beyond the border."""
    height, width = numbers.shape
    padded = np.pad(numbers, 2)
    rows = np.stack([padded[k : k + height] for k in range(5)]).sum(axis=0, dtype=np.int32)
    total: NDArray[np.int32] = np.stack([rows[:, k : k + width] for k in range(5)]).sum(axis=0, dtype=np.int32)
    return total


def from_other(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Return pixels of another image."""
    return _moved(other, rng)


def from_elsewhere(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Return shifted and turned pixels of the same image, a little lighter or darker.

    Without the change of brightness, the defect would be invisible in most textures.
    """
    return _moved(pixels, rng) + np.float32(rng.choice([-1, 1]) * rng.uniform(15, 45))


def _moved(pixels: Pixels, rng: np.random.Generator) -> Field:
    """Shift an image by at least a quarter of its sides and, at random, flip and (if square) turn it by 90 degrees."""
    height, width = pixels.shape[1:]
    shifts = tuple(int(side * rng.uniform(0.25, 0.75)) for side in (height, width))
    flips = tuple(axis for axis in (1, 2) if rng.random() < 0.5)
    moved: Pixels = np.flip(np.roll(pixels, shifts, axis=(1, 2)), flips)
    if height == width and rng.random() < 0.5:
        moved = moved.transpose(0, 2, 1)
    return np.asarray(moved, dtype=np.float32)


def _shifted(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Change brightness and contrast of the image and, if it is in colour, at random its colour."""
    mean = pixels.mean(axis=(1, 2), keepdims=True, dtype=np.float32)  # (3, 1, 1)
    contrast = np.float32(rng.uniform(0.3, 1.5))
    offset = rng.choice([-1, 1]) * rng.uniform(30, 100)
    colour = rng.uniform(-50, 50, size=(_channels(pixels, rng), 1, 1))
    shifted: Field = (pixels - mean) * contrast + mean + (offset + colour).astype(np.float32)
    return shifted


def _channels(pixels: Pixels, rng: np.random.Generator) -> int:
    """Draw 1 (change of brightness) or 3 (of colour); always 1 in a grey image, where colour would be too easy."""
    coloured = bool((pixels != pixels[0]).any())
    return 3 if rng.random() < 0.5 and coloured else 1


def _noisy(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Return smooth noise, or the image with fine noise; grey or, if the image is in colour, coloured."""
    height, width = pixels.shape[1:]
    channels = _channels(pixels, rng)
    if rng.random() < 0.5:
        cells = int(rng.integers(4, 17))
        smooth = np.stack([_noise(height, width, cells=cells, rng=rng) for _ in range(channels)])
        level = rng.uniform(40, 215, size=(channels, 1, 1)).astype(np.float32)
        return np.broadcast_to(level + 40 * smooth, pixels.shape)
    fine = rng.standard_normal((channels, height, width), dtype=np.float32)
    return pixels + np.float32(rng.uniform(30, 80)) * fine


FILLS = (from_other, from_elsewhere, _shifted, _noisy)


def coverage(mask: Mask, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return the share of each cell of a grid (h, w) that a mask (H, W) covers.

    Cell j of h covers the rows [j H/h, (j+1) H/h); a pixel in two cells is divided between them.
    """
    rows, columns = (_parts(side, cells) for side, cells in zip(mask.shape, grid, strict=True))
    share: NDArray[np.float32] = (rows @ mask @ columns.T).astype(np.float32)
    return share


def _parts(side: int, cells: int) -> Field:
    """Return the share of each cell that each pixel covers, (cells, side); rows add up to 1."""
    begins = np.arange(cells)[:, None] * side / cells
    ends = np.arange(1, cells + 1)[:, None] * side / cells
    pixel = np.arange(side)
    return (np.minimum(ends, pixel + 1) - np.maximum(begins, pixel)).clip(0) * (cells / side)
