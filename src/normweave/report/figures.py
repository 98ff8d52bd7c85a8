"""The report's pictures: thumbnails with their heat-map, and the scores of normal and anomalous images.

Colours never carry the meaning alone: the heat-map's lightness rises with the score (inferno), regions are outlined,
normal and anomalous scores stand on two sides of one axis.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

THUMBNAIL = 320
"""Longest side of a thumbnail in pixels."""
HEAT_SHARE = 0.65
"""How much of the heat-map covers the grey image."""
TINY = 1e-30
"""A map of one value has no range to divide by."""
OUTLINE = (255, 255, 255)
TRUTH = (0, 229, 255)


class Panels(NamedTuple):
    """Thumbnails of one image, all of one size."""

    image: NDArray[np.uint8]  # (h, w, 3)
    heat: NDArray[np.uint8]  # (h, w, 3) the map over the grey image, outlined where above the operating point
    truth: NDArray[np.uint8] | None  # (h, w, 3) the image with the marked defects outlined; None: none marked


def panels(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    *,
    lowest: float,
    highest: float,
    threshold: float,
) -> Panels:
    """Image (H, W, 3), map (H, W) and truth (H, W) side by side.

    Args:
        lowest: the score that is shown darkest.
        highest: the score that is shown lightest.
        threshold: scores above are outlined.
    """
    from matplotlib import colormaps

    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    heat = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    share = np.clip((heat - lowest) / max(highest - lowest, TINY), 0, 1)
    grey = small.mean(axis=2, keepdims=True)
    colour = colormaps["inferno"](share)[..., :3] * 255
    shown = ((1 - HEAT_SHARE) * grey + HEAT_SHARE * colour).astype(np.uint8)
    truth = None
    if mask is not None and mask.any():
        covered = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
        truth = _outlined(small, np.asarray(covered) > 0, TRUTH)
    return Panels(small, _outlined(shown, heat > threshold, OUTLINE), truth)


def _outlined(
    image: NDArray[np.uint8], region: NDArray[np.bool_], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """A line just outside of the region, with a dark one around it, so that it shows on every ground."""
    first = _grown(_grown(region))
    result = image.copy()
    result[_grown(first) & ~first] = 0
    result[first & ~region] = colour
    return result


def _grown(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """One pixel more on all sides and corners."""
    around = np.pad(region, 1)
    tall = around[:-2] | around[1:-1] | around[2:]
    return np.asarray(tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:])


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image (h, w, 3) to be written into a page."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


BARS = 48
WIDTH, HALF, LEFT, GAP = 920, 120, 8, 4  # of the drawing; each class has a half


def score_histogram(normal: ArrayLike, anomalous: ArrayLike, *, line: float, axis: str) -> str:
    """Scores of normal images upwards, of anomalous ones downwards, and the operating point between: SVG.

    Bars on the wrong side of the line are drawn full, the others pale. Colours come from the page's style sheet. The
    outermost half percent on either side is put into the outermost bars.

    Args:
        line: the operating point; scores above are called anomalous.
        axis: what the scores are.
    """
    sides = {
        "normal": np.asarray(normal, dtype=np.float64),
        "anomalous": np.asarray(anomalous, dtype=np.float64),
    }
    low, step = _bars(np.concatenate(list(sides.values())), line)
    counts = {name: _counted(scores, low, step) for name, scores in sides.items()}
    at_line = (line - low) / step

    def x(bar: float) -> float:
        return LEFT + bar / BARS * (WIDTH - 2 * LEFT)

    parts: list[str] = []
    middle = 44 + HALF
    for name, upwards in (("normal", True), ("anomalous", False)):
        tallest = max(1, counts[name].max())
        for bar in np.flatnonzero(counts[name]).tolist():
            height = max(2.0, counts[name][bar] / tallest * HALF)
            above = bar >= round(at_line)
            wrong = "wrong" if above == upwards else "right"
            top = middle - GAP / 2 - height if upwards else middle + GAP / 2
            parts.append(
                f'<rect class="{name} {wrong}" x="{x(bar) + 0.75:.1f}" y="{top:.1f}" '
                f'width="{x(1) - x(0) - 1.5:.1f}" height="{height:.1f}" rx="1.5"/>'
            )
    where = x(at_line)
    alarms, found = (int((sides[name] > line).sum()) for name in ("normal", "anomalous"))
    passed, missed = len(sides["normal"]) - alarms, len(sides["anomalous"]) - found
    low_end, high_end = LEFT, WIDTH - LEFT
    bottom = middle + HALF + 24
    parts += [
        f'<line class="axis" x1="{low_end}" x2="{high_end}" y1="{middle}" y2="{middle}"/>',
        f'<line class="point" x1="{where:.1f}" x2="{where:.1f}" y1="20" y2="{bottom + 4}"/>',
        _text(where, 13, "operating point", _anchor(where), "strong"),
        _text(low_end, 34, f"good, passed: {passed}", "start"),
        _text(high_end, 34, f"good, false alarms: {alarms}", "end"),
        _text(low_end, bottom - 6, f"defective, missed: {missed}", "start"),
        _text(high_end, bottom - 6, f"defective, found: {found}", "end"),
    ]
    parts.append(f'<line class="axis" x1="{low_end}" x2="{high_end}" y1="{bottom + 4}" y2="{bottom + 4}"/>')
    tick = _tick(step * BARS / 6)
    for value in np.arange(math.ceil(low / tick), math.floor((low + BARS * step) / tick) + 1) * tick:
        at = x((value - low) / step)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom + 4}" y2="{bottom + 10}"/>')
        parts.append(_text(at, bottom + 26, f"{value:.10g}", "middle"))
    parts.append(_text(WIDTH / 2, bottom + 48, axis, "middle"))
    title = (
        f"{len(sides['normal'])} good images, of which {alarms} lie above the operating point; "
        f"{len(sides['anomalous'])} defective images, of which {missed} lie below it."
    )
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {bottom + 56}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _bars(scores: NDArray[np.float64], line: float) -> tuple[float, float]:
    """Where the first of BARS bars begins and how wide each is; the line lies between two of them."""
    low, high = np.quantile(np.append(scores, line), [0.005, 0.995])
    low, high = min(low, line), max(high, line)
    step = (high - low) / (BARS - 2) or 1.0
    before = math.ceil((line - low) / step)
    return line - max(1, before) * step, step


def _counted(scores: NDArray[np.float64], low: float, step: float) -> NDArray[np.int64]:
    """Images in each bar (low, low + step]: a score that equals the line lies below it."""
    place = np.ceil((scores - low) / step - 1e-9).astype(np.int64) - 1
    return np.bincount(np.clip(place, 0, BARS - 1), minlength=BARS)


def _tick(wanted: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda tick: abs(tick - wanted))


def _anchor(x: float) -> str:
    return "start" if x < WIDTH * 0.1 else "end" if x > WIDTH * 0.9 else "middle"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
