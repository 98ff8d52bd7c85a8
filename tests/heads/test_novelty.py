import math

import numpy as np
import pytest
import torch

from builders import random
from normweave.heads.novelty import SubclassNovelty, block_statistics, covariance_within

D = 5


def images(count, *, seed=0, grid=(6, 7)):
    return random(count, D, *grid, seed=seed)


def stats_by_hand(patches):
    """[mean; log of the population std] of (D, P) patches, channel by channel."""
    mean = [row.sum() / len(row) for row in patches]
    stds = [math.sqrt(((row - m) ** 2).sum() / len(row)) for row, m in zip(patches, mean, strict=True)]
    return np.array([*mean, *np.log(stds)])


def test_block_statistics_are_the_lower_median_of_those_of_4_x_4_parts():
    features = images(2, grid=(12, 8))  # parts of 3 x 2 cells
    found = block_statistics(features)
    for image, got in zip(features.double().numpy(), found, strict=True):
        parts = [
            stats_by_hand(image[:, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2].reshape(D, 6))
            for y in range(4)
            for x in range(4)
        ]
        np.testing.assert_allclose(got, np.sort(parts, axis=0)[7], rtol=1e-4, atol=1e-5)


def test_block_statistics_of_alike_parts_are_those_of_the_image():
    part = images(2, grid=(4, 4))
    expected = [stats_by_hand(image.double().numpy().reshape(D, -1)) for image in part]
    np.testing.assert_allclose(block_statistics(part.repeat(1, 1, 4, 4)), np.stack(expected), atol=1e-4, rtol=1e-4)


def test_block_statistics_are_robust_to_a_local_defect():
    clean = images(1, grid=(32, 32))
    defective = clean.clone()
    defective[:, :, 3:11, 3:11] += 20

    plain = (defective.mean((2, 3)) - clean.mean((2, 3))).abs().max()
    robust = (block_statistics(defective) - block_statistics(clean)).abs().max()

    assert plain > 1
    assert robust < 0.3


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (5, 9)])
def test_block_statistics_take_any_grid(grid):
    found = block_statistics(torch.zeros(2, D, *grid))
    assert found.shape == (2, 2 * D)
    assert torch.isfinite(found).all()


def test_the_covariance_within_subclasses_by_hand():
    subclasses = np.array([0, 0, 0, 1, 1])
    samples = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    means, covariance = covariance_within(samples, subclasses, shrinkage=0.25)

    by_hand = np.zeros((3, 3))
    for subclass in (0, 1):
        own = [samples[row].astype(float) for row in range(5) if subclasses[row] == subclass]
        mean = sum(own) / len(own)
        np.testing.assert_allclose(means[subclass], mean)
        for sample in own:
            by_hand += np.outer(sample - mean, sample - mean) / (5 - 2)
    for i in range(3):
        for j in range(3):
            by_hand[i, j] = by_hand[i, j] + 1e-4 if i == j else 0.75 * by_hand[i, j]
    np.testing.assert_allclose(covariance, by_hand)


def fitted(count=200, numbers=4, seed=0):
    generator = np.random.default_rng(seed)
    subclasses = np.arange(count) % 2
    samples = generator.normal(size=(count, numbers)) @ generator.normal(size=(numbers, numbers))
    samples += 3.0 * subclasses[:, None]
    novelty = SubclassNovelty(statistics=numbers)
    novelty.fit(samples.astype(np.float32), subclasses)
    return novelty, samples, subclasses


def test_distance_is_mahalanobis_under_the_shrunk_covariance_within_subclasses():
    novelty, samples, subclasses = fitted()
    tests = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    distances = novelty(torch.from_numpy(tests))

    means = [samples[subclasses == subclass].mean(axis=0) for subclass in (0, 1)]
    residual = np.concatenate([samples[subclasses == subclass] - means[subclass] for subclass in (0, 1)])
    covariance = residual.T @ residual / (len(samples) - 2)
    shrunk = 0.5 * covariance + 0.5 * np.diag(np.diag(covariance)) + 1e-4 * np.eye(4)
    for row in range(5):
        for subclass in (0, 1):
            difference = tests[row] - means[subclass]
            expected = math.sqrt(difference @ np.linalg.inv(shrunk) @ difference / 4)
            assert distances[row, subclass].item() == pytest.approx(expected, rel=1e-3)


def test_the_distance_of_normal_images_is_about_one_and_that_of_others_large():
    novelty, samples, subclasses = fitted()

    own = novelty(torch.from_numpy(samples.astype(np.float32)))[torch.arange(200), torch.from_numpy(subclasses)]
    unseen = novelty(torch.full((1, 4), 1000.0))

    assert 0.5 < own.median() < 1.5
    assert unseen.min() > 50
