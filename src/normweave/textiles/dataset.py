"""Textile images with planted defects and exact masks: data for the demo, the tests and the examples.

A piece of cloth is woven first (which yarn lies on top at each crossing, how thick each yarn is along its way),
damaged next, and photographed last. A mask is where the photograph of the damaged cloth differs visibly from that of
the same cloth undamaged, so it is exact by construction.

    weave draft -> yarns -> (damage) -> relief -> light -> camera -> image, mask

Fields over the image have shape (height, width); yarn tables have shape (yarns, samples along the yarn).
"""

import csv
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from normweave.errors import ConfigError, DataError, unknown

Field = NDArray[np.floating[Any]]  # float32 throughout
Colour = tuple[float, float, float]  # linear red, green, blue; reflected share 0..1

OVERSAMPLE = 2  # rendered pixels per image pixel, each way
MARGIN = 8  # rendered pixels beyond each border, so that shadows and slopes are right at the border
STRIP = 128  # rendered rows at a time
SAMPLES = 12  # samples along a yarn from one crossing to the next
FLOOR = -1.3  # half pitches; what is seen through gaps lies here
PLUMP = 0.75  # a yarn's thickness as a share of its width: cloth is pressed
VISIBLE = 7.0  # grey levels (0..255), mean of 5 x 5 pixels: a greater difference counts as a visible change
DEFECT_SHARE = (0.002, 0.05)  # smallest and largest share of the image that a defect may cover
ATTEMPTS = 20  # draws of a defect before its size is accepted as it is
GENERATOR = 2  # raised whenever the same seed would give other images


@dataclass(frozen=True, kw_only=True)
class Weave:
    """How the yarns cross, and what they are spun like.

    `draft` is the weaver's point paper: one string a weft yarn, X where the warp yarn lies on top.
    """

    draft: tuple[str, ...]
    pitch: tuple[float, float]  # image pixels from weft to weft, and from warp to warp
    width: tuple[float, float]  # weft and warp: share of the pitch that a yarn fills
    depth: float  # how far a yarn rises and sinks at the crossings, in half pitches
    twist: float  # turns of the ply from one crossing to the next
    uneven: float  # spread of a yarn's thickness, as a share
    slubs: float  # thick places a yarn, on average
    sheen: float  # strength of the highlight along the fibres
    fuzz: float  # loose fibres for each 1000 image pixels


@dataclass(frozen=True, kw_only=True)
class Dye:
    """The colours of the two yarn systems."""

    warp: Colour
    weft: Colour


@dataclass(frozen=True, kw_only=True)
class Lighting:
    """The lamp and the camera."""

    azimuth: float  # degrees, where the light comes from: 0 right, 90 below, 180 left
    elevation: float  # degrees above the cloth; low = raking
    ambient: float  # share of light that comes from everywhere
    tint: Colour  # gain of each channel
    exposure: float
    vignette: float  # share of light lost in the corners
    noise: float  # standard deviation of the camera noise at mid grey, as a share of white


