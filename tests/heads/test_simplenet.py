import itertools
import math

import pytest
import torch

from builders import normals, random, seeded
from normweave.heads.simplenet import SimpleNet
from normweave.training import train


def begun(data, **settings):
    head = SimpleNet(
        shape=data.features.shape,
        **{
            "hidden": 6,
            "noise": 0.5,
            "margin": 0.5,
            "epochs": 8,
            "batch_images": 4,
            "learning_rate": 1e-2,
            "patience": 0,
            "border": 0,
        }
        | settings,
    )
    head.begin(data)
    return head


def by_hand(discriminator, patch, *, mean, variance):
    """D of an adapted patch, one number at a time, for given statistics of the batch norm's input."""
    hidden = []
    for row, bias in zip(
        discriminator.hidden.weight.tolist(), discriminator.hidden.bias.tolist(), strict=True
    ):
        hidden.append(sum(w * x for w, x in zip(row, patch, strict=True)) + bias)
    norm = discriminator.standardise
    total = 0.0
    for unit, value in enumerate(hidden):
        standard = (value - mean[unit]) / math.sqrt(variance[unit] + norm.eps)
        bent = standard * norm.weight[unit].item() + norm.bias[unit].item()
        total += discriminator.out.weight[0, unit].item() * (bent if bent > 0 else 0.2 * bent)
    return total


def adapt_by_hand(discriminator, patch):
    return (discriminator.adaptor.weight @ patch + discriminator.adaptor.bias).tolist()


def test_the_score_is_minus_the_discriminator():
    data = normals(random(10, 3, 2, 4, seed=1))
    head = begun(data)
    (stage,) = head.stages(data)
    train(stage, data, device="cpu")
    image = random(2, 3, 2, 4, seed=2)
    scores = head(image).scores
    norm = head.discriminator.standardise
    with torch.no_grad():
        for b, y, x in itertools.product(range(2), range(2), range(4)):
            adapted = adapt_by_hand(head.discriminator, image[b, :, y, x])
            wanted = -by_hand(
                head.discriminator,
                adapted,
                mean=norm.running_mean.tolist(),
                variance=norm.running_var.tolist(),
            )
            assert scores[b, y, x].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_the_loss_is_the_truncated_l1_of_normal_and_noised_patches():
    data = normals(random(3, 4, 2, 2, seed=3))
    head = begun(data, margin=0.3, noise=0.7)
    (stage,) = head.stages(data)
    stage.module.train()
    with torch.no_grad():
        loss = stage.loss(data.features.features, None, generator=seeded(4), training=True)["loss"].item()

        patches = [data.features.features[b, :, y, x] for b in range(3) for y in range(2) for x in range(2)]
        normal = torch.tensor([adapt_by_hand(head.discriminator, patch) for patch in patches])
        noised = normal + 0.7 * random(12, 4, seed=4)
        inner = torch.cat([normal, noised]) @ head.discriminator.hidden.weight.T
        statistics = {"mean": inner.mean(0).tolist(), "variance": inner.var(0, unbiased=False).tolist()}
        wanted = 0.0
        for patch in normal.tolist():
            wanted += max(0, 0.3 - by_hand(head.discriminator, patch, **statistics)) / 12
        for patch in noised.tolist():
            wanted += max(0, 0.3 + by_hand(head.discriminator, patch, **statistics)) / 12
    assert loss == pytest.approx(wanted, rel=1e-4)


def test_the_adaptor_learns_at_half_the_rate():
    data = normals(torch.randn(4, 3, 2, 2))
    (stage,) = begun(data, learning_rate=0.04).stages(data)
    adaptor, rest = stage.optimiser().param_groups
    assert (adaptor["lr"], rest["lr"]) == (0.02, 0.04)
    assert adaptor["weight_decay"] == rest["weight_decay"] == 1e-5
    assert [tuple(p.shape) for p in adaptor["params"]] == [(3, 3), (3,)]
    assert len(adaptor["params"]) + len(rest["params"]) == len(list(stage.module.parameters()))


def test_it_learns_where_normal_patches_lie():
    """Normal patches lie near a line; after training, patches off the line score higher."""
    along = random(20, 1, 4, 4, seed=5)
    normal = torch.cat([along, along], dim=1) + 0.02 * random(20, 2, 4, 4, seed=6)
    data = normals(normal)
    head = begun(data, hidden=64, epochs=60, learning_rate=3e-3)
    (stage,) = head.stages(data)
    history = train(stage, data, device="cpu")
    assert history.best_loss < 0.8 * history.holdout_losses[0]
    off = normal[:5] + torch.tensor([0.8, -0.8]).view(2, 1, 1)
    higher = head(off).scores.flatten()[:, None] > head(normal[:5]).scores.flatten()[None]
    assert higher.float().mean() > 0.9  # a path of sixty epochs is not the same for every number of threads


def test_another_seed_begins_with_other_weights_and_the_same_one_with_the_same():
    features = torch.randn(4, 3, 2, 2)
    one, same, other = (begun(normals(features, seed=seed)).state() for seed in (0, 0, 1))
    assert torch.equal(one["discriminator.hidden.weight"], same["discriminator.hidden.weight"])
    assert not torch.equal(one["discriminator.hidden.weight"], other["discriminator.hidden.weight"])
