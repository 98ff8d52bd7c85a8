"""Charts of HTML and SVG: no script; each bar shows its numbers as a tooltip."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import ArrayLike

from normweave.report.figures import Series, score_histogram
from normweave.serve.pages.verdict import Result
from normweave.serve.records import Bucket, Count
from normweave.serve.templating import render_macro

TEMPLATE = "charts.html"
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
    normals: ArrayLike,
    stored: ArrayLike,
    *,
    limit: float,
    moved: float | None,
    relative: bool = False,
    limits: tuple[str, str | None] | None = None,
) -> str:
    """Draw scores of held-out good parts upwards, of stored inspections downwards, and the limit across both.

    Args:
        limit: the threshold.
        moved: another threshold to compare with, if any.
        relative: the scores are distances from the limit of each product, which is 0.
        limits: text for the limit and for the other one, if any; None: the numbers.
    """
    upper, lower = np.asarray(normals, dtype=np.float64), np.asarray(stored, dtype=np.float64)
    everything = np.concatenate([upper, lower, [limit, limit if moved is None else moved]])
    low = everything.min()
    highest = low + REACH * max(everything[-2:].max() - low, 1e-9)
    name = "score minus the limit of its product" if relative else "score"
    figure = score_histogram(
        Series("normal", np.minimum(upper, highest), "good parts, below", "good parts, above"),
        Series("plain", np.minimum(lower, highest), "inspections, below", "inspections, above"),
        threshold=limit,
        axis=f"{name} (higher scores are in the last bar)" if everything.max() > highest else name,
        proposed=moved,
        label="limit",
    )
    if limits is None:
        limits = f"{limit:.4g}", None if moved is None else f"{moved:.4g}"
    return render_macro(TEMPLATE, "histogram", figure=figure, limit=limits[0], moved=limits[1])


def over_time(counts: Sequence[Count], *, bucket: Bucket, shares: bool) -> str:
    """Draw the number of inspections of each result, one column per hour, day or week; at most the newest 200 columns.

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
