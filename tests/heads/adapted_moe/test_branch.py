"""The scores of all experts are on one scale, measured on held-out images."""

import numpy as np
import pytest
import torch

from builders import InMemory, random
from normweave.config import GaussianExpertConfig, PlainAdaptionConfig
from normweave.heads.adapted_moe.branch import FEWEST_HELD_OUT, ExpertBranch
from normweave.heads.adapted_moe.experts.base import Experts

SHAPE = (4, 3, 2)


class Means(Experts):
    """Expert k multiplies the mean of the channels by k + 1; nothing is fitted."""

    def forward(self, features, experts):
        mean = features.mean(2)  # (B, T or 1, h, w)
        return (mean * (experts + 1)[:, :, None, None])[:, :, None]


@pytest.fixture
def branch():
    made = ExpertBranch(GaussianExpertConfig(), PlainAdaptionConfig(method="off"), shape=SHAPE)
    made.experts = Means()
    return made


def measured(branch, *, rows, owner, number=3):
    features = 2 + random(len(owner), *SHAPE, seed=1)
    branch.measure(InMemory(features), np.asarray(rows), np.asarray(owner), number=number)
    return features


def test_mean_and_std_are_those_of_the_scores_of_each_experts_own_held_out_images(branch):
    owner = np.arange(18) % 3
    rows = np.arange(0, 18, 2)
    features = measured(branch, rows=rows, owner=owner)
    for k in range(3):
        scores = features[rows[owner[rows] == k]].mean(1) * (k + 1)
        torch.testing.assert_close(branch.scale_mean[k], scores.mean())
        torch.testing.assert_close(branch.scale_std[k], scores.std(unbiased=False))


def test_an_expert_with_few_held_out_images_has_the_scale_of_all(branch):
    owner = np.array([0] * 5 + [1] * FEWEST_HELD_OUT + [2] * (FEWEST_HELD_OUT - 1))
    features = measured(branch, rows=np.arange(len(owner)), owner=owner)
    everything = features.mean(1) * torch.from_numpy(owner + 1)[:, None, None]
    own = everything[owner == 1]
    torch.testing.assert_close(branch.scale_mean[2], everything.mean())
    torch.testing.assert_close(branch.scale_std[2], everything.std(unbiased=False))
    torch.testing.assert_close(branch.scale_mean[1], own.mean())


def test_without_held_out_images_scores_stay_as_they_are(branch):
    measured(branch, rows=np.arange(0), owner=np.zeros(4, dtype=np.int64))
    assert (branch.scale_mean.tolist(), branch.scale_std.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_scores_are_divided_by_the_scale_of_their_expert(branch):
    branch.scale_mean, branch.scale_std = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    features, chosen = random(2, *SHAPE, seed=3), torch.tensor([[2, 0], [1, 2]])
    found = branch(features, torch.zeros(2, 2 * SHAPE[0]), chosen)
    assert found.shape == (2, 2, 1, *SHAPE[1:])
    mean = features.mean(1)
    torch.testing.assert_close(found[0, 0, 0], (3 * mean[0] - 2) / 4)
    torch.testing.assert_close(found[0, 1, 0], mean[0])
    torch.testing.assert_close(found[1, 0, 0], (2 * mean[1] - 1) / 2)


def test_a_removed_branch_has_no_experts():
    branch = ExpertBranch(GaussianExpertConfig(), PlainAdaptionConfig(method="off"), shape=SHAPE)
    branch.experts.start(experts=3, generator=torch.Generator().manual_seed(0))
    branch.remove()
    assert branch.number == 0
    assert all(len(tensor) == 0 for tensor in branch.experts.state_dict().values())
    branch.unit_scale(2)
    assert branch.number == 2
