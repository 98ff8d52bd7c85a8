"""What a plug-in tests itself with: the contract of heads as a class of tests, and small data to fit one.

    from normweave.testing import HeadContract

    class TestMyHead(HeadContract):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return MyConfig()

The heads of normweave pass the same tests. It needs pytest and `normweave[train]`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from normweave.config import HeadConfig
from normweave.errors import BundleError
from normweave.heads import build
from normweave.heads.base import Head
from normweave.passes import Merge, Statistics, Tensors, batches, by_part
from normweave.training import train
from normweave.types import FitData, PatchScores

T = TypeVar("T")

SHAPE = (16, 8, 8)
"""(D, h, w) of the features."""
CELL = (3, 4)
"""Of the planted defect; well inside, for heads that treat the border."""


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal random numbers of this shape."""
    return torch.randn(*shape, generator=seeded(seed))


class InMemory:
    """A feature source over a tensor (n, D, h, w) that records the rows of each read."""

    def __init__(self, features: Tensor | ArrayLike) -> None:
        self.features = torch.as_tensor(features, dtype=torch.float32)
        D, h, w = self.features.shape[1:]
        self.shape = (D, h, w)
        self.reads: list[NDArray[np.int64]] = []

    @property
    def largest_read(self) -> int:
        """The largest number of images in one read."""
        return max((len(rows) for rows in self.reads), default=0)

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these rows."""
        self.reads.append(np.asarray(rows))
        return self.features[torch.as_tensor(np.asarray(rows), dtype=torch.int64)]


class InParts(InMemory):
    """As `InMemory`, but only parts of `size` images can be read at once, as if each part were on a machine of its own.

    What passes between them is pickled.
    """

    def __init__(self, features: Tensor | ArrayLike, *, size: int = 7) -> None:
        super().__init__(features)
        self.size = size

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Fail: the features are not on this machine."""
        raise AssertionError("An image was read on this machine. Use passes.over, or leave `distributed` False.")

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of the parts of these images; see `passes.over`."""
        results = []
        for _, own, rest in by_part(rows, self.size, aligned):
            there, given = pickle.loads(pickle.dumps((statistics, rest)))
            results.append(there(batches(InMemory(self.features), own, given)))
        merged: T = merge(iter(results))
        return merged


def normals(features: Tensor | ArrayLike, **fields: Any) -> FitData:
    """Fit data without subclass labels; each image is its own group and every fifth is held out."""
    source = InMemory(features)
    number = np.arange(len(source))
    defaults: dict[str, Any] = {
        "subclasses": np.full(len(source), -1),
        "names": (),
        "groups": number,
        "holdout": number % 5 == 0,
        "seed": 0,
    }
    return FitData(features=source, **defaults | fields)


def subclass_images(
    count: int, *, subclasses: int = 3, shape: tuple[int, int, int] = SHAPE, seed: int
) -> tuple[Tensor, NDArray[np.int64]]:
    """Standardised features of normal images, and their subclasses, which differ in the mean of every channel."""
    means = random(subclasses, shape[0], 1, 1, seed=1)
    noise = random(count, *shape, seed=seed)
    subclass = torch.arange(count) % subclasses
    spread = means.var(0, unbiased=False).add(0.25).sqrt()
    return (means[subclass] - means.mean(0) + 0.5 * noise) / spread, subclass.numpy()


def subclass_normals(
    *,
    count: int = 24,
    subclasses: int = 3,
    shape: tuple[int, int, int] = SHAPE,
    labelled: bool = True,
    holdout: bool = True,
) -> FitData:
    """Fit data of several subclasses; a group is two images of one subclass."""
    features, subclass = subclass_images(count, subclasses=subclasses, shape=shape, seed=2)
    groups = np.arange(count) // (2 * subclasses) * subclasses + subclass
    labels: dict[str, Any] = {"subclasses": subclass, "names": tuple(f"cloth/{name}" for name in "abc"[:subclasses])}
    return normals(features, groups=groups, holdout=(groups < subclasses) & holdout, **labels if labelled else {})


def fit(head: Head, data: FitData) -> Head:
    """Fit a head as `normweave.fitting` does."""
    head.begin(data)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return head


def same(one: PatchScores, other: PatchScores, *, exactly: bool = False) -> None:
    """Assert that two PatchScores agree."""
    tolerance = 0.0 if exactly else 1e-4
    torch.testing.assert_close(one.scores, other.scores, rtol=tolerance, atol=tolerance)
    for a, b in ((one.image_scores, other.image_scores), (one.routing, other.routing)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pick(out: PatchScores, rows: slice | Tensor) -> PatchScores:
    """Return the PatchScores of some images."""
    return type(out)(
        scores=out.scores[rows],
        image_scores=None if out.image_scores is None else out.image_scores[rows],
        routing=None if out.routing is None else type(out.routing)(*(field[rows] for field in out.routing)),
    )


def check(head: Head, out: PatchScores, *, count: int, grid: tuple[int, ...]) -> None:
    """Assert the shapes, types and ranges of `types.PatchScores`."""
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
    if out.nearest is not None and head.origins is not None:
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


class HeadContract:
    """Tests of every head. A subclass has the fixture `config`: the settings of the head."""

    @pytest.fixture(scope="class")
    @classmethod
    def head(cls, config: HeadConfig) -> Head:
        """The head, fitted to normal images of three subclasses."""
        return fit(build(config, shape=SHAPE), subclass_normals())

    @pytest.fixture(scope="class")
    @classmethod
    def unseen(cls) -> Tensor:
        """Normal images that the head was not fitted on."""
        return subclass_images(5, seed=3)[0]

    def test_scores_have_the_shape_and_type_that_the_stages_rely_on(self, head: Head, unseen: Tensor) -> None:
        """Scores have the shape and type that the stages rely on."""
        check(head, head(unseen), count=5, grid=SHAPE[1:])

    def test_a_planted_defect_raises_the_score_where_it_is(self, head: Head, unseen: Tensor) -> None:
        """A planted defect raises the score where it is."""
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

    def test_scores_do_not_depend_on_the_batch(self, head: Head, unseen: Tensor) -> None:
        """Scores do not depend on the batch."""
        together = head(unseen)
        for row in range(len(unseen)):
            same(head(unseen[row : row + 1]), pick(together, slice(row, row + 1)))

    def test_images_in_another_order_give_the_same_scores_in_that_order(self, head: Head, unseen: Tensor) -> None:
        """Images in another order give the same scores in that order."""
        order = torch.tensor([3, 0, 4, 1, 2])
        same(head(unseen[order]), pick(head(unseen), order))

    def test_no_image_gives_no_scores(self, head: Head, unseen: Tensor) -> None:
        """No image gives no scores."""
        check(head, head(unseen[:0]), count=0, grid=SHAPE[1:])

    def test_train_mode_changes_nothing(self, head: Head, unseen: Tensor) -> None:
        """Train mode changes nothing."""
        before, state = head(unseen), head.state()
        head.train()
        same(head(unseen), before, exactly=True)
        head.eval()
        assert all(torch.equal(tensor, state[name]) for name, tensor in head.state().items())

    def test_scoring_leaves_the_features_alone(self, head: Head, unseen: Tensor) -> None:
        """Scoring leaves the features alone."""
        kept = unseen.clone()
        head(unseen)
        assert torch.equal(unseen, kept)

    def test_the_same_seed_gives_the_same_head(self, config: HeadConfig, head: Head) -> None:
        """The same seed gives the same head."""
        again = fit(build(config, shape=SHAPE), subclass_normals()).state()
        assert again.keys() == head.state().keys()
        for name, tensor in head.state().items():
            assert torch.equal(tensor, again[name]), name

    def test_images_on_several_machines_give_the_same_head(self, config: HeadConfig, head: Head) -> None:
        """Images on several machines give the same head, if it is distributed: closed forms to 1e-6."""
        data = subclass_normals()
        assert isinstance(data.features, InMemory)
        if not head.distributed:
            return
        apart = fit(build(config, shape=SHAPE), replace(data, features=InParts(data.features.features))).state()
        for name, tensor in head.state().items():
            torch.testing.assert_close(apart[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    def test_a_loaded_head_gives_the_same_scores(
        self, config: HeadConfig, head: Head, unseen: Tensor, tmp_path: Path
    ) -> None:
        """A loaded head gives the same scores."""
        save_file(head.state(), tmp_path / "weights.safetensors")
        fresh = build(config, shape=SHAPE)
        fresh.load_state(load_file(tmp_path / "weights.safetensors"))
        fresh.subclass_names = head.subclass_names
        same(fresh(unseen), head(unseen), exactly=True)

    def test_damaged_weights_are_refused_by_name(self, config: HeadConfig, head: Head) -> None:
        """Damaged weights are refused by name."""
        good = head.state()
        first, *rest = sorted(good)
        with pytest.raises(BundleError, match=f"missing {re.escape(first)}"):
            build(config, shape=SHAPE).load_state({name: good[name] for name in rest})
        with pytest.raises(BundleError, match=r"unknown extra\. Load them with the settings"):
            build(config, shape=SHAPE).load_state(good | {"extra": torch.zeros(1)})
        first = next(name for name in sorted(good) if good[name].is_floating_point() and good[name].numel())
        with pytest.raises(BundleError, match=f"{re.escape(first)} holds NaN"):
            build(config, shape=SHAPE).load_state(good | {first: torch.full_like(good[first], torch.nan)})

    def test_heads_that_route_name_the_subclasses_they_were_given(self, head: Head) -> None:
        """Heads that route name the subclasses they were given."""
        assert head.subclass_names in ((), ("cloth/a", "cloth/b", "cloth/c"))

    def test_stages_have_different_names_that_are_file_names(self, head: Head) -> None:
        """Stages have different names that are file names."""
        names = [stage.name for stage in head.stages(subclass_normals())]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in names)

    def test_a_head_with_stages_can_be_sent_to_other_machines(self, head: Head) -> None:
        """A head with stages can be sent to other machines, which make the same stages of their images."""
        data = subclass_normals()
        if stages := head.stages(data):
            sent: Head = pickle.loads(pickle.dumps(head))
            assert [stage.name for stage in sent.stages(data)] == [stage.name for stage in stages]

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
    def test_fits_few_unlabelled_or_unusual_images(self, config: HeadConfig, given: dict[str, Any]) -> None:
        """Fits few unlabelled or unusual images."""
        data = subclass_normals(**given)
        head = fit(build(config, shape=data.features.shape), data)
        check(
            head,
            head(subclass_images(3, shape=data.features.shape, seed=3)[0]),
            count=3,
            grid=data.features.shape[1:],
        )
