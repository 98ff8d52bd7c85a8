"""Fusion: its formula by hand, which images are held out, and that the experts have not seen these."""

from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch

from builders import InMemory, begun, fit, head_config, random
from normweave.config import FusionExpertConfig
from normweave.heads import build
from normweave.heads.adapted_moe.experts.base import Normals
from normweave.heads.adapted_moe.fusion import (
    FEWEST_HELD_OUT,
    LIMIT,
    MOST_OF_CATEGORY,
    Defective,
    Fusion,
    HeldOut,
    defects_per_image,
    folds,
    level,
    patch_auroc,
)
from normweave.types import FitData, SyntheticDefects

SHAPE = (6, 8, 8)
NAMES = ("bolt", "cloth")


# ── the formula ──────────────────────────────────────────────────────────────────────────────────────────────────────


def scored(category, *columns, low=1.0, level=np.inf):
    """Images of one category, of two patches, one column for each expert; the image score is half of the map's maximum.

    Args:
        low: the second patch of the map, as a share of the first.
        level: the highest level.
    """
    scores = np.array(columns, dtype=np.float32).T
    maps = np.stack([scores, low * scores], axis=2)
    images = np.stack([scores / 2, np.minimum(scores / 2, level)], axis=2)
    return HeldOut(np.stack([maps, images], axis=2)[:, :, :, None].astype(np.float32), np.full(len(scores), category))


def defects(category, *columns):
    """Images that a defect covers, one column for each expert."""
    maps = np.array(columns, dtype=np.float32).T[:, :, None, None].repeat(2, axis=3)
    return Defective(maps, np.ones((len(maps), 1, 2), dtype=np.float32), np.full(len(maps), category))


