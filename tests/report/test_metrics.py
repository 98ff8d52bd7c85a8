import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from normweave.errors import DataError
from normweave.report import metrics
from normweave.report.metrics import (
    OverGeneralisation,
    PixelMetrics,
    binomial_interval,
    image_metrics,
    sign_flip_p_value,
)


def textured(seed, *, images=4, side=64, low=0.0, high=1.0):
    """Return smooth maps in [low, high] and masks that correlate with them; the first image is good."""
    random = np.random.default_rng(seed)
    maps, masks = [], []
    for number in range(images):
        noise = ndimage.gaussian_filter(random.normal(size=(side, side)), 2)
        mask = ndimage.gaussian_filter(random.normal(size=(side, side)), 4) > (0.12 if number else math.inf)
        raw = noise + 0.15 * ndimage.gaussian_filter(mask.astype(float), 2)
        maps.append(raw)
        masks.append(mask)
    least, most = np.min(maps), np.max(maps)
    maps = [(low + (high - low) * (one - least) / (most - least)).astype(np.float32) for one in maps]
    return maps, masks


def measured(maps, masks):
    total = PixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        total.update(one, mask)
    values, reasons = total.compute()
    assert reasons == {}
    return values


def literal_aupro(maps, masks, limit=0.3):
    """Compute AUPRO with every distinct score as a threshold, region by region, with the trapezoidal rule."""
    normal = np.concatenate([one[~mask] for one, mask in zip(maps, masks, strict=True)])
    regions = []
    for one, mask in zip(maps, masks, strict=True):
        labels, found = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [one[labels == number] for number in range(1, found + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([one.ravel() for one in maps]))[::-1]:
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        points.append(((normal >= threshold).mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 >= limit:
            if x1 > x0:
                area += (limit - x0) * (y0 + y0 + (y1 - y0) * (limit - x0) / (x1 - x0)) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def by_sklearn(maps, masks):
    scores, labels = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "pixel_auroc": roc_auc_score(labels, scores),
        "pixel_ap": average_precision_score(labels, scores),
        "pixel_f1max": np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12)),
    }


def test_pixels_agree_with_sklearn_on_all_of_them():
    maps, masks = textured(0)
    values = measured(maps, masks)
    for name, expected in by_sklearn(maps, masks).items():
        assert values[name] == pytest.approx(expected, abs=1e-9), name


def test_aupro_agrees_with_its_literal_definition():
    maps, masks = textured(1, images=3, side=32)
    assert measured(maps, masks)["aupro"] == pytest.approx(literal_aupro(maps, masks), abs=1e-9)


def test_aupro_with_many_ties_agrees_with_its_literal_definition():
    maps, masks = textured(2, images=3, side=32)
    maps = [np.round(one * 6) / 6 for one in maps]
    assert measured(maps, masks)["aupro"] == pytest.approx(literal_aupro(maps, masks), abs=1e-9)
    for name, expected in by_sklearn(maps, masks).items():
        assert measured(maps, masks)[name] == pytest.approx(expected, abs=1e-9), name


def test_aupro_weighs_a_small_region_as_much_as_a_large_one():
    """One of two regions is detected without a false alarm: overlap 1/2, although 100 of 101 pixels are detected."""
    anomaly_map, mask = np.zeros((40, 40), np.float32), np.zeros((40, 40), bool)
    mask[:10, :10] = mask[30, 30] = True
    anomaly_map[:10, :10] = 1
    # All other pixels have one score: a straight line from (0, 1/2) to (1, 1), integrated up to 0.3.
    assert measured([anomaly_map], [mask])["aupro"] == pytest.approx((0.5 + 0.65) / 2)


def test_pixels_that_touch_at_a_corner_are_one_region():
    anomaly_map, mask = np.zeros((30, 30), np.float32), np.zeros((30, 30), bool)
    mask[3, 3] = mask[4, 4] = mask[20, 20] = True
    anomaly_map[20, 20] = 1
    # The regions are the corner pair and the single pixel: the overlap is 1/2, not 1/3.
    assert measured([anomaly_map], [mask])["aupro"] == pytest.approx((0.5 + 0.65) / 2)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.05), (50.0, 50.4), (-0.3, 0.7), (1e-4, 40.0), (0.0, 0.001), (-2.0, -1.9)]
)
@pytest.mark.parametrize("bins", [2**16, 2**14])
def test_the_error_of_merged_bins_is_below_a_ten_thousandth(low, high, bins, monkeypatch):
    """For narrow and wide ranges of scores, and also with a quarter of the bins."""
    monkeypatch.setattr(metrics, "MOST_BINS", bins)
    maps, masks = textured(3, images=4, side=200, low=low, high=high)
    total = PixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        total.update(one, mask)
    values, _ = total.compute()
    assert len(total.bins) <= bins
    monkeypatch.setattr(metrics, "MOST_BINS", 2**32)
    exact = measured(maps, masks)
    assert exact["pixel_auroc"] == pytest.approx(by_sklearn(maps, masks)["pixel_auroc"], abs=1e-9)
    for name, expected in exact.items():
        assert values[name] == pytest.approx(expected, abs=1e-4), name


