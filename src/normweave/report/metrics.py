"""Numbers by which detectors are compared; higher score = more anomalous, shares in 0..1.

A number that is undefined (only one class was there) is None, and a reason stands beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import trapezoid
from scipy.ndimage import label
from scipy.stats import beta
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from normweave.errors import DataError

MOST_BINS = 2**16
"""Distinct scores that PixelMetrics tells apart at most: 2 MiB."""
FPR_LIMIT = 0.3
"""AUPRO is integrated up to this false-positive rate."""

Measured = tuple[dict[str, float | None], dict[str, str]]
"""(numbers by name, reason by name for those that are None)."""


def image_metrics(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> Measured:
    """AUROC, average precision and the best F1 over all thresholds, of n images (True = anomalous)."""
    names = ("image_auroc", "image_ap", "image_f1max")
    if labels.all() or not labels.any():
        return _undefined(names, "image", normal=int((~labels).sum()))
    precision, recall, _ = precision_recall_curve(labels, scores)
    # At zero recall precision is 1 by convention or 0 by fact; F1 is 0 either way.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1max": float(f1.max()),
    }, {}


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Where the true rate lies, given k of n: Clopper and Pearson 1934, holds at least at `level`.

    Quantiles (1 ± level)/2 of Beta(k, n − k + 1) below and Beta(k + 1, n − k) above.

    Raises:
        DataError: not 0 <= k <= n with n > 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise DataError(
            f"An interval needs 0 <= successes <= trials and a trial, got {successes} of {trials}."
        )
    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def sign_flip_p_value(differences: ArrayLike) -> float | None:
    """How likely differences this far from zero are by chance: two-sided paired permutation test (Fisher 1935).

    Under the null hypothesis a difference is as likely to have the other sign: p is the share of all 2ⁿ choices of
    signs whose mean lies at least as far from zero. Beyond 14 differences 16,384 choices are drawn at random with a
    fixed seed, and p = (1 + #)/(1 + 16,384) with them. None without differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        return None
    if n <= EXACT_SIGNS:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2ⁿ, n); the first row flips nothing
    else:
        drawn = np.random.default_rng(0).integers(0, 2, size=(2**EXACT_SIGNS, n))
        signs = np.concatenate([np.ones((1, n), dtype=np.int64), 1 - 2 * drawn])
    means = np.abs(signs @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-9)))  # equal but for rounding counts as equal


EXACT_SIGNS = 14
"""Differences up to which all choices of signs are tried."""