def joined(*parts):
    return type(parts[0])(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def fused(normal, defective=None, *, categories=(0,), use=("memory", "gaussian"), **settings):
    fusion = Fusion(FusionExpertConfig(use=use, **settings), border=2)
    fusion.fit(normal, defective, categories=np.array(categories), names=NAMES)
    assert (fusion.border.gain == 1).all()
    fusion.border.gain, fusion.border.shift = fusion.border.gain[..., :1], fusion.border.shift[..., :1]  # for any grid
    return fusion


def test_fusion_by_hand():
    first, second = [0.0, 1, 2, 3, 10], [5.0, 5, 6, 7, 9]
    # of the ten pairs with the two defects: 9 of the first expert are in order, of the second 7.5
    fusion = fused(scored(0, first, second), defects(0, [11, 9], [8, 7]), sharpness=1.0)
    odds = [(9 / 10) / (1 / 10), (7.5 / 10) / (2.5 / 10)]
    weights = [odd / sum(odds) for odd in odds]
    np.testing.assert_allclose(fusion.weights[0], weights, rtol=1e-5)

    medians = [2.0, 6.0]
    highs = [3 + 0.6 * 7, 7 + 0.6 * 2]  # the quantile at 0.9 is 0.6 of the way from the fourth to the fifth
    patches = {e: random(3, 2, 4, 5, seed=e) for e in range(2)}
    fused_map, fused_images = fusion(patches, torch.zeros(3, dtype=torch.int64))
    for b in range(3):
        expected = sum(
            weights[e] * (2 * patches[e][b, 1].max().item() - medians[e]) / (highs[e] - medians[e]) for e in range(2)
        )
        assert fused_images[b].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for y in range(4):
            for x in range(5):
                expected = sum(
                    weights[e] * (patches[e][b, 0, y, x].item() - medians[e]) / (highs[e] - medians[e])
                    for e in range(2)
                )
                assert fused_map[b, y, x].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_maps_of_all_categories_have_one_scale():
    """A typical maximum of a normal image is 0, and typical normal patches are equally far below it."""
    narrow = scored(0, [0.0, 2, 4, 6, 20], [10.0, 10, 12, 14, 18], low=0.5)
    wide = scored(1, [200.0, 600, 1000, 1400, 1800], [100.0, 110, 120, 130, 140], low=0.5)
    typical = [
        (np.median(each.maps, axis=(0, 2, 3)), np.median(each.scores[:, :, 0], axis=0)) for each in (narrow, wide)
    ]

    def on_scale(fusion, subclass):
        fusion.limit.zero_()
        patches = {
            e: torch.tensor(pair).float().expand(1, 2, 1, 2)
            for e, pair in enumerate(zip(*typical[subclass], strict=True))
        }
        return fusion(patches, torch.tensor([subclass]))[0][0, 0].tolist()

    both = fused(joined(narrow, wide), categories=(0, 1))
    alone = [fused(each, categories=(each.categories[0],) * 2) for each in (narrow, wide)]
    depths = [on_scale(fusion, subclass)[0] for subclass, fusion in enumerate(alone)]
    for subclass in range(2):
        assert on_scale(both, subclass) == pytest.approx([np.mean(depths), 0], abs=1e-4)


@pytest.mark.parametrize("expert", [0, 1])
def test_no_expert_is_ignored(expert):
    fusion = fused(scored(0, [0.0, 1, 2, 3], [5.0, 6, 7, 9]))
    patches = {e: random(2, 2, 4, 5, seed=e) for e in range(2)}
    before = fusion(patches, torch.zeros(2, dtype=torch.int64))
    after = fusion(patches | {expert: patches[expert] + 1}, torch.zeros(2, dtype=torch.int64))
    assert all((new > old + 1e-3).all() for old, new in zip(before, after, strict=True))


def test_the_level_is_the_quantile_at_a_tenth():
    patches = random(2, 3, 4, 5)
    expected = np.sort(patches.numpy().reshape(2, 3, 20))[:, :, 1]
    np.testing.assert_array_equal(level(patches), expected)


def test_a_higher_level_than_of_any_normal_image_is_taken_off():
    """As in an image of an unseen subclass; a defect on a part of the image changes nothing."""
    columns = [0.0, 1, 2, 3], [5.0, 6, 7, 9]
    fusion = fused(joined(scored(0, *columns, level=1.0), scored(0, *columns, level=0.5)))
    never = fused(joined(scored(0, *columns), scored(0, *columns)))
    patches = torch.rand(3, 2, 4, 5)  # levels below 1
    patches[1, :, :2] += 8
    brighter = patches + torch.tensor([0.0, 0.0, 20.0])[:, None, None, None]
    subclass = torch.zeros(3, dtype=torch.int64)
    maps, scores = fusion({0: brighter, 1: brighter}, subclass)
    excess = (level(brighter[:, 1]) - 1).clamp(min=0)
    assert excess[:2].max() == 0
    corrected = brighter - excess[:, None, None, None]
    torch.testing.assert_close(scores, never({0: corrected, 1: corrected}, subclass)[1])
    never.limit.zero_()
    uncorrected = never({0: brighter, 1: brighter}, subclass)[0]
    torch.testing.assert_close(maps[:2], uncorrected[:2])
    torch.testing.assert_close(maps[2], uncorrected[2] - fusion.limit)
    assert fusion.limit > 0


def test_a_map_is_lowered_by_the_excess_of_its_level_up_to_a_limit():
    """Half of what the highest level of the normal images is above the median level."""
    first, second = [0.0, 1, 2, 3, 10], [5.0, 5, 6, 7, 9]  # both patches of an image have the same score
    fusion = fused(scored(0, first, second))
    highs = [3 + 0.6 * 7, 7 + 0.6 * 2]
    levels = [
        0.5 * (a - 2) / (highs[0] - 2) + 0.5 * (b - 6) / (highs[1] - 6) for a, b in zip(first, second, strict=True)
    ]
    assert fusion.map_highest[0].item() == pytest.approx(max(levels), rel=1e-5)
    assert fusion.limit[0].item() == pytest.approx(LIMIT * (max(levels) - np.median(levels)), rel=1e-5)
    slope = 0.5 / (highs[0] - 2)  # of the fused map by the score of the first expert

    def lowered(above):
        """What is taken off the map of an image whose level is above the highest one."""
        patches = {0: torch.full((1, 2, 4, 5), 10 + above / slope), 1: torch.full((1, 2, 4, 5), 9.0)}
        return max(levels) + above - fusion(patches, torch.tensor([0]))[0][0, 0, 0].item()

    limit = fusion.limit[0].item()
    expected = [0, 0, limit / 2, limit, limit]
    assert [lowered(above * limit) for above in (-1, 0, 0.5, 1, 3)] == pytest.approx(expected, abs=1e-4)


def test_the_limits_of_all_categories_have_the_scale_of_their_maps():
    narrow = scored(0, [0.0, 2, 4, 6, 20], [10.0, 10, 12, 14, 18], low=0.5)
    wide = scored(1, [200.0, 600, 1000, 1400, 1800], [100.0, 110, 120, 130, 140], low=0.5)
    both = fused(joined(narrow, wide), categories=(0, 1))
    for subclass, own in enumerate((narrow, wide)):
        maps = {e: torch.from_numpy(own.maps[:, e, None]).repeat(1, 2, 1, 1) for e in range(2)}
        levels = level(both(maps, torch.full((5,), subclass))[0])  # none of them is above the highest
        assert both.map_highest[subclass].item() == pytest.approx(levels.max().item(), abs=1e-5)
        assert both.limit[subclass].item() == pytest.approx(LIMIT * (levels.max() - levels.median()).item(), abs=1e-5)


def test_each_category_has_its_own_highest_level():
    good = joined(scored(0, range(10), range(10), level=1.0), scored(1, range(10), range(10), level=2.0))
    fusion = fused(good, categories=(1, 0))
    assert fusion.highest.tolist() == [[2.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize(("sharpness", "share"), [(0, 1 / 2), (1, 9 / 10), (2, 81 / 82)])
def test_sharpness_is_the_exponent_of_the_odds(sharpness, share):
    normal = scored(0, range(10), [0] * 10)
    fusion = fused(normal, defects(0, [8.5], [0]), sharpness=sharpness, smallest_weight=0.001)
    np.testing.assert_allclose(fusion.weights[0], [share, 1 - share], rtol=1e-5)


def test_without_defects_the_weights_are_equal():
    fusion = fused(scored(0, range(10), range(10)))
    assert fusion.weights.tolist() == [[0.5, 0.5]]
    assert fusion.record[0]["synthetic_defects"] == 0


def test_an_expert_below_the_smallest_weight_is_dropped_and_the_others_sum_to_one():
    normal, defective = scored(0, range(10), [0] * 10), defects(0, [8.5], [0])  # odds of 9 to 1
    assert fused(normal, defective, sharpness=1.0, smallest_weight=0.09).used == [True, True]
    dropped = fused(normal, defective, sharpness=1.0, smallest_weight=0.11)
    assert dropped.weights.tolist() == [[1, 0]]
    assert dropped.used == [True, False]
    equal = fused(normal, smallest_weight=0.9)  # all are below: those with the largest weight stay
    assert equal.weights.tolist() == [[0.5, 0.5]]


def test_each_category_has_its_own_weights_and_scales():
    good = joined(scored(0, range(10), range(10)), scored(1, range(100, 110), range(10)))
    bad = joined(defects(0, [20] * 4, [4.5] * 4), defects(1, [104.5] * 4, [20] * 4))
    fusion = fused(good, bad, categories=(0, 1, 0), smallest_weight=0.001)
    assert fusion.weights[0, 0] > 0.9
    assert fusion.weights[1, 1] > 0.9
    assert torch.equal(fusion.weights[0], fusion.weights[2])
    assert fusion.centre[:, 0].tolist() == [[4.5, 2.25], [104.5, 52.25], [4.5, 2.25]]
    assert [(each["category"], each["held_out_images"], each["synthetic_defects"]) for each in fusion.record] == [
        ("bolt", 10, 4),
        ("cloth", 10, 4),
    ]
    for each, row in zip(fusion.record, fusion.weights[:2], strict=True):
        assert [expert["name"] for expert in each["experts"]] == ["memory", "gaussian"]
        np.testing.assert_allclose([expert["weight"] for expert in each["experts"]], row, rtol=1e-5)


def test_a_category_with_few_images_takes_the_scales_and_weights_of_all():
    good = joined(scored(0, range(10), range(10)), scored(1, [50, 60, 70], [1, 2, 3]))
    bad = joined(defects(0, [20] * 4, [4.5] * 4), defects(1, [0] * 4, [20] * 4))
    fusion = fused(good, bad, categories=(0, 1))
    assert fusion.centre[1, 0].tolist() == np.median(good.scores[:, 0], axis=0).tolist()
    assert fusion.record[1]["held_out_images"] == 13
    assert fusion.record[1]["experts"][0]["synthetic_auroc"] == patch_auroc(
        good.maps[:, 0], bad.maps[:, 0], bad.coverage
    )


def test_ties_count_half():
    normal = np.array([1, 2, 3], dtype=np.float32).reshape(3, 1, 1)
    bad = np.array([[[2]], [[9]]], dtype=np.float32)
    assert patch_auroc(normal, bad, np.ones((2, 1, 1), dtype=np.float32)) == pytest.approx((1.5 + 3) / 6)


def test_only_patches_that_the_defect_covers_count():
    """Half of a patch is enough, or as much as of any other; what covers nothing does not count."""
    normal = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
    bad = np.array([[[4.5, 0]], [[0, 8.5]], [[0, 0]]], dtype=np.float32)
    coverage = np.array([[[0.5, 0.4]], [[0.1, 0.2]], [[0, 0]]], dtype=np.float32)
    assert patch_auroc(normal, bad, coverage) == pytest.approx((0.5 + 0.9) / 2)
    assert patch_auroc(normal, bad[2:], coverage[2:]) == 0.5
    assert patch_auroc(normal, bad[:0], coverage[:0]) == 0.5


def test_each_defect_counts_the_same_whatever_its_size():
    normal = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
    bad = np.array([[[20, 20, 20, 20]], [[0.5, 0, 0, 0]]], dtype=np.float32)
    coverage = np.array([[[1, 1, 1, 1]], [[1, 0, 0, 0]]], dtype=np.float32)
    assert patch_auroc(normal, bad, coverage) == pytest.approx((1 + 0.1) / 2)


# ── which images are held out ────────────────────────────────────────────────────────────────────────────────────────


def images(count, *, holdout=(), groups=None, subclasses=2, defects=None, seed=0):
    """Fit data of subclasses that differ in the mean of the channels, each a category."""
    subclass = np.arange(count) % subclasses
    features = 0.5 * random(count, *SHAPE, seed=1) + random(subclasses, SHAPE[0], 1, 1, seed=2)[subclass]
    return FitData(
        features=InMemory(features),
        subclasses=subclass,
        names=tuple(f"{name}/good" for name in NAMES[:subclasses]),
        groups=np.arange(count) if groups is None else np.asarray(groups),
        holdout=np.isin(np.arange(count), holdout),
        seed=seed,
        category_names=NAMES[:subclasses],
        given_categories=subclass,
        defects=defects,
    )


def test_enough_held_out_images_of_each_category_are_the_only_fold():
    data = images(60, holdout=range(2 * FEWEST_HELD_OUT))
    fold = folds(data, data.subclasses)
    assert (fold == np.where(data.holdout, 0, -1)).all()


def test_a_category_with_fewer_has_every_image_held_out():
    """Many of the other category do not help: the scales are those of each category."""
    enough = images(60, holdout=range(0, 2 * FEWEST_HELD_OUT, 2), subclasses=1)
    assert (folds(enough, enough.subclasses) == np.where(enough.holdout, 0, -1)).all()
    two = images(60, holdout=range(0, 2 * FEWEST_HELD_OUT, 2))
    assert (folds(two, np.zeros(60, dtype=np.int64)) >= 0).all()


def test_with_fewer_every_image_is_held_out_once_and_groups_stay_together():
    data = images(60, holdout=range(FEWEST_HELD_OUT - 1), groups=np.arange(60) // 3)
    fold = folds(data, np.zeros(60, dtype=np.int64))
    assert sorted(set(fold)) == [0, 1, 2, 3]
    assert np.bincount(fold).tolist() == [15] * 4
    assert all(len(set(fold[data.groups == group])) == 1 for group in range(20))
    assert not (fold == folds(replace(data, seed=1), np.zeros(60, dtype=np.int64))).all()


def test_the_last_images_of_an_expert_are_never_held_out():
    experts = np.r_[np.zeros(59, dtype=np.int64), 1]
    assert folds(images(60), experts)[-1] == -1
    data = images(60, holdout=range(30))
    fold = folds(data, data.holdout.astype(np.int64))
    assert (fold == -1).all()


def test_of_a_large_category_whole_groups_are_held_out_up_to_a_limit():
    count, few = 4 * MOST_OF_CATEGORY, range(1, 40, 2)  # of the second category, which has every other image
    data = images(count, holdout=[*range(0, count, 2), *few], groups=np.arange(count) // 4 * 2 + np.arange(count) % 2)
    fold = folds(data, data.subclasses)
    first = data.categories == 0
    assert (fold[first] == 0).sum() == MOST_OF_CATEGORY
    assert all(len(set(fold[data.groups == group])) == 1 for group in set(data.groups[first]))
    assert (np.flatnonzero(~first & (fold == 0)) == few).all()


def test_one_group_holds_out_nothing():
    assert (folds(images(8, groups=[0] * 8), np.zeros(8, dtype=np.int64)) == -1).all()


@pytest.mark.parametrize(("held_out", "each"), [(0, 0), (1, 8), (16, 8), (24, 6), (128, 1), (500, 1)])
def test_about_128_defects_are_wanted(held_out, each):
    assert defects_per_image(held_out) == each


# ── in the head ──────────────────────────────────────────────────────────────────────────────────────────────────────


def head(*, border=2, **expert):
    small = {"memory.max_patches": 40, "memory.max_pool": 400, "layout.cells": 4}
    return build(head_config(expert={"kind": "fusion"} | small | expert, border=border), shape=SHAPE)


def with_defects(data, wanted, *, strength=6.0):
    """The data with defective versions of the wanted images: a few patches that differ."""
    features = data.features.features[torch.from_numpy(wanted)].clone()
    features[:, :, 3:5, 3:5] += strength * random(len(wanted), SHAPE[0], 1, 1, seed=5)
    coverage = torch.zeros(len(wanted), *SHAPE[1:])
    coverage[:, 3:5, 3:5] = 1
    return replace(data, defects=SyntheticDefects(InMemory(features), wanted, lambda rows: coverage[rows]))


@pytest.fixture(scope="module")
def fitted():
    data = images(40)
    one = head()
    return fit(one, with_defects(data, one.defect_images(data), strength=1.0))  # AUROCs below the highest


def test_the_wanted_defects_are_of_held_out_images():
    data = images(60, holdout=range(2 * FEWEST_HELD_OUT))
    wanted = head().defect_images(data)
    assert wanted.tolist() == sorted([*range(2 * FEWEST_HELD_OUT)] * 6)
    assert len(build(head_config(expert="memory"), shape=SHAPE).defect_images(data)) == 0


@pytest.mark.parametrize("holdout", [range(2 * FEWEST_HELD_OUT), ()])
def test_held_out_scores_come_from_experts_that_have_not_seen_the_image(holdout, monkeypatch):
    """Scales and weights of each fold are measured before any of its images is in the fit."""
    data = images(48, holdout=holdout)
    one = head()
    data = with_defects(data, one.defect_images(data))
    memory = one.branches[0].experts
    pool = torch.cat([data.features.features, data.defects.features.features])
    originals = np.concatenate([np.arange(48), data.defects.images])
    seen, measured = set(), set()
    fit_memory, score = memory.fit, memory.score_united

    def fitting(normals, *, generator):
        seen.clear()
        seen.update(normals.rows.tolist())
        fit_memory(normals, generator=generator)

    def measuring(features, allowed):
        for image in features:  # without adaption, as it is in the source
            (row,) = np.flatnonzero((pool == image).flatten(1).all(dim=1).numpy())
            assert originals[row] not in seen
            measured.add(int(row))
        return score(features, allowed)

    monkeypatch.setattr(memory, "fit", fitting)
    monkeypatch.setattr(memory, "score_united", measuring)
    fit(one, data)
    assert set(originals[sorted(measured)]) == set(holdout or range(48))
    assert len(measured) == len(holdout or range(48)) + len(data.defects.images)
    assert seen == set(range(48))  # in the end the experts are fitted to all


def test_the_scale_is_that_of_the_held_out_images():
    """Experts score the images that they were fitted to lower, so that a scale of these would be too small."""
    data = images(48, holdout=range(24))
    settings = {"border": 0, "memory.max_patches": 1_000, "memory.max_pool": 2_000}
    one = fit(head(**settings), data)
    branch = next(iter(one.used.values()))
    rows = np.flatnonzero(~data.holdout)
    other = begun(head(**settings), data).branch
    generator = torch.Generator().manual_seed(data.seed)
    other.experts.fit(Normals(data.features, rows, data.subclasses[rows], data.groups[rows]), generator=generator)

    def scores(experts, features):  # of the memory bank alone: no adaption, all subclasses together
        return experts.score_united(features, None)[0][:, 0].amax(dim=(1, 2)).numpy()

    for k in range(2):
        own = data.features.features[data.holdout & (data.subclasses == k)]
        held_out = np.median(scores(other.experts, own))
        assert one.fusion.centre[k, 0, 1].item() == pytest.approx(held_out, rel=1e-5)
        assert np.median(scores(branch.experts, own)) < held_out


def test_the_scores_near_the_border_have_the_scale_of_the_held_out_images():
    """Layout experts have no border, and with `border=0` there is none."""
    data = images(48, holdout=range(24), subclasses=1)
    data.features.features[:, :, 1] *= 5
    gain, shift = (getattr(fit(head(), data).fusion.border, name)[0] for name in ("gain", "shift"))
    memory, layout, gaussian = range(3)
    assert (gain[layout] == 1).all()
    assert (shift[layout] == 0).all()
    for number in (memory, gaussian):
        assert (gain[number, 1, 1:-1] < 0.7).all()
        assert gain[number, 3, 3] == 1
    assert (fit(head(border=0), data).fusion.border.gain == 1).all()


def test_both_categories_are_in_the_notes(fitted):
    record = fitted.notes()["fusion"]
    assert [each["category"] for each in record] == list(NAMES)
    assert all(sum(expert["weight"] for expert in each["experts"]) == pytest.approx(1) for each in record)
    assert all(each["synthetic_defects"] > 0 for each in record)


def test_a_head_of_a_fold_takes_scales_and_weights_and_fits_its_own_experts(fitted):
    """By the name of the category, whose number in the fold is another one."""
    data = images(40)
    cloth = np.flatnonzero(data.categories == 1)
    part = replace(
        data,
        features=InMemory(data.features.features[torch.from_numpy(cloth)]),
        subclasses=np.zeros(len(cloth), dtype=np.int64),
        names=("cloth",),
        groups=data.groups[cloth],
        holdout=data.holdout[cloth],
        given_categories=np.zeros(len(cloth), dtype=np.int64),
        category_names=("cloth",),
    )
    one = head()
    one.reuse(fitted)
    assert not len(one.defect_images(part))
    fit(one, part)
    for name in (*Fusion.by_subclass, "border.gain", "border.shift"):
        own, theirs = (attrgetter(name)(each.fusion) for each in (one, fitted))
        torch.testing.assert_close(own, theirs[1:], rtol=0, atol=0)
        assert not torch.equal(own, theirs[:1])
    features = images(4).features.features
    assert not torch.allclose(one(features).scores, fitted(features).scores, rtol=1e-3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_head_fuses_every_expert(fitted, number):
    """Doubling the scores of one expert changes the fused ones."""
    head = build(fitted.config, shape=SHAPE)
    head.load_state(fitted.state())
    features = images(4).features.features + 0.1
    before = head(features)
    assert number in head.used
    head.fusion.weights[:, number] *= 2
    after = head(features)
    assert not torch.allclose(after.scores, before.scores, rtol=1e-3)
    assert not torch.allclose(after.image_scores, before.image_scores, rtol=1e-3)


def test_an_expert_without_any_weight_is_removed_and_not_run_after_loading(monkeypatch):
    data = images(40)
    one = head()
    blind = one.branches[1]  # layout

    def same(features, samples, experts):  # for which all images are the same
        return torch.zeros(*experts.shape, 2, *SHAPE[1:])

    monkeypatch.setattr(blind, "forward", same)
    fit(one, with_defects(data, one.defect_images(data)))
    assert one.fusion.used[:2] == [True, False]
    assert 1 not in one.used
    assert all(len(tensor) == 0 for tensor in blind.experts.state_dict().values())

    loaded = build(one.config, shape=SHAPE)
    loaded.load_state(one.state())
    assert list(loaded.used) == list(one.used)
    features = images(4).features.features

    def refuse(*_):
        raise AssertionError("the removed expert was run")

    monkeypatch.setattr(loaded.branches[1], "forward", refuse)
    torch.testing.assert_close(loaded(features), one(features), rtol=0, atol=0)
