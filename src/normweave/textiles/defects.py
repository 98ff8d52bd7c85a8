"""Textile defects: each function returns the fabric with one defect at a random position."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.textiles.weave import MARGIN, SAMPLES, Colour, Fabric, Field, Thread, Yarns, gain, smooth_noise


class Spot(NamedTuple):
    """A position on the fabric."""

    pixel: tuple[float, float]  # rendered pixels
    yarn: tuple[int, int]  # number of the weft and of the warp yarn that cross there


def _choose_spot(fabric: Fabric, random: np.random.Generator, *, border: float) -> Spot:
    """Return a random position that is at least `border` (share of the image) from the edges."""
    height, width = fabric.shape
    y = random.uniform(border, 1 - border) * (height - 2 * MARGIN) + MARGIN
    x = random.uniform(border, 1 - border) * (width - 2 * MARGIN) + MARGIN
    at = int(y), int(x)
    # The crossings along a yarn are the numbers of the yarns of the other direction.
    return Spot((y, x), (int(fabric.warp_position.along[at]), int(fabric.weft_position.along[at])))


def _yarns_at(fabric: Fabric, spot: Spot, *, warpwise: bool) -> tuple[Yarns, int, int, float]:
    """Return one yarn system, the yarn and the crossing at a spot, and the rendered pixels between crossings."""
    weft, warp = spot.yarn
    if warpwise:
        return fabric.warp, warp, weft, fabric.pitch[0]
    return fabric.weft, weft, warp, fabric.pitch[1]


def _with_yarns(fabric: Fabric, yarns: Yarns, *, warpwise: bool) -> Fabric:
    return replace(fabric, warp=yarns) if warpwise else replace(fabric, weft=yarns)


def _stretch(yarns: Yarns, *, start: float, stop: float, taper: float) -> Field:
    """Return 1 along a yarn between two crossings, 0 elsewhere, (samples,); both ends taper over `taper` crossings."""
    along = np.arange(yarns.width.shape[1], dtype=np.float32) / SAMPLES
    return np.clip(np.minimum(along - start, stop - along) / taper + 0.5, 0, 1).astype(np.float32)


def broken_thread(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Remove or thin one to three yarns over a stretch; some leave a loose end on the fabric."""
    spot = _choose_spot(fabric, random, border=0.22)
    warpwise = bool(random.uniform() < 0.5)
    yarns, number, middle, crossing = _yarns_at(fabric, spot, warpwise=warpwise)
    half = random.uniform(0.10, 0.24) * fabric.short_side / crossing
    gone = _stretch(yarns, start=middle - half, stop=middle + half, taper=random.uniform(0.4, 2.5))
    width, lift = yarns.width.copy(), yarns.lift.copy()
    slack = random.uniform() < 0.3
    last = number + int(random.integers(0, 3))
    width[number : last + 1] *= 1 - gone * (random.uniform(0.4, 0.7) if slack else 1)
    lift[number : last + 1] -= 0.3 * gone
    for neighbour in (number - 1, last + 1):  # the neighbours spread into the gap
        width[neighbour] *= 1 + 0.07 * gone
    fabric = _with_yarns(fabric, yarns._replace(width=width, lift=lift), warpwise=warpwise)
    if slack or random.uniform() >= 0.6:
        return fabric
    down, right = (1.0, 0.0) if warpwise else (0.0, 1.0)
    side = random.choice([-1, 1])
    length = random.uniform(2, 5)
    pitch = fabric.pitch
    return _add_thread(
        fabric,
        random,
        start=(
            spot.pixel[0] + side * half * pitch[0] * down,
            spot.pixel[1] + side * half * pitch[1] * right,
        ),
        heading=np.arctan2(down, right) + (np.pi if side > 0 else 0) + random.normal(0, 0.7),
        length=length * pitch[0],
        curl=1.2,
        radius=0.36 * min(pitch),
        colour=fabric.dye.warp if warpwise else fabric.dye.weft,
    )


