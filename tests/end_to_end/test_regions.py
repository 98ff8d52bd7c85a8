"""Nothing outside a region of interest is learnt, scored or shown, for several heads and in every way to a score."""

import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from normweave import bundle as bundles
from normweave import contents, settings
from normweave.cli import app
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, RegionConfig, ShapesConfig, TimmConfig
from normweave.data import images, layouts, regions
from normweave.data.alignment import encode_reference as reference_of
from normweave.data.masks import near
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.types import Outcome, Sample

PART = RegionConfig(
    include=ShapesConfig(polygons=(((0.1, 0.05), (0.95, 0.1), (0.9, 0.9), (0.3, 0.8)),)),
    ignore=ShapesConfig(rectangles=((0.55, 0.4, 0.15, 0.2),)),
)
SMALL = {"memory": {"max_patches": 100, "max_pool": 2000}, "layout": {"cells": 4}}
HEADS = {
    "fusion": {"kind": "adapted_moe", "expert": {"kind": "fusion"} | SMALL},
    "gaussian": {"kind": "adapted_moe", "expert": {"kind": "gaussian"}},
    "patchcore": {"kind": "memory_bank"},
    "mean-shift": {"kind": "mean_shift"},
}


def config(head, *listed):
    return Config(
        data=DataConfig(subclass_from="column", calibration="split"),
        prepare=PrepareConfig(height=64, width=64, tile_beyond=2),
        regions=listed,
        features=TimmConfig(weights="random", strides=(8,), batch_images=4),
        head=settings.from_dict({"head": HEADS[head]}).head,
        outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
    )


def fit(data, head, *listed):
    return Detector.fit(data, config=config(head, *listed), use_cache=False, device="cpu")


