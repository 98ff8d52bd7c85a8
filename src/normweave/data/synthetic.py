"""Pseudo-abnormal images: normal images with damage put into them, and where it shows.

    mask -> fill (another image, the image moved, its colours shifted, noise) -> blend -> what shows of it

The masks of thresholded noise follow DRAEM (Zavrtanik et al. 2021, arXiv:2108.07610, section 3.2); the scratches and
the choice of fills are ours. Images are channels first, (3, H, W); H and W of at least 32 pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]  # (3, H, W)
Field = NDArray[np.floating[Any]]  # float32

FORMAT = 1  # raised whenever the same draws would give other damage
BLOB_SHARE = (0.015, 0.10)  # of the image, covered by blobs
SCRATCH_LENGTH = (0.3, 0.9)  # shares of the image's shorter side
SCRATCH_WIDTH = (0.01, 0.022)  # likewise
SCRATCHES = 0.35  # share of the masks that are scratches
OPACITY = (0.4, 1.0)
VISIBLE = 10.0  # grey levels (0..255), mean of 5 x 5 pixels: a smaller change does not count
LEAST_SHARE = 0.002  # of the image, that must have changed visibly
ATTEMPTS = 5


def seeded(seed: int, variant: int, index: int) -> np.random.Generator:
    """The draws of one damage of one image, the same in whichever order images are damaged."""
    return np.random.default_rng([seed, variant, index])


def mask(height: int, width: int, *, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Where damage goes, (H, W): blobs on 1.5 to 10 % of the image, or one or two scratches on less."""
    return _scratches(height, width, rng) if rng.random() < SCRATCHES else _blobs(height, width, rng)


