"""Photographs of a fabric: relief, light and shadow, lens, sensor.

    Fabric -> Tables -> relief, reflected light (3, h, w) -> light on the sensor (3, H, W) -> grey levels (3, H, W)

(h, w) are rendered pixels, (H, W) image pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from normweave.textiles.weave import (
    MARGIN,
    OVERSAMPLE,
    SAMPLES,
    Colour,
    Fabric,
    Field,
    Weave,
    Window,
    YarnPosition,
    Yarns,
    smooth_noise,
)

STRIP = 128  # rendered rows at a time
FLOOR = -1.3  # half pitches; height of the table that is visible through gaps
PLUMP = 0.75  # a yarn's thickness as a share of its width: the fabric is pressed
VISIBLE = 7.0  # grey levels (0..255), mean of 5 x 5 pixels: a greater difference counts as a visible change


@dataclass(frozen=True)
class Lighting:
    """The lamp and the camera."""

    azimuth: float  # degrees, direction of the lamp: 0 right, 90 below, 180 left
    elevation: float  # degrees above the fabric; low = raking
    ambient: float  # share of light that comes from all directions
    tint: Colour  # gain of each channel
    exposure: float
    vignette: float  # share of light lost in the corners
    noise: float  # std of the camera noise at mid grey, as a share of white


LIGHTINGS = {  # azimuth, elevation, ambient, tint, exposure, vignette, noise
    "raking": Lighting(205.0, 24.0, 0.20, (1.03, 1.0, 0.95), 1.35, 0.10, 0.012),
    "diffuse": Lighting(250.0, 62.0, 0.55, (1.0, 1.0, 1.0), 1.0, 0.05, 0.009),
    "warm": Lighting(300.0, 40.0, 0.32, (1.14, 1.0, 0.76), 1.05, 0.14, 0.013),
    "cold": Lighting(160.0, 44.0, 0.35, (0.88, 1.0, 1.16), 1.05, 0.08, 0.011),
    "dim": Lighting(230.0, 36.0, 0.30, (1.05, 1.0, 0.90), 0.62, 0.18, 0.015),
}


class CameraSetup(NamedTuple):
    """The random part of one photograph: the same for the fabric with and without its defect."""

    lighting: Lighting
    fibres: Field  # (256, 256) streaks, fine from row to row
    light: NDArray[np.float64]  # (3,) down, right, up: direction of the lamp, length 1
    hair: Field  # share of each image pixel covered by loose fibres, (H, W)
    falloff: Field  # (3, H, W) exposure, tint, uneven light and vignette
    noise: Field  # (3, H, W) of the sensor, unit std


class Tables(NamedTuple):
    """The samples of all yarns, flattened, the weft's before the warp's, (samples,)."""

    width: Field
    middle: Field  # height of the yarn's centre line, half pitches
    shade: Field
    foreign: Field
    turn: Field


def set_up(weave: Weave, lighting: Lighting, *, seed: int, size: tuple[int, int]) -> CameraSetup:
    """Draw lamp, lens, loose fibres and sensor noise of one photograph of (H, W) pixels."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    azimuth = np.radians(lighting.azimuth + random.normal(0, 4))
    elevation = np.radians(lighting.elevation + random.normal(0, 1))
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    tilt = random.normal(0, 0.025, 2).astype(np.float32)
    falloff = (1 - np.float32(lighting.vignette / 2) * (y * y + x * x)) * (1 + tilt[0] * y + tilt[1] * x)
    exposure = np.array(lighting.tint) * lighting.exposure * (1 + random.normal(0, 0.015))
    return CameraSetup(
        lighting=lighting,
        fibres=smooth_noise(random, (256, 256), scale=(1, 10)),
        light=np.array([np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]),
        hair=_draw_hairs(random, weave.fuzz, size),
        falloff=falloff * exposure.astype(np.float32)[:, None, None],
        noise=random.standard_normal((3, *size), dtype=np.float32),
    )


def _draw_hairs(random: np.random.Generator, fuzz: float, size: tuple[int, int]) -> Field:
    """Return the share of each pixel that loose fibres cover, (H, W)."""
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


def tabulate(fabric: Fabric) -> Tables:
    """Return the tables that the pixels of a fabric look up."""
    weft, warp = fabric.weft, fabric.warp
    pairs = (
        (weft.width, warp.width),
        (_rise(weft, ~fabric.over, fabric.weave.depth), _rise(warp, fabric.over.T, fabric.weave.depth)),
        (weft.shade, warp.shade),
        (weft.foreign, warp.foreign),
        (weft.turn, warp.turn),
    )
    return Tables(*(np.concatenate([own.ravel(), other.ravel()]) for own, other in pairs))


