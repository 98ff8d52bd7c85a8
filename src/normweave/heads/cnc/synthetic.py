"""Random batches of synthetic anomalies together with the normal images that they were made from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.types import FitData, SyntheticAnomalies


class SyntheticBatch(NamedTuple):
    """Images with synthetic anomalies."""

    features: Tensor  # (B, D, h, w)
    clean: Tensor  # (B, D, h, w) of the same images without anomalies
    anomalous: Tensor  # (B, N) bool, cells of which more than `covered` is anomalous


class SyntheticSampler:
    """Draws from the synthetic anomalies of the fit images.

    Args:
        covered: share of a cell above which it counts as anomalous.
    """

    def __init__(self, data: FitData, synthetic: SyntheticAnomalies, *, covered: float) -> None:
        self.data = data
        self.synthetic = synthetic
        self.covered = covered

    def draw(self, count: int, *, held_out: bool, generator: torch.Generator) -> SyntheticBatch:
        """Draw `count` images with replacement from the held-out images or from the others, one anomaly each."""
        images = np.flatnonzero(self.data.holdout == held_out)
        clean_rows = images[_integers(len(images), count, generator)]
        variants = len(self.synthetic.features) // len(self.data)
        rows = clean_rows + len(self.data) * _integers(variants, count, generator)
        return SyntheticBatch(
            self.synthetic.features.read(rows),
            self.data.features.read(clean_rows),
            self.synthetic.coverage(rows).flatten(1) > self.covered,
        )


def _integers(below: int, count: int, generator: torch.Generator) -> NDArray[np.int64]:
    drawn: NDArray[np.int64] = torch.randint(below, (count,), generator=generator).numpy()
    return drawn
