"""DFM: reconstruction error under the principal components of whole normal images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from normweave.config import DFMConfig
from normweave.heads.base import Head
from normweave.passes import Tensors, per_image
from normweave.types import FitData, PatchScores

PIECE = 1024  # numbers of an image that are converted to float64 at once


class DFM(Head):
    """Principal subspace of the whole feature map, averaged to a few cells; the score is the residual.

    Ahuja et al. 2019 (arXiv 1909.11786), scored by the feature reconstruction error of anomalib's DFM:

        r = (x - m) - C C^T (x - m),  image score |r|,  cell score = norm of r over the channels

    (anomalib gives the squares of both and keeps one component less.)

    Args:
        shape: (D, h, w) of the features; averaged to F = D * cells * cells values per image.
    """

    mean: Tensor  # (F,)
    components: Tensor  # (F, C), orthonormal columns

    distributed = True

    def __init__(self, config: DFMConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        D, h, w = shape
        self.channels = D
        self.grid = (min(config.cells, h), min(config.cells, w))
        numbers = D * self.grid[0] * self.grid[1]
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.empty(numbers, 0))

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Compute mean and components."""
        generator = torch.Generator().manual_seed(data.seed)
        rows = torch.randperm(len(data), generator=generator)[: self.config.max_images].sort().values.numpy()
        (flat,) = per_image(data.features, self._rows, rows=rows)  # (n, F)
        mean, components = principal_components(flat, variance=self.config.variance)
        self.mean, self.components = mean.to(self.mean.device), components.to(self.mean.device)

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w) on the coarser grid of the cells."""
        centred = self._flat(features) - self.mean  # (B, F)
        residual = centred - (centred @ self.components) @ self.components.T  # (B, F)
        squared = residual.square().view(-1, self.channels, *self.grid).sum(1)  # (B, cells, cells)
        return PatchScores(scores=squared.sqrt(), image_scores=squared.sum((1, 2)).sqrt(), routing=None)

    def _rows(self, features: Tensor) -> Tensors:
        return (self._flat(features),)

    def _flat(self, features: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(features, self.grid).flatten(1)  # (B, F)


def principal_components(rows: Tensor, *, variance: float) -> tuple[Tensor, Tensor]:
    """Return the mean and the fewest principal components that explain this share of the variance.

    Computed in float64 by the smaller of X^T X and X X^T (whose eigenvectors u give the components X^T u / |X^T u|).

    Args:
        rows: (n, F) float32, n >= 1.
        variance: share in (0, 1).

    Returns:
        (F,) mean and (F, C) orthonormal columns, both float32, largest variance first. C = 0 when all rows
        are equal.
    """
    n, width = rows.shape
    mean = rows.mean(0, dtype=torch.float64)  # (F,)
    if n <= width:
        gram = torch.zeros(n, n, dtype=torch.float64)
        for start in range(0, width, PIECE):
            piece = rows[:, start : start + PIECE] - mean[start : start + PIECE]  # (n, p) float64
            gram.addmm_(piece, piece.T)
    else:
        gram = torch.zeros(width, width, dtype=torch.float64)
        for start in range(0, n, PIECE):
            piece = rows[start : start + PIECE] - mean  # (p, F) float64
            gram.addmm_(piece.T, piece)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held = values.cumsum(0)
    # The variance of equal rows is 0, or consists of rounding errors.
    count = int((held < variance * held[-1]).sum()) + 1 if held[-1] > 0 else 0
    if n > width:
        return mean.float(), vectors[:, :count].float()
    components = torch.empty(width, count)
    for start in range(0, width, PIECE):
        piece = rows[:, start : start + PIECE] - mean[start : start + PIECE]  # (n, p)
        components[start : start + PIECE] = (piece.T @ vectors[:, :count] / values[:count].sqrt()).float()
    return mean.float(), components
