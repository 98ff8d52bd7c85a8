"""One number an image, from its map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def from_maps(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest value of each smoothed map, (B, H, W) to (B,): one defect is enough, however small."""
    scores: NDArray[np.float32] = maps.max(axis=(1, 2))
    return scores
