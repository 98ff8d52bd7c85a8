"""Standardization of feature channels, so that noise and distances mean the same in every channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.errors import DataError
from normweave.passes import Batches, Merge, Statistics, Tensors, over
from normweave.types import FeatureSource

T = TypeVar("T")
Moments = tuple[int, Tensor, Tensor]
"""Number of patches, sum, and sum of squared differences from the mean (D,) of each channel, in float64."""


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
        equation 2.1, in float64: with n patches so far and m new ones, T the sum, delta the difference of the means and
        M2 the sum of squared differences from the mean,

            T <- T + T_new,    M2 <- M2 + M2_new + delta^2 n m / (n + m).

        Features of the cache have 16 bits, whose sum is exact: the mean is the same in whatever parts they are summed.

        Raises:
            DataError: the source is empty.
        """
        if len(source) == 0:
            raise DataError("Standardization needs at least one image, got none. Check which images are fit normals.")
        count, total, squares = over(source, _moments, merge=_merged)
        std = (squares / count).sqrt()
        # A constant channel is divided by 1 instead of 0. Its std is exactly 0: sums of equal float32 are exact in
        # float64.
        std[std == 0] = 1
        self.mean.copy_(total / count)
        self.std.copy_(std)

    def forward(self, features: Tensor) -> Tensor:
        """Standardize features (B, D, h, w) to mean 0 and standard deviation 1 of each channel."""
        return (features - self.mean[:, None, None]) / self.std[:, None, None]


def _moments(batches: Batches) -> Moments:
    """Return the moments of the patches of all images."""
    return _merged(_moments_of(features) for (features,) in batches)


def _moments_of(features: Tensor) -> Moments:
    patches = features.double().movedim(1, 0).flatten(1)  # (D, m)
    total = patches.sum(1)
    return patches.shape[1], total, (patches - total[:, None] / patches.shape[1]).square().sum(1)


def _merged(parts: Iterable[Moments]) -> Moments:
    """Merge moments by the equations of `ChannelStandardizer.fit`."""
    rest = iter(parts)
    count, total, squares = next(rest)
    for new, new_total, new_squares in rest:
        delta = new_total / new - total / count
        squares = squares + (new_squares + delta**2 * (count * new / (count + new)))
        total = total + new_total
        count += new
    return count, total, squares


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

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of these images; see `passes.over`."""
        standardized = partial(_standardized, statistics, self.standardizer)
        return over(self.source, standardized, merge=merge, rows=rows, aligned=aligned)


def _standardized(statistics: Statistics[T], standardizer: ChannelStandardizer, batches: Batches) -> T:
    return statistics((standardizer(features), *own) for features, *own in batches)
