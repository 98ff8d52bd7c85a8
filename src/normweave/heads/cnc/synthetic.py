"""Fit normals with damage in them, and the same images without."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.types import FitData, SyntheticAnomalies


class Drawn(NamedTuple):
    """Damaged images."""

    features: Tensor  # (B, D, h, w)
    clean: Tensor  # (B, D, h, w) the same images undamaged
    shows: Tensor  # (B, N) bool, places of which more than `covered` is damaged


class Damaged:
    """Draws from the pseudo-abnormal images of the fit normals.

    Args:
        data: the fit normals.
        pseudo: their damages.
        covered: share of a cell that must be damaged to count as abnormal.
    """

    def __init__(self, data: FitData, pseudo: SyntheticAnomalies, *, covered: float) -> None:
        self.data = data
        self.synthetic = pseudo
        self.covered = covered

    def draw(self, count: int, *, held_out: bool, generator: torch.Generator) -> Drawn:
        """As many images, with any of their damages, from those that gradients see or from the held-out ones."""
        images = np.flatnonzero(self.data.holdout == held_out)
        own = images[_integers(len(images), count, generator)]
        variants = len(self.synthetic.features) // len(self.data)
        rows = own + len(self.data) * _integers(variants, count, generator)
        return Drawn(
            self.synthetic.features.read(rows),
            self.data.features.read(own),
            self.synthetic.coverage(rows).flatten(1) > self.covered,
        )


def _integers(below: int, count: int, generator: torch.Generator) -> NDArray[np.int64]:
    drawn: NDArray[np.int64] = torch.randint(below, (count,), generator=generator).numpy()
    return drawn
