"""Settings within a time budget: what is compared, which one is chosen, and from which images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders import head_config
from normweave import budget, settings
from normweave.budget import Candidate, Trial, best, candidates, cheapest_of_the_best, cost, faster, some_groups
from normweave.config import (
    Config,
    DataConfig,
    MapsConfig,
    OpenClipConfig,
    PrepareConfig,
    RegionConfig,
    ShapesConfig,
    TimmConfig,
)
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.types import Sample

BASE = Candidate(256, 256, 4.0)
CHEAP = Config(
    data=DataConfig(calibration="split"),
    features=TimmConfig(weights="random", strides=(8,), batch_images=4),
    head=head_config(expert="gaussian"),
)


def strip(seed, *, height=64, width=1100):
    """A grey texture with stripes, brighter to the right."""
    rng = np.random.default_rng(seed)
    columns = 90 + 40 * np.sin(np.arange(width) / 5) + np.arange(width) / 20
    pixels = columns + rng.normal(0, 6, (height, width))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """Six good strips for training, three good and three defective ones for testing."""
    folder = tmp_path_factory.mktemp("strips")
    samples = []
    for number in range(12):
        path = folder / f"{number:02}.png"
        image = strip(number)
        if number >= 9:
            image.paste((250, 30, 30), (900, 20, 940, 44))
        image.save(path)
        label = "anomalous" if number >= 9 else "normal"
        samples.append(Sample(image_path=path, label=label, split="train" if number < 6 else "test"))
    return samples


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def compare(samples, cache, config=CHEAP, keep=()):
    """Run `best` without the times, which differ from run to run."""
    chosen, record = best(samples, config, keep, cache=cache, cache_gib=1, device="cpu", progress=None)
    return chosen, [{name: value for name, value in each.items() if name != "image_ms"} for each in record]


def test_balanced_changes_nothing(detector):
    assert detector.record["budget"] == {
        "name": "balanced",
        "height": 64,
        "width": 64,
        "tile_beyond": 4.0,
        "candidates": [],
        "settings": [],
    }
    assert detector.config.prepare == PrepareConfig(height=64, width=64)


def test_an_unknown_budget_is_refused(strips):
    with pytest.raises(ConfigError, match=r"Unknown budget 'bset'\. Did you mean 'best'\?"):
        Detector.fit(strips, budget="bset")


def fast(config, keep):
    return settings.override(config, faster(config, keep))


# ── fast ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fast_has_a_coarser_grid_and_a_smaller_memory_bank():
    config = fast(Config(), ())
    assert (config.head.expert.memory.max_patches, config.head.expert.memory.dimensions) == (500, 64)
    assert config.features.grid_stride == 16
    assert config.head.border * config.features.grid_stride == Config().head.border * Config().features.grid_stride


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        (["head.expert.sharpness=1.0"], ()),
        (["head.expert.kind=memory"], ()),
        (["head.border=0"], ()),
        (["head.kind=dfm"], ()),
        ([], ("head.expert.kind",)),
        ([], ("head.expert",)),
        ([], ("head.border",)),
    ],
)
def test_fast_keeps_the_experts_of_the_user(changes, keep):
    config = settings.override(Config(), changes)
    assert fast(config, keep).head == config.head
    assert fast(config, keep).features.grid_stride == 16


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        (["features.grid_stride=4"], ()),
        (["features.blocks=[4, 8]"], ()),
        (["features.kind=offline_pair"], ()),
        ([], ("features.grid_stride",)),
    ],
)
def test_fast_keeps_the_grid_of_the_user(changes, keep):
    config = settings.override(Config(), changes)
    assert fast(config, keep).features == config.features
    assert fast(config, keep).head.expert.memory.max_patches == 500


def test_fast_keeps_other_settings():
    config = settings.override(Config(), ["head.top_k=1", "prepare.height=128"])
    chosen = fast(config, ("head.top_k", "prepare.height"))
    assert (chosen.head.top_k, chosen.prepare) == (1, config.prepare)


def test_a_fast_detector_has_a_coarser_grid(cloth):
    config = Config(
        data=DataConfig(subclass_from="column", calibration="split"),
        prepare=PrepareConfig(height=64, width=64),
        features=CHEAP.features,
    )
    detector = Detector.fit(cloth, config=config, budget="fast", use_cache=False, device="cpu")
    assert detector.config == replace(fast(config, ()), maps=MapsConfig(smoothing=1.0))  # of a fusion
    assert detector.record["feature_shape"][1:] == [4, 4]
    assert detector.record["budget"]["name"] == "fast"
    assert detector.record["budget"]["settings"] == faster(config, ())


# ── candidates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sizes_and_tilings_of_large_images():
    assert candidates(Config(), (), [(1000, 800)] * 3) == [
        BASE,
        Candidate(384, 384, 4.0),
        Candidate(512, 512, 4.0),
        Candidate(256, 256, 2.0),  # 2 x 2 tiles
        Candidate(256, 256, 1.0),  # 4 x 4 tiles
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((200, 256), [BASE]),
        ((300, 400), [BASE, Candidate(384, 384, 4.0)]),
        # 4 tiles are 1,130 pixels wide: squeezed by 4.4. With tile_beyond 1, 16 of 291 pixels.
        (
            (256, 4096),
            [BASE, Candidate(384, 384, 4.0), Candidate(512, 512, 4.0), *(Candidate(256, 256, t) for t in (2, 1))],
        ),
    ],
)
def test_an_input_is_not_larger_than_what_it_shows(size, expected):
    assert candidates(Config(), (), [size]) == expected


def test_costly_candidates_are_left_out():
    found = candidates(Config(), (), [(3000, 4000)])
    costs = [cost(each, Config(), [(3000, 4000)]) for each in found]
    assert costs[0] == 12  # 3 x 4 tiles beyond 4 times the input
    assert max(costs[1:], default=0) <= budget.MOST_PASSES
    assert Candidate(256, 256, 1.0) not in found


@pytest.mark.parametrize(
    ("config", "keep", "expected"),
    [
        (Config(), ("prepare.height",), {256}),
        (Config(), ("prepare.width", "prepare.tile_overlap"), {256}),
        (Config(prepare=PrepareConfig(height=320, width=320)), (), {320}),
        (Config(prepare=PrepareConfig(height=256, width=512)), (), {256}),
        (Config(features=OpenClipConfig()), (), {256}),
        (Config(features=TimmConfig(grid_stride=24)), (), {256, 384}),  # 512 is no multiple
        (Config(), ("head.expert.kind", "seed"), {256, 384, 512}),
    ],
)
def test_sizes_of_the_user_are_kept(config, keep, expected):
    assert {each.height for each in candidates(config, keep, [(1000, 800)])} == expected


@pytest.mark.parametrize(
    ("prepare", "keep"), [(PrepareConfig(), ("prepare.tile_beyond",)), (PrepareConfig(tile_beyond=0.0), ())]
)
def test_a_tiling_of_the_user_is_kept(prepare, keep):
    found = candidates(Config(prepare=prepare), keep, [(1000, 800)])
    assert {each.tile_beyond for each in found} == {prepare.tile_beyond}
    assert len(found) == 3


def test_the_images_of_the_search_are_few_and_of_groups_drawn_at_random():
    samples = [Sample(image_path=Path(f"{n}.png"), group=f"part {n // 5}") for n in range(200)]
    contents = {sample: str(sample.image_path) for sample in samples}
    drawn = some_groups(samples, contents, seed=0)
    assert len(drawn) == budget.MOST_IMAGES
    groups = [sample.group for sample in drawn]
    assert sum(groups.count(name) == 5 for name in set(groups)) == 9  # and three images of a tenth
    assert drawn == some_groups(samples, contents, seed=0) != some_groups(samples, contents, seed=1)
    assert drawn == sorted(drawn, key=samples.index)


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def trial(shift, *, n=24, m=3, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    normal = rng.normal(0, noise, n)
    return Trial(normal, normal[:, None] + shift + rng.normal(0, 0.3, (n, m)), np.arange(n) % 2, np.arange(n) // 2)


def test_auroc_compares_images_of_one_fold():
    one = trial(1.0)
    kept = one.groups != 3
    wins = [
        (defect > normal) + 0.5 * (defect == normal)
        for i, normal in enumerate(one.normal)
        for j, defects in enumerate(one.defective)
        for defect in defects
        if one.folds[i] == one.folds[j] and kept[i] and kept[j]
    ]
    assert one.auroc(left_out=3) == pytest.approx(np.mean(wins))
    assert one.auroc() != one.auroc(left_out=3)
    shifted = one._replace(normal=one.normal + 9 * one.folds, defective=one.defective + 9 * one.folds[:, None])
    assert shifted.auroc() == pytest.approx(one.auroc())


def test_a_clearly_better_candidate_is_chosen_whatever_it_costs():
    assert cheapest_of_the_best([trial(0.2), trial(3.0)], [1, 9]) == 1


def test_a_difference_within_noise_does_not_pay(monkeypatch):
    trials = [trial(1.0, seed=2), trial(1.0, seed=1)]
    assert trials[1].auroc() > trials[0].auroc()
    assert cheapest_of_the_best(trials, [1, 4]) == 0
    assert cheapest_of_the_best(trials, [4, 1]) == 1
    assert cheapest_of_the_best(trials, [4, 4]) == 1  # at the same cost the better one
    monkeypatch.setattr(budget, "STANDARD_ERRORS", 0.0)
    assert cheapest_of_the_best(trials, [1, 4]) == 1


def test_a_small_difference_counts_if_every_group_has_it():
    first = trial(1.0)
    better = first._replace(defective=first.defective + 0.3)
    assert better.auroc() - first.auroc() < 0.1
    assert cheapest_of_the_best([first, better], [1, 4]) == 1


def test_aurocs_near_one_are_equal():
    trials = [trial(3.7, seed=4), trial(50.0)]
    assert budget.HIGHEST_AUROC < trials[0].auroc() < trials[1].auroc() == 1
    assert cheapest_of_the_best(trials, [1, 4]) == 0


def test_without_a_trial_the_first_is_chosen():
    assert cheapest_of_the_best([], [1]) == 0


# ── best ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_search(monkeypatch):
    """Two candidates and few defects."""
    monkeypatch.setattr(budget, "SIDES", ())
    monkeypatch.setattr(budget, "TILINGS", (2.0,))
    monkeypatch.setattr(budget, "DEFECTS", 6)


@pytest.mark.usefixtures("small_search")
def test_best_is_the_same_whatever_the_test_images_are(strips, cache, tmp_path):
    other = []
    for sample in strips:
        path = sample.image_path
        if sample.split == "test":
            path = tmp_path / path.name
            path.write_bytes(b"no image")
        other.append(Sample(image_path=path, label=sample.label, split=sample.split))
    config, record = compare(strips, cache)
    assert compare(other, cache) == (config, record)
    assert [(each["tile_beyond"], each["cost"]) for each in record] == [(4.0, 2), (2.0, 3)]
    assert all(0 <= each["auroc"] <= 1 for each in record)
    (chosen,) = [each for each in record if each["chosen"]]
    assert config.prepare == PrepareConfig(tile_beyond=chosen["tile_beyond"])


@pytest.mark.usefixtures("small_search")
def test_best_uses_no_calibration_image_and_its_choice_is_fitted(strips, cache, monkeypatch):
    used = []
    run = budget.run_trial

    def recorded(samples, *given, **options):
        used.extend(samples)
        return run(samples, *given, **options)

    monkeypatch.setattr(budget, "run_trial", recorded)
    monkeypatch.setattr(budget, "cheapest_of_the_best", lambda trials, costs: 1)
    detector = Detector.fit(strips, config=CHEAP, budget="best", cache=cache, device="cpu")
    assert len(set(used)) == detector.record["fit_images"] == 4
    assert [each["chosen"] for each in detector.record["budget"]["candidates"]] == [False, True]
    assert detector.record["budget"]["tile_beyond"] == detector.config.prepare.tile_beyond == 2.0
    assert len(detector.preparation.tiles(64, 1100)) == 3
    (outcome,) = detector.score([str(strips[10].image_path)])
    assert outcome.anomaly_map.shape == (64, 1100)


def test_the_search_ends_at_an_auroc_that_counts_as_one(strips, cache, monkeypatch):
    tried = []

    def perfect(samples, groups, config, **options):
        tried.append(config.prepare.height)
        return trial(50.0), 1.0

    monkeypatch.setattr(budget, "run_trial", perfect)
    _, record = compare(strips, cache)
    assert tried == [256]
    assert [each["auroc"] for each in record] == [1, None, None, None]


def test_default_settings_score_strips_by_their_tiles(strips, cache):
    detector = Detector.fit(strips, config=CHEAP, cache=cache, device="cpu")
    assert len(detector.preparation.tiles(64, 1100)) == 2
    outcome = detector.score(str(strips[10].image_path))
    assert outcome.anomaly_map.shape == (64, 1100)
    assert outcome.anomaly_map[:, 900:940].mean() > outcome.anomaly_map[:, :700].mean()


def test_too_few_groups_are_not_compared(strips, cache):
    config, record = compare(strips[:3], cache, settings.override(CHEAP, ["data.calibration=cross-validation"]))
    assert config.prepare == PrepareConfig()
    assert [each["auroc"] for each in record] == [None] * 4
    assert [each["chosen"] for each in record] == [True, *[False] * 3]


def test_the_time_of_an_image(detector, photos):
    samples = [Sample(image_path=Path(path), split="train") for path in photos[:2]]
    assert 0 < budget.image_ms(detector, samples) < 5_000
    assert budget.image_ms(detector, [Sample(image_path=Path(photos[0]), split="test")]) is None


def test_defects_are_planted_and_sizes_are_taken_inside_the_region(strips, cache):
    """The middle of each strip, less a corner: the defects that are planted there are found."""
    part = ((0.4, 0.0), (0.7, 0.0), (0.7, 1.0), (0.5, 1.0))
    config = replace(CHEAP, regions=(RegionConfig(include=ShapesConfig(polygons=(part,))),))
    train = strips[:6]
    trial, _ = budget.run_trial(train, np.arange(6), config, cache=cache, cache_gib=1, device="cpu")
    assert np.isfinite(trial.normal).all()
    assert (trial.defective != trial.normal[:, None]).mean() > 0.9  # a defect outside would change no score
    _, record = compare(train[:3], cache, settings.override(config, ["data.calibration=cross-validation"]))
    assert record[0]["cost"] == 1.0  # one tile of 330 pixels, where the strip has two
