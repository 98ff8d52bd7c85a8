"""Test-time adaption: bring an image of an unseen kind of normal to where the experts work.

arXiv 2409.05611, Eq. 5-6, and a guarded form of our own (docs/equations.md).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.heads.novelty import SMALLEST_DEVIATION, covariance_within


def statistics(features: Tensor) -> Tensor:
    """s = [mean over patches; log deviation over patches] of each image, (B, D, h, w) -> (B, 2D).

    The deviation is that of the whole population of patches (divided by P, not P - 1).
    """
    mean = features.mean(dim=(2, 3))  # (B, D)
    # A difference of squares takes a hundredth of the time of torch's var; features are standardised, so it loses
    # nothing that matters. `block_statistics` asks for the same squares: in the exported graph they are one.
    square = (features * features).mean(dim=(2, 3))
    variance = (square - mean.square()).clamp_min(SMALLEST_DEVIATION**2)
    return torch.cat([mean, 0.5 * variance.log()], dim=1)


class NoAdaption(nn.Module):
    """Leave the features as they are."""

    def fit(self, samples: NDArray[np.float32], kinds: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Nothing to learn."""

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 1, D, h, w)."""
        return features[:, None]

    def changes(self, samples: Tensor) -> Tensor:
        """Which images are adapted, (B,) bool."""
        return torch.zeros(samples.shape[0], dtype=torch.bool, device=samples.device)


class FullAdaption(nn.Module):
    """Full re-normalisation of each image, whatever the subclass: x' = (x - mean(x)) / std(x), per channel.

    Eq. 5 of arXiv 2409.05611 without the way back to a subclass and without Eq. 6's length of one: experts that
    measure deviations in every direction take c_k and std_k into themselves, and length tells them something.
    """

    def fit(self, samples: NDArray[np.float32], kinds: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Nothing to learn."""

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Adapt (B, D, h, w) with their `statistics` (B, 2D): the same for all experts, (B, 1, D, h, w)."""
        return _standardise(features, samples)

    def changes(self, samples: Tensor) -> Tensor:
        """Which images are adapted, (B,) bool: all."""
        return torch.ones(samples.shape[0], dtype=torch.bool, device=samples.device)


class PaperAdaption(nn.Module):
    """Full re-normalisation of each image to the statistics of an expert's subclass.

    Eq. 5-6 of arXiv 2409.05611, per channel over the patches of one image, for every expert k that is asked:

        x' = (x - mean(x)) * std_k / std(x) + c_k,    x'' = x' / |x'|

    c_k and std_k are mean and deviation over all training patches of subclass k. Training images go through the same,
    so the experts learn on patches of length one.

    Args:
        width: D.
    """

    centres: Tensor  # (K, D) c_k
    deviations: Tensor  # (K, D) std_k

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(1, width))
        self.register_buffer("deviations", torch.ones(1, width))

    def fit(self, samples: NDArray[np.float32], kinds: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Learn c_k and std_k from the statistics of each training image, (n, 2D), and its expert, (n,)."""
        mean, log_deviation = np.split(samples.astype(np.float64), 2, axis=1)
        centres, deviations = [], []
        for expert in range(int(experts.max()) + 1):
            own = experts == expert
            centre = mean[own].mean(axis=0)
            # All images have as many patches, so the squares of the parts add up to that of the whole.
            square = (np.exp(2 * log_deviation[own]) + mean[own] ** 2).mean(axis=0)
            centres.append(centre)
            deviations.append(np.sqrt(np.maximum(square - centre**2, SMALLEST_DEVIATION**2)))
        self.centres = torch.from_numpy(np.stack(centres)).float()
        self.deviations = torch.from_numpy(np.stack(deviations)).float()

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Adapt each image once for each expert asked.

        Args:
            features: (B, D, h, w).
            samples: their `statistics`, (B, 2D).
            experts: (B, T) numbers of the experts.

        Returns:
            (B, T, D, h, w), patches of length one.
        """
        mean, log_deviation = samples.chunk(2, dim=1)  # (B, D), (B, D)
        scale = self.deviations[experts] / log_deviation.exp()[:, None]  # (B, T, D)
        shift = self.centres[experts] - mean[:, None] * scale  # (B, T, D)
        adapted = features[:, None] * scale[..., None, None] + shift[..., None, None]
        return F.normalize(adapted, dim=2)

    def changes(self, samples: Tensor) -> Tensor:
        """Which images are adapted, (B,) bool: all."""
        return torch.ones(samples.shape[0], dtype=torch.bool, device=samples.device)


class GuardedAdaption(nn.Module):
    """Adapt only along the directions in which the known kinds of normal differ.

    Ours. With s the statistics of an image, t_k their mean in kind k, t their mean, S their covariance within kinds
    (shrunk) and B the leading r directions of the t_k - t, scaled by singular value / sqrt(K - 1), the posterior mean
    of the image's coordinates under z ~ N(0, tau I) and the statistics of the kind it seems to be are

        z = (B' S^-1 B + I / tau)^-1 B' S^-1 (s - t),    s^ = t + B z,
        x' = (x - s^_mean) / exp(s^_logdeviation)

    It extrapolates along "brighter" but does not explain a defect away. With one kind there is no direction: then the
    features stay as they are, as with `off`.

    Args:
        width: D.
        directions: r, at most.
        prior: tau; how far beyond the known kinds an image may be taken to lie.
        shrinkage: of S towards its diagonal, in [0, 1].
    """

    centre: Tensor  # (2D,) t
    directions: Tensor  # (2D, r) B; columns without a direction are zero
    reader: Tensor  # (r, 2D) (B' S^-1 B + I / tau)^-1 B' S^-1

    def __init__(self, *, width: int, directions: int, prior: float, shrinkage: float) -> None:
        super().__init__()
        self.prior = prior
        self.shrinkage = shrinkage
        self.register_buffer("centre", torch.zeros(2 * width))
        self.register_buffer("directions", torch.zeros(2 * width, directions))
        self.register_buffer("reader", torch.zeros(directions, 2 * width))

    def fit(self, samples: NDArray[np.float32], kinds: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Learn from the statistics of each training image, (n, 2D), and its kind of normal, (n,)."""
        means, within = covariance_within(samples, kinds, shrinkage=self.shrinkage)
        found = min(self.directions.shape[1], len(means) - 1)
        if found < 1:
            return
        centre = means.mean(axis=0)
        _, values, vectors = np.linalg.svd(means - centre, full_matrices=False)
        between = np.zeros(tuple(self.directions.shape))  # (2D, r)
        between[:, :found] = vectors[:found].T * (values[:found] / math.sqrt(len(means) - 1))
        weighed = np.linalg.solve(within, between)  # S^-1 B
        precision = between.T @ weighed + np.eye(between.shape[1]) / self.prior
        self.centre = torch.from_numpy(centre).float()
        self.directions = torch.from_numpy(between).float()
        self.reader = torch.from_numpy(np.linalg.solve(precision, weighed.T)).float()

    def coordinates(self, samples: Tensor) -> Tensor:
        """z of images with these statistics, (B, 2D) -> (B, r)."""
        return (samples - self.centre) @ self.reader.T

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Adapt (B, D, h, w) with the statistics (B, 2D): the same for all experts, (B, 1, D, h, w)."""
        return _standardise(features, self.centre + self.coordinates(samples) @ self.directions.T)

    def changes(self, samples: Tensor) -> Tensor:
        """Which images are adapted, (B,) bool: all, unless there was one kind of normal only."""
        return self.directions.any().expand(samples.shape[0])


Adaption = NoAdaption | FullAdaption | PaperAdaption | GuardedAdaption


def _standardise(features: Tensor, samples: Tensor) -> Tensor:
    """(x - mean) / deviation by statistics (B, 2D): (B, D, h, w) -> (B, 1, D, h, w)."""
    mean, log_deviation = samples[..., None, None].chunk(2, dim=1)  # (B, D, 1, 1) each
    scale = (-log_deviation).exp()
    return torch.addcmul(-mean * scale, features, scale)[:, None]
