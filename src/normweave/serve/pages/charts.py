"""Charts of plain boxes that grow with the page: no script, every bar says its numbers when pointed at.

What the colours say, hatching and the key say too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from normweave.serve.pages.verdict import KINDS, WORDS, Kind
from normweave.serve.records import Bucket, Count

BINS = 40
REACH = 4.0
"""The axis ends this many times as far from the lowest score as the line lies."""
MOST_COLUMNS = 200
COLUMN = 64
"""Pixels of a column at most."""
STEPS: dict[Bucket, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
}


def histogram(
    normals: ArrayLike, stored: ArrayLike, *, line: float, moved: float | None, upper: str, lower: str
) -> str:
    """Scores of held-out good parts upwards, of stored inspections downwards, and the line across both.

    Args:
        line: where it is.
        moved: where it would be; None: nowhere else.
        upper: what the bars upwards are, for the key.
        lower: the same of those downwards.
    """
    above, below = np.asarray(normals, dtype=np.float64), np.asarray(stored, dtype=np.float64)
    lines = [line] if moved is None else [line, moved]
    everything = np.concatenate([above, below, lines])
    low = float(everything.min())
    span = max(max(lines) - low, 1e-9)
    high = min(
        max(float(everything.max()), low + 1.2 * span), low + REACH * span
    )  # the last bar holds what is beyond
    step = (high - low) / (BINS - 2)
    low = line - step * math.ceil((line - low) / step + 0.5)  # the line lies between two bars
    high = low + BINS * step
    edges = low + step * np.arange(BINS + 1)

    def side(scores: np.ndarray, where: str, kind: str, what: str) -> str:
        bins = np.clip(
            np.ceil((scores - low) / step).astype(np.int64) - 1, 0, BINS - 1
        )  # a score on the line is below
        counts = np.bincount(bins, minlength=BINS)
        tallest = max(1, int(counts.max(initial=0)))
        bars = []
        for count, left, right in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
            colour = kind if (left + right) / 2 <= line else "anomalous"
            height = f"{100 * count / tallest:.1f}%" if count else "0"
            told = f"{count} {what}, score {left:.4g} " + (f"to {right:.4g}" if right < high else "and above")
            bars.append(f'<span class="{colour}" style="height:{height}" title="{escape(told)}"></span>')
        return f'<div class="bars {where}">{"".join(bars)}</div>'

    def at(score: float) -> float:
        return 100 * (score - low) / (high - low)

    marks = f'<span class="mark" style="left:{at(line):.2f}%"></span>'
    if moved is not None:
        marks += f'<span class="mark moved" style="left:{at(moved):.2f}%"></span>'
    beyond = f"{int((above > line).sum())} of {len(above)} {upper}, {int((below > line).sum())} of {len(below)} {lower}"
    ticks = "".join(f"<span>{low + share * (high - low):.3g}</span>" for share in (0, 0.25, 0.5, 0.75))
    ticks += f"<span>{high:.3g}{'+' if everything.max() > high else ''}</span>"
    dashed = "" if moved is None else f'<span><i class="key dashed"></i>the line moved: {moved:.4g}</span>'
    return (
        f'<figure class="chart" role="img" aria-label="Beyond the line: {escape(beyond)}">'
        f'<div class="plot">{side(above, "up", "normal", upper)}{side(below, "down", "plain", lower)}{marks}</div>'
        f'<div class="ticks">{ticks}</div>'
        f'<figcaption><span><i class="key normal"></i>{escape(upper)} ({len(above)}), upwards</span>'
        f'<span><i class="key plain"></i>{escape(lower)} ({len(below)}), downwards</span>'
        f'<span><i class="key anomalous"></i>beyond the line</span>'
        f'<span><i class="key solid"></i>the line: {line:.4g}</span>{dashed}</figcaption></figure>'
    )


def over_time(counts: Sequence[Count], *, bucket: Bucket, shares: bool) -> str:
    """How many inspections of each verdict, one column an hour, day or week; the newest 200 columns at most.

    Args:
        shares: every column is as tall as the others, so that rates are compared instead of numbers.
    """
    columns: dict[datetime, dict[Kind, int]] = {}
    for count in counts:
        column = columns.setdefault(count.start, dict.fromkeys(KINDS, 0))
        for kind in KINDS:
            column[kind] += getattr(count, kind)
    if not columns:
        return '<p class="soft none">No inspections in this span of time.</p>'
    starts = [max(columns)]
    while starts[-1] - STEPS[bucket] >= min(columns) and len(starts) < MOST_COLUMNS:
        starts.append(starts[-1] - STEPS[bucket])
    starts.reverse()
    empty = dict.fromkeys(KINDS, 0)
    whole = [columns.get(start, empty) for start in starts]
    tallest = max(1, max(sum(column.values()) for column in whole))
    drawn = []
    for start, column in zip(starts, whole, strict=True):
        total = sum(column.values())
        scale = (total or 1) if shares else tallest
        parts = "".join(
            f'<span class="{kind}" style="height:{100 * column[kind] / scale:.2f}%"></span>'
            for kind in reversed(KINDS)
            if column[kind]
        )
        told = ", ".join(f"{column[kind]} {WORDS[kind].lower()}" for kind in KINDS if column[kind]) or "none"
        drawn.append(f'<div class="stack" title="{moment(start, bucket)}: {told}">{parts}</div>')
    ends = [starts[0], starts[len(starts) // 2], starts[-1]] if len(starts) > 4 else [starts[0]]
    ticks = "".join(f"<span>{moment(start, bucket)}</span>" for start in ends)
    width = f"max-width:{max(4, len(starts)) * COLUMN}px"
    totals = {kind: sum(column[kind] for column in whole) for kind in KINDS}
    everything = max(1, sum(totals.values()))
    rates = {kind: f"{100 * totals[kind] / everything:.1f}\u00a0%" for kind in KINDS}
    key = "".join(
        f'<span><i class="key {kind}"></i>{WORDS[kind]}: {totals[kind]} ({rates[kind]})</span>'
        for kind in KINDS
    )
    told = ", ".join(f"{totals[kind]} {WORDS[kind].lower()}" for kind in KINDS)
    return (
        f'<figure class="chart" role="img" aria-label="{told}"><div style="{width}">'
        f'<div class="top-tick">{"100 %" if shares else tallest}</div>'
        f'<div class="plot columns">{"".join(drawn)}</div><div class="ticks">{ticks}</div></div>'
        f"<figcaption>{key}</figcaption></figure>"
    )


def moment(start: datetime, bucket: Bucket) -> str:
    """When a column begins, by the clock of this machine."""
    return f"{start.astimezone():%d %b %H:%M}" if bucket == "hour" else f"{start:%d %b %Y}"