def test_the_error_of_auroc_is_within_its_bound(monkeypatch):
    """With so few bins that the error is not zero."""
    monkeypatch.setattr(metrics, "MOST_BINS", 32)
    maps, masks = textured(4, low=1.0, high=1.2)
    total = PixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        total.update(one, mask)
    normal, anomalous, _ = total.counts
    bound = 0.5 * (normal * anomalous).sum() / normal.sum() / anomalous.sum()
    error = abs(total.compute()[0]["pixel_auroc"] - by_sklearn(maps, masks)["pixel_auroc"])
    assert 0 < error <= bound < 0.05


def test_the_state_does_not_depend_on_the_order(monkeypatch):
    monkeypatch.setattr(metrics, "MOST_BINS", 500)
    maps, masks = textured(5, images=6)
    maps[2], maps[5] = np.round(maps[2] * 8) / 8, np.round(maps[5] * 8) / 8  # the last part stays exact
    forward, parts = PixelMetrics(), [PixelMetrics() for _ in range(3)]
    for number, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        forward.update(one, mask)
        parts[number % 3].update(one, mask)
    parts[1].skip()
    backward = PixelMetrics()
    for one, mask in zip(maps[::-1], masks[::-1], strict=True):
        backward.update(one, mask)
    assert parts[2].shift == 0 < parts[0].shift
    added = sum(parts, PixelMetrics())
    for other in (backward, added):
        np.testing.assert_array_equal(other.bins, forward.bins)
        np.testing.assert_allclose(other.counts, forward.counts, rtol=1e-12)
        assert other.compute()[0] == pytest.approx(forward.compute()[0], rel=1e-12)
    assert added.skipped == 1


def test_zeros_of_both_signs_are_ties():
    total = PixelMetrics()
    total.update(np.array([[0.0, -0.0, 0.0, -0.0]], np.float32), np.array([[True, False, True, False]]))
    assert total.compute()[0]["pixel_auroc"] == 0.5


def test_order_of_bits_is_the_order_of_floats():
    scores = np.array([-np.finfo(np.float32).max, -1.5, -1e-40, 0.0, 1e-40, 1.0, 1.0000001, 3e38], np.float32)
    bits = metrics.ordered_bits(scores)
    assert (np.diff(bits.astype(np.int64)) > 0).all()
    assert bits[6] - bits[5] == 1


def test_undefined_pixel_metrics_have_a_reason():
    total = PixelMetrics()
    total.update(np.ones((4, 4), np.float32), np.zeros((4, 4), bool))
    values, reasons = total.compute()
    assert values == {"pixel_auroc": None, "pixel_ap": None, "pixel_f1max": None, "aupro": None}
    assert set(reasons.values()) == {"no anomalous pixel"}
    everything = PixelMetrics()
    everything.update(np.ones((4, 4), np.float32), np.ones((4, 4), bool))
    assert everything.compute()[1]["aupro"] == "no normal pixel"
    assert PixelMetrics().compute()[1]["aupro"] == "no normal pixel"


def test_wrong_shapes_and_values_are_errors():
    with pytest.raises(DataError, match=r"same shape, got \(4, 4\) and \(4, 5\)"):
        PixelMetrics().update(np.ones((4, 4), np.float32), np.ones((4, 5), bool))
    with pytest.raises(DataError, match="not finite"):
        PixelMetrics().update(np.full((1, 1), np.nan, np.float32), np.ones((1, 1), bool))


