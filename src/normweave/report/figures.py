"""Histograms of anomaly scores. numpy and Jinja2 only: the server draws them without torch and matplotlib."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from normweave.report.html import render

BINS = 48
WIDTH, HALF, LEFT, GAP = 920, 120, 8, 4
"""Sizes of the drawing: total width, height of each half, margin, space between the halves."""


class Series(NamedTuple):
    """The scores in one half of a histogram."""

    style: str
    """CSS class of the bars; each also has the class `above` or `below`, by its side of the threshold."""
    scores: ArrayLike
    below: str
    """Label of the number of scores at or below the threshold."""
    above: str
    """Label of the number of scores above the threshold."""


def bin_edges(scores: ArrayLike, threshold: float, *, bins: int = BINS) -> NDArray[np.float64]:
    """Return bins + 1 edges of equal distance, of which the threshold is one.

    The bins between the outermost two cover all scores but the lowest and highest half per cent, and the threshold.
    """
    low, high = np.quantile(np.append(np.asarray(scores, dtype=np.float64), threshold), [0.005, 0.995])
    low, high = min(low, threshold), max(high, threshold)
    step = (high - low) / (bins - 2) or 1.0
    before = max(1, math.ceil((threshold - low) / step))
    return threshold + step * np.arange(-before, bins - before + 1)


def bin_counts(scores: ArrayLike, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the number of scores in each bin (left, right]; the outermost bins hold all scores beyond them."""
    position = np.searchsorted(edges, np.asarray(scores, dtype=np.float64)) - 1
    return np.bincount(np.clip(position, 0, len(edges) - 2), minlength=len(edges) - 1)


def score_histogram(
    upper: Series,
    lower: Series,
    *,
    threshold: float,
    axis: str,
    proposed: float | None = None,
    label: str = "threshold",
) -> Markup:
    """Return an SVG with the bars of one series upwards, of the other downwards, and the threshold across both.

    Args:
        axis: label of the horizontal axis.
        proposed: a second threshold, drawn as a thin line; scores above it are not counted.
        label: name of the threshold.
    """
    halves = [np.asarray(series.scores, dtype=np.float64).reshape(-1) for series in (upper, lower)]
    edges = bin_edges(np.concatenate([*halves, [] if proposed is None else [proposed]]), threshold)
    step, middle, bottom = edges[1] - edges[0], 44 + HALF, 68 + 2 * HALF

    def x(score: float) -> float:
        share = (score - edges[0]) / (edges[-1] - edges[0])
        return float(LEFT + np.clip(share, 0, 1) * (WIDTH - 2 * LEFT))

    bars, labels, totals = [], [], []
    for series, scores, upwards in zip((upper, lower), halves, (True, False), strict=True):
        counts = bin_counts(scores, edges)
        for index in np.flatnonzero(counts).tolist():
            height = max(2.0, counts[index] / counts.max() * HALF)
            left, right = edges[index : index + 2].tolist()
            bars.append(
                {
                    "style": f"{series.style} {'above' if (left + right) / 2 > threshold else 'below'}",
                    "x": x(left) + 0.75,
                    "y": middle - GAP / 2 - height if upwards else middle + GAP / 2,
                    "width": (WIDTH - 2 * LEFT) / BINS - 1.5,
                    "height": height,
                    "title": f"{counts[index]} with scores from {left:.4g} to {right:.4g}",
                }
            )
        above = int((scores > threshold).sum())
        y = 34 if upwards else bottom - 6
        named = [f"{series.below}: {len(scores) - above}", f"{series.above}: {above}"]
        labels += [(LEFT, y, named[0], "start"), (WIDTH - LEFT, y, named[1], "end")]
        totals += named
    tick = _tick(step * BINS / 6)
    numbers = np.arange(math.ceil(edges[0] / tick), math.floor(edges[-1] / tick) + 1) * tick
    at = x(threshold)
    return render(
        "histogram.svg",
        width=WIDTH,
        left=LEFT,
        middle=middle,
        bottom=bottom,
        bars=bars,
        labels=labels,
        threshold=at,
        label=label,
        anchor="start" if at < WIDTH * 0.1 else "end" if at > WIDTH * 0.9 else "middle",
        proposed=None if proposed is None else x(proposed),
        ticks=[(x(number), f"{number:.10g}") for number in numbers],
        axis=axis,
        title="; ".join(totals),
    )


def _tick(distance: float) -> float:
    """Return the nearest of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(distance))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda tick: abs(tick - distance))