def _blobs(height: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The places of the highest noise; a hill added to it draws them together into one blob or a few."""
    hill = rng.uniform(0, 4) * _hill(height, width, rng)
    noise = _noise(height, width, cells=int(rng.integers(3, 9)), rng=rng) + hill
    count = round(height * width * rng.uniform(*BLOB_SHARE))
    highest = np.argpartition(noise, -count, axis=None)[-count:]
    chosen = np.zeros(height * width, dtype=np.bool_)
    chosen[highest] = True
    return chosen.reshape(height, width)


def _hill(height: int, width: int, rng: np.random.Generator) -> Field:
    """exp(-r^2 / 2) around a random place, r in quarters of the shorter side, (H, W)."""
    scale = min(height, width) / 4
    rows = (np.arange(height, dtype=np.float32) - rng.uniform(0, height)) / scale
    columns = (np.arange(width, dtype=np.float32) - rng.uniform(0, width)) / scale
    return np.outer(np.exp(-(rows**2) / 2), np.exp(-(columns**2) / 2))


def _noise(height: int, width: int, *, cells: int, rng: np.random.Generator) -> Field:
    """Value noise of three octaves, (H, W): random numbers on ever finer grids, each of half the height before.

    `cells` of the coarsest grid lie along the shorter side.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        side = min(height, width) / (cells * 2**octave)  # pixels of a cell
        grid = rng.standard_normal((math.ceil(height / side), math.ceil(width / side)), dtype=np.float32)
        image = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(image) / 2**octave
    return total


def _scratches(height: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """One or two bent lines that begin anywhere and mostly keep their direction."""
    shorter = min(height, width)
    canvas = Image.new("1", (width, height))
    for _ in range(rng.integers(1, 3)):
        step = shorter * rng.uniform(*SCRATCH_LENGTH) / 6
        place = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        # Towards the middle, so that a line that begins at a border runs inside.
        heading = math.atan2(height / 2 - place[1], width / 2 - place[0]) + rng.uniform(-0.8, 0.8)
        points = [tuple(place)]
        for _ in range(6):
            heading += rng.normal(0, 0.35)
            place = place + step * np.array([math.cos(heading), math.sin(heading)])
            points.append(tuple(place))
        line_width = max(1, round(shorter * rng.uniform(*SCRATCH_WIDTH)))
        ImageDraw.Draw(canvas).line(points, fill=1, width=line_width, joint="curve")
    return np.asarray(canvas)


def damage(pixels: Pixels, other: Pixels, *, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.bool_]]:
    """An image with damage, and where it shows: (3, H, W) and (H, W).

    Outside the mask returned not a single number differs from `pixels`; inside it the change is visible, which
    means that its mean over the 5 x 5 pixels around (those that were painted) is at least `VISIBLE`. At least
    `LEAST_SHARE` of the image is in the mask, unless even the strong shift that ends the attempts shows less.

    Args:
        pixels: a normal image.
        other: another one of the same size, of any category, to take pixels from.
        rng: every draw comes from it, so that the result depends on the arguments alone.
    """
    height, width = pixels.shape[1:]
    for _ in range(ATTEMPTS):
        place = mask(height, width, rng=rng)
        fill = FILLS[rng.integers(len(FILLS))](pixels, other, rng)
        damaged, shows = _blend(pixels, fill, place, opacity=rng.uniform(*OPACITY))
        if shows.mean() >= LEAST_SHARE:
            return damaged, shows
    place = _blobs(height, width, rng)
    shift = 120 if pixels[:, place].mean() < 128 else -120
    return _blend(pixels, pixels.astype(np.float32) + shift, place, opacity=1.0)


def _blend(
    pixels: Pixels, fill: Field, place: NDArray[np.bool_], *, opacity: float
) -> tuple[Pixels, NDArray[np.bool_]]:
    """`fill` over `pixels` where `place` is and, weaker, one pixel around it; and where that shows."""
    around = Image.fromarray(place.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(1))
    share = np.where(place, 1, np.asarray(around, dtype=np.float32) / 255) * np.float32(opacity)  # (H, W)
    painted = np.rint(pixels + share * (np.clip(fill, 0, 255) - pixels)).astype(np.uint8)
    change = np.abs(painted.astype(np.int32) - pixels).max(axis=0)  # (H, W)
    touched = share > 0
    shows = touched & (change > 0) & (_sums(change) >= VISIBLE * _sums(touched.astype(np.int32)))
    return np.where(shows, painted, pixels), shows


def _sums(numbers: NDArray[np.int32]) -> NDArray[np.int32]:
    """Sum of the 5 x 5 numbers around each place, (H, W); zeros beyond the border."""
    height, width = numbers.shape
    padded = np.pad(numbers, 2)
    rows = np.zeros((height, width + 4), dtype=np.int32)
    for k in range(5):
        rows += padded[k : k + height]
    total = np.zeros((height, width), dtype=np.int32)
    for k in range(5):
        total += rows[:, k : k + width]
    return total


def _from_other(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Pixels of another image."""
    return _moved(other, rng)


def _from_elsewhere(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Pixels of the same image, from another place and turned, a little lighter or darker.

    Without the change of tone most textures would go on as if nothing had happened.
    """
    return _moved(pixels, rng) + np.float32(rng.choice([-1, 1]) * rng.uniform(15, 45))


def _moved(pixels: Pixels, rng: np.random.Generator) -> Field:
    """Shifted by a quarter of the sides or more, flipped or not, and a square one turned by 90 degrees or not."""
    height, width = pixels.shape[1:]
    shifts = tuple(int(side * rng.uniform(0.25, 0.75)) for side in (height, width))
    flips = tuple(axis for axis in (1, 2) if rng.random() < 0.5)
    moved: Pixels = np.flip(np.roll(pixels, shifts, axis=(1, 2)), flips)
    if height == width and rng.random() < 0.5:
        moved = moved.transpose(0, 2, 1)
    return np.asarray(moved, dtype=np.float32)


def _shifted(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """The same image lighter or darker, with other contrast, and in an image of colours at times another colour."""
    mean = pixels.mean(axis=(1, 2), keepdims=True, dtype=np.float32)  # (3, 1, 1)
    contrast = np.float32(rng.uniform(0.3, 1.5))
    offset = rng.choice([-1, 1]) * rng.uniform(30, 100)
    colour = rng.uniform(-50, 50, size=(_channels(pixels, rng), 1, 1))
    shifted: Field = (pixels - mean) * contrast + mean + (offset + colour).astype(np.float32)
    return shifted


def _channels(pixels: Pixels, rng: np.random.Generator) -> int:
    """1 for a change of grey, 3 for one of colour: never of colour in a grey image, where it would be too easy."""
    coloured = bool((pixels != pixels[0]).any())
    return 3 if rng.random() < 0.5 and coloured else 1


def _noisy(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Field:
    """Smooth noise instead of the image, or fine noise on top of it; grey or, in an image of colours, coloured."""
    height, width = pixels.shape[1:]
    channels = _channels(pixels, rng)
    if rng.random() < 0.5:
        cells = int(rng.integers(4, 17))
        smooth = np.stack([_noise(height, width, cells=cells, rng=rng) for _ in range(channels)])
        level = rng.uniform(40, 215, size=(channels, 1, 1)).astype(np.float32)
        return np.broadcast_to(level + 40 * smooth, pixels.shape)
    fine = rng.standard_normal((channels, height, width), dtype=np.float32)
    return pixels + np.float32(rng.uniform(30, 80)) * fine


FILLS = (_from_other, _from_elsewhere, _shifted, _noisy)


def coverage(damaged: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Share of each cell that is damaged, (h, w) for a mask (H, W).

    Cell j of h takes up [j H/h, (j+1) H/h) of the rows; a pixel that two cells share counts for each by its part.
    """
    rows, columns = (_parts(side, cells) for side, cells in zip(damaged.shape, grid, strict=True))
    share: NDArray[np.float32] = (rows @ damaged @ columns.T).astype(np.float32)
    return share


def _parts(side: int, cells: int) -> Field:
    """Which part of each cell each pixel makes up, (cells, side); rows add up to 1."""
    begins = np.arange(cells)[:, None] * side / cells
    ends = np.arange(1, cells + 1)[:, None] * side / cells
    pixel = np.arange(side)
    return (np.minimum(ends, pixel + 1) - np.maximum(begins, pixel)).clip(0) * (cells / side)
