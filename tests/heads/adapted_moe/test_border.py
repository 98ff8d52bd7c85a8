"""Scale of the scores near the border: its formula by hand, and what it leaves alone."""

import numpy as np
import pytest
import torch

from builders import random
from normweave.heads.adapted_moe.border import BorderScale, rings

GRID = (8, 9)


def maps(*, seed=0, factor=1.0, offset=0.0, experts=2):
    """Scores of ten normal images; at a distance of 1 from the border they are times the factor, plus the offset."""
    scores = random(10, experts, *GRID, seed=seed).abs().numpy()
    outer = rings(GRID, 2) == 1
    scores[:, :, outer] = scores[:, :, outer] * factor + offset
    return scores


def fitted(*by_subclass, affected=(True, True), width=2):
    scale = BorderScale(affected, width=width)
    scale.fit(by_subclass, range(len(by_subclass)))
    return scale


def test_the_rings_of_a_grid():
    assert rings((7, 8), 2).tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 2, 2, 2, 2, 1, 1],
        [1, 1, 2, 3, 3, 2, 1, 1],
        [1, 1, 2, 2, 2, 2, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert (rings((7, 8), 0) == 1).all()
    assert (rings((2, 2), 2) == 1).all()
    assert (rings((1, 1), 2) == 1).all()


def test_border_scale_by_hand():
    good = maps(factor=3.0, offset=2.0)
    scale = fitted(good)
    scores = random(3, 2, *GRID, seed=5)
    got = scale(scores, torch.zeros(3, dtype=torch.int64), 1)
    ring = rings(GRID, 2)
    inner = good[:, 1][:, ring == 3]
    for each in (1, 2):
        own = good[:, 1][:, ring == each]
        factor = (np.quantile(inner, 0.9) - np.median(inner)) / (np.quantile(own, 0.9) - np.median(own))
        shift = min(np.median(own), np.median(inner))
        expected = (scores[:, :, ring == each] - np.median(own)) * min(1, factor) + shift
        torch.testing.assert_close(got[:, :, ring == each], expected, check_dtype=False)
    assert torch.equal(got[:, :, ring == 3], scores[:, :, ring == 3])


def test_normal_scores_near_the_border_have_the_median_and_quantile_of_the_inner_ones():
    good = maps(factor=4.0, offset=2.0)
    scaled = fitted(good)(torch.from_numpy(good), torch.zeros(10, dtype=torch.int64), 0).numpy()[:, 0]
    ring = rings(GRID, 2)
    for q in (0.5, 0.9):
        outer, inner = (np.quantile(scaled[:, ring == each], q) for each in (1, 3))
        assert outer == pytest.approx(inner, rel=1e-4)


@pytest.mark.parametrize(("factor", "offset"), [(0.0, 0.0), (0.1, 0.0), (0.0, -1.0)])
def test_scores_are_never_made_larger(factor, offset):
    """At the border of a plain background normal scores are small and all the same."""
    scale = fitted(maps(factor=factor, offset=offset))
    assert (scale.gain <= 1).all()
    scores = random(3, 2, *GRID, seed=5).abs()
    got = scale(scores, torch.zeros(3, dtype=torch.int64), 0)
    assert (got[:, :, rings(GRID, 2) == 1] <= scores[:, :, rings(GRID, 2) == 1] + 1e-6).all()


def test_each_subclass_and_expert_has_its_own_scale_and_others_none():
    scale = fitted(maps(factor=2.0), maps(factor=8.0), affected=(True, False))
    assert scale.gain[0, 0, 0, 0] > 2 * scale.gain[1, 0, 0, 0]
    scores = random(2, 1, *GRID)
    assert scale(scores, torch.tensor([0, 1]), 1) is scores
    first = scale(scores, torch.tensor([0, 0]), 0)
    both = scale(scores, torch.tensor([0, 1]), 0)
    assert torch.equal(first[0], both[0])
    assert not torch.allclose(first[1], both[1])


def test_without_a_border_nothing_changes():
    scores = random(2, 2, *GRID)
    torch.testing.assert_close(fitted(maps(factor=3.0), width=0)(scores, torch.tensor([0, 0]), 0), scores)


def test_a_copy_has_the_scales_of_the_chosen_subclasses():
    scale = fitted(maps(factor=2.0), maps(factor=8.0))
    other = BorderScale((True, True), width=2)
    other.copy(scale, [1])
    assert torch.equal(other.gain, scale.gain[1:])
    assert torch.equal(other.shift, scale.shift[1:])


def test_an_added_subclass_has_a_scale_of_its_images_or_that_of_another_one():
    """Of the experts in use; the scales of the others do not change."""
    first, second = maps(factor=2.0), maps(factor=8.0)
    scale = fitted(first)
    scale.append(second[:, 1:], [1])
    assert torch.equal(scale.gain[1, 1], fitted(second).gain[0, 1])
    assert (scale.gain[1, 0] == 1).all()
    scale.append_like(0)
    assert torch.equal(scale.gain[2], fitted(first).gain[0])
    assert torch.equal(scale.shift[[0, 2]], fitted(first, first).shift)


def test_scores_of_some_experts_are_scaled_by_those():
    first, second = maps(factor=2.0), maps(factor=8.0)
    scale = fitted(first, second)
    patches = random(3, 1, 2, *GRID).numpy()
    rows = np.array([1, 0, 1])
    got = scale.scaled(patches, rows, [1])
    torch.testing.assert_close(
        torch.from_numpy(got[:, 0]), scale(torch.from_numpy(patches[:, 0]), torch.from_numpy(rows), 1)
    )
