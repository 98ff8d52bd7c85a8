"""Adapted-MoE as released against its equations, one number at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

from builders import begun, fit, normals, perturb, quick_training, random, seeded, subclass_images, subclass_normals
from normweave.config import AdaptedMoEReleasedConfig
from normweave.heads.adapted_moe.released import AdaptedMoEReleased, draw
from normweave.heads.novelty import block_statistics

SHAPE = (4, 2, 3)


def data(count=6, **fields):
    labels = {"subclasses": np.arange(count) % 3, "names": ("a", "b", "c")}
    return normals(random(count, *SHAPE, seed=1), **labels | fields)


def new(given, **settings):
    config = AdaptedMoEReleasedConfig(**{"hidden": 5, "training": quick_training(epochs=2)} | settings)
    return AdaptedMoEReleased(config, shape=given.features.shape)


def fitted(given, **settings):
    head = fit(new(given, **settings), given)
    perturb(head.network)
    head.finish(given)
    return head


def unit(vector):
    length = math.sqrt(sum(value**2 for value in vector))
    return [value / length for value in vector]


def project(network, patch):
    weight = network.projection.weight[:, :, 0, 0].tolist()
    return [
        sum(a * x for a, x in zip(row, patch, strict=True)) + bias
        for row, bias in zip(weight, network.projection.bias.tolist(), strict=True)
    ]


def patches_of(image):
    return [image[:, y, x].tolist() for y, x in itertools.product(range(SHAPE[1]), range(SHAPE[2]))]


def discriminate(experts, k, patch, *, mean, variance):
    """D_k of a patch for given statistics of the batch norm's input."""
    total = 0.0
    for unit_number, row in enumerate(experts.weight[k].tolist()):
        hidden = sum(w * x for w, x in zip(row, patch, strict=True)) + experts.bias[k, unit_number].item()
        standard = (hidden - mean[unit_number]) / math.sqrt(variance[unit_number] + 1e-5)
        scaled = standard * experts.gain[k, unit_number].item() + experts.shift[k, unit_number].item()
        total += experts.readout[k, unit_number].item() * (scaled if scaled > 0 else 0.2 * scaled)
    return total


def log_probabilities(network, patch):
    logits = [sum(w * z for w, z in zip(row, patch, strict=True)) for row in network.router.tolist()]
    total = sum(math.exp(logit) for logit in logits)
    return [logit - math.log(total) for logit in logits]


def score_by_hand(head, image, given, *, excluded=-1):
    """Scores of the patches of one image, and the expert, for top_k = 1."""
    network = head.network
    z = [unit(project(network, patch)) for patch in patches_of(image)]
    routed = np.mean([log_probabilities(network, patch) for patch in z], axis=0)
    if excluded >= 0:
        routed[excluded] = -math.inf
    k = int(routed.argmax())
    own = [
        unit(project(network, patch))
        for row in np.flatnonzero(given.subclasses == k)
        for patch in patches_of(given.features.features[row])
    ]
    centre, std = np.mean(own, axis=0), np.std(own, axis=0)
    adapted = [unit((np.array(patch) - np.mean(z, axis=0)) / np.std(z, axis=0) * std + centre) for patch in z]
    experts = network.experts
    mean, variance = experts.running_mean[k].tolist(), experts.running_variance[k].tolist()
    return [-discriminate(experts, k, patch, mean=mean, variance=variance) for patch in adapted], k


@pytest.mark.parametrize("without", ["none", "the nearest expert"])
def test_an_image_is_routed_adapted_and_scored_by_one_expert(without):
    given = data()
    head = fitted(given)
    images = random(3, *SHAPE, seed=2)
    nearest = head(images).routing.subclass
    excluded = torch.full((3,), -1) if without == "none" else nearest
    out = head.score_excluding(images, excluded)
    assert torch.equal(out.routing.subclass, nearest) == (without == "none")
    for row, image in enumerate(images):
        expected, expert = score_by_hand(head, image, given, excluded=int(excluded[row]))
        assert out.scores[row].flatten().tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert out.image_scores[row].item() == pytest.approx(max(expected), rel=1e-3, abs=1e-4)
        assert out.routing.subclass[row] == expert
        assert out.routing.weights[row].tolist() == [float(k == expert) for k in range(3)]
    assert out.routing.adapted.all()


def test_the_distance_is_that_to_the_nearest_subclass_that_is_not_excluded():
    head = fitted(data())
    images = random(3, *SHAPE, seed=2)
    distances = head.novelty(block_statistics(images))  # (B, K)
    nearest, second = distances.sort(dim=1).values.T[:2]
    assert torch.equal(head(images).routing.distance, nearest)
    assert torch.equal(head.score_excluding(images, distances.argmin(dim=1)).routing.distance, second)


def test_several_experts_are_weighed_by_their_probabilities():
    given = data()
    head = fitted(given, top_k=2)
    images = random(2, *SHAPE, seed=2)
    out = head(images)
    with torch.no_grad():
        probabilities = head.network.log_probabilities(head.network(images)).mean(dim=(2, 3)).exp()  # (B, K)
    for row, image in enumerate(images):
        first, second = probabilities[row].argsort(descending=True)[:2].tolist()
        one, _ = score_by_hand(head, image, given)
        two, expert = score_by_hand(head, image, given, excluded=first)
        assert expert == second
        share = (probabilities[row, first] / probabilities[row, [first, second]].sum()).item()
        expected = [share * a + (1 - share) * b for a, b in zip(one, two, strict=True)]
        assert out.scores[row].flatten().tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert out.routing.weights[row, [first, second]].tolist() == pytest.approx([share, 1 - share], rel=1e-4)


