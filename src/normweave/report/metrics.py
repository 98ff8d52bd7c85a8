"""Metrics of anomaly detection, in [0, 1]; a higher score is more anomalous.

A metric that is undefined, such as AUROC with a single class, is None and has a reason.
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
"""Maximum number of distinct scores in PixelMetrics: 2 MiB."""
FPR_LIMIT = 0.3
"""False-positive rate up to which AUPRO is integrated."""
EXACT_SIGNS = 14
"""Number of differences up to which all combinations of signs are computed."""
COVERED = 0.3
"""Share of a cell that a mask must cover for the cell to be abnormal."""

Measured = tuple[dict[str, float | None], dict[str, str]]
"""(metrics by name, reasons by name of those that are None)."""


def image_metrics(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> Measured:
    """Return AUROC, average precision and the highest F1 over all thresholds, of n images (True = anomalous)."""
    names = ("image_auroc", "image_ap", "image_f1max")
    if labels.all() or not labels.any():
        return _undefined(names, "image", normal=int((~labels).sum()))
    precision, recall, _ = precision_recall_curve(labels, scores)
    # At zero recall F1 is 0, whatever the precision.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1max": float(f1.max()),
    }, {}


def binomial_interval(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of a rate of k in n trials (Clopper and Pearson 1934).

    The bounds are the quantile (1 − level)/2 of Beta(k, n − k + 1) and (1 + level)/2 of Beta(k + 1, n − k).
    k need not be whole: for dependent images it is their rate times the number of independent groups.

    Raises:
        DataError: not 0 <= k <= n, or n is 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise DataError(
            f"A confidence interval needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}."
        )
    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def sign_flip_p_value(differences: ArrayLike) -> float | None:
    """Return the p-value of a two-sided paired permutation test of zero mean (Fisher 1935); None for no differences.

    Under the null hypothesis both signs of a difference are equally likely: p is the share of all 2ⁿ combinations of
    signs whose mean is at least as far from zero. For more than 14 differences, 16,384 combinations are drawn at
    random with a fixed seed, and p = (1 + #)/(1 + 16,384).
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        return None
    if n <= EXACT_SIGNS:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2ⁿ, n); the first row keeps all signs
    else:
        drawn = np.random.default_rng(0).integers(0, 2, size=(2**EXACT_SIGNS, n))
        signs = np.concatenate([np.ones((1, n), dtype=np.int64), 1 - 2 * drawn])
    means = np.abs(signs @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-9)))  # equal up to rounding


class PixelMetrics:
    """AUROC, AP, highest F1 and AUPRO over the pixels of any number of images, in bounded memory.

    Maps and masks have the size of the image on disk. Anomalous images without a mask are left out and counted
    (`skip`).

    The state holds the number of pixels of each score. Scores are exact (all 32 bits) up to 65,536 distinct ones;
    beyond that, neighbouring floats are merged in pairs as often as needed. The state depends on the pixels alone, not
    on their order or on the order of additions. Pixels in one bin count as ties: the error of AUROC is at most
    ½ Σ_bins (share of normal pixels · share of anomalous pixels), and likewise for AUPRO.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Number of anomalous images without a mask."""
        self.shift = 0
        """Number of low bits of the scores that are dropped."""
        self.bins = np.zeros(0, dtype=np.uint32)
        """Distinct scores in ascending order, as `ordered_bits`."""
        self.counts = np.zeros((3, 0), dtype=np.float64)
        """For each bin: number of normal pixels, of anomalous pixels, and the sum of 1/|region| over the latter."""
        self._regions = 0

    def skip(self) -> None:
        """Count an anomalous image without a mask."""
        self.skipped += 1

    def update(
        self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_], inside: NDArray[np.bool_] | None = None
    ) -> None:
        """Add one image: its map (H, W) and its mask (H, W), all False for a normal image.

        Args:
            inside: (H, W) the pixels that are counted, those in the region of interest; None: all.

        Raises:
            DataError: the shapes differ, or the map is not finite.
        """
        if anomaly_map.shape != mask.shape:
            raise DataError(f"Map and mask must have the same shape, got {anomaly_map.shape} and {mask.shape}.")
        if not np.isfinite(anomaly_map).all():
            raise DataError("The anomaly map contains values that are not finite.")
        counted = ~mask if inside is None else inside & ~mask
        mask = mask if inside is None else inside & mask
        normal, number = np.unique(ordered_bits(anomaly_map[counted]) >> self.shift, return_counts=True)
        anomalous = ordered_bits(anomaly_map[mask]) >> self.shift
        counts = np.zeros((3, len(normal) + len(anomalous)))
        counts[0, : len(normal)] = number
        counts[1, len(normal) :] = 1
        if len(anomalous):
            regions, found = label(mask, structure=np.ones((3, 3)))
            sizes = np.bincount(regions.ravel())
            counts[2, len(normal) :] = 1 / sizes[regions[mask]]
            self._regions += int(found)
        self.bins, self.counts, self.shift = _merged(
            np.concatenate([self.bins, normal, anomalous]),
            np.concatenate([self.counts, counts], axis=1),
            self.shift,
        )

    def __add__(self, other: PixelMetrics) -> PixelMetrics:
        """Return the metrics of the images of both."""
        total = PixelMetrics()
        shift = max(self.shift, other.shift)
        total.bins, total.counts, total.shift = _merged(
            np.concatenate([part.bins >> (shift - part.shift) for part in (self, other)]),
            np.concatenate([self.counts, other.counts], axis=1),
            shift,
        )
        total._regions = self._regions + other._regions
        total.skipped = self.skipped + other.skipped
        return total

    def compute(self) -> Measured:
        """Return the four metrics.

        AUPRO (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", IJCV, section 5.2): the mean over all
        8-connected regions of the share of the region above a threshold, against the share of all normal pixels
        above it, integrated up to 0.3 and divided by 0.3.
        """
        names = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
        normal, anomalous, overlap = self.counts[:, ::-1]  # highest score first
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


