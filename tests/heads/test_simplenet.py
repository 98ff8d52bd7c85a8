import itertools
import math

import pytest
import torch

from builders import begun, normals, quick_training, random, seeded
from normweave.config import SimpleNetConfig
from normweave.heads.simplenet import SimpleNet
from normweave.training import train


def new(data, **settings):
    config = SimpleNetConfig(**{"hidden": 6, "training": quick_training(), "border": 0} | settings)
    return begun(SimpleNet(config, shape=data.features.shape), data)


def by_hand(discriminator, patch, *, mean, variance):
    """D of an adapted patch, one number at a time, for given statistics of the batch norm's input."""
    hidden = []
    for row, bias in zip(discriminator.hidden.weight.tolist(), discriminator.hidden.bias.tolist(), strict=True):
        hidden.append(sum(w * x for w, x in zip(row, patch, strict=True)) + bias)
    norm = discriminator.norm
    total = 0.0
    for unit, value in enumerate(hidden):
        standard = (value - mean[unit]) / math.sqrt(variance[unit] + norm.eps)
        scaled = standard * norm.weight[unit].item() + norm.bias[unit].item()
        total += discriminator.out.weight[0, unit].item() * (scaled if scaled > 0 else 0.2 * scaled)
    return total


def adapt_by_hand(discriminator, patch):
    return (discriminator.adaptor.weight @ patch + discriminator.adaptor.bias).tolist()


def test_the_score_is_minus_the_discriminator():
    data = normals(random(10, 3, 2, 4, seed=1))
    head = new(data)
    (stage,) = head.stages(data)
    train(stage, data, device="cpu")
    image = random(2, 3, 2, 4, seed=2)
    scores = head(image).scores
    norm = head.discriminator.norm
    with torch.no_grad():
        for b, y, x in itertools.product(range(2), range(2), range(4)):
            adapted = adapt_by_hand(head.discriminator, image[b, :, y, x])
            expected = -by_hand(
                head.discriminator,
                adapted,
                mean=norm.running_mean.tolist(),
                variance=norm.running_var.tolist(),
            )
            assert scores[b, y, x].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_loss_is_the_truncated_l1_of_normal_and_noised_patches():
    data = normals(random(3, 4, 2, 2, seed=3))
    head = new(data, margin=0.3, noise=0.7)
    (stage,) = head.stages(data)
    stage.module.train()
    with torch.no_grad():
        loss = stage.loss(data.features.features, None, generator=seeded(4), training=True)["loss"].item()

        patches = [data.features.features[b, :, y, x] for b in range(3) for y in range(2) for x in range(2)]
        normal = torch.tensor([adapt_by_hand(head.discriminator, patch) for patch in patches])
        noised = normal + 0.7 * random(12, 4, seed=4)
        inner = torch.cat([normal, noised]) @ head.discriminator.hidden.weight.T
        statistics = {"mean": inner.mean(0).tolist(), "variance": inner.var(0, unbiased=False).tolist()}
        expected = 0.0
        for patch in normal.tolist():
            expected += max(0, 0.3 - by_hand(head.discriminator, patch, **statistics)) / 12
        for patch in noised.tolist():
            expected += max(0, 0.3 + by_hand(head.discriminator, patch, **statistics)) / 12
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_adaptor_learns_at_half_the_rate():
    data = normals(torch.randn(4, 3, 2, 2))
    (stage,) = new(data, training=quick_training(learning_rate=0.04)).stages(data)
    adaptor, rest = stage.optimiser().param_groups
    assert (adaptor["lr"], rest["lr"]) == (0.02, 0.04)
    assert adaptor["weight_decay"] == rest["weight_decay"] == 1e-5
    assert [tuple(p.shape) for p in adaptor["params"]] == [(3, 3), (3,)]
    assert len(adaptor["params"]) + len(rest["params"]) == len(list(stage.module.parameters()))


def test_patches_off_the_normal_line_score_higher_after_training():
    """Normal patches are close to a straight line in feature space."""
    along = random(20, 1, 4, 4, seed=5)
    normal = torch.cat([along, along], dim=1) + 0.02 * random(20, 2, 4, 4, seed=6)
    data = normals(normal)
    head = new(data, hidden=64, training=quick_training(epochs=60, learning_rate=3e-3))
    (stage,) = head.stages(data)
    history = train(stage, data, device="cpu")
    assert history.best_loss < 0.8 * history.holdout_losses[0]
    off = normal[:5] + torch.tensor([0.8, -0.8]).view(2, 1, 1)
    higher = head(off).scores.flatten()[:, None] > head(normal[:5]).scores.flatten()[None]
    assert higher.float().mean() > 0.9  # sixty epochs end differently for every number of threads


def test_the_initial_weights_depend_on_the_seed():
    features = torch.randn(4, 3, 2, 2)
    one, same, other = (new(normals(features, seed=seed)).state() for seed in (0, 0, 1))
    assert torch.equal(one["discriminator.hidden.weight"], same["discriminator.hidden.weight"])
    assert not torch.equal(one["discriminator.hidden.weight"], other["discriminator.hidden.weight"])
