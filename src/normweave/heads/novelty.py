"""Which known kind of normal an image is nearest to, and how far it lies from them all."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

SMALLEST_DEVIATION = 1e-3
"""Channels are standardised: a deviation below this is a channel that says nothing on an image."""


def block_statistics(features: Tensor, *, blocks: int = 4) -> Tensor:
    """What s would be without a local defect: medians over blocks x blocks parts of the image, (B, 2D).

    A defect moves the mean of an image, but not the median of the means of its parts. On magnetic tiles this halves
    how many defects lie beyond the normals' 99th percentile of distance, and another material stays as far away.
    """
    mean = F.adaptive_avg_pool2d(features, blocks)  # (B, D, blocks, blocks)
    variance = (F.adaptive_avg_pool2d(features * features, blocks) - mean.square()).clamp_min(
        SMALLEST_DEVIATION**2
    )
    both = torch.cat([mean, 0.5 * variance.log()], dim=1).flatten(2)  # (B, 2D, blocks^2)
    # The lower of the two middle values, by topk: ONNX knows no median. (x * x above: its power takes twice as long.)
    return both.topk((blocks**2 + 1) // 2, dim=2, largest=False, sorted=False).values.amax(dim=2)


def covariance_within(
    samples: NDArray[np.float32], kinds: NDArray[np.int64], *, shrinkage: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of each kind (K, N) and the covariance around them (N, N), shrunk towards its diagonal, + 1e-4 I.

    Args:
        samples: (n, N), one row an image.
        kinds: (n,) in 0..K-1, each at least once.
        shrinkage: share of the diagonal, in [0, 1].
    """
    rows = samples.astype(np.float64)
    means = np.stack([rows[kinds == kind].mean(axis=0) for kind in range(int(kinds.max()) + 1)])  # (K, N)
    residual = rows - means[kinds]
    covariance = residual.T @ residual / max(1, len(rows) - len(means))
    diagonal = np.diag(np.diag(covariance))
    shrunk = (1 - shrinkage) * covariance + shrinkage * diagonal + 1e-4 * np.eye(len(covariance))
    return means, shrunk


class SubclassNovelty(nn.Module):
    """How far an image's statistics lie from each known kind of normal.

    Ours: the Mahalanobis distance of s to the mean t_k of each kind under the covariance within kinds, shrunk halfway
    to its diagonal and divided by the number of statistics, so that about 1 is usual whatever D. From it `unknown`
    is decided; no training, and features of a foreign material lie far out in every direction.

    Args:
        statistics: N numbers of an image.
    """

    means: Tensor  # (K, N) t_k, whitened
    whitener: Tensor  # (N, N) W with W W' = S^-1 / N

    shrinkage = 0.5

    def __init__(self, *, statistics: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(1, statistics))
        self.register_buffer("whitener", torch.eye(statistics))

    def fit(self, samples: NDArray[np.float32], kinds: NDArray[np.int64]) -> None:
        """Learn from the statistics of each training image, (n, N), and its kind of normal, (n,)."""
        means, within = covariance_within(samples, kinds, shrinkage=self.shrinkage)
        inverse_root = np.linalg.inv(np.linalg.cholesky(within)) / np.sqrt(len(within))  # L^-1 / sqrt(N)
        self.means = torch.from_numpy(means @ inverse_root.T).float()
        self.whitener = torch.from_numpy(inverse_root.T.copy()).float()

    def whitened(self, samples: Tensor) -> Tensor:
        """(B, N) statistics in the space in which distances are taken, (B, N)."""
        return samples @ self.whitener

    def forward(self, samples: Tensor) -> Tensor:
        """Distances of (B, N) statistics to the kinds, (B, K)."""
        # Differences, not |a|^2 - 2ab + |b|^2: far away, the rounding of the squares would be all that is left.
        return self.whitened(samples)[:, None].sub(self.means).square().sum(dim=2).sqrt()
