"""Woven fabrics: which yarn is on top at each crossing, how thick each yarn is, and where each yarn runs.

Fields over the image have shape (h, w) in rendered pixels, which are OVERSAMPLE times finer than image pixels. Tables
of yarns have shape (yarns, samples along the yarn). Heights and widths are in half pitches: half the distance of two
yarns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.floating[Any]]  # float32 throughout
Colour = tuple[float, float, float]  # linear red, green, blue; reflected share 0..1
Window = tuple[slice, slice]  # rows and columns of rendered pixels

OVERSAMPLE = 2  # rendered pixels per image pixel, in each direction
MARGIN = 8  # rendered pixels beyond each border, so that shadows and slopes are right at the border
SAMPLES = 12  # samples along a yarn from one crossing to the next


class Weave(NamedTuple):
    """How the yarns cross, and how they are spun."""

    draft: tuple[str, ...]  # weaving draft: one string per weft yarn, X where the warp yarn is on top
    pitch: tuple[float, float]  # image pixels from weft to weft, and from warp to warp
    width: tuple[float, float]  # weft and warp: share of the pitch that a yarn fills
    depth: float  # how far a yarn rises and sinks at the crossings, in half pitches
    twist: float  # turns of the ply from one crossing to the next
    uneven: float  # standard deviation of a yarn's thickness, as a share
    slubs: float  # mean number of thick spots per 35 crossings of a yarn
    sheen: float  # strength of the highlight along the fibres
    fuzz: float  # loose fibres per 1000 image pixels


class Dye(NamedTuple):
    """The colours of the two yarn systems."""

    warp: Colour
    weft: Colour


SATIN = (".XXXXXXX", "XXX.XXXX", "XXXXXX.X", "X.XXXXXX", "XXXX.XXX", "XXXXXXX.", "XX.XXXXX", "XXXXX.XX")
HERRINGBONE = ("XX..XX..XX..XX..", ".XX..XX.X..XX..X", "..XX..XX..XX..XX", "X..XX..X.XX..XX.")
WEAVES = {  # draft, pitch, width, depth, twist, uneven, slubs, sheen, fuzz
    "plain": Weave(("X.", ".X"), (8.6, 8.4), (0.92, 0.90), 0.55, 1.3, 0.09, 0.5, 0.05, 1.2),
    "twill": Weave(("XXX.", ".XXX", "X.XX", "XX.X"), (7.6, 6.6), (0.94, 0.98), 0.50, 1.0, 0.07, 0.3, 0.06, 0.8),
    "satin": Weave(SATIN, (5.2, 4.2), (0.94, 1.04), 0.42, 0.25, 0.04, 0.05, 0.5, 0.1),
    "herringbone": Weave(HERRINGBONE, (7.4, 7.2), (0.94, 0.94), 0.50, 0.9, 0.08, 0.3, 0.04, 2.0),
    "basket": Weave(("XX..", "XX..", "..XX", "..XX"), (7.4, 7.2), (0.94, 0.94), 0.55, 1.2, 0.07, 0.3, 0.06, 0.9),
    "rib": Weave(("X.", "X.", ".X", ".X"), (6.8, 6.2), (0.90, 1.0), 0.62, 0.9, 0.06, 0.2, 0.08, 0.6),
}

COLOURS = {
    "burgundy": Dye(warp=(0.26, 0.022, 0.045), weft=(0.20, 0.018, 0.035)),
    "charcoal": Dye(warp=(0.055, 0.057, 0.062), weft=(0.26, 0.255, 0.245)),
    "ecru": Dye(warp=(0.60, 0.52, 0.39), weft=(0.64, 0.57, 0.44)),
    "indigo": Dye(warp=(0.028, 0.055, 0.16), weft=(0.52, 0.51, 0.47)),
    "navy": Dye(warp=(0.022, 0.035, 0.105), weft=(0.03, 0.045, 0.12)),
    "olive": Dye(warp=(0.115, 0.12, 0.042), weft=(0.17, 0.165, 0.075)),
    "rust": Dye(warp=(0.36, 0.105, 0.028), weft=(0.42, 0.20, 0.09)),
    "sand": Dye(warp=(0.46, 0.35, 0.22), weft=(0.33, 0.235, 0.14)),
    "teal": Dye(warp=(0.02, 0.17, 0.19), weft=(0.035, 0.23, 0.23)),
}


def interlacing(weave: Weave, *, weft: int, warp: int) -> NDArray[np.bool_]:
    """Return which yarn is on top at each crossing, (weft, warp); true = the warp yarn."""
    draft = np.array([[mark == "X" for mark in pick] for pick in weave.draft])
    rows, columns = -(-weft // len(draft)), -(-warp // len(draft[0]))
    return np.tile(draft, (rows, columns))[:weft, :warp]


class Yarns(NamedTuple):
    """All yarns of one direction, as tables (yarns, samples along)."""

    width: Field  # half width; 0 = no yarn here
    shade: Field  # gain on the dye
    lift: Field  # height above the height that the weave gives
    foreign: Field  # share of another dye, 0..1
    turn: Field  # phase of the yarn's twist


class YarnPosition(NamedTuple):
    """Which yarn of one direction each rendered pixel shows, and which point of that yarn; fields (h, w)."""

    sample: NDArray[np.intp]  # index into the flat tables of `camera.Tables`
    fraction: Field  # distance to that sample, as a share of the distance to the next, 0..1
    across: Field  # -1..1 from edge to edge of the yarn's lane
    along: Field  # crossings since the yarn's start

    def crop(self, window: Window) -> "YarnPosition":
        """Return the same for a window of the rendered pixels."""
        return YarnPosition(self.sample[window], self.fraction[window], self.across[window], self.along[window])


class Thread(NamedTuple):
    """A thread on top of the fabric: fields over a window of the rendered image."""

    window: Window
    height: Field  # height above the fabric; -9 outside the thread
    colour: Colour

    def crop(self, window: Window) -> "Thread | None":
        """Return the part of the thread inside a window of the rendered pixels, None if there is none."""
        inside, kept = [], []
        for own, view in zip(self.window, window, strict=True):
            start, stop = max(own.start, view.start), min(own.stop, view.stop)
            if stop <= start:
                return None
            inside.append(slice(start - view.start, stop - view.start))
            kept.append(slice(start - own.start, stop - own.start))
        return Thread((inside[0], inside[1]), self.height[kept[0], kept[1]], self.colour)


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """A woven piece, ready to be photographed."""

    weave: Weave
    over: NDArray[np.bool_]  # (weft, warp), true = warp on top
    weft: Yarns
    warp: Yarns
    weft_position: YarnPosition
    warp_position: YarnPosition
    dye: Dye
    backdrop: Colour  # the table, visible through gaps
    other_dye: Colour = (0.0, 0.0, 0.0)
    tint: Field | None = None  # gain on the dyes, (3, h, w)
    threads: tuple[Thread, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) rendered pixels, MARGIN included."""
        height, width = self.weft_position.across.shape
        return height, width

    @property
    def short_side(self) -> int:
        """The shorter side of the image in rendered pixels."""
        return min(self.shape) - 2 * MARGIN

    @property
    def pitch(self) -> tuple[float, float]:
        """Rendered pixels from weft to weft and from warp to warp, before the variation of the loom."""
        return self.weave.pitch[0] * OVERSAMPLE, self.weave.pitch[1] * OVERSAMPLE

    def crop(self, window: Window) -> "Fabric":
        """Return the part of the fabric inside a window of the rendered pixels."""
        return replace(
            self,
            weft_position=self.weft_position.crop(window),
            warp_position=self.warp_position.crop(window),
            tint=None if self.tint is None else self.tint[:, window[0], window[1]],
            threads=tuple(part for thread in self.threads if (part := thread.crop(window))),
        )


