"""Synthetic defects that are hard to detect: small, faint, or made of the pixels of the image itself.

They judge detectors on held-out normal images, where the defects of `synthetic` are too easy. Types, sizes and
strengths are *ours*; strengths are drawn such that a memory bank detects some types almost always and others hardly
more often than by chance (docs/log.md). Images are channels first, (3, H, W); H and W are at least 32 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from normweave.data.images import as_image, as_pixels

Pixels = NDArray[np.uint8]  # (3, H, W)
Field = NDArray[np.floating[Any]]  # float32
Mask = NDArray[np.bool_]  # (H, W)
Window = tuple[slice, slice]  # rows and columns of a square inside the image

FORMAT = 1  # raised whenever the same draws would give other defects
UNIFORM = 0.5  # share of the defects that are placed anywhere; the others where the image varies most, or least
CANDIDATES = 8  # positions, of which one with much or little variance is chosen
LEAST_CHANGE = 4  # grey levels (0..255), mean of 5 x 5 pixels (at 256): with a smaller change, a defect is drawn again
ATTEMPTS = 20
EDGE = (0.5, 2.5)  # width of the blend at the outline of a region, in pixels
TEXTURE = 7.0  # grey levels: where they are the standard deviation around a defect, its contrast is doubled
MOST_GAIN = 4.0  # of the contrast, by texture


def add_hard_defect(pixels: Pixels, other: Pixels, *, rng: np.random.Generator) -> tuple[Pixels, Mask, str]:
    """Return an image with a hard synthetic defect, the mask of all changed pixels, and the type: a key of `TYPES`.

    A grey image stays grey. The change of some 5 x 5 pixels is at least `LEAST_CHANGE` on average; a type that changes
    less (in a uniform image nothing can be moved) is drawn again, and after `ATTEMPTS` draws a pit is taken.

    Args:
        pixels: a normal image, (3, H, W).
        other: another image of the same size, of any category, to copy pixels from.
        rng: source of all random draws.
    """
    if not _coloured(pixels):
        other = np.broadcast_to(other.mean(axis=0).astype(np.uint8), other.shape)
    names = list(TYPES)
    for attempt in range(2 * ATTEMPTS):
        name = names[rng.integers(len(names))] if attempt < ATTEMPTS else pit.__name__
        defective = TYPES[name](pixels, other, rng)
        change = np.abs(defective.astype(np.int16) - pixels).max(axis=0).astype(np.uint8)  # (H, W)
        around = np.asarray(Image.fromarray(change).filter(ImageFilter.BoxBlur(2 * min(change.shape) / 256)))
        if around.max() >= LEAST_CHANGE:
            break
    return defective, change > 0, name


def spots(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw one to four sharp spots of 2 to 10 pixels (at 256) close to each other, all darker or all lighter."""
    window = _window(pixels, _length(pixels, 0.06, 0.12, rng), rng)
    side = _side(window)
    share = np.zeros((side, side), dtype=np.float32)
    for _ in range(rng.integers(1, 5)):
        spot = _blob(min(side, max(2, _length(pixels, 0.01, 0.04, rng))), 0.5, rng)
        top, left = rng.integers(0, side - len(spot) + 1, size=2)
        part = share[top : top + len(spot), left : left + len(spot)]
        np.maximum(part, spot, out=part)
    return _blend(pixels, window, pixels[:, *window] + _contrast(pixels, window, 25, 160, rng), share)


