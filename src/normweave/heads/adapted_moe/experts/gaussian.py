"""Gaussians: Mahalanobis distance to normal patches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from normweave.config import GaussianExpertConfig
from normweave.heads.adapted_moe.experts.base import Experts, Normals, fine_channels, products
from normweave.passes import Batches, Tensors, added_rows, present


class GaussianExperts(Experts):
    """Mahalanobis distance to the patches of the subclass.

    d(x) = |W (x - m)| with W' W the inverse of a covariance: that of the subclass mixed with that of all subclasses,
    then shrunk towards its mean variance (PaDiM, arXiv 2011.08785, with one Gaussian for all positions). Only the first
    D' channels of a patch are used; the finest stages come first.
    """

    whitener: Tensor  # (K, D', D') W
    offset: Tensor  # (K, D') -W m

    distributed = True
    default_adaption = "full"
    by_subclass = ("whitener", "offset")

    def __init__(self, config: GaussianExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        channels = fine_channels(config.fine, shape[0])
        self.register_buffer("whitener", torch.eye(channels)[None])
        self.register_buffer("offset", torch.zeros(1, channels))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fit means and covariances, summed in float64 in one pass."""
        count, total, square = self._sums(normals)
        together = _covariance(square.sum(dim=0)[None], total.sum(dim=0)[None], count.sum()[None])
        self.whitener, self.offset = self._whitening(
            _covariance(square, total, count), together, total / count[:, None]
        )

    def add(self, normals: Normals, *, first: int, generator: torch.Generator) -> None:
        """Append an expert. Its covariance is mixed with the mean of those of the first training, from their W."""
        count, total, square = self._sums(normals)
        together = covariances(self.whitener[:first]).mean(dim=0, keepdim=True)
        whitener, offset = self._whitening(_covariance(square, total, count), together, total / count[:, None])
        self.whitener, self.offset = torch.cat([self.whitener, whitener]), torch.cat([self.offset, offset])

    def _sums(self, normals: Normals) -> Tensors:
        """Return number (K,), sum (K, D') and sum of x x' (K, D', D') of the patches of each expert, in float64."""
        return normals.over(
            partial(_patch_sums, normals.number, self.offset.shape[1]),
            merge=partial(added_rows, normals.number),
            aligned=(torch.from_numpy(normals.experts),),
        )

    def _whitening(self, own: Tensor, together: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return W (K, D', D') and -W m (K, D') for the covariances (K, D', D') and means (K, D') of experts.

        Args:
            together: (1, D', D') covariance that is mixed with each.
        """
        mixed = (1 - self.config.pooled) * own + self.config.pooled * together
        variance = mixed.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-6)  # (K,)
        identity = torch.eye(own.shape[1], dtype=torch.float64)
        shrunk = (1 - self.config.shrinkage) * mixed + self.config.shrinkage * variance[:, None, None] * identity
        factor = torch.linalg.cholesky(shrunk)
        whitener = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return whitener.float(), -(whitener @ mean[..., None]).squeeze(2).float()

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return the distance of every patch, (B, T, 1, h, w)."""
        used = features[:, :, : self.offset.shape[1]]  # (B, S, D', h, w)
        whitened = products(used, self.whitener[experts], self.offset[experts])  # (B, T, D', P)
        return (whitened * whitened).sum(dim=2).sqrt().view(*experts.shape, 1, *features.shape[3:])


def _patch_sums(number: int, channels: int, batches: Batches) -> Tensors:
    count = torch.zeros(number, dtype=torch.float64)
    total = torch.zeros(number, channels, dtype=torch.float64)
    square = torch.zeros(number, channels, channels, dtype=torch.float64)
    for features, experts in batches:
        for expert, image in zip(experts, features[:, :channels].flatten(2).double(), strict=True):
            count[expert] += image.shape[1]
            total[expert] += image.sum(dim=1)
            square[expert] += image @ image.T
    return present(count, total, square)


def covariances(whitener: Tensor) -> Tensor:
    """Return the covariances (K, D, D), in float64, whose inverses are W' W, for lower triangular W (K, D, D)."""
    identity = torch.eye(whitener.shape[1], dtype=torch.float64).expand(whitener.shape)
    factor = torch.linalg.solve_triangular(whitener.double(), identity, upper=False)
    return torch.bmm(factor, factor.mT)


def _covariance(square: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return the covariances from the sums of x x' (K, D, D) and of x (K, D) and the number of x (K,)."""
    mean = total / count[:, None]
    return square / count[:, None, None] - mean[:, :, None] * mean[:, None]