def smooth_noise(random: np.random.Generator, shape: tuple[int, int], *, scale: tuple[float, float]) -> Field:
    """Return noise of unit std that changes over `scale` (rows, columns) entries; a scale of 1 leaves an axis rough."""
    coarse = tuple(max(2, round(n / s) + 1) if s > 1 else n for n, s in zip(shape, scale, strict=True))
    noise = random.standard_normal(coarse, dtype=np.float32)
    return np.asarray(Image.fromarray(noise).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def gain(colour: Colour, factors: Sequence[float] | NDArray[np.float64]) -> Colour:
    """Return a colour with each channel multiplied by its own factor."""
    red, green, blue = (float(value * factor) for value, factor in zip(colour, factors, strict=True))
    return red, green, blue


def _spin(random: np.random.Generator, *, yarns: int, crossings: int, width: float, weave: Weave) -> Yarns:
    """Return yarns with the unevenness of spinning: thickness, slubs, and small differences in dye uptake."""
    shape = (yarns, crossings * SAMPLES)
    thickness = 1 + weave.uneven * (
        0.6 * smooth_noise(random, shape, scale=(1, 3 * SAMPLES))
        + 0.5 * smooth_noise(random, shape, scale=(1, 12 * SAMPLES))
        + 0.5 * random.standard_normal((yarns, 1), dtype=np.float32)
    )
    samples = np.arange(shape[1], dtype=np.float32)
    for yarn in np.flatnonzero(random.poisson(weave.slubs * crossings / 35, yarns)):
        centre, length = random.uniform(0, shape[1]), random.uniform(1.2, 3.5) * SAMPLES
        thickness[yarn] += random.uniform(0.1, 0.25) * np.exp(-(((samples - centre) / length) ** 2))
    shade = 1 + 0.05 * random.standard_normal((yarns, 1), dtype=np.float32)
    shade = shade + 0.04 * smooth_noise(random, shape, scale=(1, 5 * SAMPLES))
    zeros = np.zeros(shape, np.float32)
    turn = np.broadcast_to(random.uniform(0, 256, (yarns, 1)).astype(np.float32), shape)
    return Yarns(width=width * thickness, shade=shade, lift=zeros, foreign=zeros, turn=turn)


def _lanes(position: Field, spacing: Field) -> tuple[NDArray[np.int32], Field]:
    """Return the number of the yarn and -1..1 across its lane, for positions in pitches.

    `spacing` (yarns,) shifts the border between two lanes, in pitches.
    """
    steps = 64
    even = np.arange(len(spacing) * steps) / steps
    shifted = (even + np.interp(even, np.arange(len(spacing)), spacing)).astype(np.float32)
    across = shifted.take((position * np.float32(steps)).astype(np.intp))
    number = across.astype(np.int32)
    across -= number
    across *= 2
    across -= 1
    return number, across


def weave_piece(weave: Weave, dye: Dye, *, roll: int, seed: int, size: tuple[int, int]) -> Fabric:
    """Weave a piece of a roll for an image of `size`. The roll sets the dye lot, the loom and the mean angle."""
    lot = np.random.default_rng(np.random.SeedSequence(roll, spawn_key=(0,)))
    lot_gain = (1 + 0.05 * lot.standard_normal()) * (1 + 0.02 * lot.standard_normal(3))
    loom = 1 + 0.02 * lot.standard_normal(2)
    mean_angle = lot.normal(0, 1.0)
    table = float(lot.choice([0.012, 0.02, 0.05, 0.15]))

    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    height, width = (OVERSAMPLE * n + 2 * MARGIN for n in size)
    pitch = np.array(weave.pitch) * loom * OVERSAMPLE
    counts = [int(np.hypot(height, width) / step) + 8 for step in pitch]
    angle = np.radians(mean_angle + random.normal(0, 1.2))
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    x = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    directions = ((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))
    scales = ((1.6 * pitch[0], 7 * pitch[1]), (7 * pitch[0], 1.6 * pitch[1]))
    positions: list[Field] = []  # across the weft, then across the warp, in yarns
    for (down, right), step, count, scale in zip(directions, pitch, counts, scales, strict=True):
        position = y * np.float32(down / step) + (x * np.float32(right / step) + np.float32(count / 2))
        position += np.float32(random.uniform())
        # A fabric is never quite flat: slow waves, a few hundred pixels long, shift the yarns.
        for _ in range(2):
            turns = random.uniform(0.4, 1.6, 2) * random.choice([-1, 1], 2) / (400 * OVERSAMPLE)
            fy, fx = (2 * np.pi * turns).astype(np.float32)
            wave = y * fy + (x * fx + np.float32(random.uniform(0, 2 * np.pi)))
            np.sin(wave, out=wave)
            wave *= np.float32(random.uniform(0.1, 0.4))
            position += wave
        # Each yarn also bends a little.
        position += np.float32(0.05) * smooth_noise(random, (height, width), scale=scale)
        positions.append(position)

    first_samples = (0, counts[0] * counts[1] * SAMPLES)  # the warp's tables follow the weft's
    yarn_positions = []
    for own, other in ((0, 1), (1, 0)):
        number, across = _lanes(positions[own], 0.06 * random.standard_normal(counts[own]))
        fraction = positions[other] * np.float32(SAMPLES)
        sample = fraction.astype(np.int32)
        fraction -= sample
        sample += number * np.int32(counts[other] * SAMPLES)
        sample += np.int32(first_samples[own])
        yarn_positions.append(YarnPosition(sample.astype(np.intp), fraction, across, positions[other]))
    # The pattern starts at a random yarn of the draft.
    first_weft, first_warp = random.integers(0, [len(weave.draft), len(weave.draft[0])])
    over = interlacing(weave, weft=counts[0] + first_weft, warp=counts[1] + first_warp)
    return Fabric(
        weave=weave,
        over=over[first_weft:, first_warp:],
        weft=_spin(random, yarns=counts[0], crossings=counts[1], width=weave.width[0], weave=weave),
        warp=_spin(random, yarns=counts[1], crossings=counts[0], width=weave.width[1], weave=weave),
        weft_position=yarn_positions[0],
        warp_position=yarn_positions[1],
        dye=Dye(warp=gain(dye.warp, lot_gain), weft=gain(dye.weft, lot_gain)),
        backdrop=(table, table, table),
    )
