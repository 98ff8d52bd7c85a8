"""Standardization of feature channels, so that noise and distances mean the same in every channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.errors import DataError
from normweave.types import FeatureSource

BATCH_IMAGES = 16


class ChannelStandardizer(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation, both over all patches of the fit normals.

    Args:
        channels: D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def fit(self, source: FeatureSource) -> None:
        """Compute mean and standard deviation in one pass over the images.

        Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances",
        equation 2.1, in float64: with n patches so far and m new ones, delta the difference of their means and M2 the
        sum of squared differences from the mean,

            mean <- mean + delta m / (n + m),    M2 <- M2 + M2_new + delta^2 n m / (n + m).

        Raises:
            DataError: the source is empty.
        """
        if len(source) == 0:
            raise DataError("Standardization needs at least one image, got none. Check which images are fit normals.")
        channels = source.shape[0]
        count = 0
        mean = torch.zeros(channels, dtype=torch.float64)
        squares = torch.zeros(channels, dtype=torch.float64)
        for start in range(0, len(source), BATCH_IMAGES):
            rows = range(start, min(start + BATCH_IMAGES, len(source)))
            patches = source.read(rows).double().movedim(1, 0).flatten(1)  # (D, m)
            new = patches.shape[1]
            new_mean = patches.mean(1)  # (D,)
            delta = new_mean - mean
            squares += (patches - new_mean[:, None]).square().sum(1) + delta**2 * (count * new / (count + new))
            mean += delta * (new / (count + new))
            count += new
        std = (squares / count).sqrt()
        # A constant channel is divided by 1 instead of 0. Its std is exactly 0: sums of equal float32 are exact in
        # float64.
        std[std == 0] = 1
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, features: Tensor) -> Tensor:
        """Standardize features (B, D, h, w) to mean 0 and standard deviation 1 of each channel."""
        return (features - self.mean[:, None, None]) / self.std[:, None, None]


class StandardizedFeatures:
    """A feature source whose features are standardized as they are read."""

    def __init__(self, source: FeatureSource, standardizer: ChannelStandardizer) -> None:
        self.source = source
        self.standardizer = standardizer
        self.shape = source.shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, (len(rows), D, h, w) float32."""
        features: Tensor = self.standardizer(self.source.read(rows))
        return features