def planted(pixels, region, *, seed):
    """The image with a text, a clock with its hand and noise outside the region."""
    drawn = Image.fromarray(np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8))
    draw = ImageDraw.Draw(drawn)
    height, width = pixels.shape[:2]
    draw.rectangle((0, 0, width, height // 8), fill="white")
    draw.text((2, 0), f"CAMERA 1  {seed}", fill="black")
    draw.ellipse((0, height // 2, width // 4, height // 2 + width // 4), fill="white", outline="red")
    draw.line((width // 8, height // 2 + width // 8, seed % width, height // 2), fill="black")
    inside = regions.mask(regions.of([region], None), height, width)
    return np.where(inside[..., None], pixels, np.asarray(drawn))


def same(one: Outcome, other: Outcome):
    """Every field, every bit of the map."""
    assert replace(one, latency_ms=None, image_path=None) == replace(other, latency_ms=None, image_path=None)
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


@pytest.fixture(scope="module", params=["fusion", "patchcore", "mean-shift"])
def with_region(request, cloth, tmp_path_factory):
    fitted = fit(cloth, request.param, PART)
    folder = tmp_path_factory.mktemp("regions") / f"{request.param}.bundle"
    fitted.save(folder)
    return Detector.load(folder, threads=1, device="cpu")


def test_what_is_planted_outside_changes_no_bit(with_region, photos):
    whole = [images.decode(path) for path in photos[::3]]
    large = np.tile(whole[0], (4, 5, 1))  # cut into tiles, of which some are partly outside
    assert len(with_region.preparation.tiles(*large.shape[:2])) > 4
    for number, pixels in enumerate([*whole, large]):
        outcome = with_region.score(pixels)
        for seed in (number, number + 100):
            same(outcome, with_region.score(planted(pixels, PART, seed=seed)))
    assert not np.array_equal(with_region.score(large).anomaly_map, with_region.score(large[::-1].copy()).anomaly_map)


def test_nothing_is_shown_outside(with_region, photos):
    inside = regions.mask(regions.of([PART], None), 64, 64)
    for outcome in with_region.score(photos):
        np.testing.assert_array_equal(with_region.regions.inside(outcome), inside)
        assert (outcome.anomaly_map[~inside] <= outcome.anomaly_map[inside].min()).all()
        assert (outcome.anomaly_map[~inside] < with_region.box_threshold(outcome)).all()
        for box in outcome.boxes:
            assert inside[box.y : box.y + box.height, box.x : box.x + box.width].any()
        if not with_region.image_level:
            # The place of a peak is the centre of its cell of 8 pixels, which may be partly outside.
            assert near(inside, 4)[min(63, int(outcome.peak_y * 64)), min(63, int(outcome.peak_x * 64))]


def test_nothing_outside_is_learnt(cloth, tmp_path):
    """A fit to images with other pixels outside gives the same weights and thresholds."""
    samples = [each for each in layouts.read(cloth, DataConfig(subclass_from="column")) if each.split == "train"]
    changed = []
    for number, sample in enumerate(samples):
        path = tmp_path / f"{number}.png"
        Image.fromarray(planted(images.decode(sample.image_path), PART, seed=number)).save(path)
        changed.append(replace(sample, image_path=path))
    own, other = (fit(each, "gaussian", PART) for each in (samples, changed))
    ours, theirs = own.network.tensors(), other.network.tensors()
    differences = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not differences
    assert own.operating_points.as_dict() == other.operating_points.as_dict()


def test_categories_with_different_regions(cloth, photos):
    """Each image is scored under the region of its category, whatever lies outside that one."""
    left, right = (
        (((0.0, 0.0), (0.6, 0.0), (0.5, 1.0), (0.0, 1.0)),),
        (((0.4, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)),),
    )
    samples = [
        replace(each, category=each.subclass, subclass=None)
        for each in layouts.read(cloth, DataConfig(subclass_from="column"))
    ]
    names = sorted({each.category for each in samples if each.split == "train"})
    listed = [
        RegionConfig(category=name, include=ShapesConfig(polygons=shape))
        for name, shape in zip(names, (left, right), strict=False)
    ]
    detector = fit([each for each in samples if each.split == "train"], "gaussian", *listed)
    assert len(detector.regions.owned) == 3  # the third category has no region
    tests = [each for each in samples if each.split == "test" and each.category in names]
    right_categories = 0
    for number, (sample, outcome, tiles, _) in enumerate(detector.stream_samples(tests)):
        pixels = images.decode(sample.image_path)
        alone = detector.score(pixels)
        assert (alone.category, alone.pred_score) == (outcome.category, pytest.approx(outcome.pred_score, abs=0.02))
        np.testing.assert_allclose(alone.anomaly_map, outcome.anomaly_map, atol=0.05)  # of features in 16 bits
        assert len(tiles) == 1
        right_categories += outcome.category == sample.category
        region = {each.category: each for each in listed}.get(outcome.category)
        if region is not None:
            np.testing.assert_array_equal(
                detector.regions.inside(outcome), regions.mask(regions.of([region], outcome.category), 64, 64)
            )
            same(detector.score(planted(pixels, replace(region, category="*"), seed=number)), alone)
    assert right_categories >= 0.8 * len(tests)
    with pytest.raises(ConfigError, match="this model does not route"):
        fit([each for each in samples if each.split == "train"], "patchcore", *listed)


def call(*words: object, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (code, 1), result.output
    return result.stdout


def test_a_region_from_the_command_line_to_the_report(cloth, photos, tmp_path):
    """Drawn, trained with, shown, changed by a calibration, evaluated."""
    file, preview = tmp_path / "regions.json", tmp_path / "preview.png"
    text = call("data", "roi", photos[0], "-o", file, "--rectangle", "0.25,0.25,0.5,0.5", "--preview", preview)
    assert "the region of * is 25.0% of" in text
    shown = images.decode(preview)
    assert shown[2, 2].mean() < 0.5 * images.decode(photos[0])[2, 2].mean()
    model = tmp_path / "cloth.bundle"
    call(
        *("train", cloth, "-o", model, "--model", "patchcore", "--no-cache", "--regions", file),
        *("--subclass-from", "column", "--false-alarm-rate", "0.1", "--set", "features.weights=random"),
        *("--set", "prepare.height=64", "--set", "prepare.width=64", "--set", "features.strides=[8]"),
    )
    (held,) = bundles.read(model)["config"]["regions"]
    assert held["include"]["rectangles"] == [[0.25, 0.25, 0.5, 0.5]]
    assert "region of *: {'include': {'rectangles': [[0.25, 0.25, 0.5, 0.5]]}}" in call("bundle", "show", model)
    detector = Detector.load(model, threads=1, device="cpu")
    other = detector.with_rate(0.2)
    other.save(tmp_path / "other.bundle")
    assert "regions" not in contents.differences(model, tmp_path / "other.bundle")
    call("evaluate", model, cloth, "-o", tmp_path / "report")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["pooled"]["pixel_auroc"] is not None
    maps = tmp_path / "maps"
    call("predict", model, photos[0], "--maps", maps)
    edge = images.decode(next(maps.glob("*.png")))
    assert (edge[16, 16:48] == (80, 160, 255)).all()
    assert not (edge[:15] == (80, 160, 255)).all(axis=2).any()


def test_pixels_as_bytes(with_region, photos):
    """What is planted outside changes no bit of the answer to a file either."""
    pixels = images.decode(photos[0])
    content = io.BytesIO()
    Image.fromarray(planted(pixels, PART, seed=5)).save(content, "PNG")
    same(with_region.score(Path(photos[0]).read_bytes()), with_region.score(content.getvalue()))


@pytest.fixture(scope="module")
def two_of_three(cloth):
    """The training images of three subclasses, their names, and a detector of the first two under the region."""
    samples = [each for each in layouts.read(cloth, DataConfig(subclass_from="column")) if each.split == "train"]
    names = sorted({each.subclass for each in samples})
    return samples, names, fit([each for each in samples if each.subclass in names[:2]], "fusion", PART)


def test_an_added_subclass_is_learnt_under_the_region(two_of_three):
    """The region stays in the bundle, and what lies outside in its images changes no threshold and no weight."""
    samples, names, first = two_of_three
    new = [replace(each, split=None) for each in samples if each.subclass == names[2]][:8]
    grown = first.with_subclass(new, category="cloth", subclass=names[2])
    assert grown.config.regions == (PART,)
    assert len(grown.regions.owned) == 1
    pixels = images.decode(new[0].image_path)
    outcome = grown.score(pixels)
    assert outcome.subclass == names[2]
    same(outcome, grown.score(planted(pixels, PART, seed=1)))


# ── regions that follow the part ─────────────────────────────────────────────────────────────────────────────────────

BOX = ShapesConfig(rectangles=((0.25, 0.25, 0.5, 0.5),))


def part(seed, *, right=0.0, down=0.0, degrees=0.0, print_seed=1, size=96):
    """A printed part of always the same print, with a little noise, on a grey ground, moved and turned."""
    print_ = np.random.default_rng(print_seed).uniform(20, 235, (12, 12)).astype(np.float32)
    pixels = np.full((size, size), 120, dtype=np.float32)
    side = size // 2 + 8
    pixels[20 : 20 + side, 20 : 20 + side] = cv2.resize(print_, (side, side), interpolation=cv2.INTER_CUBIC)
    centre = ((size - 1) / 2,) * 2
    matrix = cv2.getRotationMatrix2D(centre, -degrees, 1)
    matrix[:, 2] += [right, down]
    shown = cv2.warpAffine(pixels, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
    shown = shown + np.random.default_rng(seed).normal(0, 3, shown.shape)
    return np.repeat(shown.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def poses(count, *, seed):
    """Moves of a part: up to 6 pixels and 8 degrees."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        right, down, degrees = rng.uniform(-1, 1, 3) * [6, 6, 8]
        yield {"right": right, "down": down, "degrees": degrees}


def following(align, category="*", *, print_seed=1):
    given = {} if align == "none" else {"align": align, "reference": reference_of(part(0, print_seed=print_seed))}
    return RegionConfig(category=category, include=BOX, **given)


def written(folder, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two detectors of a part that does not move in training, without and with alignment."""
    paths = written(tmp_path_factory.mktemp("parts"), (part(seed) for seed in range(1, 13)))
    return {align: fit(paths, "patchcore", following(align)) for align in ("none", "rigid")}


def test_scores_stay_where_the_part_moves(parts):
    """Without alignment they rise."""
    still = [part(seed) for seed in range(20, 26)]
    moving = [part(20 + number, **pose) for number, pose in enumerate(poses(6, seed=3))]
    scores = {}
    for align, detector in parts.items():
        scores[align] = [[each.pred_score for each in detector.score(shown, maps=False)] for shown in (still, moving)]
    spread = np.ptp(scores["rigid"][0]) + 0.1 * np.mean(scores["rigid"][0])
    assert np.abs(np.subtract(*scores["rigid"])).max() < spread
    assert np.mean(scores["none"][1]) > np.mean(scores["none"][0]) + spread
    detector = parts["rigid"]
    assert [each.verdict for each in detector.score(moving)].count("normal") >= 5
    assert {each.verdict for each in parts["none"].score(moving)} == {"anomalous"}


def test_maps_boxes_and_regions_are_those_of_the_image_as_it_was_taken(parts, tmp_path):
    """In memory, from a bundle and twice: the same bits. A defect is marked where it lies in the image."""
    detector = parts["rigid"]
    pixels = part(30, right=7, down=-5, degrees=10)
    spot = pixels.copy()
    spot[42:56, 46:60] = np.random.default_rng(4).choice([0, 255], (14, 14, 1))
    outcome = detector.score(spot)
    assert (outcome.shift_x, outcome.shift_y) == (pytest.approx(7, abs=0.7), pytest.approx(-5, abs=0.7))
    assert outcome.rotation == pytest.approx(10, abs=1.5)
    assert outcome.correlation > 0.5
    assert outcome.verdict == "anomalous"
    assert outcome.anomaly_map.shape == (96, 96)
    down, right = np.unravel_index(outcome.anomaly_map.argmax(), (96, 96))
    assert (abs(down - 49), abs(right - 53)) < (9, 9)
    (box,) = outcome.boxes
    assert box.x <= 53 < box.x + box.width
    assert box.y <= 49 < box.y + box.height
    inside = detector.regions.inside(outcome)
    assert inside.sum() == pytest.approx(48 * 48, rel=0.04)
    rows, columns = np.nonzero(inside)
    assert (columns.mean(), rows.mean()) == (pytest.approx(54.5, abs=1), pytest.approx(42.5, abs=1))
    assert (outcome.anomaly_map[~inside] <= outcome.anomaly_map[inside].min()).all()
    again = Detector.load(detector.save(tmp_path / "part.bundle"), threads=1, device="cpu")
    assert again.preparation.limits_of == detector.preparation.limits_of
    assert again.score(spot).pred_score == pytest.approx(outcome.pred_score, rel=1e-3)
    same(again.score(spot), again.score(spot))
    (path,) = written(tmp_path / "files", [spot])
    (scored,) = again.stream_samples(settings_samples([path]))
    assert scored.outcome.pred_score == again.score(spot).pred_score
    np.testing.assert_array_equal(scored.outcome.anomaly_map, again.score(spot).anomaly_map)
    described = contents.describe(tmp_path / "part.bundle")["regions"]["*"]
    assert described["align"] == "rigid"
    assert len(described["reference_sha256"]) == 64


def settings_samples(paths):
    return [Sample(image_path=path) for path in paths]


def test_an_image_without_the_part_is_refused_and_the_others_are_scored(parts, tmp_path):
    """Also in a data set, and for calibration, which computes the limits again."""
    detector = parts["rigid"]
    limits = detector.preparation.limits_of["*"]
    assert limits.images == detector.record["calibration_images"]
    assert 0.15 <= limits.correlation < 0.5
    wrong = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    good, bad, other = detector.score([part(40), wrong, part(41)[:, :60]])
    assert good.error is None
    assert bad.verdict is None
    assert "no position was found" in bad.error or "does not fit the reference image" in bad.error
    assert "other proportions than the reference image" in other.error
    paths = written(tmp_path, [*(part(seed, right=2) for seed in range(50, 70)), wrong])
    found = list(detector.stream_samples(settings_samples(paths)))
    assert [each.outcome.error is None for each in found] == [True] * 20 + [False]
    other = Detector.load(detector.save(tmp_path / "own.bundle"), threads=1, device="cpu")
    other.calibrate([str(path) for path in paths], false_alarm_rate=0.1)
    assert other.preparation.limits_of["*"].images == other.record["alignment"]["*"]["images"] == 20
    assert [each.image_path for each in other.refused] == [str(paths[-1])]


def test_categories_with_references_of_their_own(tmp_path):
    """An image that shows the part of one category only is scored under the region of that one."""
    samples = []
    for name, print_seed in (("bolt", 1), ("nut", 2)):
        paths = written(tmp_path / name, (part(seed, print_seed=print_seed) for seed in range(8)))
        samples += [Sample(image_path=path, category=name) for path in paths]
    listed = [following("rigid", name, print_seed=seed) for name, seed in (("bolt", 1), ("nut", 2))]
    detector = fit(samples, "gaussian", *listed)
    assert set(detector.record["alignment"]) == {"bolt", "nut"}
    moving = {name: part(90, right=5, degrees=-6, print_seed=seed) for name, seed in (("bolt", 1), ("nut", 2))}
    for name, pixels in moving.items():
        outcome = detector.score(pixels)
        assert (outcome.category, outcome.shift_x) == (name, pytest.approx(5, abs=0.7))
    paths = written(tmp_path / "test", [*moving.values(), part(3, print_seed=9)])
    found = {each.sample.image_path: each.outcome for each in detector.stream_samples(settings_samples(paths))}
    assert [found[path].category for path in paths[:2]] == ["bolt", "nut"]
    assert "reference image of its region" in found[paths[2]].error


# ── a category that is added with its region ─────────────────────────────────────────────────────────────────────────


def test_a_new_category_brings_its_region_and_no_other_score_changes(two_of_three, photos):
    samples, names, first = two_of_three
    new = [str(each.image_path) for each in samples if each.subclass == names[2]][:8]
    half = RegionConfig(category="felt", include=ShapesConfig(rectangles=((0.0, 0.0, 0.5, 1.0),)))
    for given, category, words in (
        ((half, replace(PART, include=half.include)), "felt", "The region of all categories differs from that of the"),
        ((half,), "cloth", r"'felt' has no images\. Categories of the data: cloth"),
        ((replace(half, category="cloth"),), "cloth", "The region of 'cloth' differs from that of the detector"),
    ):
        with pytest.raises(ConfigError, match=words):
            first.with_subclass(new, category=category, subclass="grey", regions=given)
    after = first.with_subclass(new, category="felt", subclass="grey", regions=(half, PART))  # PART as it is stored
    described = {"include": {"rectangles": [[0.0, 0.0, 0.5, 1.0]]}}
    assert after.record["preparation"]["regions"]["felt"] == described
    assert settings.from_dict(after.record["config"]).regions == after.config.regions == (PART, half)
    assert len(after.regions.owned) == 2
    own = after.score(new[0])
    assert own.category == "felt"
    np.testing.assert_array_equal(after.regions.inside(own), regions.mask(regions.of([half], "felt"), 64, 64))
    kept = 0
    for path in photos:
        old, now = first.score(path), after.score(path)
        if now.category == "cloth":
            assert (now.subclass, now.pred_score) == (old.subclass, old.pred_score)
            np.testing.assert_array_equal(now.anomaly_map, old.anomaly_map)
            kept += 1
    assert kept >= 6


def test_the_command_takes_the_region_of_a_new_category(cloth, fusion_bundle, tmp_path):
    """That of a known one is refused, and no bundle is written."""
    file = tmp_path / "regions.json"
    settings.write_regions(file, [replace(PART, category="cloth")])
    words = ("add-subclass", fusion_bundle, cloth.parent, "--category", "cloth", "--subclass", "new")
    result = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "x"), "--regions", str(file)])
    assert result.exit_code == 2
    assert "differs from that of the detector, which has none" in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()


def test_a_new_category_brings_a_region_that_follows_the_part(tmp_path):
    """Its limits are computed from its own good images."""
    bolts = [Sample(image_path=path, category="bolt") for path in written(tmp_path / "b", map(part, range(10)))]
    first = fit(bolts, "fusion", following("rigid", "bolt"))
    nuts = written(tmp_path / "n", (part(seed, print_seed=2, right=seed - 4) for seed in range(8)))
    grown = first.with_subclass(nuts, category="nut", subclass=None, regions=[following("rigid", "nut", print_seed=2)])
    assert grown.record["alignment"]["bolt"] == first.record["alignment"]["bolt"]
    assert grown.record["alignment"]["nut"]["images"] == 8
    outcome = grown.score(part(77, print_seed=2, right=4, degrees=5))
    assert (outcome.category, outcome.shift_x) == ("nut", pytest.approx(4, abs=0.7))
    same(grown.score(part(78, right=3)), replace(first.score(part(78, right=3)), bundle_hash=None))
    less = grown.with_regions(first.config)  # as remove-subclass does with the last subclass of a category
    assert set(less.record["alignment"]) == set(less.preparation.limits_of) == {"bolt"}
    assert less.record["preparation"] == first.record["preparation"]
