"""Real tiles and boards, read where they are: the results of the tables in results/, on as few images as possible."""

from pathlib import Path

import pytest

from normweave import settings
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


def test_layout_experts_detect_defects_in_unseen_light_better_than_memory_or_subspace(
    fold: Fold, tiles: Detector, feature_cache: Path
):
    """Parts with a fixed position. The default, a fusion chosen on all sets, is in between."""
    assert fold.name == "without exp4"
    layout = settings.override(Config(), ["head.expert.kind=layout"])
    detectors = {
        "default": tiles,
        "layout": Detector.fit(fold.samples, config=layout, cache=feature_cache),
        "patchcore": Detector.fit(fold.samples, model="patchcore", cache=feature_cache),
        "dfm": Detector.fit(fold.samples, model="dfm", cache=feature_cache),
    }
    measured = {
        name: measure(detector, fold.tests["unseen"], cache=feature_cache)[0]["pooled"]
        for name, detector in detectors.items()
    }
    assert measured["layout"]["image_auroc"] > 0.9
    for peer in ("patchcore", "dfm"):
        for number in ("image_auroc", "pixel_auroc", "aupro"):
            assert measured["layout"][number] > measured[peer][number], (peer, number, measured)
    assert measured["default"]["image_auroc"] > max(0.85, measured["dfm"]["image_auroc"])
    assert measured["default"]["aupro"] > measured["dfm"]["aupro"]


def test_a_board_is_unknown_to_a_detector_of_tiles(tiles: Detector, data_root: Path):
    boards = [sample.image_path for sample in read(data_root / "deep-pcb", DataConfig()) if sample.label == "normal"]
    verdicts = [outcome.verdict for outcome in tiles.stream(boards[:10], maps=False)]
    assert verdicts == ["unknown"] * 10


def test_a_good_tile_of_another_light_is_not(fold: Fold, tiles: Detector, feature_cache: Path):
    good = [sample for sample in fold.tests["unseen"] if sample.label == "normal"]
    outcomes = [outcome for _, outcome, *_ in tiles.stream_samples(good, maps=False, cache=feature_cache)]
    assert sum(outcome.verdict == "unknown" for outcome in outcomes) <= 0.05 * len(good)