def _rise(yarns: Yarns, on_top: NDArray[np.bool_], depth: float) -> Field:
    """Return the height of the yarns' centre lines, (yarns, samples) in half pitches; `on_top`: (yarns, crossings)."""
    steps: Field = np.repeat(np.where(on_top, np.float32(depth), np.float32(-depth)), SAMPLES, axis=1)
    for _ in range(2):  # a yarn bends smoothly
        steps = _box_mean(steps, SAMPLES // 2 + 1, axis=1)
    return steps + yarns.lift


def _box_mean(field: Field, side: int, *, axis: int) -> Field:
    """Return the mean over `side` neighbours (odd) along one axis of two."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (side // 2 + 1, side // 2)
    sums = np.cumsum(np.pad(field, padding, mode="edge"), axis=axis, dtype=np.float64)
    difference = sums[side:] - sums[:-side] if axis == 0 else sums[:, side:] - sums[:, :-side]
    return (difference / side).astype(np.float32)


def _yarn_relief(tables: Tables, position: YarnPosition) -> Field:
    """Return the height of one yarn system, (h, w) in half pitches; below the floor where it has no yarn."""
    height = tables.middle.take(position.sample)
    height += (tables.middle.take(position.sample + 1) - height) * position.fraction
    half_width = tables.width.take(position.sample)
    # A yarn on top spreads, a yarn below is squeezed.
    half_width += (half_width > 0.1) * (np.float32(0.10) * height)
    half_width *= half_width
    half_width -= position.across * position.across
    present = half_width > 0
    np.maximum(half_width, 0, out=half_width)
    height += np.float32(PLUMP) * np.sqrt(half_width)
    return np.where(present, height, np.float32(FLOOR - 1))


def _shadow(height: Field, light: NDArray[np.float64]) -> Field:
    """Return the depth of each point of a relief (in pixels) below the grazing rays of the lamp; 0 = lit."""
    slope = float(light[2] / np.hypot(light[0], light[1]))
    deepest = np.zeros_like(height)
    for step in (2, 4, 7):
        rows, columns = round(step * light[0]), round(step * light[1])
        blocker = np.roll(height, (-rows, -columns), axis=(0, 1))
        blocker -= height
        blocker -= np.float32(step * slope)
        np.maximum(deepest, blocker, out=deepest)
    return deepest


def _illuminate(fabric: Fabric, tables: Tables, setup: CameraSetup) -> Field:
    """Return the light that the fabric reflects, (3, h, w); 1 = a white sheet that faces the lamp."""
    ambient = setup.lighting.ambient
    half_pitch = np.float32(min(fabric.pitch) / 2)

    weft_height = _yarn_relief(tables, fabric.weft_position)
    height = _yarn_relief(tables, fabric.warp_position)
    warp_visible = height > weft_height
    np.maximum(height, weft_height, out=height)
    np.maximum(height, np.float32(FLOOR), out=height)
    solid = height > FLOOR
    sample = np.where(warp_visible, fabric.warp_position.sample, fabric.weft_position.sample)
    across = np.where(warp_visible, fabric.warp_position.across, fabric.weft_position.across)
    along = np.where(warp_visible, fabric.warp_position.along, fabric.weft_position.along)

    # The ply twists around the yarn, and fibres run along the ply.
    turn = tables.turn.take(sample)
    ply = along * np.float32(fabric.weave.twist)
    ply += across * np.float32(0.4)
    ply += turn
    twist = np.cos(np.float32(2 * np.pi) * ply)
    row = (ply * 5 + across * 4 + turn * 31).astype(np.int32) & 255
    column = (along * 12 + turn * 57).astype(np.int32) & 255
    fibre = setup.fibres.take((row << 8) + column)
    height += solid * (np.float32(0.04) * twist + np.float32(0.035) * fibre)

    shade = tables.shade.take(sample)
    shade *= 1 + np.float32(0.11) * fibre + np.float32(0.04) * twist
    foreign = tables.foreign.take(sample) if tables.foreign.any() else None
    planes = []
    for channel in range(3):
        warp, weft = np.float32(fabric.dye.warp[channel]), np.float32(fabric.dye.weft[channel])
        plane = np.where(warp_visible, warp, weft)
        if foreign is not None:
            plane += foreign * (np.float32(fabric.other_dye[channel]) - plane)
        plane *= shade
        if fabric.tint is not None:
            plane *= fabric.tint[channel]
        planes.append(np.where(solid, plane, np.float32(fabric.backdrop[channel])))
    for thread in fabric.threads:
        above = thread.height > height[thread.window]
        height[thread.window][above] = thread.height[above]
        for plane, colour in zip(planes, thread.colour, strict=True):
            plane[thread.window][above] = colour

    light = setup.light
    down, right = np.zeros_like(height), np.zeros_like(height)  # slopes
    np.clip((height[2:] - height[:-2]) * (half_pitch / 2), -2.5, 2.5, out=down[1:-1])
    np.clip((height[:, 2:] - height[:, :-2]) * (half_pitch / 2), -2.5, 2.5, out=right[:, 1:-1])
    upright = 1 / np.sqrt(1 + down * down + right * right)
    direct = np.float32(light[2]) - down * np.float32(light[0])
    direct -= right * np.float32(light[1])
    direct *= upright
    np.maximum(direct, 0, out=direct)
    direct *= 1 - np.float32(0.85) * np.minimum(_shadow(height * half_pitch, light) * np.float32(0.5), 1)
    # Creases between yarns receive little light.
    open_sky = np.clip((height - np.float32(FLOOR)) * np.float32(1 / (1.2 - FLOOR)), 0, 1)
    open_sky *= upright
    glow = np.float32(0.25 * ambient) + np.float32(0.75 * ambient) * open_sky
    glow += np.float32(1 - ambient) * direct
    # Fibres reflect like thin cylinders (Kajiya and Kay 1989): brightest if perpendicular to the half vector.
    halfway = light + np.array([0, 0, 1])
    halfway = (halfway / np.linalg.norm(halfway)).astype(np.float32)
    slope = np.where(warp_visible, down, right)
    cosine = np.where(warp_visible, halfway[0], halfway[1]) + slope * halfway[2]
    shine = 1 - cosine * cosine / (1 + slope * slope)
    for _ in range(3):  # to the power of eight
        shine *= shine
    shine *= direct
    shine *= solid * np.float32(fabric.weave.sheen)
    glow += shine
    shine *= np.float32(0.1)  # the share that keeps the lamp's colour
    return np.stack([plane * glow + shine for plane in planes])


def render_window(reflected: Field, window: Window, fabric: Fabric, tables: Tables, setup: CameraSetup) -> None:
    """Render a window of the reflected light into `reflected` (3, h, w).

    In strips, because arrays that fit the processor's cache are faster. Slopes and shadows are wrong at the border of
    what is rendered, so MARGIN more is rendered than is kept.
    """
    rows, columns = window
    wide = slice(max(0, columns.start - MARGIN), min(reflected.shape[2], columns.stop + MARGIN))
    kept = slice(columns.start - wide.start, columns.stop - wide.start)
    for top in range(rows.start, rows.stop, STRIP):
        bottom = min(top + STRIP, rows.stop)
        high = slice(max(0, top - MARGIN), min(reflected.shape[1], bottom + MARGIN))
        strip = _illuminate(fabric.crop((high, wide)), tables, setup)
        reflected[:, top:bottom, columns] = strip[:, top - high.start : bottom - high.start, kept]


def expose(reflected: Field, fabric: Fabric, setup: CameraSetup) -> Field:
    """Return the light on the sensor, (3, H, W): the lens averages rendered pixels, blurs, and darkens corners."""
    reflected = reflected[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    light: Field = reflected[:, ::2, ::2] + reflected[:, 1::2, ::2]
    light = light + reflected[:, ::2, 1::2] + reflected[:, 1::2, 1::2]
    light *= np.float32(0.25)
    stray = [max(own) * 0.7 + 0.03 for own in zip(fabric.dye.warp, fabric.dye.weft, strict=True)]
    light += setup.hair * (np.array(stray, np.float32)[:, None, None] - light)
    for axis in (1, 2):
        neighbours = np.roll(light, 1, axis) + np.roll(light, -1, axis)
        light = np.float32(0.76) * light + np.float32(0.12) * neighbours
    return light * setup.falloff


def grey_levels(light: Field, setup: CameraSetup | None = None) -> Field:
    """Return light on the sensor as grey levels 0..255, with the sensor noise of `setup` if given."""
    if setup is not None:
        std = np.sqrt(np.float32(2.5) * np.maximum(light, 0) + np.float32(0.1))  # shot and read noise
        light = light + setup.noise * np.float32(setup.lighting.noise) * std
    return np.float32(255) * np.power(np.clip(light, 0, 1), np.float32(1 / 2.2))


def visible_change(before: Field, after: Field) -> NDArray[np.bool_]:
    """Return where two noiseless images (3, H, W) differ by more than VISIBLE, without pinholes, (H, W)."""
    change: Field = np.abs(after - before).max(axis=0)
    for axis in (0, 1):
        change = _box_mean(change, 5, axis=axis)
    changed = Image.fromarray((change > VISIBLE).astype(np.uint8))
    closed = changed.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    return np.asarray(closed) > 0


def changed_window(before: Fabric, after: Fabric, old: Tables, new: Tables) -> Window:
    """Return a window of rendered pixels that contains everything a defect changes, its shadow included."""
    changed = np.zeros(old.width.shape, np.bool_)
    for table, other in zip(old, new, strict=True):
        changed |= table != other
    hit = changed.take(before.weft_position.sample) | changed.take(before.warp_position.sample)
    for thread in after.threads:
        hit[thread.window] = True
    if after.tint is not None:
        hit |= np.abs(after.tint - 1).max(axis=0) > 0.002
    rows, columns = np.flatnonzero(hit.any(axis=1)), np.flatnonzero(hit.any(axis=0))
    height, width = hit.shape
    return (
        slice(max(0, int(rows[0]) - MARGIN), min(height, int(rows[-1]) + 1 + MARGIN)),
        slice(max(0, int(columns[0]) - MARGIN), min(width, int(columns[-1]) + 1 + MARGIN)),
    )
