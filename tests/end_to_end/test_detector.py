"""A detector from end to end: fit, score, save, load."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bundles import without_history
from normweave import fitting, settings
from normweave.benchmark.evaluate import evaluate
from normweave.config import Config, DataConfig, OutcomeConfig
from normweave.data.layouts import read
from normweave.detector import Detector
from normweave.errors import BundleError, CheckError, DataError, ImageError
from normweave.textiles import SEEN, render
from normweave.types import Outcome, Sample

from .conftest import FEW_EPOCHS

MODELS = ("adapted-moe", "cnc", "simplenet", "patchcore", "dfm", "msflow", "pyramidflow")


def good_cloth(seed: int) -> np.ndarray:
    return render(SEEN[0], seed=seed).image


def same(first: Outcome, second: Outcome) -> bool:
    maps_equal = np.array_equal(first.anomaly_map, second.anomaly_map)
    return maps_equal and replace(first, latency_ms=0, bundle_hash=None) == replace(
        second, latency_ms=0, bundle_hash=None
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_planted_defect_is_found_where_it_is(
    model: str, textiles: Path, feature_cache: Path, config: Config, request: pytest.FixtureRequest
):
    if model == "adapted-moe":
        detector = request.getfixturevalue("default")
    else:
        quick = settings.override(settings.with_model(config, model), FEW_EPOCHS.get(model, []))
        cloth = read(textiles, DataConfig())
        if model not in ("cnc", "simplenet"):  # which need more images
            cloth = [each for each in cloth if each.subclass == SEEN[0].name]
        detector = Detector.fit(cloth, config=quick, cache=feature_cache)
    offsets = []
    for seed, (y, x) in enumerate([(40, 60), (40, 200), (128, 128), (200, 64), (210, 180)]):
        image = good_cloth(seed=1000 + seed)
        image[y - 12 : y + 12, x - 12 : x + 12] = (20, 160, 40)
        outcome = detector.score(image)
        assert outcome.verdict != "normal"
        box = outcome.boxes[0]
        assert box.x <= x < box.x + box.width
        assert box.y <= y < box.y + box.height
        weight = np.clip(outcome.anomaly_map - np.quantile(outcome.anomaly_map, 0.98), 0, None)
        rows, columns = np.mgrid[:256, :256] + 0.5
        offsets.append(((rows * weight).sum() / weight.sum() - y, (columns * weight).sum() / weight.sum() - x))
    # One cell is 8 pixels (32 for the whole-image subspace, whose blur is symmetrical all the same).
    assert np.abs(np.mean(offsets, axis=0)).max() < 4, offsets


def test_defective_cloth_scores_higher_than_good_cloth(default: Detector, textiles: Path, tmp_path: Path):
    metrics = evaluate(default, textiles, output=tmp_path / "evaluation")
    assert metrics["seen"]["image_auroc"] > 0.8
    assert metrics["seen"]["pixel_auroc"] > 0.85
    assert metrics["pooled"]["n_normal"] == 4 * 6
    assert metrics["pooled"]["n_anomalous"] == 4 * 7
    assert metrics["unseen"]["n_normal"] == 6
    written = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert written == metrics
    lines = (tmp_path / "evaluation" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 13
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page


def test_a_bad_mask_is_listed_and_stops_nothing(default: Detector, textiles: Path, tmp_path: Path):
    damaged = [sample for sample in read(textiles, DataConfig()) if sample.label == "anomalous"][:3]
    small = tmp_path / "small.png"
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(small)
    samples = [
        replace(damaged[0], mask_path=small),
        replace(damaged[1], mask_path=tmp_path / "gone.png"),
        damaged[2],
    ]
    metrics = evaluate(default, samples, output=tmp_path / "evaluation")
    assert [fault["image_path"] for fault in metrics["mask_faults"]] == [str(s.image_path) for s in damaged[:2]]
    assert "9" in metrics["mask_faults"][0]["reason"]
    assert "gone.png" in metrics["mask_faults"][1]["reason"]
    assert metrics["pooled"]["n_without_mask"] == 2
    assert metrics["pooled"]["n_anomalous"] == 3


def test_a_bundle_read_into_torch_gives_the_scores_of_training(default: Detector, textiles: Path, tmp_path: Path):
    bundle = default.save(tmp_path / "cloth.bundle")
    loaded = fitting.load(bundle)
    paths = [sample.image_path for sample in read(textiles, DataConfig()) if sample.split == "test"][:9]
    for before, after in zip(default.score(paths), loaded.score(paths), strict=True):
        assert same(before, after)
    assert loaded.record == default.record
    assert loaded.config == default.config


def test_the_threshold_is_computed_from_normals_outside_of_the_fit(default: Detector, textiles: Path):
    fit, calibration = set(default.record["fit_hashes"]), set(default.record["calibration_hashes"])
    assert fit
    assert not fit & calibration
    samples = [sample for sample in read(textiles, DataConfig()) if sample.split == "train"]
    assert len(fit) + len(calibration) == len(samples)
    # The threshold follows from the scores of the calibration images, to the half precision of the feature cache.
    from normweave.data.images import content_hash

    held_out = [sample.image_path for sample in samples if content_hash(sample.image_path)[:16] in calibration]
    scores = sorted(outcome.pred_score for outcome in default.score(held_out))
    np.testing.assert_allclose(scores, default.calibration.scores, rtol=5e-3, atol=5e-3)


def test_images_of_one_roll_stay_together(default: Detector, textiles: Path):
    from normweave.data.images import content_hash

    fit = set(default.record["fit_hashes"])
    side = {}
    for sample in read(textiles, DataConfig()):
        if sample.split == "train":
            side.setdefault(sample.group, set()).add(content_hash(sample.image_path)[:16] in fit)
    assert all(len(sides) == 1 for sides in side.values())


def test_no_test_image_is_opened_by_fit(textiles: Path, feature_cache: Path, config: Config, tmp_path: Path):
    samples = [sample for sample in read(textiles, DataConfig()) if sample.split == "train"]
    trap = tmp_path / "trap.png"
    trap.write_text("opening this would be a refusal")
    with_test = [*samples, Sample(image_path=trap, category="cloth", split="test")]
    detector = Detector.fit(with_test, config=config, model="dfm", cache=feature_cache)
    assert detector.refused == ()


def test_an_image_of_the_training_cannot_be_tested(default: Detector, textiles: Path):
    train = next(sample for sample in read(textiles, DataConfig()) if sample.split == "train")
    with pytest.raises(DataError, match="was used in training, so it cannot be used for test"):
        list(default.stream_samples([train]))


def test_one_bad_image_never_stops_a_batch(default: Detector, tmp_path: Path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    first, second, third = default.score([good_cloth(2000), text, good_cloth(2001)])
    assert (first.error, third.error) == (None, None)
    assert second.verdict is None
    assert "text.png" in second.error
    with pytest.raises(ImageError, match=r"text\.png"):
        default.score(text)


def test_an_outcome_does_not_depend_on_its_company(default: Detector):
    images = [good_cloth(seed) for seed in range(2100, 2111)]
    together = default.score(images)
    for image, outcome in zip(images, together, strict=True):
        alone = default.score(image)
        np.testing.assert_allclose(alone.anomaly_map, outcome.anomaly_map, rtol=1e-4, atol=1e-4)
        assert alone.verdict == outcome.verdict


def test_the_same_seed_gives_the_same_weights(default: Detector, textiles: Path, config: Config, tmp_path: Path):
    """Also with features that are computed again. The demo is compared to the last byte of the bundle."""
    again = Detector.fit(textiles, config=config, cache=tmp_path)
    first, second = default.network.tensors(), again.network.tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert default.calibration.as_dict() == again.calibration.as_dict()
    assert without_history(default.record) == without_history(again.record)


def test_a_large_image_is_cut_into_tiles(default: Detector):
    rng = np.random.default_rng(0)
    large = np.tile(good_cloth(2200), (5, 9, 1))  # 1280 x 2304, beyond four times the input
    large = large + rng.integers(0, 2, large.shape, dtype=np.uint8) // 2
    assert len(default.preparation.tiles(*large.shape[:2])) > 1
    outcome = default.score(large)
    assert outcome.anomaly_map.shape == (1280, 2304)
    assert (outcome.height, outcome.width) == (1280, 2304)


def test_calibrate_computes_the_threshold_again(default: Detector, textiles: Path, tmp_path: Path):
    loaded = Detector.load(default.save(tmp_path / "bundle"))
    folder = tmp_path / "more"
    folder.mkdir()
    for seed in range(30):
        Image.fromarray(good_cloth(3000 + seed)).save(folder / f"{seed}.png")
    loaded.calibrate(folder, false_alarm_rate=0.1)
    assert loaded.calibration.false_alarm_rate == 0.1
    assert len(loaded.calibration) == 30
    with pytest.raises(DataError, match="cannot be used for test"):
        list(loaded.stream_samples([Sample(image_path=folder / "0.png")]))
    with pytest.raises(CheckError, match="needs at least 999 independent groups of held-out normal images, got 30"):
        loaded.calibrate(folder, false_alarm_rate=0.001)
    assert loaded.config.outcome.false_alarm_rate == 0.1  # the failed call changed nothing
    with pytest.raises(DataError, match="cannot be used for calibration"):
        loaded.calibrate(textiles)


def test_a_changed_byte_is_refused(default: Detector, tmp_path: Path):
    bundle = default.save(tmp_path / "bundle")
    weights = bytearray((bundle / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        Detector.load(bundle)


def test_subclasses_are_discovered_when_none_are_given(textiles: Path, feature_cache: Path):
    config = Config(data=DataConfig(calibration="cross-validation", folds=2), seed=7)
    detector = Detector.fit(textiles, config=config, subclass_from="auto", cache=feature_cache)
    assert len(detector.subclass_names) >= 2
    outcome = detector.score(good_cloth(4000))
    assert outcome.category == "cloth"
    assert outcome.subclass in detector.subclass_names


def test_one_good_image_is_too_few(tmp_path: Path):
    Image.fromarray(good_cloth(0)).save(tmp_path / "only.png")
    with pytest.raises(DataError, match="1"):
        Detector.fit(tmp_path)


def test_a_rate_that_cannot_be_promised_is_not(textiles: Path, feature_cache: Path):
    config = Config(data=DataConfig(subclass_from="column"), outcome=OutcomeConfig(false_alarm_rate=0.0001))
    calibration = Detector.fit(textiles, config=config, model="dfm", cache=feature_cache).calibration
    assert calibration.guarantee == "uncalibrated"
    assert "0.01 % needs 9999" in calibration.promise


def test_the_same_file_in_two_splits_is_refused(textiles: Path, feature_cache: Path, config: Config):
    samples = [sample for sample in read(textiles, DataConfig()) if sample.split == "train"]
    twice = [*samples, replace(samples[0], split="calibration", group="elsewhere")]
    with pytest.raises(DataError, match="split"):
        Detector.fit(twice, config=config, cache=feature_cache)


def test_unreadable_training_images_are_listed(textiles: Path, feature_cache: Path, config: Config, tmp_path: Path):
    samples = [sample for sample in read(textiles, DataConfig()) if sample.split == "train"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(samples[0].image_path.read_bytes()[:500])
    detector = Detector.fit(
        [*samples, replace(samples[0], image_path=broken)], config=config, model="dfm", cache=feature_cache
    )
    (refusal,) = detector.refused
    assert refusal.image_path == str(broken)
    assert detector.record["refused"] == [[str(broken), refusal.reason]]


def test_record_is_what_json_holds(default: Detector):
    assert default.record["notes"]["experts"] == "fusion"
    (fusion,) = default.record["notes"]["fusion"]
    assert [each["name"] for each in fusion["experts"]] == ["memory", "layout", "gaussian"]
    assert sum(each["weight"] for each in fusion["experts"]) == pytest.approx(1)
    assert json.loads(json.dumps(default.record)) == default.record
    assert settings.from_dict(default.record["config"]) == default.config
