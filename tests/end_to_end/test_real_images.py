"""Real tiles and boards, read where they are: the results of the tables in results/, on as few images as possible."""

from pathlib import Path

import pytest

from normweave.benchmark.evaluate import measure
from normweave.benchmark.protocols import Fold, folds
from normweave.config import Config, DataConfig
from normweave.data.layouts import read
from normweave.detector import Detector

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def fold(data_root: Path) -> Fold:
    """Three lights train, the brightest tests, on other tiles."""
    samples = read(data_root / "magnetic-tiles", DataConfig(), layout="magnetic_tiles")
    return folds(samples, "leave-one-subclass-out", seed=0)[-1]


@pytest.fixture(scope="module")
def tiles(fold: Fold, feature_cache: Path) -> Detector:
    return Detector.fit(fold.samples, config=Config(), cache=feature_cache)


def test_defects_in_unseen_light_are_detected_better_than_by_memory_or_subspace(
    fold: Fold, tiles: Detector, feature_cache: Path
):
    assert fold.name == "without exp4"
    measured = {}
    for model in ("adapted-moe", "patchcore", "dfm"):
        detector = tiles if model == "adapted-moe" else Detector.fit(fold.samples, model=model, cache=feature_cache)
        measured[model] = measure(detector, fold.tests["unseen"], cache=feature_cache)[0]["pooled"]
    ours = measured["adapted-moe"]
    assert ours["image_auroc"] > 0.9
    for peer in ("patchcore", "dfm"):
        for number in ("image_auroc", "pixel_auroc", "aupro"):
            assert ours[number] > measured[peer][number], (peer, number, measured)


def test_the_gaussian_experts_have_the_smallest_weight_on_tiles(tiles: Detector):
    """Parts with a fixed position: the Gaussian experts do not know it."""
    (fusion,) = tiles.record["notes"]["fusion"]
    weights = {each["name"]: each["weight"] for each in fusion["experts"]}
    assert min(weights, key=weights.__getitem__) == "gaussian", weights


def test_a_board_is_unknown_to_a_detector_of_tiles(tiles: Detector, data_root: Path):
    boards = [sample.image_path for sample in read(data_root / "deep-pcb", DataConfig()) if sample.label == "normal"]
    verdicts = [outcome.verdict for outcome in tiles.stream(boards[:10], maps=False)]
    assert verdicts == ["unknown"] * 10


def test_a_good_tile_of_another_light_is_not(fold: Fold, tiles: Detector, feature_cache: Path):
    good = [sample for sample in fold.tests["unseen"] if sample.label == "normal"]
    outcomes = [outcome for _, outcome, *_ in tiles.stream_samples(good, maps=False, cache=feature_cache)]
    assert sum(outcome.verdict == "unknown" for outcome in outcomes) <= 0.05 * len(good)