def pit(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a dark or bright pit with a blurred edge, 5 to 20 pixels wide (at 256)."""
    window = _window(pixels, _length(pixels, 0.02, 0.08, rng), rng)
    radius = _radius(_side(window))
    share = np.exp(-4 * radius**2) * (radius < 1)
    return _blend(pixels, window, pixels[:, *window] + _contrast(pixels, window, 25, 160, rng), share)


def faint_region(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Change brightness or colour of a region by 4 to 15 grey levels, more where there is texture."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng)
    share = _blob(_side(window), rng.uniform(1, 6), rng)
    return _blend(pixels, window, pixels[:, *window] + _contrast(pixels, window, 4, 15, rng), share)


def faint_scratch(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a thin bent line, 1 to 3 pixels wide (at 256)."""
    window = _window(pixels, _length(pixels, 0.15, 0.8, rng), rng)
    side = _side(window)
    turn = rng.uniform(0, math.pi)
    along = np.linspace(-0.95, 0.95, 12)
    across = rng.uniform(-0.3, 0.3) * (along**2 - 0.5) + rng.normal(0, 0.02, along.size)
    x = along * math.cos(turn) - across * math.sin(turn)
    y = along * math.sin(turn) + across * math.cos(turn)
    fine = Image.new("L", (4 * side, 4 * side))
    points = list(zip(2 * side * (1 + x), 2 * side * (1 + y), strict=True))
    width = max(3, round(4 * min(pixels.shape[1:]) / 256 * rng.uniform(1, 3)))
    ImageDraw.Draw(fine).line(points, fill=255, width=width, joint="curve")
    share = np.asarray(fine.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
    return _blend(pixels, window, pixels[:, *window] + _contrast(pixels, window, 8, 60, rng), share)


def missing_part(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Replace a region that has structure by its surroundings."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng, most=True)
    share = _blob(_side(window), rng.uniform(*EDGE), rng)
    return _blend(pixels, window, _surroundings(pixels, window, share, rng), share)


def moved_part(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Move a region by 8 to 50 pixels (at 256) and fill the hole from around."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng, most=True)
    share = _blob(_side(window), rng.uniform(*EDGE), rng)
    emptied = _blend(pixels, window, _surroundings(pixels, window, share, rng), share)
    distance, turn = _length(pixels, 0.03, 0.2, rng), rng.uniform(0, 2 * math.pi)
    target = _beside(pixels, window, round(distance * math.sin(turn)), round(distance * math.cos(turn)))
    return _blend(emptied, target, pixels[:, *window], share)


def turned_part(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn a disc by 90, 180 or 270 degrees, or mirror it."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng)
    part = pixels[:, *window]
    turned = part[:, :, ::-1] if rng.random() < 0.25 else np.rot90(part, int(rng.integers(1, 4)), axes=(1, 2))
    share = np.clip((1 - _radius(part.shape[1])) * part.shape[1] / 4, 0, 1)  # soft over two pixels
    return _blend(pixels, window, turned, share)


def local_blur(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur a region with a standard deviation of 1.2 to 8 pixels (at 256)."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng)
    share = _blob(_side(window), 3, rng)
    spread = min(pixels.shape[1:]) / 256 * math.exp(rng.uniform(math.log(1.2), math.log(8)))
    blurred = as_image(pixels[:, *window]).filter(ImageFilter.GaussianBlur(spread))
    return _blend(pixels, window, as_pixels(blurred), share)


def missing_print(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Replace a region by its local median: lines and fine structure fade or vanish, flat areas stay."""
    window = _window(pixels, _length(pixels, 0.1, 0.4, rng), rng)
    part = pixels[:, *window]
    side = part.shape[1]
    # At a quarter of the size: a median over 20 pixels at the cost of one over 5.
    small = as_image(part).resize((math.ceil(side / 4),) * 2, Image.Resampling.BOX).filter(ImageFilter.MedianFilter(5))
    median = as_pixels(small.resize((side, side), Image.Resampling.BILINEAR))
    return _blend(pixels, window, median, _blob(side, 2, rng) * rng.uniform(0.5, 1))


def copied_patch(pixels: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Replace a region by pixels of another position of the image or, in half of the cases, of another image."""
    window = _window(pixels, _length(pixels, 0.08, 0.4, rng), rng)
    side = _side(window)
    source = other if rng.random() < 0.5 else pixels
    share = _blob(side, rng.uniform(*EDGE), rng) * rng.uniform(0.5, 1)
    return _blend(pixels, window, source[:, *_anywhere(pixels, side, rng)], share)


TYPES: dict[str, Callable[[Pixels, Pixels, np.random.Generator], Pixels]] = {
    defect.__name__: defect
    for defect in (
        spots,
        pit,
        faint_region,
        faint_scratch,
        missing_part,
        moved_part,
        turned_part,
        local_blur,
        missing_print,
        copied_patch,
    )
}


def _coloured(pixels: Pixels) -> bool:
    return bool((pixels != pixels[0]).any())


def _length(pixels: Pixels, least: float, most: float, rng: np.random.Generator) -> int:
    """Draw a length in pixels between two shares of the shorter side, uniform in its logarithm."""
    shorter = int(min(pixels.shape[1:]))
    return max(1, round(shorter * math.exp(rng.uniform(math.log(least), math.log(most)))))


def _side(window: Window) -> int:
    rows, _ = window
    return int(rows.stop - rows.start)


def _anywhere(pixels: Pixels, side: int, rng: np.random.Generator) -> Window:
    top, left = (int(rng.integers(0, length - side + 1)) for length in pixels.shape[1:])
    return slice(top, top + side), slice(left, left + side)


def _window(pixels: Pixels, side: int, rng: np.random.Generator, *, most: bool = False) -> Window:
    """Draw the position of a window: anywhere, or where the pixels vary most or least (always most, if wanted)."""
    if not most and rng.random() < UNIFORM:
        return _anywhere(pixels, side, rng)
    windows = [_anywhere(pixels, side, rng) for _ in range(CANDIDATES)]
    variation = [float(pixels[1, *window].std()) for window in windows]
    structured = most or rng.random() < 0.5
    return windows[int(np.argmax(variation) if structured else np.argmin(variation))]


def _beside(pixels: Pixels, window: Window, down: int, right: int) -> Window:
    """Return a window moved by these pixels, but not beyond the border of the image."""
    moved = []
    for part, shift, length in zip(window, (down, right), pixels.shape[1:], strict=True):
        side = part.stop - part.start
        start = min(max(part.start + shift, 0), length - side)
        moved.append(slice(start, start + side))
    return moved[0], moved[1]


def _radius(side: int) -> Field:
    """Return the distance of each pixel to the centre of a square, 1 at the middle of its sides, (side, side)."""
    offset = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(2 / side) - 1
    radius: Field = np.hypot(offset[:, None], offset)
    return radius


def _blob(side: int, edge: float, rng: np.random.Generator) -> Field:
    """Return a region of random outline in a square, 1 inside and 0 outside, soft over `edge` pixels."""
    offset = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(2 / side) - 1
    angle = np.arctan2(offset[:, None], offset)
    outline = np.full((side, side), 0.75, dtype=np.float32)
    for waves in (2, 3, 5):
        outline += rng.uniform(0, 0.25 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * math.pi), dtype=np.float32)
    inside: Field = np.clip((outline - _radius(side)) * np.float32(side / 2 / edge) + 0.5, 0, 1)
    return inside


def _contrast(pixels: Pixels, window: Window, least: float, most: float, rng: np.random.Generator) -> Field:
    """Draw a change of brightness or, in half of the coloured images, of colour, (3, 1, 1) grey levels.

    The largest change of a channel is uniform in its logarithm, and larger where the texture would hide it. The
    direction is drawn too, but a window that cannot become that much lighter is made darker, and the reverse.
    """
    part = pixels[:, *window]
    size = math.exp(rng.uniform(math.log(least), math.log(most)))
    size *= min(MOST_GAIN, 1 + float(part[1].std()) / TEXTURE)
    level = float(part.mean())
    sign = rng.choice([-1, 1])
    if not 0 <= level + sign * size <= 255:
        sign = 1 if level < 128 else -1
    weights = np.ones(3)
    if _coloured(pixels) and rng.random() < 0.5:
        weights = rng.uniform(-1, 1, size=3)
        weights /= np.abs(weights).max()
    contrast: Field = (sign * size * weights).astype(np.float32).reshape(3, 1, 1)
    return contrast


def _surroundings(pixels: Pixels, window: Window, share: Field, rng: np.random.Generator) -> Field:
    """Return what a window would show without its content: its border interpolated, or a window beside it.

    Of the eight windows around, the one that resembles the pixels around the region most.
    """
    part = pixels[:, *window].astype(np.float32)
    side = part.shape[1]
    if rng.random() < 0.5:
        near = 1 / (np.arange(side, dtype=np.float32) + 1)  # weight of the first row or column; reversed: of the last
        top, bottom, left, right = near[:, None], near[::-1, None], near, near[::-1]
        rows = top * part[:, :1] + bottom * part[:, -1:]
        columns = left * part[:, :, :1] + right * part[:, :, -1:]
        interpolated: Field = (rows + columns) / (top + bottom + left + right)
        return interpolated
    around = share == 0
    shifts = [(down, right) for down in (-side, 0, side) for right in (-side, 0, side) if down or right]
    fills = [pixels[:, *_beside(pixels, window, *shift)].astype(np.float32) for shift in shifts]
    # A window that the border pushed back onto the region itself would fill it with its own content.
    distances = [
        np.inf if _overlap(window, _beside(pixels, window, *shift)) else np.abs(fill - part)[:, around].sum()
        for shift, fill in zip(shifts, fills, strict=True)
    ]
    return fills[int(np.argmin(distances))]


def _overlap(one: Window, other: Window) -> bool:
    return all(abs(a.start - b.start) < a.stop - a.start for a, b in zip(one, other, strict=True))


def _blend(pixels: Pixels, window: Window, fill: Field | Pixels, share: Field) -> Pixels:
    """Return the image with `fill` (3, side, side) blended over a window, weighted by `share` (side, side)."""
    blended = pixels.copy()
    part = pixels[:, *window].astype(np.float32)
    blended[:, *window] = np.rint(part + share * (np.clip(fill, 0, 255) - part))
    return blended
