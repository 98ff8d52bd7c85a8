"""Every good image both fits and calibrates: the scores of held-out folds, and what the verdicts promise."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from builders import head_config
from normweave import cross_validation, fitting, settings
from normweave.cli.train import compose_settings
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.data import rows
from normweave.data.prepare import Preparation
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.heads.adapted_moe.fusion import Fusion
from normweave.outcome.operating_point import Calibration
from normweave.scoring import HeldOut, ImageScore
from normweave.textiles import SEEN, make_textures, render
from normweave.types import Sample

SMALL = Config(
    data=DataConfig(subclass_from="column"),
    prepare=PrepareConfig(height=64, width=64),
    features=TimmConfig(weights="random", strides=(8,), batch_images=4),
    head=head_config(expert="gaussian"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Paths of three images of each of six subclasses."""
    folder = tmp_path_factory.mktemp("few") / "cloth"
    make_textures(folder, size=(64, 64), train_images=3, test_images=0, defect_images=0, seen=SEEN, unseen=[])
    found = sorted(folder.glob("cloth/*/train/good/*.png"))
    assert len(found) == 18
    return found


@pytest.fixture(scope="module")
def lots(good):
    """Six groups, each a subclass of its own."""
    return [
        Sample(image_path=path, subclass=f"lot {number // 3}", group=f"lot {number // 3}")
        for number, path in enumerate(good)
    ]


def test_five_images_at_default_settings_but_small(good, tmp_path):
    default = compose_settings(
        **dict.fromkeys(
            ("config", "model", "clip_weights", "category", "subclass", "subclass_from", "false_alarm_rate", "seed")
        ),
        assignments=[],
    )
    config = replace(default, prepare=SMALL.prepare, features=SMALL.features)
    detector = Detector.fit(good[:5], config=config, use_cache=False, device="cpu")
    calibration = detector.calibration
    assert (calibration.guarantee, calibration.independent_groups) == ("uncalibrated", 5)
    assert calibration.point().threshold == calibration.scores.max()
    assert detector.record["fit_images"] == detector.record["calibration_images"] == 5
    assert calibration.promise == (
        "5 independent good parts can promise 16.7 % false alarms at best; 5 % needs 19. Verdicts are marked "
        "uncalibrated."
    )
    loaded = Detector.load(detector.save(tmp_path / "five.bundle"), device="cpu")
    assert loaded.calibration.as_dict() == calibration.as_dict()
    outcome = loaded.score(good[9])
    assert (outcome.guarantee, outcome.false_alarm_rate) == ("uncalibrated", 1 / 6)
    with pytest.raises(ConfigError, match=r"int8 .* cross-validation fits it to all images"):
        fitting.quantize(detector)


def test_groups_that_are_each_a_subclass_of_their_own(lots):
    detector = Detector.fit(lots, config=SMALL, use_cache=False, device="cpu")
    calibration = detector.calibration
    assert detector.subclass_names == tuple(f"default/lot {number}" for number in range(6))
    assert (calibration.guarantee, calibration.independent_groups, len(calibration)) == ("uncalibrated", 6, 18)
    assert sorted(calibration.subclasses.tolist()) == sorted([0, 1, 2, 3, 4, 5] * 3)  # of the label, not of the routing
    attained = detector.with_rate(0.2).calibration
    assert attained.guarantee == "cross-validated"
    assert attained.promise.startswith("About 20 % false alarms, estimated by cross-validation over 6 independent")
    again = Calibration.from_dict(json.loads(json.dumps(calibration.as_dict())))
    assert again.as_dict() == calibration.as_dict()


@pytest.mark.parametrize("method", ["auto", "split", "cross-validation"])
def test_the_method_is_chosen_by_the_number_of_groups(good, method):
    """18 groups, a third is 6: enough for a rate of 0.2 (4), not for 0.1 (9); a split holds out 9 then."""
    samples = [Sample(image_path=path) for path in good]
    for rate, expected in ((0.2, "conformal"), (0.1, "cross-validated")):
        config = replace(
            SMALL,
            data=DataConfig(subclass_from="none", calibration=method),
            outcome=OutcomeConfig(false_alarm_rate=rate),
        )
        calibration = Detector.fit(samples, config=config, use_cache=False, device="cpu").calibration
        forced = {"split": "conformal", "cross-validation": "cross-validated"}.get(method)
        assert calibration.guarantee == (forced or expected)
        assert len(calibration) == {"conformal": 6 if rate == 0.2 else 9, "cross-validated": 18}[calibration.guarantee]


def scan(samples):
    return rows.scan(samples, Preparation(SMALL.prepare))


class Recorded:
    """A detector that scores each image by its number and remembers what it was fitted to."""

    def __init__(self, names, fitted, *, routes=None):
        self.subclass_names = names
        self.fitted = set(fitted)
        self.routes = routes or (lambda number: number % len(names))
        self.network = type("Network", (), {"can_exclude": len(names) > 1})()

    def score_of(self, number):
        return ImageScore(float(number), float(number), None, self.routes(number), 1.0, False)

    def held_out_scores(self, images, chosen, **given):
        assert not self.fitted & set(chosen.tolist())
        return [HeldOut(n, n, self.score_of(n), self.score_of(n)._replace(score=100.0 + n)) for n in chosen.tolist()]


