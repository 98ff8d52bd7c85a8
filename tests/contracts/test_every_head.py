"""Contract of every head, which covers `normweave.heads.base`. The heads are those of `HeadConfig`."""

import re
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import SHAPE, fit, subclass_images, subclass_normals
from normweave.config import HeadConfig
from normweave.errors import BundleError
from normweave.heads import build

CELL = (3, 4)  # of the planted defect; well inside, for heads that replace the border


def same(one, other, *, exactly=False):
    """Assert that two PatchScores agree."""
    close = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(one.scores, other.scores, **close)
    for a, b in ((one.image_scores, other.image_scores), (one.routing, other.routing)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **close)


def pick(out, rows):
    """Return the PatchScores of some images."""
    return type(out)(
        scores=out.scores[rows],
        image_scores=None if out.image_scores is None else out.image_scores[rows],
        routing=None if out.routing is None else type(out.routing)(*(field[rows] for field in out.routing)),
    )


@pytest.fixture(scope="module", params=get_args(HeadConfig), ids=lambda head: head.kind)
def config(request):
    return request.param()


@pytest.fixture(scope="module")
def head(config):
    return fit(build(config, shape=SHAPE), subclass_normals())


@pytest.fixture(scope="module")
def unseen():
    """Normal images that no head was fit on."""
    return subclass_images(5, seed=3)[0]


def check(head, out, *, count, grid):
    """Shapes, types and ranges of `types.PatchScores`."""
    assert out.scores.shape[0] == count
    assert 1 <= out.scores.shape[1] <= grid[0]
    assert 1 <= out.scores.shape[2] <= grid[1]
    assert out.scores.dtype == torch.float32
    assert torch.isfinite(out.scores).all()
    assert not out.scores.requires_grad
    if out.image_scores is not None:
        assert out.image_scores.shape == (count,)
        assert out.image_scores.dtype == torch.float32
        assert torch.isfinite(out.image_scores).all()
    assert (out.nearest is None) == (head.origins is None)
    if out.nearest is not None:
        assert (out.nearest.shape, out.nearest.dtype) == (out.scores.shape, torch.int64)
        assert ((out.nearest >= 0) & (out.nearest < len(head.origins))).all()
        assert head.origins.dtype == np.int64
        assert (head.origins >= 0).all()
        assert (head.origins[:, 1:] < grid).all()
    assert (out.routing is None) == (head.subclass_names == ())
    if out.routing is not None:
        K = len(head.subclass_names)
        weights, subclass, distance, adapted = out.routing
        assert (weights.shape, weights.dtype) == ((count, K), torch.float32)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(count))
        assert (subclass.shape, subclass.dtype) == ((count,), torch.int64)
        assert ((subclass >= 0) & (subclass < K)).all()
        assert (distance.shape, distance.dtype) == ((count,), torch.float32)
        assert (distance >= 0).all()
        assert torch.isfinite(distance).all()
        assert (adapted.shape, adapted.dtype) == ((count,), torch.bool)


def test_scores_have_the_shape_and_type_that_the_stages_rely_on(head, unseen):
    check(head, head(unseen), count=5, grid=SHAPE[1:])


def test_a_planted_defect_raises_the_score_where_it_is(head, unseen):
    before = head(unseen).scores
    signs = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(4)).sign()
    defective = unseen.clone()
    defective[:, :, CELL[0], CELL[1]] += 5 * signs
    after = head(defective).scores

    h, w = after.shape[1:]
    y, x = CELL[0] * h // SHAPE[1], CELL[1] * w // SHAPE[2]
    assert ((after - before).flatten(1).argmax(1) == y * w + x).all()
    if head.image_level:
        assert (h, w) == (1, 1)
        assert (after > before).all()  # one patch of 64 moves a mean little
        return
    assert (after[:, y, x] > before.quantile(0.95)).all()  # few images and epochs: not yet above all normals


def test_scores_do_not_depend_on_the_batch(head, unseen):
    together = head(unseen)
    for row in range(len(unseen)):
        same(head(unseen[row : row + 1]), pick(together, slice(row, row + 1)))


def test_images_in_another_order_give_the_same_scores_in_that_order(head, unseen):
    order = torch.tensor([3, 0, 4, 1, 2])
    same(head(unseen[order]), pick(head(unseen), order))


def test_no_image_gives_no_scores(head, unseen):
    check(head, head(unseen[:0]), count=0, grid=SHAPE[1:])


def test_train_mode_changes_nothing(head, unseen):
    before, state = head(unseen), head.state()
    head.train()
    same(head(unseen), before, exactly=True)
    head.eval()
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state().items())


def test_scoring_leaves_the_features_alone(head, unseen):
    kept = unseen.clone()
    head(unseen)
    assert torch.equal(unseen, kept)


def test_the_same_seed_gives_the_same_head(config, head):
    again = fit(build(config, shape=SHAPE), subclass_normals()).state()
    assert again.keys() == head.state().keys()
    for name, tensor in head.state().items():
        assert torch.equal(tensor, again[name]), name


def test_a_loaded_head_gives_the_same_scores(config, head, unseen, tmp_path):
    save_file(head.state(), tmp_path / "weights.safetensors")
    fresh = build(config, shape=SHAPE)
    fresh.load_state(load_file(tmp_path / "weights.safetensors"))
    fresh.subclass_names = head.subclass_names
    same(fresh(unseen), head(unseen), exactly=True)


def test_damaged_weights_are_refused_by_name(config, head):
    good = head.state()
    first, *rest = sorted(good)
    with pytest.raises(BundleError, match=f"missing {re.escape(first)}"):
        build(config, shape=SHAPE).load_state({name: good[name] for name in rest})
    with pytest.raises(BundleError, match=r"unknown extra\. Load them with the settings"):
        build(config, shape=SHAPE).load_state(good | {"extra": torch.zeros(1)})
    first = next(name for name in sorted(good) if good[name].is_floating_point() and good[name].numel())
    with pytest.raises(BundleError, match=f"{re.escape(first)} holds NaN"):
        build(config, shape=SHAPE).load_state(good | {first: torch.full_like(good[first], torch.nan)})


def test_heads_that_route_name_the_subclasses_they_were_given(head):
    assert head.subclass_names in ((), ("cloth/a", "cloth/b", "cloth/c"))


def test_stages_have_different_names_that_are_file_names(head):
    names = [stage.name for stage in head.stages(subclass_normals())]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in names)


@pytest.mark.parametrize(
    "given",
    [
        {"subclasses": 1},
        {"labelled": False},
        {"shape": (16, 6, 11)},
        {"count": 1, "subclasses": 1, "holdout": False},
        {"holdout": False},
    ],
    ids=["one subclass", "no labels", "not square", "one image", "nothing held out"],
)
def test_fits_few_unlabelled_or_unusual_images(config, given):
    data = subclass_normals(**given)
    head = fit(build(config, shape=data.features.shape), data)
    check(
        head,
        head(subclass_images(3, shape=data.features.shape, seed=3)[0]),
        count=3,
        grid=data.features.shape[1:],
    )
