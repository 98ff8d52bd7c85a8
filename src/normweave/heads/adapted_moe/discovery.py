"""What the normal images themselves say: which kinds nobody named there are, and whether things have their place."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from normweave.types import FitData

BATCH_IMAGES = 16

COORDINATES = 5
"""Principal components of the statistics in which kinds are sought; the rest is the scatter of single parts."""
FEWEST_IMAGES = 5
"""A smaller cluster is not a kind but a few odd images, and no expert could learn from it."""
CLEAR_SILHOUETTE = 0.25
"""Below it there is no substantial structure (Kaufman and Rousseeuw 1990), so k-means answers: one kind."""


class Agreement(NamedTuple):
    """How discovered kinds compare to given subclasses."""

    adjusted_rand_index: float  # 1 = the same division, 0 = as chance would have it
    purity: float  # share of images whose subclass is the most frequent one of their kind
    found: int
    given: int


@dataclass(frozen=True)
class Discovery:
    """Kinds of normal as Gaussians with diagonal covariance in a few principal components of the statistics."""

    mean: NDArray[np.float64]  # (N,)
    components: NDArray[np.float64]  # (N, q)
    centres: NDArray[np.float64]  # (K, q)
    variances: NDArray[np.float64]  # (K, q)
    log_shares: NDArray[np.float64]  # (K,)

    def kinds(self, samples: NDArray[np.float32]) -> NDArray[np.int64]:
        """The most probable kind of images with these statistics, (n, N) -> (n,)."""
        places = (samples.astype(np.float64) - self.mean) @ self.components  # (n, q)
        gaps = (places[:, None] - self.centres) ** 2 / self.variances  # (n, K, q)
        log_likelihood = self.log_shares - 0.5 * (gaps + np.log(self.variances)).sum(axis=2)
        return np.asarray(log_likelihood.argmax(axis=1), dtype=np.int64)


def discover(
    samples: NDArray[np.float32], *, method: Literal["kmeans", "mixture"], most: int, seed: int
) -> Discovery:
    """Cluster images by their statistics.

    Args:
        samples: (n, N) statistics s of normal images.
        method: `kmeans` takes the number of kinds with the best silhouette, `mixture` (Gaussian, diagonal) that with
            the lowest BIC.
        most: largest number of kinds to try.
        seed: of the restarts.
    """
    rows = samples.astype(np.float64)
    mean = rows.mean(axis=0)
    _, _, vectors = np.linalg.svd(rows - mean, full_matrices=False)
    components = vectors[:COORDINATES].T  # (N, q)
    places = (rows - mean) @ components  # (n, q)
    most = min(most, len(rows) // FEWEST_IMAGES, len(np.unique(places, axis=0)))
    if most < 2:
        clusters = _one(places)
    elif method == "kmeans":
        clusters = _kmeans(places, most, seed)
    else:
        clusters = _mixture(places, most, seed)
    centres, variances, shares = clusters
    return Discovery(mean, components, centres, variances, np.log(shares))


Clusters = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Centres (K, q), variances (K, q), shares (K,)."""


def _one(places: NDArray[np.float64]) -> Clusters:
    centre = places.mean(axis=0, keepdims=True)
    return centre, np.ones_like(centre), np.ones(1)


def _kmeans(places: NDArray[np.float64], most: int, seed: int) -> Clusters:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    best, clusters = CLEAR_SILHOUETTE, _one(places)
    for number in range(2, most + 1):
        found = KMeans(number, n_init=10, random_state=seed).fit(places)
        if np.bincount(found.labels_, minlength=number).min() < FEWEST_IMAGES:
            continue
        silhouette = silhouette_score(
            places, found.labels_, sample_size=min(2000, len(places)), random_state=seed
        )
        if silhouette > best:
            centres = found.cluster_centers_
            best, clusters = silhouette, (centres, np.ones_like(centres), np.full(number, 1 / number))
    return clusters


def _mixture(places: NDArray[np.float64], most: int, seed: int) -> Clusters:
    from sklearn.mixture import GaussianMixture

    floor = 1e-3 * float(places.var(axis=0).mean()) + 1e-12
    lowest, clusters = np.inf, _one(places)
    for number in range(1, most + 1):
        found = GaussianMixture(
            number, covariance_type="diag", n_init=3, max_iter=500, reg_covar=floor, random_state=seed
        ).fit(places)
        if np.bincount(found.predict(places), minlength=number).min() < FEWEST_IMAGES:
            continue
        if (criterion := float(found.bic(places))) < lowest:
            lowest, clusters = criterion, (found.means_, found.covariances_, found.weights_)
    return clusters


def agreement(kinds: NDArray[np.int64], subclasses: NDArray[np.int64]) -> Agreement:
    """Compare discovered kinds, (n,), with given subclasses, (n,)."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(subclasses, kinds)  # (given, found) images
    return Agreement(
        adjusted_rand_index=float(adjusted_rand_score(subclasses, kinds)),
        purity=float(table.max(axis=0).sum() / table.sum()),
        found=int(table.shape[1]),
        given=int(table.shape[0]),
    )


def place_explains(data: FitData, *, channels: int) -> float:
    """Share of an image's variance that the mean of images of other groups explains, place by place.

    Near 0 or below for a texture, clearly above where things have their place. Looked for in the finest stages and
    well inside the image only: the padding of the convolutions gives even a texture a place, and reaches far in coarse
    stages.

    Args:
        channels: the first so many are looked at.
    """
    _, h, w = data.features.shape
    above, beside = h // 8, w // 8
    names, members = np.unique(data.groups, return_inverse=True)
    fold = np.random.default_rng(data.seed).permutation(len(names))[members] % 4  # (n,) whole groups
    sums: list[torch.Tensor | float] = [0.0] * 4
    counts = np.bincount(fold, minlength=4)
    squares = 0.0
    for start in range(0, len(data), BATCH_IMAGES):
        few = np.arange(start, min(start + BATCH_IMAGES, len(data)))
        inner = data.features.read(few)[:, :channels, above : h - above, beside : w - beside]
        deviation, mean = torch.std_mean(inner, dim=(2, 3), correction=0, keepdim=True)
        pooled = F.avg_pool2d((inner - mean) / deviation.clamp_min(1e-3), (min(2, h), min(2, w))).double()
        squares += float(pooled.square().sum())
        for part in range(4):
            sums[part] = sums[part] + pooled[torch.from_numpy(fold[few] == part)].sum(dim=0)
    if np.count_nonzero(counts) < 2 or squares == 0:
        return 0.0
    # sum over a part of |x - m|^2 - |x|^2 = |m|^2 n - 2 m . sum x, with m the mean of the other parts
    rest = 0.0
    for part in range(4):
        mean = (sum(sums) - sums[part]) / (counts.sum() - counts[part])
        rest += float((mean * (mean * counts[part] - 2 * sums[part])).sum())
    return -rest / squares