class OverGeneralisation:
    """How well a decoder reconstructs anomalies, although it should not; in bounded memory.

    `d_normal` is the mean distance between features and their reconstruction over the cells of normal images,
    `d_abnormal` the mean over abnormal cells (a mask covers at least 30 %). `ratio` is d_abnormal / d_normal, low for a
    decoder that over-generalises; `cell_auroc` is the AUROC of the distance. The ratio alone misleads: a decoder that
    reconstructs nothing well has larger distances for both.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(2)  # over normal and over abnormal cells
        self._counts = np.zeros(2)
        self._cells = PixelMetrics()

    def update(self, distance: NDArray[np.float32], coverage: NDArray[np.float32] | None) -> None:
        """Add the cells of an image or of a tile.

        Args:
            distance: (h, w).
            coverage: (h, w) share of each cell that the mask covers, None for a normal image. Other cells than the
                abnormal ones of an anomalous image are left out.
        """
        values = distance.ravel() if coverage is None else distance[coverage >= COVERED]
        if values.size:
            abnormal = int(coverage is not None)
            self._sums[abnormal] += values.sum(dtype=np.float64)
            self._counts[abnormal] += values.size
            self._cells.update(values[None], np.full((1, values.size), bool(abnormal)))

    def __add__(self, other: OverGeneralisation) -> OverGeneralisation:
        """Return the metrics of the images of both."""
        total = OverGeneralisation()
        total._sums, total._counts = self._sums + other._sums, self._counts + other._counts
        total._cells = self._cells + other._cells
        return total

    def compute(self) -> dict[str, float | None] | None:
        """Return the four metrics, or None without normal or without abnormal cells."""
        if not self._counts.all():
            return None
        normal, abnormal = self._sums / self._counts
        return {
            "d_normal": float(normal),
            "d_abnormal": float(abnormal),
            "ratio": float(abnormal / normal) if normal > 0 else None,
            "cell_auroc": self._cells.compute()[0]["pixel_auroc"],
        }


def _merged(
    bins: NDArray[np.uint32], counts: NDArray[np.float64], shift: int
) -> tuple[NDArray[np.uint32], NDArray[np.float64], int]:
    """Merge equal bins, then neighbouring ones while their number exceeds MOST_BINS."""
    order = np.lexsort((bins,))  # stable, and merges runs that are sorted already, as most of the bins are
    ordered = bins[order]
    while True:
        first = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
        if first.sum() <= MOST_BINS:
            break
        shift += 1
        ordered >>= 1
    position = np.empty(len(bins), dtype=np.int64)
    position[order] = first.cumsum() - 1
    merged = ordered[first]
    return merged, np.stack([np.bincount(position, weights=row, minlength=len(merged)) for row in counts]), shift


def ordered_bits(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return integers in the order of the floats, consecutive for consecutive floats."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _area_to(limit: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the area under the polyline through (x, y), with x ascending from 0 to 1, up to x = limit."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(trapezoid(np.append(y[inside], end), np.append(x[inside], limit)))


def _undefined(names: tuple[str, ...], what: str, *, normal: int) -> Measured:
    reason = f"no anomalous {what}" if normal else f"no normal {what}"
    return dict.fromkeys(names), dict.fromkeys(names, reason)