class PixelMetrics:
    """AUROC, AP, best F1 and AUPRO over the pixels of any number of images, in bounded memory.

    Maps and masks have the size of the image on disk; a mask's pixels above 127 are anomalous. An anomalous image
    without a mask says nothing about pixels: it is left out and counted (`skip`).

    Kept are counts by score. Scores are exact (all 32 bits) until more than 65,536 distinct ones have been seen;
    then neighbouring floats are made one, two by two, as often as needed. What is kept depends on the pixels alone,
    not on their order or on how parts are added up. Pixels in one bin count as ties, so that AUROC is wrong by at
    most ½ Σ_bins (share of normal pixels · share of anomalous pixels), and AUPRO likewise.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Anomalous images without a mask."""
        self._shift = 0
        self._bins = np.zeros(0, dtype=np.uint32)  # ascending
        # By bin: normal pixels, anomalous pixels, and the sum of 1/|region| over the anomalous pixels.
        self._counts = np.zeros((3, 0), dtype=np.float64)
        self._regions = 0

    def skip(self) -> None:
        """Leave out an anomalous image that has no mask."""
        self.skipped += 1

    def update(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """Add one image: its map (H, W) and the truth (H, W), all False for a normal image.

        Raises:
            DataError: the shapes differ, or the map is not finite.
        """
        if anomaly_map.shape != mask.shape:
            raise DataError(f"Map and mask must have one shape, got {anomaly_map.shape} and {mask.shape}.")
        if not np.isfinite(anomaly_map).all():
            raise DataError("An anomaly map holds numbers that are not finite.")
        counts = np.zeros((3, mask.size))
        counts[0], counts[1] = ~mask.ravel(), mask.ravel()
        if mask.any():
            regions, found = label(mask, structure=np.ones((3, 3)))
            sizes = np.bincount(regions.ravel())
            counts[2] = np.where(mask, 1 / np.maximum(sizes, 1)[regions], 0).ravel()
            self._regions += int(found)
        self._bins, self._counts, self._shift = _narrowed(
            np.concatenate([self._bins, _ordered_bits(anomaly_map.ravel()) >> self._shift]),
            np.concatenate([self._counts, counts], axis=1),
            self._shift,
        )

    def __add__(self, other: PixelMetrics) -> PixelMetrics:
        """Those of both together, as if one had seen all images."""
        total = PixelMetrics()
        shift = max(self._shift, other._shift)
        total._bins, total._counts, total._shift = _narrowed(
            np.concatenate([part._bins >> (shift - part._shift) for part in (self, other)]),
            np.concatenate([self._counts, other._counts], axis=1),
            shift,
        )
        total._regions = self._regions + other._regions
        total.skipped = self.skipped + other.skipped
        return total

    def compute(self) -> Measured:
        """The four numbers.

        AUPRO (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", IJCV, section 5.2): the mean over all
        8-connected regions of the share of the region above a threshold, against the share of all normal pixels
        above it, integrated up to 0.3 and divided by 0.3.
        """
        names = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
        normal, anomalous, overlap = self._counts[:, ::-1]  # highest score first
        if not normal.any() or not anomalous.any():
            return _undefined(names, "pixel", normal=int(normal.sum()))
        false_positives, true_positives = normal.cumsum(), anomalous.cumsum()
        normals, anomalies = false_positives[-1], true_positives[-1]
        precision = true_positives / (true_positives + false_positives)
        f1 = 2 * true_positives / (true_positives + false_positives + anomalies)
        rate = np.append(0, false_positives / normals)
        recall = np.append(0, true_positives / anomalies)
        return {
            "pixel_auroc": float(trapezoid(recall, rate)),
            "pixel_ap": float((np.diff(recall) * precision).sum()),
            "pixel_f1max": float(f1.max()),
            "aupro": _area_to(FPR_LIMIT, rate, np.append(0, overlap.cumsum() / self._regions)) / FPR_LIMIT,
        }, {}


COVERED = 0.3
"""Share of a cell that must be anomalous for it to count as an abnormal cell."""


class OverGeneralisation:
    """How much of the abnormal a decoder reconstructs as well, in bounded memory.

    Of the distances between features and their reconstruction: `d_abnormal`, the mean over abnormal cells (at least
    30 % of which a mask covers); `d_normal`, the mean over the cells of normal images; their `ratio`, which is low
    where the decoder over-generalises; and `cell_auroc`, how well the distance tells the two apart. The ratio alone
    misleads: a decoder that reconstructs nothing well has higher distances for both.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(2)  # of normal and of abnormal cells
        self._counts = np.zeros(2)
        self._cells = PixelMetrics()

    def update(self, distance: NDArray[np.float32], coverage: NDArray[np.float32] | None) -> None:
        """Add an image, or a tile of one: (h, w) distances, and which share of each cell is anomalous.

        Args:
            coverage: (h, w); None = a normal image. Cells of an anomalous image that are not abnormal say nothing.
        """
        values = distance.ravel() if coverage is None else distance[coverage >= COVERED]
        if values.size:
            abnormal = int(coverage is not None)
            self._sums[abnormal] += values.sum(dtype=np.float64)
            self._counts[abnormal] += values.size
            self._cells.update(values[None], np.full((1, values.size), bool(abnormal)))

    def __add__(self, other: OverGeneralisation) -> OverGeneralisation:
        """Those of both together, as if one had seen all images."""
        total = OverGeneralisation()
        total._sums, total._counts = self._sums + other._sums, self._counts + other._counts
        total._cells = self._cells + other._cells
        return total

    def compute(self) -> dict[str, float | None] | None:
        """The four numbers; None where normal or abnormal cells are missing."""
        if not self._counts.all():
            return None
        normal, abnormal = self._sums / self._counts
        return {
            "d_normal": float(normal),
            "d_abnormal": float(abnormal),
            "ratio": float(abnormal / normal) if normal > 0 else None,
            "cell_auroc": self._cells.compute()[0]["pixel_auroc"],
        }


def _narrowed(
    bins: NDArray[np.uint32], counts: NDArray[np.float64], shift: int
) -> tuple[NDArray[np.uint32], NDArray[np.float64], int]:
    """Equal bins made one, and neighbours too while there are more than MOST_BINS."""
    bins, place = np.unique(bins, return_inverse=True)
    while len(bins) > MOST_BINS:
        shift += 1
        bins, joined = np.unique(bins >> 1, return_inverse=True)
        place = joined[place]
    return bins, np.stack([np.bincount(place, weights=row, minlength=len(bins)) for row in counts]), shift


def _ordered_bits(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Whole numbers in the order of the floats, neighbours for neighbours."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 the same as 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _area_to(limit: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Area under the line through (x, y), x ascending from 0 to 1, up to x = limit."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(trapezoid(np.append(y[inside], end), np.append(x[inside], limit)))


def _undefined(names: tuple[str, ...], what: str, *, normal: int) -> Measured:
    reason = f"no anomalous {what}" if normal else f"no normal {what}"
    return dict.fromkeys(names), dict.fromkeys(names, reason)