def test_the_loss_is_the_hinge_of_the_own_expert_and_the_nll_of_every_patch():
    given = data(count=4, subclasses=np.array([0, 2, 2, 1]))
    head = begun(new(given, margin=0.3, noise=0.7), given)
    network = perturb(head.network)
    (stage,) = head.stages(given)
    features, own = given.features.features[:3], given.subclasses[:3]  # without an image of the second expert
    with torch.no_grad():
        terms = stage.loss(features, torch.from_numpy(own), generator=seeded(4), training=True)
        noise = 0.7 * random(3, *SHAPE, seed=4)
        hinge = nll = 0.0
        for k in (0, 2):
            normal, noised = [], []
            for row in np.flatnonzero(own == k):
                for patch, added in zip(patches_of(features[row]), patches_of(noise[row]), strict=True):
                    q = project(network, patch)
                    normal.append(unit(q))
                    noised.append(unit([a + b for a, b in zip(q, added, strict=True)]))
            inner = torch.tensor(normal + noised) @ network.experts.weight[k].T + network.experts.bias[k]
            batch = {"mean": inner.mean(0).tolist(), "variance": inner.var(0, unbiased=False).tolist()}
            hinge += sum(max(0, 0.3 - discriminate(network.experts, k, patch, **batch)) for patch in normal)
            hinge += sum(max(0, 0.3 + discriminate(network.experts, k, patch, **batch)) for patch in noised)
            nll -= sum(log_probabilities(network, patch)[k] for patch in normal)
    assert terms["hinge"].item() == pytest.approx(hinge / 18, rel=1e-4)
    assert terms["routing"].item() == pytest.approx(nll / 18, rel=1e-4)
    assert terms["loss"].item() == pytest.approx((hinge + nll) / 18, rel=1e-4)


def test_a_step_uses_patches_drawn_of_each_image():
    images = torch.arange(3.0).view(3, 1, 1, 1) * 10 + torch.arange(8.0).view(2, 4)
    drawn = draw(images, 5, seeded(1))
    assert drawn.shape == (3, 1, 5, 1)
    for image, patches in enumerate(drawn.flatten(1).tolist()):
        assert len(set(patches)) == 5
        assert set(patches) < set(images[image].flatten().tolist())
    assert len({tuple(patches) for patches in (drawn.flatten(1) % 10).tolist()}) == 3
    assert draw(images, 8, seeded(1)) is images

    given = data()
    (stage,) = begun(new(given, patches=2), given).stages(given)
    losses = [
        stage.loss(given.features.features, torch.from_numpy(given.subclasses), generator=generator, training=False)
        for generator in (seeded(1), seeded(1), seeded(2))
    ]
    assert losses[0]["routing"] == losses[1]["routing"] != losses[2]["routing"]


def test_projection_router_and_experts_are_trained_in_one_stage():
    given = data()
    head = begun(new(given, accumulate=3, training=quick_training(learning_rate=0.02)), given)
    (stage,) = head.stages(given)
    projection, router, experts = stage.optimiser().param_groups
    assert (projection["lr"], router["lr"], experts["lr"]) == (0.01, 0.1, 0.02)
    assert [tuple(p.shape) for p in projection["params"] + router["params"]] == [(4, 4, 1, 1), (4,), (3, 4)]
    assert len(experts["params"]) + 3 == len(list(stage.module.parameters()))
    assert (stage.accumulate, stage.final_rate) == (3, 0)
    stage.loss(given.features.features, torch.from_numpy(given.subclasses), generator=seeded(), training=True)[
        "loss"
    ].backward()
    assert all(parameter.grad.any() for parameter in stage.module.parameters())


def test_the_statistics_of_an_expert_are_those_of_patches_drawn_of_its_images():
    given = subclass_normals(count=12, shape=(4, 12, 12))
    head = fit(new(given), given)
    with torch.no_grad():
        z = head.network(given.features.features)  # 144 patches an image, of which 100 are drawn
    every = torch.stack([z[given.subclasses == k].mean(dim=(0, 2, 3)) for k in range(3)])
    assert not torch.allclose(head.adaption.centres, every, atol=1e-6)
    torch.testing.assert_close(head.adaption.centres, every, atol=0.1, rtol=0)


def test_the_embedding_is_the_mean_patch():
    given = data()
    head = fitted(given)
    image = random(1, *SHAPE, seed=3)
    expected = np.mean([unit(project(head.network, patch)) for patch in patches_of(image[0])], axis=0)
    assert head.embed(image)[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_images_of_known_subclasses_are_routed_to_them():
    head = fit(AdaptedMoEReleased(AdaptedMoEReleasedConfig(hidden=16), shape=(16, 8, 8)), subclass_normals())
    images, subclasses = subclass_images(6, seed=3)
    assert head(images).routing.subclass.tolist() == subclasses.tolist()


def test_without_labels_there_is_one_expert():
    given = data(subclasses=np.full(6, -1), names=())
    head = fit(new(given), given)
    assert head.subclass_names == ("all",)
    assert not head.can_exclude
    images = random(2, *SHAPE, seed=2)
    assert torch.equal(head.score_excluding(images, torch.zeros(2, dtype=torch.int64)).scores, head(images).scores)
