"""Shares of the images, and the number of workers. `test_ray_fit` trains on a cluster."""

import numpy as np
import pytest
import torch

from normweave.bridges import ray_train
from normweave.config import Config, SimpleNetConfig
from normweave.errors import ConfigError, MissingError
from normweave.heads.mean_shift import MeanShiftedStage
from normweave.heads.pyramidflow import SimilarityStage
from normweave.heads.simplenet import NoiseStage

CONFIG = Config(head=SimpleNetConfig())


def job(*, holdout, tiles=2, head=None):
    """A job of images with some tiles each, that no worker gets."""
    n = len(holdout) * tiles
    per_image = dict.fromkeys(ray_train.PER_IMAGE) | {"holdout": np.repeat(holdout, tiles)}
    owner = np.repeat(np.arange(len(holdout)), tiles)
    return ray_train.Job(head, None, CONFIG, "f", (), ("k",) * n, owner, {}, per_image, None, 1.0, "cpu", ".")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_image_is_in_the_share_of_one_worker_with_all_its_tiles(size):
    one = job(holdout=np.arange(11) % 4 == 0)  # 8 and 3
    shares = [one.share(rank, size) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == list(range(22))
    images = [set(one.owner[share]) for share in shares]
    assert not set.intersection(*images) or size == 1
    for side in (False, True):
        counts = [int((one.per_image["holdout"][share] == side).sum()) // 2 for share in shares]
        assert max(counts) - min(counts) <= 1


def stage(of, batch_images):
    made = of.__new__(of)
    made.batch_images = batch_images
    return made


@pytest.mark.parametrize(
    ("stages", "most"),
    [
        ([stage(NoiseStage, 8)], 8),
        ([stage(NoiseStage, 50)], 12),  # training images
        ([stage(NoiseStage, 8), stage(SimilarityStage, 4)], 2),  # pairs of images
        ([stage(MeanShiftedStage, 32)], 1),  # compares all images of a batch
        ([], 1),
    ],
)
def test_there_are_no_more_workers_than_a_batch_can_be_divided_between(stages, most):
    assert ray_train.most_workers(stages, job(holdout=np.arange(15) % 5 == 0)) == most


def test_a_head_that_cannot_be_sent_is_refused():
    head = torch.nn.Linear(1, 1)
    head.score = lambda x: x
    with pytest.raises(
        ConfigError, match=r"simplenet cannot be sent to other machines \(.*lambda.*--ray, or make ever"
    ):
        ray_train.train(
            None, job(holdout=np.zeros(4, bool), head=head), [stage(NoiseStage, 8)], threads=None, progress=None
        )


def test_a_machine_without_the_package_of_the_head_is_named():
    content = b"cno_such_plugin.head\nHead\n."  # a reference to a class
    with pytest.raises(
        MissingError, match=r"The worker .* cannot load the head .*no_such_plugin.*same versions of normweave and its p"
    ):
        ray_train.received(content)
