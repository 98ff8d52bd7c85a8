"""Anomaly maps to look at: colours over an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HEAT = np.array(
    [
        # Inferno of matplotlib (S. van der Walt and N. Smith, CC0), every sixteenth colour: lightness grows evenly, so
        # that it can be read in grey and with any colour vision.
        [0, 0, 4],
        [12, 8, 38],
        [36, 12, 79],
        [66, 10, 104],
        [93, 18, 110],
        [120, 28, 109],
        [147, 38, 103],
        [174, 48, 92],
        [199, 62, 76],
        [221, 81, 58],
        [237, 105, 37],
        [248, 133, 15],
        [252, 165, 10],
        [250, 198, 45],
        [242, 230, 97],
        [252, 255, 164],
    ],
    dtype=np.float32,
)
LOWEST = 0.25
"""Share of the way up the colours at which a map begins to show."""


def heat(anomaly_map: NDArray[np.float32], *, threshold: float) -> NDArray[np.uint8]:
    """Colours (H, W, 4) to lay over the image: the threshold is in their middle, and nothing shows far below it."""
    span = max(threshold - float(anomaly_map.min()), 1e-12)  # as far above the threshold is the brightest
    height = np.clip(0.5 + (anomaly_map - threshold) / (2 * span), 0, 1).astype(np.float32)
    place = height * (len(_HEAT) - 1)
    below = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    share = (place - below)[..., None]
    colours = _HEAT[below] * (1 - share) + _HEAT[below + 1] * share
    visible = np.clip((height - LOWEST) / (0.5 - LOWEST), 0, 1)[..., None] * 255
    return np.concatenate([colours, visible], axis=2).round().astype(np.uint8)


def overlay(
    image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], *, threshold: float
) -> NDArray[np.uint8]:
    """The image (H, W, 3) in grey, and what lies above the threshold in yellow to red over it."""
    grey = image.mean(axis=2, keepdims=True)
    span = max(threshold - float(anomaly_map.min()), 1e-12)
    # 0 at the threshold, 1 as far above it again
    beyond = np.clip((anomaly_map - threshold) / span, 0, 1)[..., None]
    colour = np.concatenate([np.full_like(beyond, 255), 220 * (1 - beyond), np.zeros_like(beyond)], axis=2)
    mixed = np.where(anomaly_map[..., None] > threshold, 0.5 * grey + 0.5 * colour, grey)
    return np.broadcast_to(mixed, image.shape).round().astype(np.uint8)
