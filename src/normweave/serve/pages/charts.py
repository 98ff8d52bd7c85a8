"""Charts of HTML boxes: no script; each bar shows its numbers as a tooltip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normweave.serve.pages.verdict import Result
from normweave.serve.records import Bucket, Count
from normweave.serve.templating import render_macro

TEMPLATE = "charts.html"
BINS = 40
REACH = 4.0
"""The axis ends at most this many times as far from the lowest score as the limit."""
MOST_COLUMNS = 200
COLUMN_PIXELS = 64
"""Largest width of a column."""
STEPS: dict[Bucket, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
}


def histogram(
    normals: ArrayLike, stored: ArrayLike, *, limit: float, moved: float | None, upper: str, lower: str
) -> str:
    """Draw scores of held-out good parts upwards, of stored inspections downwards, and the limit across both.

    Args:
        limit: the threshold.
        moved: another threshold to compare with, if any.
        upper: name of the upper bars in the key.
        lower: name of the lower bars in the key.
    """
    above, below = np.asarray(normals, dtype=np.float64), np.asarray(stored, dtype=np.float64)
    limits = [limit] if moved is None else [limit, moved]
    scores = np.concatenate([above, below, limits])
    low, highest = float(scores.min()), float(scores.max())
    span = max(max(limits) - low, 1e-9)
    high = min(max(highest, low + 1.2 * span), low + REACH * span)  # the last bar holds the scores beyond
    step = (high - low) / (BINS - 2)
    low = limit - step * math.ceil((limit - low) / step + 0.5)  # the limit is between two bars
    high = low + BINS * step
    edges = low + step * np.arange(BINS + 1)

    def side(scores: NDArray[np.float64], direction: str, colour: str, name: str) -> dict[str, object]:
        bins = np.clip(
            np.ceil((scores - low) / step).astype(np.int64) - 1, 0, BINS - 1
        )  # limit itself: below
        counts = np.bincount(bins, minlength=BINS)
        tallest = max(1, int(counts.max(initial=0)))
        bars = [
            {
                "colour": colour if (left + right) / 2 <= limit else "anomalous",
                "height": f"{100 * count / tallest:.1f}%" if count else "0",
                "title": f"{count} {name}, score {left:.4g} "
                + (f"to {right:.4g}" if right < high else "and above"),
            }
            for count, left, right in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        ]
        return {"direction": direction, "colour": colour, "name": name, "n": len(scores), "bars": bars}

    def at(score: float) -> float:
        return 100 * (score - low) / (high - low)

    ticks = [f"{low + share * (high - low):.3g}" for share in (0, 0.25, 0.5, 0.75, 1)]
    return render_macro(
        TEMPLATE,
        "histogram",
        sides=[side(above, "up", "normal", upper), side(below, "down", "plain", lower)],
        beyond=f"{(above > limit).sum()} of {len(above)} {upper}, {(below > limit).sum()} of {len(below)} {lower}",
        limit=limit,
        limit_at=at(limit),
        moved=moved,
        moved_at=None if moved is None else at(moved),
        ticks=[*ticks[:-1], ticks[-1] + ("+" if highest > high else "")],
    )


def over_time(counts: Sequence[Count], *, bucket: Bucket, shares: bool) -> str:
    """Draw the number of inspections of each result, one column an hour, day or week; at most the newest 200 columns.

    Args:
        shares: draw all columns equally tall, to compare rates instead of numbers.
    """
    by_start: dict[datetime, dict[Result, int]] = {}
    for count in counts:
        column = by_start.setdefault(count.start, dict.fromkeys(Result, 0))
        for result in Result:
            column[result] += getattr(count, result)
    starts = [max(by_start)] if by_start else []
    while starts and starts[-1] - STEPS[bucket] >= min(by_start) and len(starts) < MOST_COLUMNS:
        starts.append(starts[-1] - STEPS[bucket])
    starts.reverse()
    drawn = [by_start.get(start, dict.fromkeys(Result, 0)) for start in starts]
    tallest = max([1, *(sum(column.values()) for column in drawn)])
    columns = []
    for start, column in zip(starts, drawn, strict=True):
        scale = (sum(column.values()) or 1) if shares else tallest
        present = [result for result in Result if column[result]]
        numbers = ", ".join(f"{column[result]} {result.word.lower()}" for result in present) or "none"
        parts = [(result, 100 * column[result] / scale) for result in reversed(present)]
        columns.append({"title": f"{moment(start, bucket)}: {numbers}", "parts": parts})
    totals = {result: sum(column[result] for column in drawn) for result in Result}
    n = max(1, sum(totals.values()))
    ends = [starts[0], starts[len(starts) // 2], starts[-1]] if len(starts) > 4 else starts[:1]
    return render_macro(
        TEMPLATE,
        "over_time",
        columns=columns,
        totals=[(result, total, f"{100 * total / n:.1f}\u00a0%") for result, total in totals.items()],
        label=", ".join(f"{total} {result.word.lower()}" for result, total in totals.items()),
        width=max(4, len(starts)) * COLUMN_PIXELS,
        top="100 %" if shares else tallest,
        ticks=[moment(start, bucket) for start in ends],
    )


def moment(start: datetime, bucket: Bucket) -> str:
    """Return the start of a column: hours in the time zone of this machine, days and weeks as dates."""
    return f"{start.astimezone():%d %b %H:%M}" if bucket == "hour" else f"{start:%d %b %Y}"
