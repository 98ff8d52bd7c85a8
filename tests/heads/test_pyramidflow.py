import math

import numpy as np
import pytest
import torch

from builders import begun, normals, perturb, quick_training, random, seeded
from normweave.config import PyramidFlowConfig
from normweave.errors import ConfigError
from normweave.heads.pyramidflow import (
    LatentPyramid,
    NeighbourCoupling,
    PyramidFlow,
    blur,
    compose,
    decompose,
)
from normweave.training import train


def new(data, *, dims=(), **settings):
    config = PyramidFlowConfig(**{"levels": 3, "blocks": 2, "training": quick_training(), "border": 0} | settings)
    return begun(PyramidFlow(config, shape=data.features.shape, dims=dims), data)


def test_compose_inverts_decompose():
    features = random(2, 3, 7, 9, seed=1)
    pyramid = decompose(features, levels=4)
    assert [tuple(level.shape[2:]) for level in pyramid] == [(7, 9), (4, 5), (2, 3), (1, 2)]
    torch.testing.assert_close(compose(pyramid), features)
    assert torch.equal(decompose(features, levels=1)[0], features)


def test_a_level_holds_what_the_coarser_one_lacks():
    features = random(1, 1, 4, 4, seed=1)
    finest, coarsest = decompose(features, levels=2)
    blurred = blur(features)[0, 0]
    for i in range(2):
        for j in range(2):
            assert coarsest[0, 0, i, j] == blurred[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()
    blown_up = coarsest.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(finest, features - blur(blown_up))


def test_blurring_is_binomial_and_repeats_the_edge():
    grid = random(1, 2, 5, 6, seed=1)
    got = blur(grid)
    weights = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    for c in range(2):
        for i in range(5):
            for j in range(6):
                want = sum(
                    weights[a] * weights[b] * grid[0, c, min(max(i + a - 2, 0), 4), min(max(j + b - 2, 0), 5)].item()
                    for a in range(5)
                    for b in range(5)
                )
                assert got[0, c, i, j].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("volume", ["channel", "space"])
def test_a_coupling_is_its_equation(volume):
    """z = W (exp(s - mean s) x + t), with s clamped by an arctangent."""
    coupling = NeighbourCoupling(PyramidFlowConfig(volume=volume), width=3, neighbours=2)
    coupling.start(seeded(1))
    perturb(coupling)
    x, finer, coarser = (random(1, 3, 2, 4, seed=seed) for seed in (2, 3, 4))
    with torch.no_grad():
        z = coupling(x, [finer, coarser])
        parameters = coupling.second(torch.nn.functional.leaky_relu(coupling.first(torch.cat([finer, coarser], dim=1))))
        s = 2 * 0.636 * np.arctan(parameters[0, :3].numpy() / 2)
        mean = s.mean(axis=0) if volume == "channel" else s.mean(axis=(1, 2), keepdims=True)
        changed = np.exp(s - mean) * x[0].numpy() + parameters[0, 3:].numpy()
        lower = np.tril(coupling.lower.numpy(), -1) + np.eye(3)
        stretch = coupling.stretch.numpy()
        diagonal = coupling.sign.numpy() * np.exp(stretch - stretch.mean())
        upper = np.triu(coupling.upper.numpy(), 1) + np.diag(diagonal)
        mixing = coupling.permutation.numpy() @ lower @ upper
    want = np.einsum("ij,jhw->ihw", mixing, changed)
    np.testing.assert_allclose(z[0].numpy(), want, rtol=1e-4, atol=1e-5)
    assert abs(np.linalg.det(mixing)) == pytest.approx(1, rel=1e-4)


def test_a_new_coupling_is_a_rotation():
    coupling = NeighbourCoupling(PyramidFlowConfig(), width=4, neighbours=1)
    coupling.start(seeded(1))
    mixing = coupling.mixing().detach()
    torch.testing.assert_close(mixing @ mixing.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    x = random(1, 4, 3, 3, seed=2)
    want = torch.einsum("ij,bjhw->bihw", mixing, x)
    torch.testing.assert_close(coupling(x, [random(1, 4, 3, 3, seed=3)]).detach(), want)


@pytest.mark.parametrize("volume", ["channel", "space"])
def test_the_flow_preserves_volume(volume):
    """log |det| of the Jacobian of the couplings, by autograd, is 0 whatever the weights."""
    flow = LatentPyramid(PyramidFlowConfig(levels=3, blocks=2, volume=volume), width=2)
    flow.start(seeded(1))
    perturb(flow).double()
    pyramid = decompose(random(1, 2, 4, 4, seed=2).double(), levels=3)
    sizes = [level.numel() for level in pyramid]

    def coupled(flat):
        parts = zip(flat.split(sizes), pyramid, strict=True)
        return torch.cat([level.flatten() for level in flow.couple([p.view(like.shape) for p, like in parts])])

    flat = torch.cat([level.flatten() for level in pyramid])
    jacobian = torch.autograd.functional.jacobian(coupled, flat)
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(0, abs=1e-6)
    assert (jacobian - torch.eye(len(jacobian))).abs().max() > 0.1


def test_odd_levels_are_coupled_before_even_ones():
    flow = LatentPyramid(PyramidFlowConfig(levels=5, blocks=2), width=2)
    assert flow.steps == [1, 3, 0, 2, 4] * 2


def test_the_loss_is_the_spectrum_of_the_differences():
    data = normals(random(3, 2, 4, 4, seed=1))
    head = new(data)
    perturb(head.flow)
    (stage,) = head.stages(data)
    with torch.no_grad():
        loss = stage.loss(data.features.features, None, generator=seeded(), training=True)["loss"].item()
        latents = [head.flow(image[None]) for image in data.features.features]
        sizes = []
        for one, other in ((0, 1), (0, 2), (1, 2)):
            differences = [(a - b) ** 2 for a, b in zip(latents[one], latents[other], strict=True)]
            difference = compose(differences)[0].mean(0).tolist()
            for u in range(4):
                for v in range(4):
                    turned = sum(
                        difference[y][x] * complex(math.cos(angle), math.sin(angle))
                        for y in range(4)
                        for x in range(4)
                        for angle in (-2 * math.pi * (u * y + v * x) / 4,)
                    )
                    sizes.append(abs(turned))
    assert loss == pytest.approx(sum(sizes) / len(sizes), rel=1e-4)


def test_a_single_image_is_paired_with_its_mirror_image():
    data = normals(random(1, 2, 4, 4, seed=1))
    head = new(data)
    (stage,) = head.stages(data)
    image = data.features.features
    with torch.no_grad():
        alone, both = (
            stage.loss(images, None, generator=seeded(), training=True)["loss"]
            for images in (image, torch.cat([image, image.flip(3)]))
        )
    assert alone == both > 0


def test_the_template_is_the_mean_latent_and_the_score_the_distance_from_it():
    data = normals(random(20, 2, 5, 6, seed=1))
    head = new(data)
    perturb(head.flow)
    head.finish(data)
    image = random(1, 2, 5, 6, seed=2)
    with torch.no_grad():
        latents = [head.flow(one[None]) for one in data.features.features]
        differences = [
            (found - torch.stack([of[level] for of in latents]).mean(0)).abs()
            for level, found in enumerate(head.flow(image))
        ]
        want = compose(differences).mean(1)
    torch.testing.assert_close(head(image).scores, want, rtol=1e-4, atol=1e-5)
    assert data.features.largest_read <= 16


def test_only_the_finest_level_of_the_features_is_used():
    data = normals(random(6, 5, 4, 4, seed=1))
    head = new(data, dims=(2, 3))
    head.finish(data)
    image = random(1, 5, 4, 4, seed=2)
    other = image.clone()
    other[:, 2:] += 1
    assert torch.equal(head(image).scores, head(other).scores)
    with pytest.raises(ConfigError, match=r"widths \[2, 2\] must add up to 5 channels"):
        new(data, dims=(2, 2))


def test_training_makes_the_latents_of_normal_images_similar():
    """Normal images share a pattern in one channel, the other is noise; the anomaly breaks the pattern."""
    pattern = random(1, 1, 8, 8, seed=5)
    images = torch.cat([pattern.expand(20, -1, -1, -1), random(20, 1, 8, 8, seed=6)], dim=1)
    data = normals(images + 0.05 * random(20, 2, 8, 8, seed=7))
    head = new(data, training=quick_training(epochs=15))
    (stage,) = head.stages(data)
    history = train(stage, data, device="cpu")
    head.finish(data)
    assert history.best_loss < 0.7 * history.holdout_losses[0]
    off = data.features.features[:5].clone()
    off[:, 0, 3, 4] += 4
    rise = head(off).scores - head(data.features.features[:5]).scores
    assert (rise.flatten(1).argmax(1) == 3 * 8 + 4).all()
