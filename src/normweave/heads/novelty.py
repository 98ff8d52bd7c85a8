"""Novelty of an image: distance of its statistics to those of the known subclasses."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

SMALLEST_STD = 1e-3
"""Lower bound of the std of a channel within an image; channels are standardised."""


def block_statistics(features: Tensor, *, blocks: int = 4) -> Tensor:
    """Return statistics that a local defect does not change: medians over blocks x blocks parts of an image, (B, 2D).

    A defect moves the mean of an image, but not the median of the means of its parts. On magnetic tiles this halves
    the number of defects beyond the 99th percentile of the distances of normal images, while the distance of another
    material stays the same.
    """
    mean = F.adaptive_avg_pool2d(features, blocks)  # (B, D, blocks, blocks)
    variance = (F.adaptive_avg_pool2d(features * features, blocks) - mean.square()).clamp_min(SMALLEST_STD**2)
    both = torch.cat([mean, 0.5 * variance.log()], dim=1).flatten(2)  # (B, 2D, blocks^2)
    # The lower of the two middle values, by topk: ONNX has no median. (x * x above: ONNX's power takes twice as long.)
    return both.topk((blocks**2 + 1) // 2, dim=2, largest=False, sorted=False).values.amax(dim=2)


def covariance_within(
    samples: NDArray[np.float32], subclasses: NDArray[np.int64], *, shrinkage: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means of the subclasses (K, N) and the shrunk covariance within them (N, N), plus 1e-4 I.

    Args:
        samples: (n, N), one row per image.
        subclasses: (n,) in 0..K-1, each at least once.
        shrinkage: weight of the diagonal in the covariance, in [0, 1].
    """
    rows = samples.astype(np.float64)
    means = np.stack([rows[subclasses == each].mean(axis=0) for each in range(int(subclasses.max()) + 1)])  # (K, N)
    residual = rows - means[subclasses]
    covariance = residual.T @ residual / max(1, len(rows) - len(means))
    diagonal = np.diag(np.diag(covariance))
    shrunk = (1 - shrinkage) * covariance + shrinkage * diagonal + 1e-4 * np.eye(len(covariance))
    return means, shrunk


class SubclassNovelty(nn.Module):
    """Distance of the statistics of an image to each known subclass, by which unknown products are detected.

    Not from a paper. The Mahalanobis distance of s to the mean t_k of each subclass, with the covariance within
    subclasses, shrunk halfway to its diagonal. The square is divided by the number of statistics, so that normal images
    have distances of about 1 for any D.

    Args:
        statistics: N numbers of an image.
    """

    means: Tensor  # (K, N) t_k, whitened
    whitener: Tensor  # (N, N) W with W W' = S^-1 / N

    shrinkage = 0.5
    by_subclass = ("means",)

    def __init__(self, *, statistics: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(1, statistics))
        self.register_buffer("whitener", torch.eye(statistics))

    def fit(self, samples: NDArray[np.float32], subclasses: NDArray[np.int64]) -> None:
        """Fit on the statistics (n, N) and the subclass (n,) of each training image."""
        means, within = covariance_within(samples, subclasses, shrinkage=self.shrinkage)
        inverse_root = np.linalg.inv(np.linalg.cholesky(within)) / np.sqrt(len(within))  # L^-1 / sqrt(N)
        self.means = torch.from_numpy(means @ inverse_root.T).float()
        self.whitener = torch.from_numpy(inverse_root.T.copy()).float()

    def add(self, samples: NDArray[np.float32]) -> None:
        """Append a subclass with these statistics (n, N); the covariance stays that of the fit."""
        mean = torch.from_numpy(samples.astype(np.float64).mean(axis=0))
        self.means = torch.cat([self.means, (mean @ self.whitener.double()).float()[None]])

    def whitened(self, samples: Tensor) -> Tensor:
        """Return the whitened statistics, (B, N) -> (B, N); distances are Euclidean there."""
        return samples @ self.whitener

    def forward(self, samples: Tensor) -> Tensor:
        """Return the distances of (B, N) statistics to the subclasses, (B, K)."""
        # Differences, not |a|^2 - 2ab + |b|^2, which loses precision for large distances.
        return self.whitened(samples)[:, None].sub(self.means).square().sum(dim=2).sqrt()
