import itertools
import math

import numpy as np
import pytest
import torch

from builders import InMemory, begun, normals, random, seeded
from normweave.config import MemoryBankConfig
from normweave.heads.memory_bank import MemoryBank, coreset, draw_patches, nearest, project


def fitted(features, *, seed=0, **settings):
    config = MemoryBankConfig(**{"share": 0.5, "projection": 0, "border": 0} | settings)
    return begun(MemoryBank(config, shape=tuple(features.shape[1:])), normals(features, seed=seed))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_agrees_with_all_pairs(chunk):
    queries, bank = random(31, 5, seed=1), random(50, 5, seed=2)

    distance, index = nearest(queries, bank, chunk=chunk)

    for row, query in enumerate(queries):
        all_distances = [math.dist(query.tolist(), stored.tolist()) for stored in bank]
        assert index[row] == int(np.argmin(all_distances))
        assert distance[row].item() == pytest.approx(min(all_distances), rel=1e-5)


def test_a_stored_patch_is_at_distance_zero():
    bank = 3 + random(200, 8, seed=0)
    distance, index = nearest(bank, bank)
    assert (distance == 0).all()
    assert (index == torch.arange(200)).all()


def test_the_pool_takes_equally_from_every_image_and_no_patch_twice():
    features = torch.arange(7 * 30, dtype=torch.float32).view(7, 1, 5, 6)  # each number identifies its patch
    pool, _ = draw_patches(InMemory(features), np.arange(7), at_most=7 * 4 + 3, generator=seeded())
    numbers = pool[:, 0].long()
    assert len(numbers.unique()) == len(pool) == 31
    assert sorted(torch.bincount(numbers // 30).tolist()) == [4, 4, 4, 4, 5, 5, 5]


def test_every_patch_of_an_image_is_as_likely_to_be_drawn():
    features = torch.arange(12, dtype=torch.float32).view(1, 1, 3, 4)
    draws = [
        draw_patches(InMemory(features), np.arange(1), at_most=3, generator=seeded(seed))[0] for seed in range(2000)
    ]
    counts = torch.bincount(torch.cat(draws)[:, 0].long(), minlength=12)
    assert ((counts - 500).abs() < 5 * math.sqrt(500)).all(), counts


def test_the_pool_keeps_the_channels_of_a_patch_together():
    features = random(4, 3, 2, 5, seed=0)
    pool, _ = draw_patches(InMemory(features), np.array([1, 3]), at_most=100, generator=seeded())
    expected = {tuple(features[image, :, y, x].tolist()) for image in (1, 3) for y in range(2) for x in range(5)}
    assert {tuple(patch.tolist()) for patch in pool} == expected


def test_the_pool_knows_where_each_patch_is_from():
    features = random(4, 3, 2, 5, seed=0)
    pool, origins = draw_patches(InMemory(features), np.array([3, 1]), at_most=13, generator=seeded())
    assert origins[:, 0].tolist() == sorted(origins[:, 0], reverse=True)
    for patch, (image, y, x) in zip(pool, origins, strict=True):
        assert torch.equal(patch, features[image, :, y, x])


def test_a_pool_smaller_than_the_number_of_images_takes_one_patch_of_some():
    pool, _ = draw_patches(InMemory(torch.randn(50, 2, 3, 3)), np.arange(50), at_most=20, generator=seeded())
    assert pool.shape == (20, 2)


def test_images_are_read_in_small_batches():
    source = InMemory(torch.randn(50, 2, 3, 3))
    draw_patches(source, np.arange(50), at_most=1000, generator=seeded())
    assert source.largest_read <= 16


def test_the_coreset_is_gonzalez_farthest_point_first():
    points = random(60, 3, seed=3)
    chosen = coreset(points, 12, generator=seeded()).tolist()
    for step in range(1, 12):
        distances = [min(math.dist(point, points[c]) for c in chosen[:step]) for point in points.tolist()]
        assert chosen[step] == int(np.argmax(distances))


def test_the_coreset_covers_the_points_within_twice_the_optimal_radius():
    points = random(12, 2, seed=4)
    distances = torch.cdist(points, points)
    best = min(distances[:, list(choice)].amin(1).max() for choice in itertools.combinations(range(12), 3))
    for seed in range(5):
        chosen = coreset(points, 3, generator=seeded(seed))
        assert distances[:, chosen].amin(1).max() <= 2 * best


def test_the_coreset_never_takes_a_point_twice_even_among_duplicates():
    assert sorted(coreset(torch.ones(9, 4), 9, generator=seeded()).tolist()) == list(range(9))


def test_the_projection_approximately_preserves_distances():
    points = random(40, 300, seed=5)
    projected = project(points, 128, generator=seeded())
    assert projected.shape == (40, 128)
    ratio = torch.pdist(projected) / torch.pdist(points)
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert 0.7 < ratio.min() <= ratio.max() < 1.3
    assert project(points, 0, generator=seeded()) is points


def test_a_patch_scores_its_distance_to_the_nearest_normal_patch():
    normal = random(6, 4, 3, 5, seed=6)
    head = fitted(normal, share=1.0)
    assert head.bank.shape == (90, 4)
    image = random(2, 4, 3, 5, seed=7)
    scores = head(image).scores
    stored = normal.permute(0, 2, 3, 1).reshape(-1, 4)
    for b, y, x in itertools.product(range(2), range(3), range(5)):
        expected = min(math.dist(image[b, :, y, x].tolist(), patch.tolist()) for patch in stored)
        assert scores[b, y, x].item() == pytest.approx(expected, rel=1e-5)
    assert (head(normal).scores == 0).all()


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"share": 0.1}, 9), ({"max_patches": 20}, 20), ({"max_pool": 30}, 15), ({"share": 0.001}, 1)],
)
def test_the_bank_is_as_large_as_its_limits_allow(settings, size):
    assert fitted(torch.randn(6, 4, 3, 5), **settings).bank.shape == (size, 4)


def test_the_bank_holds_unprojected_patches_although_chosen_in_a_projection():
    normal = random(6, 4, 3, 5, seed=8)
    head = fitted(normal, projection=2)
    assert (nearest(head.bank, normal.permute(0, 2, 3, 1).reshape(-1, 4))[0] == 0).all()


def test_another_seed_keeps_other_patches():
    normal = random(6, 4, 3, 5, seed=9)
    assert not torch.equal(fitted(normal, seed=0).bank, fitted(normal, seed=1).bank)


def test_nearest_refers_to_the_place_of_the_stored_patch():
    normal = random(6, 4, 3, 5, seed=8)
    head = fitted(normal, projection=2)
    for patch, (image, y, x) in zip(head.bank, head.origins, strict=True):
        assert torch.equal(patch, normal[image, :, y, x])
    image, y, x = head.origins[7]
    assert head(normal[image : image + 1]).nearest[0, y, x] == 7


@pytest.mark.parametrize("border", [0, 2])
def test_border_is_a_setting(border):
    features = random(6, 4, 8, 8, seed=0)
    scores = fitted(features[:5], border=border)(features[5:]).scores
    assert torch.equal(scores[:, 0], scores[:, 2]) == (border == 2)
