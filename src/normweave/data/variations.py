"""Harmless variations: normal images as they look after a change of light, exposure, focus or position.

Each variation is fixed, so that a set of normal images rendered with one of them can serve as a synthetic subclass. The
strengths are *ours*: lamps that age, another exposure, lenses slightly out of focus. Images are (3, H, W) uint8.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from normweave.data.images import as_image, as_pixels
from normweave.errors import unknown

Pixels = NDArray[np.uint8]  # (3, H, W)

GAINS = {"darker": (0.7, 0.7, 0.7), "warmer": (1.08, 1.0, 0.9), "cooler": (0.92, 1.0, 1.08)}
"""Factors of red, green and blue."""
BRIGHTER = 1.4
"""Gain of dark pixels: x becomes 1 - (1 - x)^1.4, white = 1, so that light pixels keep their structure."""
GAMMAS = {"gamma-low": 0.75, "gamma-high": 1.35}
"""Exponents of the pixel divided by 255."""
COLOURS = ("warmer", "cooler")
VARIATIONS = ("brighter", *GAINS, *GAMMAS, "blurred", "shifted", "gradient", "noisy", "lit", "shaded")
BLUR = 1.0  # standard deviation in pixels at 256 x 256
ZOOM = 0.03  # share of each side that is cut off, on the right and at the bottom
FALL = 0.35  # gain is 1 at the left border and 1 - FALL at the right one
NOISE = 4.0  # standard deviation in grey levels
SPOT = 0.25
"""Standard deviation of a spot of light or a shadow, as a share of each side. Its place differs between images."""
LIT = 1.6
"""As `BRIGHTER`, at the centre of a spot of light."""
SHADED = 0.7
"""Gain at the centre of a shadow."""


def applicable(pixels: Pixels) -> tuple[str, ...]:
    """Return the names of the variations for an image: all, without those of colour if it is grey."""
    coloured = bool((pixels != pixels[0]).any())
    return tuple(name for name in VARIATIONS if coloured or name not in COLOURS)


def vary(pixels: Pixels, *, variation: str) -> Pixels:
    """Return a normal image (3, H, W) uint8 under a variation, of the same size.

    The same image always gives the same result. A grey image stays grey, so a variation of colour returns it unchanged.

    Args:
        variation: one of `VARIATIONS`.

    Raises:
        ConfigError: there is no such variation.
    """
    if variation not in VARIATIONS:
        raise unknown("variation", variation, set(VARIATIONS), "Choose one of normweave.data.variations.VARIATIONS.")
    if variation not in applicable(pixels):
        return pixels.copy()
    match variation:
        case "blurred":
            return as_pixels(as_image(pixels).filter(ImageFilter.GaussianBlur(BLUR * min(pixels.shape[1:]) / 256)))
        case "shifted":
            height, width = pixels.shape[1:]
            box = (0, 0, width * (1 - ZOOM), height * (1 - ZOOM))
            return as_pixels(as_image(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))
        case "gradient":
            gain = np.linspace(1, 1 - FALL, pixels.shape[2], dtype=np.float32)
            return _rounded(pixels * gain)
        case "noisy":
            rng = _seeded(pixels)  # two images never get the same noise, as from a sensor
            coloured = bool((pixels != pixels[0]).any())
            noise = rng.standard_normal((3 if coloured else 1, *pixels.shape[1:]), dtype=np.float32)
            return _rounded(pixels + np.float32(NOISE) * noise)
        case "lit":
            exponent = 1 + (LIT - 1) * _spot(pixels)
            return _rounded(255 * (1 - (1 - pixels / np.float32(255)) ** exponent))
        case "shaded":
            return _rounded(pixels * (1 - (1 - SHADED) * _spot(pixels)))
    light = np.arange(256, dtype=np.float32) / 255
    if variation == "brighter":
        return _rounded(255 * (1 - (1 - light) ** BRIGHTER))[pixels]
    if variation in GAMMAS:
        return _rounded(255 * light ** GAMMAS[variation])[pixels]
    tables = [_rounded(255 * gain * light) for gain in GAINS[variation]]
    return np.stack([table[channel] for table, channel in zip(tables, pixels, strict=True)])


def some(tiles: Pixels, *, first: int, count: int) -> Iterator[Pixels]:
    """Yield the tiles (n, 3, H, W) uint8 of an image under `count` variations, at most under each of them.

    Args:
        first: number of the first one, so that other images are seen under others.
    """
    names = applicable(tiles[0])
    for step in range(min(count, len(names))):
        name = names[(first + step) % len(names)]
        yield np.stack([vary(tile, variation=name) for tile in tiles])


def _seeded(pixels: Pixels) -> np.random.Generator:
    """Return a generator whose seed is the checksum of the image."""
    return np.random.default_rng(zlib.crc32(pixels.tobytes()))


def _spot(pixels: Pixels) -> NDArray[np.float32]:
    """Return a Gaussian (H, W), 1 at its centre, which lies in the middle 60 % of both sides."""
    axes = [
        np.exp(-0.5 * ((np.arange(side) / side - centre) / SPOT) ** 2)
        for side, centre in zip(pixels.shape[1:], _seeded(pixels).uniform(0.2, 0.8, 2), strict=True)
    ]
    spot: NDArray[np.float32] = np.outer(*axes).astype(np.float32)
    return spot


def _rounded(values: NDArray[np.floating[Any]]) -> Pixels:
    rounded: Pixels = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return rounded
