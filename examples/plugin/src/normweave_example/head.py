"""The head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normweave.heads.base import Head, batches
from normweave.types import FitData, PatchScores
from normweave_example.settings import MeanImageConfig


class MeanImage(Head):
    """Mean and standard deviation of each cell over the good images; the score is the norm of the standardised cell.

    Args:
        shape: (D, h, w) of the features.
    """

    mean: Tensor  # (D, h, w)
    spread: Tensor  # (D, h, w)

    def __init__(self, config: MeanImageConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("spread", torch.ones(shape))

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Compute mean and standard deviation."""
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for _, features in batches(data.features):
            total += features.double().sum(0)
            squares += features.double().square().sum(0)
        mean = total / len(data)
        variance = (squares / len(data) - mean.square()).clamp(min=0)
        self.mean = mean.float()
        self.spread = variance.sqrt().clamp(min=self.config.least_spread).float()

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        standardised = (features - self.mean) / self.spread
        return PatchScores(scores=standardised.square().mean(1).sqrt(), image_scores=None, routing=None)