WEAVES = {
    "plain": Weave(
        draft=("X.", ".X"),
        pitch=(8.6, 8.4),
        width=(0.92, 0.90),
        depth=0.55,
        twist=1.3,
        uneven=0.09,
        slubs=0.5,
        sheen=0.05,
        fuzz=1.2,
    ),
    "twill": Weave(
        draft=("XXX.", ".XXX", "X.XX", "XX.X"),
        pitch=(7.6, 6.6),
        width=(0.94, 0.98),
        depth=0.50,
        twist=1.0,
        uneven=0.07,
        slubs=0.3,
        sheen=0.06,
        fuzz=0.8,
    ),
    "satin": Weave(
        draft=(
            ".XXXXXXX",
            "XXX.XXXX",
            "XXXXXX.X",
            "X.XXXXXX",
            "XXXX.XXX",
            "XXXXXXX.",
            "XX.XXXXX",
            "XXXXX.XX",
        ),
        pitch=(5.2, 4.2),
        width=(0.94, 1.04),
        depth=0.42,
        twist=0.25,
        uneven=0.04,
        slubs=0.05,
        sheen=0.5,
        fuzz=0.1,
    ),
    "herringbone": Weave(
        draft=("XX..XX..XX..XX..", ".XX..XX.X..XX..X", "..XX..XX..XX..XX", "X..XX..X.XX..XX."),
        pitch=(7.4, 7.2),
        width=(0.94, 0.94),
        depth=0.50,
        twist=0.9,
        uneven=0.08,
        slubs=0.3,
        sheen=0.04,
        fuzz=2.0,
    ),
    "basket": Weave(
        draft=("XX..", "XX..", "..XX", "..XX"),
        pitch=(7.4, 7.2),
        width=(0.94, 0.94),
        depth=0.55,
        twist=1.2,
        uneven=0.07,
        slubs=0.3,
        sheen=0.06,
        fuzz=0.9,
    ),
    "rib": Weave(
        draft=("X.", "X.", ".X", ".X"),
        pitch=(6.8, 6.2),
        width=(0.90, 1.0),
        depth=0.62,
        twist=0.9,
        uneven=0.06,
        slubs=0.2,
        sheen=0.08,
        fuzz=0.6,
    ),
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

LIGHTINGS = {
    "raking": Lighting(
        azimuth=205.0,
        elevation=24.0,
        ambient=0.20,
        tint=(1.03, 1.0, 0.95),
        exposure=1.35,
        vignette=0.10,
        noise=0.012,
    ),
    "diffuse": Lighting(
        azimuth=250.0,
        elevation=62.0,
        ambient=0.55,
        tint=(1.0, 1.0, 1.0),
        exposure=1.0,
        vignette=0.05,
        noise=0.009,
    ),
    "warm": Lighting(
        azimuth=300.0,
        elevation=40.0,
        ambient=0.32,
        tint=(1.14, 1.0, 0.76),
        exposure=1.05,
        vignette=0.14,
        noise=0.013,
    ),
    "cold": Lighting(
        azimuth=160.0,
        elevation=44.0,
        ambient=0.35,
        tint=(0.88, 1.0, 1.16),
        exposure=1.05,
        vignette=0.08,
        noise=0.011,
    ),
    "dim": Lighting(
        azimuth=230.0,
        elevation=36.0,
        ambient=0.30,
        tint=(1.05, 1.0, 0.90),
        exposure=0.62,
        vignette=0.18,
        noise=0.015,
    ),
}

DEFECTS = ("broken_thread", "colour_shift", "foreign_fibre", "hole", "knot", "misweave", "stain")


@dataclass(frozen=True)
class Textile:
    """A subclass: cloth of one weave and colour under one lighting. The words are keys of the tables above."""

    weave: str
    colour: str
    lighting: str

    def __post_init__(self) -> None:
        for what, got, known in (
            ("weave", self.weave, WEAVES),
            ("colour", self.colour, COLOURS),
            ("lighting", self.lighting, LIGHTINGS),
        ):
            if got not in known:
                raise unknown(what, got, known, "They are tables in normweave/data/textures.py.")

    @property
    def name(self) -> str:
        """The subclass's name, as in folders and manifests."""
        return f"{self.weave}-{self.colour}-{self.lighting}"


SEEN = (
    Textile("plain", "ecru", "diffuse"),
    Textile("twill", "indigo", "raking"),
    Textile("satin", "burgundy", "warm"),
    Textile("herringbone", "charcoal", "cold"),
    Textile("basket", "sand", "raking"),
    Textile("plain", "teal", "dim"),
)
UNSEEN = (
    Textile("twill", "olive", "warm"),
    Textile("satin", "navy", "diffuse"),
    Textile("herringbone", "rust", "dim"),
    Textile("rib", "ecru", "cold"),
)


class Cloth(NamedTuple):
    """A photograph of a piece of cloth, and where it is damaged."""

    image: NDArray[np.uint8]  # (H, W, 3)
    mask: NDArray[np.bool_]  # (H, W), true = damaged


def interlacing(weave: str, *, weft: int, warp: int) -> NDArray[np.bool_]:
    """Which yarn lies on top at each crossing, (weft, warp); true = the warp yarn."""
    draft = np.array([[mark == "X" for mark in pick] for pick in WEAVES[weave].draft])
    rows, columns = -(-weft // len(draft)), -(-warp // len(draft[0]))
    return np.tile(draft, (rows, columns))[:weft, :warp]


# ── weaving ───────────────────────────────────────────────────────────────────────────────────────────────


class Yarns(NamedTuple):
    """All yarns of one direction, as tables (yarns, samples along)."""

    width: Field  # half width in half pitches; 0 = no yarn here
    shade: Field  # gain on the dye
    lift: Field  # half pitches above where the weave puts it
    foreign: Field  # share of another dye, 0..1
    turn: Field  # where in its turn the yarn's twist starts


class Place(NamedTuple):
    """Which yarn of one direction passes below each rendered pixel, and where on it the pixel lies."""

    sample: NDArray[np.intp]  # index into the flat tables (class Tables)
    part: Field  # how far to the next sample, 0..1
    across: Field  # -1..1 from edge to edge of the yarn's lane
    along: Field  # crossings since the yarn's start

    def part_of(self, window: tuple[slice, slice]) -> "Place":
        """The same, for a window of the rendered pixels."""
        return Place(self.sample[window], self.part[window], self.across[window], self.along[window])


class Tube(NamedTuple):
    """A thread that lies on the cloth: fields over a window of the rendered image."""

    window: tuple[slice, slice]
    height: Field  # half pitches above the cloth; -9 where it does not pass
    colour: Colour


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """A woven piece, ready to be photographed."""

    textile: Textile
    over: NDArray[np.bool_]  # (weft, warp), true = warp on top
    weft: Yarns
    warp: Yarns
    weft_place: Place
    warp_place: Place
    dye: Dye
    backdrop: Colour  # the table, seen through gaps
    other_dye: Colour = (0.0, 0.0, 0.0)
    tint: Field | None = None  # gain on the dyes, (3, h, w) rendered pixels
    tubes: tuple[Tube, ...] = ()


def smooth_noise(random: np.random.Generator, shape: tuple[int, int], *, scale: tuple[float, float]) -> Field:
    """Noise of unit spread that changes over `scale` (rows, columns) entries; a scale of 1 leaves an axis rough."""
    coarse = tuple(max(2, round(n / s) + 1) if s > 1 else n for n, s in zip(shape, scale, strict=True))
    noise = random.standard_normal(coarse, dtype=np.float32)
    return np.asarray(Image.fromarray(noise).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def spin(random: np.random.Generator, *, yarns: int, crossings: int, width: float, weave: Weave) -> Yarns:
    """Yarns with the unevenness of spinning: thick and thin places, slubs, small differences in dye uptake."""
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
    nothing = np.zeros(shape, np.float32)
    turn = np.broadcast_to(random.uniform(0, 256, (yarns, 1)).astype(np.float32), shape)
    return Yarns(width=width * thickness, shade=shade, lift=nothing, foreign=nothing, turn=turn)


def lanes(position: Field, spacing: Field) -> tuple[NDArray[np.int32], Field]:
    """From even positions (in pitches) to uneven lanes: the yarn's number, and -1..1 across its lane.

    `spacing` (yarns,) shifts the border between two lanes, in pitches.
    """
    steps = 64
    even = np.arange(len(spacing) * steps) / steps
    shifted = (even + np.interp(even, np.arange(len(spacing)), spacing)).astype(np.float32)
    uneven = shifted.take((position * np.float32(steps)).astype(np.intp))
    number = uneven.astype(np.int32)
    uneven -= number
    uneven *= 2
    uneven -= 1
    return number, uneven


def weave_piece(textile: Textile, *, roll: int, seed: int, size: tuple[int, int]) -> Fabric:
    """Weave a piece of a roll. The roll fixes the dye lot, the setting of the loom and how the cloth is laid."""
    weave, dye = WEAVES[textile.weave], COLOURS[textile.colour]
    lot = np.random.default_rng(np.random.SeedSequence(roll, spawn_key=(0,)))
    lot_gain = (1 + 0.05 * lot.standard_normal()) * (1 + 0.02 * lot.standard_normal(3))
    loom = 1 + 0.02 * lot.standard_normal(2)
    laid = lot.normal(0, 1.0)
    table = float(lot.choice([0.012, 0.02, 0.05, 0.15]))

    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    height, width = (OVERSAMPLE * n + 2 * MARGIN for n in size)
    pitch = np.array(weave.pitch) * loom * OVERSAMPLE
    counts = [int(np.hypot(height, width) / step) + 8 for step in pitch]
    angle = np.radians(laid + random.normal(0, 1.2))
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    x = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    directions = ((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))
    own_ways = ((1.6 * pitch[0], 7 * pitch[1]), (7 * pitch[0], 1.6 * pitch[1]))
    positions: list[Field] = []  # across the weft, then across the warp, in yarns
    for (down, right), step, count, own_way in zip(directions, pitch, counts, own_ways, strict=True):
        position = y * np.float32(down / step) + (x * np.float32(right / step) + np.float32(count / 2))
        position += np.float32(random.uniform())
        # Cloth is never laid quite flat: slow waves, a few hundred pixels long, shift the yarns.
        for _ in range(2):
            turns = random.uniform(0.4, 1.6, 2) * random.choice([-1, 1], 2) / (400 * OVERSAMPLE)
            fy, fx = (2 * np.pi * turns).astype(np.float32)
            wave = y * fy + (x * fx + np.float32(random.uniform(0, 2 * np.pi)))
            np.sin(wave, out=wave)
            wave *= np.float32(random.uniform(0.1, 0.4))
            position += wave
        # Each yarn also wanders a little on its own way.
        position += np.float32(0.05) * smooth_noise(random, (height, width), scale=own_way)
        positions.append(position)

    first_samples = (0, counts[0] * counts[1] * SAMPLES)  # the warp's tables stand behind the weft's
    places = []
    for own, other in ((0, 1), (1, 0)):
        number, across = lanes(positions[own], 0.06 * random.standard_normal(counts[own]))
        part = positions[other] * np.float32(SAMPLES)
        sample = part.astype(np.int32)
        part -= sample
        sample += number * np.int32(counts[other] * SAMPLES)
        sample += np.int32(first_samples[own])
        places.append(Place(sample.astype(np.intp), part, across, positions[other]))
    skip_weft, skip_warp = random.integers(
        0, [len(weave.draft), len(weave.draft[0])]
    )  # no pattern has a fixed place
    over = interlacing(textile.weave, weft=counts[0] + skip_weft, warp=counts[1] + skip_warp)
    return Fabric(
        textile=textile,
        over=over[skip_weft:, skip_warp:],
        weft=spin(random, yarns=counts[0], crossings=counts[1], width=weave.width[0], weave=weave),
        warp=spin(random, yarns=counts[1], crossings=counts[0], width=weave.width[1], weave=weave),
        weft_place=places[0],
        warp_place=places[1],
        dye=Dye(warp=gain(dye.warp, lot_gain), weft=gain(dye.weft, lot_gain)),
        backdrop=(table, table, table),
    )


def gain(colour: Colour, by: Sequence[float] | NDArray[np.float64]) -> Colour:
    """A colour with each channel multiplied by its own number."""
    red, green, blue = (float(own * factor) for own, factor in zip(colour, by, strict=True))
    return red, green, blue


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────


class Spot(NamedTuple):
    """A place on the cloth."""

    pixel: tuple[float, float]  # rendered pixels
    yarn: tuple[int, int]  # number of the weft and of the warp yarn that cross there


def choose_spot(fabric: Fabric, random: np.random.Generator, *, border: float) -> Spot:
    """Anywhere but within `border` (share of the image) of its edges."""
    height, width = fabric.weft_place.across.shape
    y = random.uniform(border, 1 - border) * (height - 2 * MARGIN) + MARGIN
    x = random.uniform(border, 1 - border) * (width - 2 * MARGIN) + MARGIN
    at = int(y), int(x)
    # A yarn's tables know the crossings along it, which are the numbers of the yarns of the other direction.
    return Spot((y, x), (int(fabric.warp_place.along[at]), int(fabric.weft_place.along[at])))


def short_side(fabric: Fabric) -> int:
    """Of the image, in rendered pixels."""
    height, width = fabric.weft_place.across.shape
    return int(min(height, width)) - 2 * MARGIN


def lane_pixels(fabric: Fabric) -> tuple[float, float]:
    """Rendered pixels from weft to weft and from warp to warp, as the loom was set up."""
    pitch = WEAVES[fabric.textile.weave].pitch
    return pitch[0] * OVERSAMPLE, pitch[1] * OVERSAMPLE


def stretch(yarns: Yarns, *, start: float, stop: float, taper: float) -> Field:
    """1 along a yarn between two crossings, 0 elsewhere, (samples,); `taper` crossings wide at both ends."""
    along = np.arange(yarns.width.shape[1], dtype=np.float32) / SAMPLES
    return np.clip(np.minimum(along - start, stop - along) / taper + 0.5, 0, 1).astype(np.float32)


def with_yarns(fabric: Fabric, warpwise: bool, yarns: Yarns) -> Fabric:
    """The fabric with its warp, or its weft, exchanged."""
    return replace(fabric, warp=yarns) if warpwise else replace(fabric, weft=yarns)


def break_thread(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """One to three yarns are missing, or hang thin and slack, over a stretch; some leave a loose end on the cloth."""
    spot = choose_spot(fabric, random, border=0.22)
    warpwise = bool(random.uniform() < 0.5)
    yarns = fabric.warp if warpwise else fabric.weft
    number, middle = (spot.yarn[1], spot.yarn[0]) if warpwise else spot.yarn
    pitch = lane_pixels(fabric)
    half = random.uniform(0.10, 0.24) * short_side(fabric) / pitch[0 if warpwise else 1]
    gone = stretch(yarns, start=middle - half, stop=middle + half, taper=random.uniform(0.4, 2.5))
    width, lift = yarns.width.copy(), yarns.lift.copy()
    slack = random.uniform() < 0.3
    last = number + int(random.integers(0, 3))
    width[number : last + 1] *= 1 - gone * (random.uniform(0.4, 0.7) if slack else 1)
    lift[number : last + 1] -= 0.3 * gone
    # The neighbours spread into the gap.
    for neighbour in (number - 1, last + 1):
        width[neighbour] *= 1 + 0.07 * gone
    fabric = with_yarns(fabric, warpwise, yarns._replace(width=width, lift=lift))
    if not slack and random.uniform() < 0.6:
        towards = (1.0, 0.0) if warpwise else (0.0, 1.0)
        side = random.choice([-1, 1])
        length = random.uniform(2, 5)
        start = (
            spot.pixel[0] + side * half * pitch[0] * towards[0],
            spot.pixel[1] + side * half * pitch[1] * towards[1],
        )
        heading = np.arctan2(towards[0], towards[1]) + (np.pi if side > 0 else 0) + random.normal(0, 0.7)
        colour = fabric.dye.warp if warpwise else fabric.dye.weft
        radius = 0.36 * min(pitch)
        end = lay_thread(
            fabric,
            random,
            start=start,
            heading=heading,
            length=length * pitch[0],
            curl=1.2,
            radius=radius,
            colour=colour,
        )
        fabric = replace(fabric, tubes=(*fabric.tubes, end))
    return fabric


def shift_colour(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Yarns of another dye lot over a stretch, or a patch where the dye took differently."""
    hue = 1 + random.choice([-1, 1]) * random.uniform(0.6, 1.05) * random.dirichlet([1.2, 1.2, 1.2])
    if random.uniform() < 0.4:
        reach = random.uniform(0.07, 0.11) * short_side(fabric)
        return blot(fabric, random, radius=reach, soft=0.5, tint=hue, rim=0.0)
    spot = choose_spot(fabric, random, border=0.25)
    warpwise = bool(random.uniform() < 0.5)
    yarns = fabric.warp if warpwise else fabric.weft
    number, middle = (spot.yarn[1], spot.yarn[0]) if warpwise else spot.yarn
    half = random.uniform(0.15, 0.4) * short_side(fabric) / lane_pixels(fabric)[0 if warpwise else 1]
    foreign = yarns.foreign.copy()
    for neighbour in range(number, number + int(random.integers(1, 4))):
        ends = random.normal(0, 0.6, 2)
        foreign[neighbour] = stretch(
            yarns, start=middle - half + ends[0], stop=middle + half + ends[1], taper=0.5
        )
    own = fabric.dye.warp if warpwise else fabric.dye.weft
    grey = sum(own) / 3
    other = (
        gain(own, hue) if random.uniform() < 0.6 else gain((grey, grey, grey), [random.uniform(0.6, 1.6)] * 3)
    )
    return replace(with_yarns(fabric, warpwise, yarns._replace(foreign=foreign)), other_dye=other)


def lose_fibre(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """A fibre from elsewhere lies on the cloth."""
    spot = choose_spot(fabric, random, border=0.2)
    colour = tuple(random.choice([0.02, 0.1, 0.35, 0.7], 3) * random.uniform(0.8, 1.2, 3))
    fibre = lay_thread(
        fabric,
        random,
        start=spot.pixel,
        heading=random.uniform(0, 2 * np.pi),
        length=random.uniform(0.15, 0.45) * short_side(fabric),
        curl=random.uniform(0.4, 1.6),
        radius=random.uniform(1.3, 2.6),
        colour=(float(colour[0]), float(colour[1]), float(colour[2])),
    )
    return replace(fabric, tubes=(*fabric.tubes, fibre))


def tear_hole(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Both yarn systems are cut within an irregular oval; their ends fray into it."""
    spot = choose_spot(fabric, random, border=0.15)
    pitch = lane_pixels(fabric)
    reach = random.uniform(0.025, 0.075) * short_side(fabric) * np.array([1, random.uniform(0.6, 1.6)])
    for warpwise in (False, True):
        yarns = fabric.warp if warpwise else fabric.weft
        number, middle = (spot.yarn[1], spot.yarn[0]) if warpwise else spot.yarn
        across, along = (reach[1], reach[0]) if warpwise else (reach[0], reach[1])
        lane, crossing = (pitch[1], pitch[0]) if warpwise else pitch
        width, shade, lift = yarns.width.copy(), yarns.shade.copy(), yarns.lift.copy()
        many = int(across / lane)
        for off in range(-many, many + 1):
            half = along / crossing * np.sqrt(max(0.0, 1 - (off * lane / across) ** 2))
            start, stop = middle - half + random.normal(0, 0.5), middle + half + random.normal(0, 0.5)
            gone = stretch(yarns, start=start, stop=stop, taper=random.uniform(0.4, 1.4))
            frayed = stretch(yarns, start=start - 1.2, stop=stop + 1.2, taper=1.5)
            width[number + off] *= 1 - gone
            shade[number + off] *= 1 + 0.25 * frayed
            lift[number + off] += 0.35 * frayed * random.normal(0.3, 1)
        fabric = with_yarns(fabric, warpwise, yarns._replace(width=width, shade=shade, lift=lift))
    tubes = list(fabric.tubes)
    for _ in range(random.integers(8, 18)):
        angle = random.uniform(0, 2 * np.pi)
        tubes.append(
            lay_thread(
                fabric,
                random,
                start=(
                    spot.pixel[0] + reach[0] * np.sin(angle) * random.uniform(0.8, 1.2),
                    spot.pixel[1] + reach[1] * np.cos(angle) * random.uniform(0.8, 1.2),
                ),
                heading=angle + np.pi + random.normal(0, 0.8),
                length=random.uniform(0.3, 1.0) * float(reach.min()),
                curl=2.0,
                radius=random.uniform(0.8, 1.3),
                colour=fabric.dye.warp if random.uniform() < 0.5 else fabric.dye.weft,
            )
        )
    return replace(fabric, tubes=tuple(tubes))


def tie_knot(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """A weaver's knot: a tight loop of yarn with two short ends."""
    spot = choose_spot(fabric, random, border=0.1)
    # The knots of a fine cloth are as large as those of others.
    pitch = max(min(lane_pixels(fabric)), short_side(fabric) / 34)
    colour = fabric.dye.warp if random.uniform() < 0.5 else fabric.dye.weft
    colour = gain(colour, [random.uniform(0.9, 1.25)] * 3)
    heading = random.uniform(0, 2 * np.pi)
    tubes = [
        lay_thread(
            fabric,
            random,
            start=(
                spot.pixel[0] + random.normal(0, 0.2 * pitch),
                spot.pixel[1] + random.normal(0, 0.2 * pitch),
            ),
            heading=heading + turn,
            length=length * pitch,
            curl=curl,
            radius=random.uniform(0.45, 0.65) * pitch,
            colour=colour,
        )
        for turn, length, curl in (
            (0.0, random.uniform(1.6, 2.8), 9.0),
            (2.1, random.uniform(1.2, 3.0), 3.0),
            (4.2, random.uniform(0.8, 2.2), 3.0),
        )
    ]
    return replace(fabric, tubes=(*fabric.tubes, *tubes))


def weave_wrongly(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Yarns float over several others, or a patch is woven with its pattern out of step."""
    spot = choose_spot(fabric, random, border=0.2)
    over = fabric.over.copy()
    weft, warp = spot.yarn
    if random.uniform() < 0.3:
        tall, wide = random.integers(4, 9, 2)
        patch = (
            slice(weft - tall // 2, weft - tall // 2 + tall),
            slice(warp - wide // 2, warp - wide // 2 + wide),
        )
        over[patch] = ~over[patch]
    elif random.uniform() < 0.5:
        length = random.integers(5, 13)
        rows = slice(weft - length // 2, weft - length // 2 + length)
        for column in range(warp, warp + random.integers(1, 4)):
            over[rows, column] = over[rows, column].mean() < 0.5
    else:
        length = random.integers(5, 13)
        columns = slice(warp - length // 2, warp - length // 2 + length)
        for row in range(weft, weft + random.integers(1, 4)):
            over[row, columns] = over[row, columns].mean() < 0.5
    return replace(fabric, over=over)


def stain(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Oil, rust or water: soft-edged, and it darkens what is there."""
    kind = random.integers(3)
    strength = random.uniform(0.28, 0.85)
    absorbed = np.array([(1.0, 1.0, 0.95), (0.35, 0.8, 1.0), (0.5, 0.5, 0.6)][kind])
    radius = random.uniform(0.05, 0.11) * short_side(fabric)
    soft = random.uniform(0.3, 0.8)
    return blot(
        fabric, random, radius=radius, soft=soft, tint=1 - strength * absorbed, rim=0.6 if kind == 2 else 0.0
    )


DAMAGE: dict[str, Callable[[Fabric, np.random.Generator], Fabric]] = {
    "broken_thread": break_thread,
    "colour_shift": shift_colour,
    "foreign_fibre": lose_fibre,
    "hole": tear_hole,
    "knot": tie_knot,
    "misweave": weave_wrongly,
    "stain": stain,
}


def blot(
    fabric: Fabric,
    random: np.random.Generator,
    *,
    radius: float,
    soft: float,
    tint: NDArray[np.float64],
    rim: float,
) -> Fabric:
    """An irregular patch in which the dyes are multiplied by `tint`; `rim` leaves that share to the patch's edge."""
    spot = choose_spot(fabric, random, border=0.15)
    height, width = fabric.weft_place.across.shape
    y = (np.arange(height, dtype=np.float32) - np.float32(spot.pixel[0]))[:, None]
    x = (np.arange(width, dtype=np.float32) - np.float32(spot.pixel[1]))[None, :]
    x = x * np.float32(random.uniform(0.7, 1.3))
    angle = np.arctan2(y, x)
    edge = np.full_like(angle, radius)
    for lobes in range(1, 6):
        amplitude = radius * random.normal(0, 0.22 / lobes)
        edge += np.float32(amplitude) * np.cos(lobes * angle + np.float32(random.uniform(0, 2 * np.pi)))
    inside = np.sqrt(y * y + x * x) / np.maximum(edge, 0.3 * radius)
    amount = np.clip((1 + soft / 2 - inside) / soft, 0, 1)
    amount = amount * amount * (3 - 2 * amount)
    amount = amount * (1 - rim * np.clip(1.15 - inside, 0, 1))
    change = (tint - 1).astype(np.float32)
    return replace(fabric, tint=1 + amount * change[:, None, None])


def lay_thread(
    fabric: Fabric,
    random: np.random.Generator,
    *,
    start: tuple[float, float],
    heading: float,
    length: float,
    curl: float,
    radius: float,
    colour: Colour,
) -> Tube:
    """A thread on top of the cloth, from `start` on; lengths in rendered pixels, `curl` in radians over its length."""
    steps = max(2, int(length))
    turning = curl * smooth_noise(random, (1, steps), scale=(1, steps / 3))[0] / steps * 2.5
    direction = heading + np.cumsum(turning)
    ys = start[0] + np.cumsum(np.sin(direction))
    xs = start[1] + np.cumsum(np.cos(direction))
    height, width = fabric.weft_place.across.shape
    pad = int(radius) + 2
    top, left = min(height - 1, max(0, int(ys.min()) - pad)), min(width - 1, max(0, int(xs.min()) - pad))
    bottom = max(top + 1, min(height, int(ys.max()) + pad + 2))
    right = max(left + 1, min(width, int(xs.max()) + pad + 2))
    distance = np.full((bottom - top, right - left), np.inf, np.float32)
    for y, x in zip(ys - top, xs - left, strict=True):
        rows = slice(max(0, int(y) - pad), max(0, int(y) + pad + 2))
        columns = slice(max(0, int(x) - pad), max(0, int(x) + pad + 2))
        near = distance[rows, columns]
        if near.size:
            dy = np.arange(rows.start, rows.start + near.shape[0], dtype=np.float32)[:, None] - np.float32(y)
            dx = np.arange(columns.start, columns.start + near.shape[1], dtype=np.float32)[
                None, :
            ] - np.float32(x)
            np.minimum(near, dy * dy + dx * dx, out=near)
    half_pitch = min(lane_pixels(fabric)) / 2
    inside = np.maximum(radius * radius - distance, 0)
    relief = np.where(inside > 0, 1.1 + np.sqrt(inside) / half_pitch, -9).astype(np.float32)
    return Tube((slice(top, bottom), slice(left, right)), relief, colour)


# ── photography ───────────────────────────────────────────────────────────────────────────────────────────


class Sitting(NamedTuple):
    """What one picture is taken with: the same for the cloth with and without its damage."""

    fibres: Field  # (256, 256) streaks, fine from row to row
    light: NDArray[np.float64]  # down, right, up: where the lamp is, length 1
    hair: Field  # share of each image pixel covered by loose fibres, (H, W)
    falloff: Field  # (3, H, W) exposure, tint, uneven light and vignette
    noise: Field  # (3, H, W) of the sensor, unit spread


def set_up(textile: Textile, *, seed: int, size: tuple[int, int]) -> Sitting:
    """Lamp, lens and sensor for one picture."""
    weave, lighting = WEAVES[textile.weave], LIGHTINGS[textile.lighting]
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    azimuth = np.radians(lighting.azimuth + random.normal(0, 4))
    elevation = np.radians(lighting.elevation + random.normal(0, 1))
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    tilt = random.normal(0, 0.025, 2).astype(np.float32)
    falloff = (1 - np.float32(lighting.vignette / 2) * (y * y + x * x)) * (1 + tilt[0] * y + tilt[1] * x)
    exposure = np.array(lighting.tint) * lighting.exposure * (1 + random.normal(0, 0.015))
    return Sitting(
        fibres=smooth_noise(random, (256, 256), scale=(1, 10)),
        light=np.array(
            [np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
        ),
        hair=draw_hairs(random, weave.fuzz, size),
        falloff=falloff * exposure.astype(np.float32)[:, None, None],
        noise=random.standard_normal((3, *size), dtype=np.float32),
    )


def draw_hairs(random: np.random.Generator, fuzz: float, size: tuple[int, int]) -> Field:
    """Loose fibres, which stand off every cloth."""
    sheet = Image.new("L", (size[1] * OVERSAMPLE, size[0] * OVERSAMPLE))
    draw = ImageDraw.Draw(sheet)
    count = random.poisson(fuzz * size[0] * size[1] / 1000)
    turning = np.cumsum(random.normal(0, 0.35, (count, 6)), axis=1) + random.uniform(0, 2 * np.pi, (count, 1))
    step = random.uniform(1.0, 3.5, (count, 1)) * OVERSAMPLE
    xs = random.uniform(0, sheet.width, (count, 1)) + np.cumsum(np.cos(turning) * step, axis=1)
    ys = random.uniform(0, sheet.height, (count, 1)) + np.cumsum(np.sin(turning) * step, axis=1)
    for points, cover in zip(np.stack([xs, ys], axis=2), random.integers(20, 75, count), strict=True):
        draw.line(points.ravel().tolist(), fill=int(cover))
    return np.asarray(sheet.reduce(OVERSAMPLE), np.float32) / 255


def rise(yarns: Yarns, on_top: NDArray[np.bool_], depth: float) -> Field:
    """Height of the yarns' middle lines, (yarns, samples), in half pitches; `on_top` is (yarns, crossings)."""
    steps: Field = np.repeat(np.where(on_top, np.float32(depth), np.float32(-depth)), SAMPLES, axis=1)
    for _ in range(2):  # a yarn bends, it does not jump
        steps = box_mean(steps, SAMPLES // 2 + 1, axis=1)
    return steps + yarns.lift


def box_mean(field: Field, side: int, *, axis: int) -> Field:
    """Mean over `side` neighbours (odd) along one axis of two."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (side // 2 + 1, side // 2)
    sums = np.cumsum(np.pad(field, padding, mode="edge"), axis=axis, dtype=np.float64)
    difference = sums[side:] - sums[:-side] if axis == 0 else sums[:, side:] - sums[:, :-side]
    return (difference / side).astype(np.float32)


class Tables(NamedTuple):
    """All yarns' samples behind one another, the weft's first, so that one index reads either, (samples,)."""

    width: Field
    middle: Field  # height of the yarn's middle line, half pitches
    shade: Field
    foreign: Field
    turn: Field


def tabulate(fabric: Fabric) -> Tables:
    """What a pixel looks up of the yarn below it."""
    weft, warp, depth = fabric.weft, fabric.warp, WEAVES[fabric.textile.weave].depth
    pairs = (
        (weft.width, warp.width),
        (rise(weft, ~fabric.over, depth), rise(warp, fabric.over.T, depth)),
        (weft.shade, warp.shade),
        (weft.foreign, warp.foreign),
        (weft.turn, warp.turn),
    )
    return Tables(*(np.concatenate([own.ravel(), other.ravel()]) for own, other in pairs))


def yarn_relief(tables: Tables, place: Place) -> Field:
    """Height of one yarn system at each rendered pixel, in half pitches; below the floor where there is none."""
    height = tables.middle.take(place.sample)
    height += (tables.middle.take(place.sample + 1) - height) * place.part
    half_width = tables.width.take(place.sample)
    # What lies on top spreads, what lies below is squeezed.
    half_width += (half_width > 0.1) * (np.float32(0.10) * height)
    half_width *= half_width
    half_width -= place.across * place.across
    there = half_width > 0
    np.maximum(half_width, 0, out=half_width)
    height += np.float32(PLUMP) * np.sqrt(half_width)
    return np.where(there, height, np.float32(FLOOR - 1))


def shadow(height: Field, light: NDArray[np.float64]) -> Field:
    """How far each point of a relief in pixels lies below the rays that graze it; 0 = lit."""
    slope = float(light[2] / np.hypot(light[0], light[1]))
    deepest = np.zeros_like(height)
    for step in (2, 4, 7):
        rows, columns = round(step * light[0]), round(step * light[1])
        blocker = np.roll(height, (-rows, -columns), axis=(0, 1))
        blocker -= height
        blocker -= np.float32(step * slope)
        np.maximum(deepest, blocker, out=deepest)
    return deepest


def illuminate(fabric: Fabric, tables: Tables, sitting: Sitting) -> Field:
    """Light that leaves the cloth, (3, h, w) rendered pixels; 1 = a white sheet facing the lamp."""
    weave, lighting = WEAVES[fabric.textile.weave], LIGHTINGS[fabric.textile.lighting]
    half_pitch = np.float32(min(lane_pixels(fabric)) / 2)

    weft_height = yarn_relief(tables, fabric.weft_place)
    height = yarn_relief(tables, fabric.warp_place)
    warp_seen = height > weft_height
    np.maximum(height, weft_height, out=height)
    np.maximum(height, np.float32(FLOOR), out=height)
    solid = height > FLOOR
    sample = np.where(warp_seen, fabric.warp_place.sample, fabric.weft_place.sample)
    across = np.where(warp_seen, fabric.warp_place.across, fabric.weft_place.across)
    along = np.where(warp_seen, fabric.warp_place.along, fabric.weft_place.along)

    # The ply twists around the yarn, and fibres run along the ply.
    turn = tables.turn.take(sample)
    ply = along * np.float32(weave.twist)
    ply += across * np.float32(0.4)
    ply += turn
    twist = np.cos(np.float32(2 * np.pi) * ply)
    row = (ply * 5 + across * 4 + turn * 31).astype(np.int32) & 255
    column = (along * 12 + turn * 57).astype(np.int32) & 255
    fibre = sitting.fibres.take((row << 8) + column)
    height += solid * (np.float32(0.04) * twist + np.float32(0.035) * fibre)

    shade = tables.shade.take(sample)
    shade *= 1 + np.float32(0.11) * fibre + np.float32(0.04) * twist
    foreign = tables.foreign.take(sample) if tables.foreign.any() else None
    planes = []
    for channel in range(3):
        plane = np.where(
            warp_seen, np.float32(fabric.dye.warp[channel]), np.float32(fabric.dye.weft[channel])
        )
        if foreign is not None:
            plane += foreign * (np.float32(fabric.other_dye[channel]) - plane)
        plane *= shade
        if fabric.tint is not None:
            plane *= fabric.tint[channel]
        planes.append(np.where(solid, plane, np.float32(fabric.backdrop[channel])))
    for tube in fabric.tubes:
        above = tube.height > height[tube.window]
        height[tube.window][above] = tube.height[above]
        for plane, colour in zip(planes, tube.colour, strict=True):
            plane[tube.window][above] = colour

    light = sitting.light
    down, right = np.zeros_like(height), np.zeros_like(height)  # slopes
    np.clip((height[2:] - height[:-2]) * (half_pitch / 2), -2.5, 2.5, out=down[1:-1])
    np.clip((height[:, 2:] - height[:, :-2]) * (half_pitch / 2), -2.5, 2.5, out=right[:, 1:-1])
    upright = 1 / np.sqrt(1 + down * down + right * right)
    direct = np.float32(light[2]) - down * np.float32(light[0])
    direct -= right * np.float32(light[1])
    direct *= upright
    np.maximum(direct, 0, out=direct)
    direct *= 1 - np.float32(0.85) * np.minimum(shadow(height * half_pitch, light) * np.float32(0.5), 1)
    # Little light comes out of the creases between yarns.
    open_sky = np.clip((height - np.float32(FLOOR)) * np.float32(1 / (1.2 - FLOOR)), 0, 1)
    open_sky *= upright
    glow = np.float32(0.25 * lighting.ambient) + np.float32(0.75 * lighting.ambient) * open_sky
    glow += np.float32(1 - lighting.ambient) * direct
    # Fibres reflect like thin cylinders (Kajiya and Kay 1989): brightest where the half vector is square to them.
    halfway = light + np.array([0, 0, 1])
    halfway = (halfway / np.linalg.norm(halfway)).astype(np.float32)
    slope = np.where(warp_seen, down, right)
    cosine = np.where(warp_seen, halfway[0], halfway[1]) + slope * halfway[2]
    shine = 1 - cosine * cosine / (1 + slope * slope)
    for _ in range(3):  # to the power of eight
        shine *= shine
    shine *= direct
    shine *= solid * np.float32(weave.sheen)
    glow += shine
    shine *= np.float32(0.1)  # the share that keeps the lamp's colour
    return np.stack([plane * glow + shine for plane in planes])


def expose(lit: Field, fabric: Fabric, sitting: Sitting) -> Field:
    """Light that falls on the sensor, (3, H, W): the lens joins rendered pixels, blurs a little and darkens corners."""
    lit = lit[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    image: Field = lit[:, ::2, ::2] + lit[:, 1::2, ::2] + lit[:, ::2, 1::2] + lit[:, 1::2, 1::2]
    image *= np.float32(0.25)
    stray = np.array(
        [max(own) * 0.7 + 0.03 for own in zip(fabric.dye.warp, fabric.dye.weft, strict=True)], np.float32
    )
    image += sitting.hair * (stray[:, None, None] - image)
    for axis in (1, 2):
        image = np.float32(0.76) * image + np.float32(0.12) * (
            np.roll(image, 1, axis) + np.roll(image, -1, axis)
        )
    return image * sitting.falloff


def develop(light: Field, noise: Field | None, strength: float) -> Field:
    """Light on the sensor to grey levels 0..255, with shot and read noise of `strength` at mid grey (0.2)."""
    if noise is not None:
        light = light + noise * np.float32(strength) * np.sqrt(
            np.float32(2.5) * np.maximum(light, 0) + np.float32(0.1)
        )
    return np.float32(255) * np.power(np.clip(light, 0, 1), np.float32(1 / 2.2))


def visible_change(before: Field, after: Field) -> NDArray[np.bool_]:
    """Where two noiseless pictures (3, H, W) differ by more than VISIBLE in any channel, without pinholes, (H, W)."""
    change: Field = np.abs(after - before).max(axis=0)
    for axis in (0, 1):
        change = box_mean(change, 5, axis=axis)
    changed = Image.fromarray((change > VISIBLE).astype(np.uint8))
    closed = changed.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    return np.asarray(closed) > 0


def touched(before: Fabric, after: Fabric, old: Tables, new: Tables) -> tuple[slice, slice]:
    """A window of the rendered picture that holds all that the damage changes, its shadow included."""
    changed = np.zeros(old.width.shape, np.bool_)
    for table, other in zip(old, new, strict=True):
        changed |= table != other
    hit = changed.take(before.weft_place.sample) | changed.take(before.warp_place.sample)
    for tube in after.tubes:
        hit[tube.window] = True
    if after.tint is not None:
        hit |= np.abs(after.tint - 1).max(axis=0) > 0.002
    rows, columns = np.flatnonzero(hit.any(axis=1)), np.flatnonzero(hit.any(axis=0))
    height, width = hit.shape
    return (
        slice(max(0, int(rows[0]) - MARGIN), min(height, int(rows[-1]) + 1 + MARGIN)),
        slice(max(0, int(columns[0]) - MARGIN), min(width, int(columns[-1]) + 1 + MARGIN)),
    )


def relight(
    lit: Field, window: tuple[slice, slice], fabric: Fabric, tables: Tables, sitting: Sitting
) -> None:
    """Render a window of the picture into `lit` (3, h, w).

    In strips, because arrays that fit the processor's cache are faster. Slopes and shadows are wrong at the border of
    what is rendered, so MARGIN more is rendered than is kept.
    """
    rows, columns = window
    wide = slice(max(0, columns.start - MARGIN), min(lit.shape[2], columns.stop + MARGIN))
    keep_columns = slice(columns.start - wide.start, columns.stop - wide.start)
    for top in range(rows.start, rows.stop, STRIP):
        bottom = min(top + STRIP, rows.stop)
        high = slice(max(0, top - MARGIN), min(lit.shape[1], bottom + MARGIN))
        strip = illuminate(crop(fabric, (high, wide)), tables, sitting)
        lit[:, top:bottom, columns] = strip[:, top - high.start : bottom - high.start, keep_columns]


def crop(fabric: Fabric, window: tuple[slice, slice]) -> Fabric:
    """The part of a fabric that is seen in a window of the rendered picture."""
    tubes = []
    for tube in fabric.tubes:
        seen, kept = [], []
        for own, view in zip(tube.window, window, strict=True):
            start, stop = max(own.start, view.start), min(own.stop, view.stop)
            seen.append(slice(start - view.start, stop - view.start))
            kept.append(slice(start - own.start, stop - own.start))
        if all(part.stop > part.start for part in seen):
            tubes.append(Tube((seen[0], seen[1]), tube.height[kept[0], kept[1]], tube.colour))
    return replace(
        fabric,
        weft_place=fabric.weft_place.part_of(window),
        warp_place=fabric.warp_place.part_of(window),
        tint=None if fabric.tint is None else fabric.tint[:, window[0], window[1]],
        tubes=tuple(tubes),
    )


# ── the ways in ───────────────────────────────────────────────────────────────────────────────────────────


def render(
    textile: Textile,
    *,
    seed: int,
    size: tuple[int, int] = (256, 256),
    defect: str | None = None,
    roll: int | None = None,
) -> Cloth:
    """One photograph of a piece of cloth, damaged or not. Outside the mask both are the same picture.

    `roll` is the seed of what pieces cut from one roll share; without it, every piece has a roll of its own.
    """
    if defect is not None and defect not in DAMAGE:
        raise unknown(
            "defect", defect, DAMAGE, "They are the functions in DAMAGE in normweave/data/textures.py."
        )
    fabric = weave_piece(textile, roll=seed if roll is None else roll, seed=seed, size=size)
    sitting = set_up(textile, seed=seed, size=size)
    tables = tabulate(fabric)
    height, width = fabric.weft_place.across.shape
    lit = np.empty((3, height, width), np.float32)
    relight(lit, (slice(0, height), slice(0, width)), fabric, tables, sitting)
    grain = LIGHTINGS[textile.lighting].noise
    light = expose(lit, fabric, sitting)
    picture = develop(light, sitting.noise, grain)
    mask = np.zeros(size, np.bool_)
    if defect is not None:
        light, mask = plant(fabric, tables, sitting, lit, light, seed=seed, defect=defect)
        picture = np.where(mask, develop(light, sitting.noise, grain), picture)
    return Cloth(np.rint(np.moveaxis(picture, 0, 2)).astype(np.uint8), mask)


def plant(
    fabric: Fabric, tables: Tables, sitting: Sitting, lit: Field, light: Field, *, seed: int, defect: str
) -> tuple[Field, NDArray[np.bool_]]:
    """Damage the cloth where and as `seed` says: the light on the sensor (3, H, W), and the mask (H, W).

    A damage that covers too little or too much of the image is drawn again; after ATTEMPTS, the best fit stays.
    """
    smallest, largest = DEFECT_SHARE
    before = develop(light, None, 0)
    best: tuple[float, Field, NDArray[np.bool_]] | None = None
    for attempt in range(ATTEMPTS):
        key = (4, zlib.crc32(defect.encode()), attempt)
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        damaged = DAMAGE[defect](fabric, random)
        changed = tabulate(damaged)
        relit = lit.copy()
        relight(relit, touched(fabric, damaged, tables, changed), damaged, changed, sitting)
        light = expose(relit, fabric, sitting)
        mask = visible_change(before, develop(light, None, 0))
        share = float(mask.mean())
        miss = max(smallest - share, share - largest, 0.0)
        if best is None or miss < best[0]:
            best = (miss, light, mask)
        if miss == 0:
            break
    assert best is not None
    return best[1], best[2]


class Piece(NamedTuple):
    """One row of the manifest, and what it takes to make its image."""

    textile: Textile
    group: str
    split: str
    defect: str | None
    image_path: str
    mask_path: str
    seed: int
    roll: int


def make_textures(
    folder: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    train_images: int,
    test_images: int,
    defect_images: int,
    seen: Sequence[Textile] = SEEN,
    unseen: Sequence[Textile] = UNSEEN,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set of textiles, as plain folders and as a manifest; returns the manifest's path.

    Counts are per subclass: `train_images` and `test_images` normal, `defect_images` anomalous, dealt out over the
    kinds of defect in turn. Unseen subclasses get no training images. Image number i is the same picture however many
    others are made. A folder made before with the same settings is left as it is. `progress` hears (done, of all).
    """
    settings = {
        "generator": GENERATOR,
        "seed": seed,
        "size": list(size),
        "train_images": train_images,
        "test_images": test_images,
        "defect_images": defect_images,
        "seen": [textile.name for textile in seen],
        "unseen": [textile.name for textile in unseen],
    }
    check_settings(size, (train_images, test_images, defect_images), [*seen, *unseen])
    pieces = [
        piece
        for known, textiles in ((True, seen), (False, unseen))
        for textile in textiles
        for piece in cut(textile, seed, train_images if known else 0, test_images, defect_images)
    ]
    folder = Path(folder)
    manifest, record = folder / "manifest.csv", folder / "textures.json"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not record.is_file():
            raise DataError(f"{folder} exists and was not made here. Choose an empty or a new folder.")
        if json.loads(record.read_text("utf-8")) != settings:
            raise DataError(
                f"{folder} holds textures made with other settings, see {record}. "
                "Choose another folder, or delete this one."
            )
        written = [path for piece in pieces for path in (piece.image_path, piece.mask_path) if path]
        if missing := [path for path in written if not (folder / path).is_file()]:
            raise DataError(
                f"{folder} misses {len(missing)} of its {len(written)} images, first {missing[0]}. "
                "Delete the folder to have it made again."
            )
        return manifest

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
    try:
        for done, piece in enumerate(pieces, start=1):
            cloth = render(piece.textile, seed=piece.seed, size=size, defect=piece.defect, roll=piece.roll)
            save_png(unfinished / piece.image_path, cloth.image)
            if piece.mask_path:
                save_png(unfinished / piece.mask_path, cloth.mask.astype(np.uint8) * 255)
            if progress is not None:
                progress(done, len(pieces))
        write_manifest(unfinished / manifest.name, pieces)
        (unfinished / record.name).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        if folder.exists():
            folder.rmdir()  # empty, as checked above; some systems do not rename onto a folder
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def check_settings(size: tuple[int, int], counts: tuple[int, int, int], textiles: Sequence[Textile]) -> None:
    """Refuse what cannot be made, all mistakes at once."""
    wrong = []
    if min(size) < 64:
        wrong.append(f"size must be 64 x 64 or more, got {size[0]} x {size[1]}")
    for what, count in zip(("train_images", "test_images", "defect_images"), counts, strict=True):
        if count < 0:
            wrong.append(f"{what} must be 0 or more, got {count}")
    names = [textile.name for textile in textiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        wrong.append(f"a textile may be named once, got twice: {', '.join(twice)}")
    if wrong:
        raise ConfigError("textures: " + "; ".join(wrong))


def cut(textile: Textile, seed: int, train: int, test: int, defects: int) -> Iterator[Piece]:
    """The pieces of one subclass. Test pieces, good and damaged, come from the same rolls; training has its own."""
    home = f"cloth/{textile.name}"
    plan: list[
        tuple[str, str | None, int, int]
    ] = []  # split, defect, number in its folder, number in its part
    plan += [("train", None, number, number) for number in range(train)]
    plan += [("test", None, number, number) for number in range(test)]
    plan += [("test", DEFECTS[n % len(DEFECTS)], n // len(DEFECTS), n) for n in range(defects)]
    rolls = {split: cut_rolls(textile, seed, split, max(train, test, defects)) for split in ("train", "test")}
    for split, defect, file_number, number in plan:
        kind = defect or "good"
        roll = rolls[split][number]
        part = "anomalous" if defect else "normal"
        yield Piece(
            textile=textile,
            group=f"{textile.name}/{split}-roll-{roll:03d}",
            split=split,
            defect=defect,
            image_path=f"{home}/{split}/{kind}/{file_number:03d}.png",
            mask_path=f"{home}/ground_truth/{kind}/{file_number:03d}.png" if defect else "",
            seed=derive_seed(seed, textile.name, split, part, number),
            roll=derive_seed(seed, textile.name, split, "roll", roll),
        )


def cut_rolls(textile: Textile, seed: int, split: str, pieces: int) -> list[int]:
    """Which roll each piece is cut from: two to four pieces a roll."""
    random = np.random.default_rng(derive_seed(seed, textile.name, split, "rolls", 0))
    rolls: list[int] = []
    roll = 0
    while len(rolls) < pieces:
        rolls += [roll] * int(random.integers(2, 5))
        roll += 1
    return rolls[:pieces]


def derive_seed(seed: int, name: str, split: str, part: str, number: int) -> int:
    """A seed for one thing, apart from all others."""
    key = (zlib.crc32(name.encode()), zlib.crc32(split.encode()), zlib.crc32(part.encode()), number)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def save_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an image or a mask, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_manifest(path: Path, pieces: Sequence[Piece]) -> None:
    """One row an image, paths relative to the manifest, with forward slashes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ("image_path", "category", "subclass", "group", "split", "label", "defect", "mask_path")
        )
        for piece in pieces:
            label = "anomalous" if piece.defect else "normal"
            start = (piece.image_path, "cloth", piece.textile.name, piece.group, piece.split)
            writer.writerow((*start, label, piece.defect or "", piece.mask_path))
