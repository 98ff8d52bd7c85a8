"""Test-time adaption: normalise the features of unseen subclasses to those of the training images.

arXiv 2409.05611, Eq. 5-6, and a guarded form of our own (docs/equations.md).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import AdaptionConfig, GuardedAdaptionConfig
from normweave.heads.novelty import SMALLEST_STD, covariance_within


def statistics(features: Tensor) -> Tensor:
    """Return s = [mean over patches; log std over patches] of each image, (B, D, h, w) -> (B, 2D).

    The std is that of the population of patches (divided by P, not P - 1).
    """
    mean = features.mean(dim=(2, 3))  # (B, D)
    # A difference of squares takes a hundredth of the time of torch's var, and is precise enough for standardised
    # features. `block_statistics` computes the same squares: in the exported graph they are shared.
    square = (features * features).mean(dim=(2, 3))
    variance = (square - mean.square()).clamp_min(SMALLEST_STD**2)
    return torch.cat([mean, 0.5 * variance.log()], dim=1)


class Adaption(nn.Module):
    """Maps features to the features that experts see. A new adaption overrides `forward`, and `fit` if it has to."""

    unit_length: bool = False
    """Adapted patches have length one."""

    def fit(self, samples: NDArray[np.float32], subclasses: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Fit on the statistics (n, 2D), the subclass (n,) and the expert (n,) of each training image."""

    @abstractmethod
    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Adapt each image.

        Args:
            features: (B, D, h, w).
            samples: their `statistics`, (B, 2D).
            experts: (B, T) indices of the experts.

        Returns:
            (B, S, D, h, w); S = T: adapted for each expert, S = 1: the same for all.
        """

    def changes(self, samples: Tensor) -> Tensor:
        """Return whether each image is adapted, (B,) bool."""
        return torch.ones(samples.shape[0], dtype=torch.bool, device=samples.device)


class NoAdaption(Adaption):
    """Features as they are."""

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Return the features."""
        return features[:, None]

    def changes(self, samples: Tensor) -> Tensor:
        """Return False for each image, (B,) bool."""
        return torch.zeros(samples.shape[0], dtype=torch.bool, device=samples.device)


