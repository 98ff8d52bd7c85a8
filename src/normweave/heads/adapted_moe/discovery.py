"""Properties of the normal images: subclasses where none are given, and how much position explains."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

COORDINATES = 5
"""Number of principal components of the statistics that are clustered; the others vary between single parts."""
FEWEST_IMAGES = 5
"""Smallest number of images of a discovered subclass, since its expert is fitted to them."""
CLEAR_SILHOUETTE = 0.25
"""Below this silhouette the clusters are not clear (Kaufman and Rousseeuw 1990), and k-means returns one subclass."""


class Agreement(NamedTuple):
    """Agreement of discovered with given subclasses."""

    adjusted_rand_index: float  # 1 = the same partition, 0 = as expected by chance
    purity: float  # share of images whose given subclass is the most frequent one of their discovered subclass
    found: int
    given: int


@dataclass(frozen=True)
class Discovery:
    """Subclasses as Gaussians with diagonal covariance in a few principal components of the statistics."""

    mean: NDArray[np.float64]  # (N,)
    components: NDArray[np.float64]  # (N, q)
    centres: NDArray[np.float64]  # (K, q)
    variances: NDArray[np.float64]  # (K, q)
    log_shares: NDArray[np.float64]  # (K,)

    def predict(self, samples: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the most probable subclass of images with these statistics, (n, N) -> (n,)."""
        points = (samples.astype(np.float64) - self.mean) @ self.components  # (n, q)
        gaps = (points[:, None] - self.centres) ** 2 / self.variances  # (n, K, q)
        log_likelihood = self.log_shares - 0.5 * (gaps + np.log(self.variances)).sum(axis=2)
        return np.asarray(log_likelihood.argmax(axis=1), dtype=np.int64)


def discover(samples: NDArray[np.float32], *, method: Literal["kmeans", "mixture"], most: int, seed: int) -> Discovery:
    """Cluster images by their statistics.

    Args:
        samples: (n, N) statistics s of normal images.
        method: `kmeans` selects the number of subclasses with the best silhouette, `mixture` (Gaussian, diagonal) the
            one with the lowest BIC.
        most: largest number of subclasses to try.
        seed: seed of the random restarts.
    """
    rows = samples.astype(np.float64)
    mean = rows.mean(axis=0)
    _, _, vectors = np.linalg.svd(rows - mean, full_matrices=False)
    components = vectors[:COORDINATES].T  # (N, q)
    points = (rows - mean) @ components  # (n, q)
    most = min(most, len(rows) // FEWEST_IMAGES, len(np.unique(points, axis=0)))
    if most < 2:
        clusters = _one(points)
    elif method == "kmeans":
        clusters = _kmeans(points, most, seed)
    else:
        clusters = _mixture(points, most, seed)
    centres, variances, shares = clusters
    return Discovery(mean, components, centres, variances, np.log(shares))


Clusters = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Centres (K, q), variances (K, q), shares (K,)."""


def _one(points: NDArray[np.float64]) -> Clusters:
    centre = points.mean(axis=0, keepdims=True)
    return centre, np.ones_like(centre), np.ones(1)


def _kmeans(points: NDArray[np.float64], most: int, seed: int) -> Clusters:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    best, clusters = CLEAR_SILHOUETTE, _one(points)
    for number in range(2, most + 1):
        found = KMeans(number, n_init=10, random_state=seed).fit(points)
        if np.bincount(found.labels_, minlength=number).min() < FEWEST_IMAGES:
            continue
        silhouette = silhouette_score(points, found.labels_, sample_size=min(2000, len(points)), random_state=seed)
        if silhouette > best:
            centres = found.cluster_centers_
            best, clusters = silhouette, (centres, np.ones_like(centres), np.full(number, 1 / number))
    return clusters


def _mixture(points: NDArray[np.float64], most: int, seed: int) -> Clusters:
    from sklearn.mixture import GaussianMixture

    floor = 1e-3 * float(points.var(axis=0).mean()) + 1e-12
    lowest, clusters = np.inf, _one(points)
    for number in range(1, most + 1):
        found = GaussianMixture(
            number, covariance_type="diag", n_init=3, max_iter=500, reg_covar=floor, random_state=seed
        ).fit(points)
        if np.bincount(found.predict(points), minlength=number).min() < FEWEST_IMAGES:
            continue
        if (criterion := float(found.bic(points))) < lowest:
            lowest, clusters = criterion, (found.means_, found.covariances_, found.weights_)
    return clusters


def agreement(found: NDArray[np.int64], subclasses: NDArray[np.int64]) -> Agreement:
    """Compare discovered with given subclasses, (n,) each."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(subclasses, found)  # (given, found) images
    return Agreement(
        adjusted_rand_index=float(adjusted_rand_score(subclasses, found)),
        purity=float(table.max(axis=0).sum() / table.sum()),
        found=int(table.shape[1]),
        given=int(table.shape[0]),
    )