def test_each_image_is_scored_by_a_head_that_was_fitted_to_the_other_folds(lots):
    images = scan(lots)
    folds = [np.arange(0, 9), np.arange(9, 18)]
    fitted = []

    def fit(rows, held_out):
        fitted.append((rows.tolist(), held_out.tolist()))
        return Recorded(tuple(f"default/lot {k}" for k in sorted({row // 3 for row in rows.tolist()})), rows)

    final = Recorded(tuple(f"default/lot {number}" for number in range(6)), range(18))
    scores = cross_validation.held_out_scores(final, images, folds, fit)
    assert fitted == [(list(range(9, 18)), list(range(9))), (list(range(9)), list(range(9, 18)))]
    assert [each.number for each in scores] == list(range(18))
    # No fold knows the subclass of its images: the label counts, and the score is also the one of an unseen subclass.
    assert [each.own.subclass for each in scores] == [number // 3 for number in range(18)]
    assert all(each.unseen.score == each.own.score == each.number for each in scores)
    assert [each.unseen.subclass for each in scores] == [3 + n % 3 for n in range(9)] + [n % 3 for n in range(9, 18)]


def test_the_fusion_is_measured_once_and_reused_in_the_folds(good, monkeypatch):
    measured, reused = [], []
    fit, copy = Fusion.fit, Fusion.copy
    monkeypatch.setattr(Fusion, "fit", lambda fusion, *data, **of: (measured.append(fusion), fit(fusion, *data, **of)))
    monkeypatch.setattr(Fusion, "copy", lambda fusion, *of: (reused.append(fusion), copy(fusion, *of)))
    small = head_config(expert={"kind": "fusion", "memory.max_patches": 40, "memory.max_pool": 400})
    Detector.fit(good, config=replace(SMALL, head=small), use_cache=False, device="cpu")
    assert (len(measured), len(reused)) == (1, 5)


def test_a_subclass_that_the_fold_knows_is_matched_by_its_name(good):
    images = scan([Sample(image_path=path, subclass="ab"[number % 2]) for number, path in enumerate(good)])
    folds = [np.arange(0, 9), np.arange(9, 18)]
    final = Recorded(("default/a", "default/b"), range(18))
    scores = cross_validation.held_out_scores(
        final, images, folds, lambda rows, held_out: Recorded(("default/b", "default/a"), rows)
    )
    assert [each.own.subclass for each in scores] == [1 - number % 2 for number in range(18)]
    assert [each.unseen.score for each in scores] == [100.0 + number for number in range(18)]


def held_out(scores):
    return [
        HeldOut(n, n, ImageScore(float(score), float(score), None, None, None, False), None)
        for n, score in enumerate(scores)
    ]


def test_suspects_are_far_above_their_subclass_and_few(good):
    """Two subclasses of nine images at levels 1 and 100; the fifth and the last image are 50 above their level."""
    random = np.random.default_rng(0)
    images = scan([Sample(image_path=path, subclass="ab"[number // 9]) for number, path in enumerate(good)])
    scores = np.repeat([1.0, 100.0], 9) + 0.5 * random.uniform(-1, 1, size=18)
    assert cross_validation.suspects(held_out(scores), images) == []
    scores[[4, 17]] += [50, 60]
    assert cross_validation.suspects(held_out(scores), images) == [(str(good[17]), scores[17])]  # 10 % of 18 is one
    twice = scan([*images.samples, *images.samples])
    found = cross_validation.suspects(held_out(np.tile(scores, 2)), twice)
    assert [score for _, score in found] == [scores[17], scores[17], scores[4]]
    assert cross_validation.suspects(held_out(np.ones(18)), images) == []
    small = scan([Sample(image_path=path, subclass=str(number // 3)) for number, path in enumerate(good)])
    assert cross_validation.suspects(held_out(scores), small) == []  # three images have no meaningful median


def test_the_record_lists_every_image_and_a_defective_one_is_a_suspect(tmp_path):
    paths = [tmp_path / f"{number:02d}.png" for number in range(12)]
    for number, path in enumerate(paths):
        image = render(SEEN[0], seed=number, roll=1, size=(64, 64)).image.copy()
        if number == 7:
            image[:, :32] = (40, 250, 40)
        Image.fromarray(image).save(path)
    config = replace(SMALL, data=DataConfig(subclass_from="none"), head=settings.model_config("dfm"))
    detector = Detector.fit(paths, config=config, use_cache=False, device="cpu")
    assert [path for path, _ in detector.record["suspects"]] == [str(paths[7])]
    listed = {path: score for path, score, unseen in detector.record["held_out_scores"] if unseen is None}
    assert sorted(listed) == sorted(map(str, paths))
    np.testing.assert_array_equal(sorted(listed.values()), detector.calibration.scores)