class FullAdaption(Adaption):
    """Normalisation of each image by its own statistics: x' = (x - mean(x)) / std(x), per channel.

    Eq. 5 of arXiv 2409.05611 without c_k and std_k of a subclass and without Eq. 6's length of one: experts that
    measure distances in every direction learn c_k and std_k themselves, and use the length of a patch.
    """

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Return the normalised features."""
        return _standardise(features, samples)


class PaperAdaption(Adaption):
    """Normalisation of each image to the statistics of the subclass of an expert.

    Eq. 5-6 of arXiv 2409.05611, per channel over the patches of one image, for every chosen expert k:

        x' = (x - mean(x)) * std_k / std(x) + c_k,    x'' = x' / |x'|

    c_k and std_k are mean and std over all training patches of subclass k. Training images are adapted likewise, so
    that the experts are fitted to patches of length one.

    Args:
        width: D.
    """

    centres: Tensor  # (K, D) c_k
    stds: Tensor  # (K, D) std_k

    unit_length = True

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(1, width))
        self.register_buffer("stds", torch.ones(1, width))

    def fit(self, samples: NDArray[np.float32], subclasses: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Fit c_k and std_k."""
        mean, log_std = np.split(samples.astype(np.float64), 2, axis=1)
        centres, stds = [], []
        for expert in range(int(experts.max()) + 1):
            own = experts == expert
            centre = mean[own].mean(axis=0)
            # All images have the same number of patches, so the mean square is the mean over images.
            square = (np.exp(2 * log_std[own]) + mean[own] ** 2).mean(axis=0)
            centres.append(centre)
            stds.append(np.sqrt(np.maximum(square - centre**2, SMALLEST_STD**2)))
        self.centres = torch.from_numpy(np.stack(centres)).float()
        self.stds = torch.from_numpy(np.stack(stds)).float()

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Return patches of length one, (B, T, D, h, w)."""
        mean, log_std = samples.chunk(2, dim=1)  # (B, D), (B, D)
        scale = self.stds[experts] / log_std.exp()[:, None]  # (B, T, D)
        shift = self.centres[experts] - mean[:, None] * scale  # (B, T, D)
        adapted = features[:, None] * scale[..., None, None] + shift[..., None, None]
        return F.normalize(adapted, dim=2)


class GuardedAdaption(Adaption):
    """Adaption along the directions in which the known subclasses differ.

    Not from a paper. Let s be the statistics of an image, t_k their mean in subclass k, t the mean of the t_k, S their
    covariance within subclasses (shrunk), and B the leading r directions of the t_k - t, scaled by singular value /
    sqrt(K - 1). The posterior mean of the coordinates of an image under z ~ N(0, tau I), and the statistics that follow
    from it, are

        z = (B' S^-1 B + I / tau)^-1 B' S^-1 (s - t),    s^ = t + B z,
        x' = (x - s^_mean) / exp(s^_log_std)

    It extrapolates a change such as brightness, but does not remove a defect. With one subclass there is no direction,
    and the features stay as they are.

    Args:
        width: D.
    """

    centre: Tensor  # (2D,) t
    directions: Tensor  # (2D, r) B; columns without a direction are zero
    reader: Tensor  # (r, 2D) (B' S^-1 B + I / tau)^-1 B' S^-1

    def __init__(self, config: GuardedAdaptionConfig, *, width: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(2 * width))
        self.register_buffer("directions", torch.zeros(2 * width, config.directions))
        self.register_buffer("reader", torch.zeros(config.directions, 2 * width))

    def fit(self, samples: NDArray[np.float32], subclasses: NDArray[np.int64], experts: NDArray[np.int64]) -> None:
        """Fit t, B and S."""
        means, within = covariance_within(samples, subclasses, shrinkage=self.config.shrinkage)
        found = min(self.directions.shape[1], len(means) - 1)
        if found < 1:
            return
        centre = means.mean(axis=0)
        _, values, vectors = np.linalg.svd(means - centre, full_matrices=False)
        between = np.zeros(tuple(self.directions.shape))  # (2D, r)
        between[:, :found] = vectors[:found].T * (values[:found] / math.sqrt(len(means) - 1))
        weighted = np.linalg.solve(within, between)  # S^-1 B
        precision = between.T @ weighted + np.eye(between.shape[1]) / self.config.prior
        self.centre = torch.from_numpy(centre).float()
        self.directions = torch.from_numpy(between).float()
        self.reader = torch.from_numpy(np.linalg.solve(precision, weighted.T)).float()

    def coordinates(self, samples: Tensor) -> Tensor:
        """Return z of images with these statistics, (B, 2D) -> (B, r)."""
        return (samples - self.centre) @ self.reader.T

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Return the features normalised by s^, (B, 1, D, h, w)."""
        return _standardise(features, self.centre + self.coordinates(samples) @ self.directions.T)

    def changes(self, samples: Tensor) -> Tensor:
        """Return True for each image, (B,) bool; False with one subclass."""
        return self.directions.any().expand(samples.shape[0])


def build_adaption(config: AdaptionConfig, *, default: str, width: int) -> Adaption:
    """Return the adaption that `config` names, not fitted yet; `default` is the method of `auto`."""
    method = default if config.method == "auto" else config.method
    match method:
        case "off":
            return NoAdaption()
        case "full":
            return FullAdaption()
        case "paper":
            return PaperAdaption(width=width)
    guarded = config if isinstance(config, GuardedAdaptionConfig) else GuardedAdaptionConfig()
    return GuardedAdaption(guarded, width=width)


def _standardise(features: Tensor, samples: Tensor) -> Tensor:
    """Return (x - mean) / std for statistics (B, 2D), (B, D, h, w) -> (B, 1, D, h, w)."""
    mean, log_std = samples[..., None, None].chunk(2, dim=1)  # (B, D, 1, 1) each
    scale = (-log_std).exp()
    return torch.addcmul(-mean * scale, features, scale)[:, None]
