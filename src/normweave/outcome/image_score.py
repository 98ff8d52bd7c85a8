"""The image score of an anomaly map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def from_maps(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the maximum (B,) of each smoothed map (B, H, W), so that one small defect is enough."""
    scores: NDArray[np.float32] = maps.max(axis=(1, 2))
    return scores