def test_image_metrics_of_a_small_example():
    labels = np.array([False, False, True, True])
    values, reasons = image_metrics(labels, np.array([0.1, 0.4, 0.35, 0.8]))
    assert reasons == {}
    assert values["image_auroc"] == 0.75  # 3 of 4 pairs
    assert values["image_ap"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert values["image_f1max"] == pytest.approx(0.8)  # at 0.35: 2 detected, 1 false alarm


def test_undefined_image_metrics_have_a_reason():
    values, reasons = image_metrics(np.array([True, True]), np.array([1.0, 2.0]))
    assert values == {"image_auroc": None, "image_ap": None, "image_f1max": None}
    assert reasons == dict.fromkeys(values, "no normal image")
    assert image_metrics(np.array([False]), np.array([1.0]))[1]["image_ap"] == "no anomalous image"
    assert image_metrics(np.zeros(0, bool), np.zeros(0))[0]["image_auroc"] is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (1, 20), (7, 50), (20, 20)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_has_the_tail_probabilities_of_its_definition(successes, trials, level):
    """k or more at the lower bound, and k or fewer at the upper bound, have probability (1 - level)/2."""
    low, high = binomial_interval(successes, trials, level)
    tail = (1 - level) / 2
    assert low == 0.0 if successes == 0 else stats.binom.sf(successes - 1, trials, low) == pytest.approx(tail)
    assert high == 1.0 if successes == trials else stats.binom.cdf(successes, trials, high) == pytest.approx(tail)


def test_an_interval_without_trials_is_an_error():
    with pytest.raises(DataError, match="got 0 of 0"):
        binomial_interval(0, 0)
    with pytest.raises(DataError, match="got 3 of 2"):
        binomial_interval(3, 2)


def decoded(seed, *, images=6):
    """Yield distances (5, 7) of good and defective images, with the coverage (5, 7) of each cell or None."""
    random = np.random.default_rng(seed)
    for number in range(images):
        share = None if number % 2 else random.choice([0, 0.1, 0.29, 0.3, 0.31, 1], size=(5, 7)).astype(np.float32)
        raised = 0 if share is None else 0.5 * share
        yield (random.random((5, 7)) + raised).astype(np.float32), share


def test_over_generalisation_agrees_with_a_loop_over_all_cells():
    total, normal, abnormal = OverGeneralisation(), [], []
    for distance, share in decoded(0):
        total.update(distance, share)
        for cell in np.ndindex(5, 7):
            if share is None:
                normal.append(distance[cell])
            elif share[cell] in np.array([0.3, 0.31, 1], np.float32):
                abnormal.append(distance[cell])
    assert total.compute() == pytest.approx(
        {
            "d_normal": np.mean(normal),
            "d_abnormal": np.mean(abnormal),
            "ratio": np.mean(abnormal) / np.mean(normal),
            "cell_auroc": roc_auc_score([0] * len(normal) + [1] * len(abnormal), normal + abnormal),
        },
        rel=1e-6,
    )


def test_over_generalisation_of_parts_adds_up():
    total, parts = OverGeneralisation(), [OverGeneralisation() for _ in range(4)]
    for number, (distance, share) in enumerate(decoded(1, images=9)):
        total.update(distance, share)
        parts[number % 3].update(distance, share)  # the last stays empty
    assert sum(parts, OverGeneralisation()).compute() == pytest.approx(total.compute(), rel=1e-12)


def test_a_decoder_that_reconstructs_everything_over_generalises():
    good, bad = np.full((2, 2), 0.2, np.float32), np.array([[0.2, 0.6], [0.2, 0.2]], np.float32)
    mask = np.array([[0, 1], [0, 0]], np.float32)
    sharp, blind = OverGeneralisation(), OverGeneralisation()
    for total, defective in ((sharp, bad), (blind, good)):
        total.update(good, None)
        total.update(defective, mask)
    assert sharp.compute() == pytest.approx({"d_normal": 0.2, "d_abnormal": 0.6, "ratio": 3, "cell_auroc": 1})
    assert blind.compute() == pytest.approx({"d_normal": 0.2, "d_abnormal": 0.2, "ratio": 1, "cell_auroc": 0.5})


def test_over_generalisation_is_undefined_without_normal_or_abnormal_cells():
    total = OverGeneralisation()
    assert total.compute() is None
    total.update(np.ones((2, 2), np.float32), None)
    assert total.compute() is None
    total.update(np.ones((2, 2), np.float32), np.full((2, 2), 0.29, np.float32))  # below the threshold of coverage
    assert total.compute() is None
    only = OverGeneralisation()
    only.update(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert only.compute() is None
    assert (total + only).compute() == {"d_normal": 1, "d_abnormal": 1, "ratio": 1, "cell_auroc": 0.5}


def test_a_ratio_to_zero_is_undefined():
    total = OverGeneralisation()
    total.update(np.zeros((2, 2), np.float32), None)
    total.update(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert total.compute() == {"d_normal": 0, "d_abnormal": 1, "ratio": None, "cell_auroc": 1}


# ── comparison with torchmetrics and anomalib ────────────────────────────────────────────────────────────────────────


def drawn(scores: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return maps and masks (4, 24, 20)."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((4, 24, 20), dtype=bool)
    masks[1, 3:9, 4:11] = True
    masks[2, 0:2, 0:2] = True
    masks[2, 15:20, 8:9] = True
    maps = rng.normal(size=masks.shape).astype(np.float32)
    match scores:
        case "informed":
            maps += 2 * masks
        case "ties":
            maps = np.round(maps)
        case "constant":
            maps[:] = 0.25
        case "perfect":
            maps = masks.astype(np.float32)
        case "reversed":
            maps = -masks.astype(np.float32)
        case "large":
            maps = 1e6 + 100 * maps
        case "saturated":
            maps = 1 / (1 + np.exp(np.clip(-40 * (maps + masks), -80, 80)))
    return maps.astype(np.float32), masks


@pytest.mark.parametrize(
    "scores", ["random", "informed", "ties", "constant", "perfect", "reversed", "large", "saturated"]
)
def test_pixels_agree_with_torchmetrics(scores):
    """anomalib uses torchmetrics. Ranks in [0, 1] avoid the sigmoid that torchmetrics applies to other scores."""
    torchmetrics = pytest.importorskip("torchmetrics")
    from torch import from_numpy as tensor

    maps, masks = drawn(scores, seed=3)
    total = PixelMetrics()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        total.update(anomaly_map, mask)
    values, _ = total.compute()
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)  # the same order, in 0..1
    shares = tensor(ranks / max(ranks.max(), 1)).flatten()
    truth = tensor(masks).flatten().int()

    auroc = torchmetrics.functional.auroc(shares, truth, task="binary")
    average = torchmetrics.functional.average_precision(shares, truth, task="binary")
    precision, recall, _ = torchmetrics.functional.precision_recall_curve(shares, truth, task="binary")
    f1 = (2 * precision * recall / (precision + recall).clamp_min(1e-12)).max()

    assert values["pixel_auroc"] == pytest.approx(float(auroc), abs=1e-5)
    assert values["pixel_ap"] == pytest.approx(float(average), abs=1e-5)
    assert values["pixel_f1max"] == pytest.approx(float(f1), abs=1e-5)


@pytest.mark.parametrize("scores", ["random", "informed", "perfect", "large"])
def test_aupro_agrees_with_anomalib(scores):
    """Without ties, which anomalib treats differently."""
    pytest.importorskip("normweave.bridges.anomalib", reason="needs pip install 'normweave[bench]'")
    import torch
    from anomalib.metrics.aupro import _AUPRO

    maps, masks = drawn(scores, seed=4)
    total = PixelMetrics()
    expected = _AUPRO(fpr_limit=0.3)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        total.update(anomaly_map, mask)
        expected.update(torch.from_numpy(anomaly_map)[None], torch.from_numpy(mask)[None].int())
    assert total.compute()[0]["aupro"] == pytest.approx(float(expected.compute()), abs=5e-3)


@pytest.mark.parametrize("distribution", ["random", "informed", "ties", "constant", "perfect", "reversed", "large"])
def test_images_agree_with_torchmetrics(distribution):
    torchmetrics = pytest.importorskip("torchmetrics")
    from torch import from_numpy as tensor

    maps, masks = drawn(distribution, seed=5)
    scores, labels = maps[:, :, 3].ravel().astype(np.float64), masks[:, :, 3:11].any(axis=2).ravel()
    values, reasons = image_metrics(labels, scores)
    ranks = np.unique(scores, return_inverse=True)[1]
    shares, truth = tensor(ranks / max(ranks.max(), 1)), tensor(labels).int()
    assert reasons == {}
    auroc = torchmetrics.functional.auroc(shares, truth, task="binary")
    average = torchmetrics.functional.average_precision(shares, truth, task="binary")
    assert values["image_auroc"] == pytest.approx(float(auroc), abs=1e-6)
    assert values["image_ap"] == pytest.approx(float(average), abs=1e-6)


# ── significance ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 5, 10])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_the_sign_flip_test_agrees_with_scipy(n, shift):
    differences = np.random.default_rng(n).normal(shift, size=n)
    if n == 1:
        assert sign_flip_p_value(differences) == 1
        return
    wanted = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_p_value(differences) == pytest.approx(wanted.pvalue)


def test_many_differences_use_random_signs_with_a_fixed_seed():
    differences = np.random.default_rng(0).normal(0.3, size=60)
    p = sign_flip_p_value(differences)
    # The sum of many differences is nearly normal.
    z = abs(differences.sum()) / np.sqrt((differences**2).sum())
    assert p == pytest.approx(2 * stats.norm.sf(z), abs=0.01)
    assert sign_flip_p_value(differences) == p


def test_zero_differences_have_a_p_value_of_one():
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1
    assert sign_flip_p_value([]) is None
    assert sign_flip_p_value([0.1] * 5) == 2 / 2**5  # the smallest p-value of five differences


def test_pixels_outside_a_region_are_not_counted():
    random = np.random.default_rng(3)
    scores, mask = random.random((20, 30), dtype=np.float32), random.random((20, 30)) > 0.7
    inside = np.zeros((20, 30), dtype=bool)
    inside[4:18, 5:25] = True
    whole, part, planted = PixelMetrics(), PixelMetrics(), PixelMetrics()
    whole.update(scores[4:18, 5:25], mask[4:18, 5:25])
    part.update(scores, mask, inside)
    planted.update(np.where(inside, scores, np.float32(9)), mask | ~inside, inside)
    assert part.compute() == whole.compute() == planted.compute()
