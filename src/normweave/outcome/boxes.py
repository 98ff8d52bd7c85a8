"""Defect boxes: connected regions of an anomaly map above a threshold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from normweave.types import DefectBox

MAX_BOXES = 100
"""The most boxes of one image."""


def find(anomaly_map: NDArray[np.float32], threshold: float) -> tuple[DefectBox, ...]:
    """Return the boxes of the regions of `anomaly_map > threshold`, highest peak first, at most 100.

    Pixels that touch at a side or a corner belong to one region. The algorithm joins runs (stretches of a row above the
    threshold) instead of pixels.
    """
    width = anomaly_map.shape[1]
    row, start, end = _runs(anomaly_map > threshold)
    if not len(row):
        return ()
    first, second = _touching(row, start, end, width)
    region = _regions(len(row), first, second)

    labels, index = np.unique(region, return_inverse=True)
    left = np.full(len(labels), width)
    right, bottom = np.zeros_like(left), np.zeros_like(left)
    top = np.full(len(labels), anomaly_map.shape[0])
    peak = np.full(len(labels), -np.inf, dtype=anomaly_map.dtype)
    np.minimum.at(left, index, start)
    np.maximum.at(right, index, end)
    np.minimum.at(top, index, row)
    np.maximum.at(bottom, index, row + 1)
    np.maximum.at(peak, index, _run_peaks(anomaly_map, row * width + start, row * width + end))

    order = np.lexsort((left, top, -peak))[:MAX_BOXES]
    return tuple(
        DefectBox(
            x=int(left[i]),
            y=int(top[i]),
            width=int(right[i] - left[i]),
            height=int(bottom[i] - top[i]),
            peak=float(peak[i]),
        )
        for i in order
    )


def around_highest(anomaly_map: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> tuple[DefectBox, ...]:
    """Return the box of the region around the highest value of a map (H, W): for an image without any other box.

    Its pixels are above the middle between the median and the highest value. A map of one value has no such box.

    Args:
        inside: (H, W) the pixels that are inspected; None: all.
    """
    values = anomaly_map if inside is None else anomaly_map[inside]
    return find(anomaly_map, (float(np.median(values)) + float(values.max())) / 2)[:1]


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return row, start and end (one past the last pixel) of every run, in reading order."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)  # (H, W + 1)
    row, start = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[1]
    return row, start, end


def _touching(
    row: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of runs in adjacent rows that touch at a side or a corner: start' <= end and start <= end'.

    The runs of the next row that touch a run are consecutive, so two binary searches find them.
    """
    stride = width + 2  # positions of all rows on one axis, with a gap between rows
    below = np.searchsorted(row * stride + end, (row + 1) * stride + start, side="left")
    beyond = np.searchsorted(row * stride + start, (row + 1) * stride + end, side="right")
    count = np.maximum(beyond - below, 0)
    first = np.repeat(np.arange(len(row)), count)
    second = np.repeat(below - (np.cumsum(count) - count), count) + np.arange(count.sum())
    return first, second


def _regions(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `count` nodes the lowest node of its connected component."""
    root = np.arange(count)
    while True:
        low = np.minimum(root[first], root[second])
        high = np.maximum(root[first], root[second])
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(root, shorter := root[root]):
            root = shorter


def _run_peaks(
    anomaly_map: NDArray[np.float32], begin: NDArray[np.int64], end: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the maximum between each begin and end, indices into the flattened map."""
    values = np.append(anomaly_map.ravel(), anomaly_map.dtype.type(0))  # an end can be one past the map
    bounds = np.stack([begin, end], axis=1).ravel()
    peaks: NDArray[np.float32] = np.maximum.reduceat(values, bounds)[::2]
    return peaks
