import math

import numpy as np
import pytest
import torch

from builders import begun, normals, quick_training, random, seeded
from normweave.config import MeanShiftConfig
from normweave.errors import DataError
from normweave.heads.mean_shift import MeanShift, contrast, view
from normweave.training import train


def new(data, **settings):
    config = MeanShiftConfig(**{"hidden": 5, "max_images": 100, "training": quick_training(epochs=5)} | settings)
    return begun(MeanShift(config, shape=data.features.shape), data)


def unit(vector):
    return vector / math.sqrt(sum(value * value for value in vector.tolist()))


def test_the_contrastive_loss_is_its_equation():
    """-log of the softmax of the partner view over all other views, view by view."""
    one, other = random(3, 4, seed=1), random(3, 4, seed=2)
    views = [unit(row) for row in torch.cat([one, other])]
    total = 0.0
    for i in range(6):
        similarity = [math.exp(float(views[i] @ views[j]) / 0.25) for j in range(6)]
        total -= math.log(similarity[(i + 3) % 6] / (sum(similarity) - similarity[i]))
    assert contrast(one, other, temperature=0.25).item() == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("angular", [True, False])
def test_the_loss_is_contrastive_around_the_centre_and_angular_towards_it(angular):
    data = normals(random(4, 3, 4, 4, seed=1))
    head = new(data, angular=angular)
    with torch.no_grad():
        head.adapter.second.weight += 0.5 * random(3, 5, seed=2)
    (stage,) = head.stages(data)
    with torch.no_grad():
        losses = stage.loss(data.features.features, None, generator=seeded(3), training=True)
        generator = seeded(3)
        phis = []
        for _ in range(2):
            means = view(data.features.features, smallest=0.2, generator=generator)
            first, second = head.adapter.first, head.adapter.second
            phis.append([unit(g + second.weight @ (first.weight @ g + first.bias).clamp(min=0)) for g in means])
        shifted = [torch.stack([phi - head.centre for phi in own]) for own in phis]
        expected = contrast(shifted[0], shifted[1], temperature=0.25).item()
        if angular:
            expected -= sum(float(phi @ head.centre) for own in phis for phi in own) / 8
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert ("angular" in losses) == angular


def test_the_centre_is_the_mean_direction_of_features_that_are_not_centred():
    raw = 3 + 2 * random(20, 3, 4, 4, seed=1)
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    standard = (raw - mean[:, None, None]) / std[:, None, None]
    head = new(normals(standard, mean=mean, std=std))
    directions = torch.stack([unit(image.mean((1, 2)) / std) for image in raw])
    torch.testing.assert_close(head.centre, unit(directions.mean(0)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new(normals(standard)).offset, torch.zeros(3))


def test_the_score_is_the_distance_to_the_nearest_normal_images():
    data = normals(random(18, 3, 2, 2, seed=1))
    head = new(data, neighbours=3)
    head.finish(data)
    image = random(1, 3, 2, 2, seed=2)
    phi = unit(image[0].mean((1, 2)))
    similarity = sorted(float(phi @ unit(one.mean((1, 2)))) for one in data.features.features)[-3:]
    out = head(image)
    assert out.scores.shape == (1, 1, 1)
    assert out.scores.item() == pytest.approx(1 - sum(similarity) / 3, abs=1e-5)
    assert data.features.largest_read <= 16


def test_fewer_images_than_neighbours_and_at_most_max_images():
    data = normals(random(9, 3, 2, 2, seed=1))
    head = new(data, neighbours=20, max_images=4)
    head.finish(data)
    assert head.bank.shape == (4, 3)
    assert head(random(2, 3, 2, 2, seed=2)).scores.isfinite().all()


def test_no_normal_image_is_refused():
    with pytest.raises(DataError, match="Mean-Shifted has no normal image to learn from"):
        new(normals(torch.empty(0, 3, 2, 2)))


def test_a_view_is_the_mean_over_a_rectangle():
    """Features that are one-hot in the cell show which cells a view averages."""
    h, w = 6, 9
    one_hot = torch.eye(h * w).view(1, h * w, h, w).expand(400, -1, -1, -1)
    views = view(one_hot, smallest=0.25, generator=seeded(1)).view(400, h, w)
    areas = []
    for inside in views:
        rows, columns = (inside > 0).any(1), (inside > 0).any(0)
        rectangle = rows[:, None] & columns[None]
        assert torch.equal(inside > 0, rectangle)
        for axis in (rows, columns):
            cells = axis.nonzero().flatten()
            assert len(cells) == cells[-1] - cells[0] + 1  # contiguous
        torch.testing.assert_close(inside[rectangle], torch.full((int(rectangle.sum()),), 1 / rectangle.sum().item()))
        areas.append(rectangle.sum().item() / (h * w))
    assert 0.15 < min(areas) < 0.35
    assert max(areas) == 1
    assert 0.5 < np.mean(areas) < 0.7  # uniform in [0.25, 1]: 0.625
    covered = (views > 0).float().mean(0)
    assert covered.min() > 0.2
    full = view(random(2, 3, h, w, seed=2), smallest=1.0, generator=seeded(1))
    assert full.shape == (2, 3)


def test_training_makes_the_views_of_an_image_more_similar():
    data = normals(2 + random(20, 6, 6, 6, seed=1) + random(20, 6, 1, 1, seed=2))
    head = new(data, training=quick_training(epochs=20, learning_rate=0.1))
    (stage,) = head.stages(data)
    history = train(stage, data, device="cpu")
    assert history.best_loss < history.holdout_losses[0] - 0.02
    assert head.adapter.second.weight.abs().max() > 0


def test_the_initial_weights_depend_on_the_seed():
    features = random(4, 3, 2, 2, seed=1)
    one, same, other = (new(normals(features, seed=seed)).state() for seed in (0, 0, 1))
    assert torch.equal(one["adapter.first.weight"], same["adapter.first.weight"])
    assert not torch.equal(one["adapter.first.weight"], other["adapter.first.weight"])