def colour_shift(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Give some yarns another colour over a stretch, or tint a patch."""
    hue = 1 + random.choice([-1, 1]) * random.uniform(0.6, 1.05) * random.dirichlet([1.2, 1.2, 1.2])
    if random.uniform() < 0.4:
        radius = random.uniform(0.07, 0.11) * fabric.short_side
        return _tint_patch(fabric, random, radius=radius, soft=0.5, tint=hue, rim=0.0)
    spot = _choose_spot(fabric, random, border=0.25)
    warpwise = bool(random.uniform() < 0.5)
    yarns, number, middle, crossing = _yarns_at(fabric, spot, warpwise=warpwise)
    half = random.uniform(0.15, 0.4) * fabric.short_side / crossing
    foreign = yarns.foreign.copy()
    for yarn in range(number, number + int(random.integers(1, 4))):
        shift = random.normal(0, 0.6, 2)
        foreign[yarn] = _stretch(yarns, start=middle - half + shift[0], stop=middle + half + shift[1], taper=0.5)
    dye = fabric.dye.warp if warpwise else fabric.dye.weft
    grey = sum(dye) / 3
    in_hue = random.uniform() < 0.6
    other = gain(dye, hue) if in_hue else gain((grey, grey, grey), [random.uniform(0.6, 1.6)] * 3)
    return replace(_with_yarns(fabric, yarns._replace(foreign=foreign), warpwise=warpwise), other_dye=other)


def foreign_fibre(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Put a fibre of another material on the fabric."""
    spot = _choose_spot(fabric, random, border=0.2)
    red, green, blue = random.choice([0.02, 0.1, 0.35, 0.7], 3) * random.uniform(0.8, 1.2, 3)
    return _add_thread(
        fabric,
        random,
        start=spot.pixel,
        heading=random.uniform(0, 2 * np.pi),
        length=random.uniform(0.15, 0.45) * fabric.short_side,
        curl=random.uniform(0.4, 1.6),
        radius=random.uniform(1.3, 2.6),
        colour=(float(red), float(green), float(blue)),
    )


def hole(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Cut both yarn systems within an irregular oval; their ends fray into it."""
    spot = _choose_spot(fabric, random, border=0.15)
    radii = random.uniform(0.025, 0.075) * fabric.short_side * np.array([1, random.uniform(0.6, 1.6)])
    for warpwise in (False, True):
        yarns, number, middle, crossing = _yarns_at(fabric, spot, warpwise=warpwise)
        lane = fabric.pitch[1 if warpwise else 0]
        across, along = (radii[1], radii[0]) if warpwise else (radii[0], radii[1])
        width, shade, lift = yarns.width.copy(), yarns.shade.copy(), yarns.lift.copy()
        last = int(across / lane)
        for offset in range(-last, last + 1):
            half = along / crossing * np.sqrt(max(0.0, 1 - (offset * lane / across) ** 2))
            start, stop = middle - half + random.normal(0, 0.5), middle + half + random.normal(0, 0.5)
            gone = _stretch(yarns, start=start, stop=stop, taper=random.uniform(0.4, 1.4))
            frayed = _stretch(yarns, start=start - 1.2, stop=stop + 1.2, taper=1.5)
            width[number + offset] *= 1 - gone
            shade[number + offset] *= 1 + 0.25 * frayed
            lift[number + offset] += 0.35 * frayed * random.normal(0.3, 1)
        fabric = _with_yarns(fabric, yarns._replace(width=width, shade=shade, lift=lift), warpwise=warpwise)
    for _ in range(random.integers(8, 18)):
        angle = random.uniform(0, 2 * np.pi)
        fabric = _add_thread(
            fabric,
            random,
            start=(
                spot.pixel[0] + radii[0] * np.sin(angle) * random.uniform(0.8, 1.2),
                spot.pixel[1] + radii[1] * np.cos(angle) * random.uniform(0.8, 1.2),
            ),
            heading=angle + np.pi + random.normal(0, 0.8),
            length=random.uniform(0.3, 1.0) * float(radii.min()),
            curl=2.0,
            radius=random.uniform(0.8, 1.3),
            colour=fabric.dye.warp if random.uniform() < 0.5 else fabric.dye.weft,
        )
    return fabric


def knot(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Tie a weaver's knot: a tight loop of yarn with two short ends."""
    spot = _choose_spot(fabric, random, border=0.1)
    pitch = max(min(fabric.pitch), fabric.short_side / 34)  # knots in fine fabrics are not smaller
    colour = fabric.dye.warp if random.uniform() < 0.5 else fabric.dye.weft
    colour = gain(colour, [random.uniform(0.9, 1.25)] * 3)
    heading = random.uniform(0, 2 * np.pi)
    for turn, length, curl in (
        (0.0, random.uniform(1.6, 2.8), 9.0),
        (2.1, random.uniform(1.2, 3.0), 3.0),
        (4.2, random.uniform(0.8, 2.2), 3.0),
    ):
        y, x = (centre + random.normal(0, 0.2 * pitch) for centre in spot.pixel)
        fabric = _add_thread(
            fabric,
            random,
            start=(y, x),
            heading=heading + turn,
            length=length * pitch,
            curl=curl,
            radius=random.uniform(0.45, 0.65) * pitch,
            colour=colour,
        )
    return fabric


def misweave(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Let yarns float over several others, or invert the pattern of a patch."""
    spot = _choose_spot(fabric, random, border=0.2)
    over = fabric.over.copy()
    weft, warp = spot.yarn
    if random.uniform() < 0.3:
        tall, wide = random.integers(4, 9, 2)
        top, left = weft - tall // 2, warp - wide // 2
        over[top : top + tall, left : left + wide] ^= True
        return replace(fabric, over=over)
    warpwise = random.uniform() < 0.5
    view = over.T if warpwise else over  # (yarns that float, crossings)
    number, middle = (warp, weft) if warpwise else (weft, warp)
    length = random.integers(5, 13)
    first = middle - length // 2
    for yarn in range(number, number + random.integers(1, 4)):
        floating = view[yarn, first : first + length]
        floating[:] = floating.mean() < 0.5
    return replace(fabric, over=over)


def stain(fabric: Fabric, random: np.random.Generator) -> Fabric:
    """Darken a patch with soft edges, as oil, rust or water does."""
    liquid = random.integers(3)
    strength = random.uniform(0.28, 0.85)
    absorbed = np.array([(1.0, 1.0, 0.95), (0.35, 0.8, 1.0), (0.5, 0.5, 0.6)][liquid])
    radius = random.uniform(0.05, 0.11) * fabric.short_side
    soft = random.uniform(0.3, 0.8)
    rim = 0.6 if liquid == 2 else 0.0
    return _tint_patch(fabric, random, radius=radius, soft=soft, tint=1 - strength * absorbed, rim=rim)


def _tint_patch(
    fabric: Fabric,
    random: np.random.Generator,
    *,
    radius: float,
    soft: float,
    tint: NDArray[np.float64],
    rim: float,
) -> Fabric:
    """Multiply the dyes by `tint` (3,) in an irregular patch, weaker inside by the share `rim`."""
    spot = _choose_spot(fabric, random, border=0.15)
    height, width = fabric.shape
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


def _add_thread(
    fabric: Fabric,
    random: np.random.Generator,
    *,
    start: tuple[float, float],
    heading: float,
    length: float,
    curl: float,
    radius: float,
    colour: Colour,
) -> Fabric:
    """Put a thread on top of the fabric; lengths in rendered pixels, `curl` in radians over its length."""
    steps = max(2, int(length))
    turning = curl * smooth_noise(random, (1, steps), scale=(1, steps / 3))[0] / steps * 2.5
    direction = heading + np.cumsum(turning)
    ys = start[0] + np.cumsum(np.sin(direction))
    xs = start[1] + np.cumsum(np.cos(direction))
    height, width = fabric.shape
    pad = int(radius) + 2
    top, left = min(height - 1, max(0, int(ys.min()) - pad)), min(width - 1, max(0, int(xs.min()) - pad))
    bottom = max(top + 1, min(height, int(ys.max()) + pad + 2))
    right = max(left + 1, min(width, int(xs.max()) + pad + 2))
    distance = np.full((bottom - top, right - left), np.inf, np.float32)  # squared
    for y, x in zip(ys - top, xs - left, strict=True):
        rows = slice(max(0, int(y) - pad), max(0, int(y) + pad + 2))
        columns = slice(max(0, int(x) - pad), max(0, int(x) + pad + 2))
        near = distance[rows, columns]
        dy = np.arange(rows.start, rows.start + near.shape[0], dtype=np.float32)[:, None] - np.float32(y)
        dx = np.arange(columns.start, columns.start + near.shape[1], dtype=np.float32) - np.float32(x)
        np.minimum(near, dy * dy + dx * dx, out=near)
    half_pitch = min(fabric.pitch) / 2
    inside = np.maximum(radius * radius - distance, 0)
    relief = np.where(inside > 0, 1.1 + np.sqrt(inside) / half_pitch, -9).astype(np.float32)
    thread = Thread((slice(top, bottom), slice(left, right)), relief, colour)
    return replace(fabric, threads=(*fabric.threads, thread))


ADD_DEFECT: dict[str, Callable[[Fabric, np.random.Generator], Fabric]] = {
    function.__name__: function
    for function in (broken_thread, colour_shift, foreign_fibre, hole, knot, misweave, stain)
}
DEFECTS = tuple(ADD_DEFECT)
