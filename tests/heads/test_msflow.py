import math

import numpy as np
import pytest
import torch

from builders import begun, normals, perturb, quick_training, random, seeded
from normweave.config import MSFlowConfig
from normweave.errors import ConfigError
from normweave.heads.msflow import Coupling, Fusion, MSFlow, ScaleFlows, position_encoding, relative
from normweave.training import train


def new(data, *, dims=(), **settings):
    config = MSFlowConfig(
        **{"blocks": 1, "further_blocks": 1, "position": 4, "training": quick_training(), "border": 0} | settings
    )
    return begun(MSFlow(config, shape=data.features.shape, dims=dims), data)


def numeric_log_determinant(function, tensors):
    """log |det| of the Jacobian of a function of several tensors of one image, by autograd."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double()

    def of_flat(numbers):
        parts = [part.view(tensor.shape) for part, tensor in zip(numbers.split(sizes), tensors, strict=True)]
        return torch.cat([out.flatten() for out in function(parts)])

    return torch.linalg.slogdet(torch.autograd.functional.jacobian(of_flat, flat)).logabsdet.item()


def test_a_coupling_is_its_equation():
    """y = R [g [x1, x2 exp(alpha tanh s) + t] + b], one number at a time."""
    coupling = Coupling(width=5, condition=2, clamp=1.9)
    coupling.start(seeded(1))
    perturb(coupling)
    x, condition = random(2, 5, 3, 4, seed=2), random(2, 2, 3, 4, seed=3)
    with torch.no_grad():
        y, log_determinant = coupling(x, condition)
        parameters = 0.1 * coupling.subnet(torch.cat([x[:, :3], condition], dim=1))
        for b in range(2):
            total = 0.0
            changed = torch.empty(5, 3, 4)
            for c in range(5):
                g = 0.1 * 2 * math.log(1 + math.exp(coupling.scale[c].item() / 2))
                for i in range(3):
                    for j in range(4):
                        value = x[b, c, i, j].item()
                        if c >= 3:
                            s = 1.9 * math.tanh(parameters[b, c - 3, i, j].item())
                            value = value * math.exp(s) + parameters[b, 2 + c - 3, i, j].item()
                            total += s
                        changed[c, i, j] = g * value + coupling.offset[c].item()
                        total += math.log(g)
            assert log_determinant[b].item() == pytest.approx(total, rel=1e-4)
            for c, source in enumerate(coupling.order.tolist()):
                torch.testing.assert_close(y[b, c], changed[source], rtol=1e-4, atol=1e-5)


def test_a_coupling_equals_that_of_freia():
    """FrEIA is the library that the paper uses; it gets our weights."""
    modules = pytest.importorskip("FrEIA.modules")
    coupling = Coupling(width=7, condition=4, clamp=1.9)
    coupling.start(seeded(1))
    perturb(coupling)
    block = modules.AllInOneBlock(
        [(7, 3, 3)],
        dims_c=[(4, 3, 3)],
        subnet_constructor=lambda given, out: coupling.subnet,
        affine_clamping=1.9,
        global_affine_type="SOFTPLUS",
    )
    with torch.no_grad():
        block.global_scale.copy_(coupling.scale[None])
        block.global_offset.copy_(coupling.offset[None])
        block.w_perm.copy_(torch.eye(7)[coupling.order][..., None, None])
        x, condition = random(3, 7, 3, 3, seed=2), random(3, 4, 3, 3, seed=3)
        (expected,), expected_log_determinant = block([x], [condition])
        outputs, log_determinant = coupling(x, condition)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(log_determinant, expected_log_determinant)


def test_a_new_coupling_is_close_to_a_permutation():
    coupling = Coupling(width=6, condition=4, clamp=1.9)
    coupling.start(seeded(1))
    assert (0.1 * torch.nn.functional.softplus(coupling.scale, beta=0.5)).sub(1).abs().max() < 1e-5
    assert sorted(coupling.order.tolist()) == list(range(6))
    assert coupling.order.tolist() != list(range(6))


def test_the_log_determinant_of_the_fusion_is_that_of_its_jacobian():
    torch.manual_seed(0)  # its convolutions are drawn by torch, unless a whole MSFlow starts them
    fusion = Fusion(dims=[3, 4], clamp=1.9)
    fusion.start(seeded(1))
    perturb(fusion).double()
    levels = [random(1, 3, 4, 3, seed=2), random(1, 4, 2, 1, seed=3)]
    expected = numeric_log_determinant(lambda parts: fusion(parts)[0], levels)
    got = fusion([level.double() for level in levels])[1].item()
    assert abs(expected) > 0.1
    assert got == pytest.approx(expected, rel=1e-6)


def test_levels_influence_each_other_only_in_the_fusion():
    flows = ScaleFlows(MSFlowConfig(blocks=1, further_blocks=1, position=4), dims=[4, 4], grid=(4, 4))
    flows.start(seeded(1))
    perturb(flows)
    levels = [random(1, 4, 4, 4, seed=2), random(1, 4, 2, 2, seed=3)]
    other = [levels[0], levels[1] + 1]
    with torch.no_grad():
        before, after = flows(levels).latents[0], flows(other).latents[0]
        assert (before - after).abs().max() > 1e-3
        flows.fusion.forward = lambda latents: (latents, torch.zeros(1))
        assert torch.equal(flows(levels).latents[0], flows(other).latents[0])


def test_the_log_determinant_of_the_whole_flow_is_that_of_its_jacobian():
    flows = ScaleFlows(MSFlowConfig(blocks=2, further_blocks=1, position=4), dims=[2, 3], grid=(3, 4))
    flows.start(seeded(1))
    perturb(flows).double()
    levels = [random(1, 2, 3, 4, seed=2), random(1, 3, 1, 2, seed=3)]
    expected = numeric_log_determinant(lambda parts: flows(parts).latents, levels)
    got = flows([level.double() for level in levels]).log_determinant.item()
    assert got == pytest.approx(expected, rel=1e-6)


def test_coarser_levels_have_more_blocks_and_smaller_grids():
    head = new(normals(random(5, 9, 8, 12, seed=1)), dims=(2, 3, 4), blocks=2, further_blocks=3)  # the paper's 2, 5, 8
    assert [len(blocks) for blocks in head.flow.parallel] == [2, 5, 8]
    features = random(1, 9, 8, 12, seed=2)
    levels = head.levels(features)
    assert [tuple(level.shape[1:]) for level in levels] == [(2, 8, 12), (3, 4, 6), (4, 2, 3)]
    assert torch.equal(levels[0], features[:, :2])
    assert levels[2][0, 3, 1, 2].item() == pytest.approx(features[0, 8, 4:8, 8:12].mean().item(), abs=1e-6)


def test_positions_are_encoded_by_sines_and_cosines():
    encoding = position_encoding(8, 3, 5)
    for k in range(2):
        frequency = 10000 ** (-2 * k / 4)
        for row in range(3):
            for column in range(5):
                expected = [
                    math.sin(column * frequency),
                    math.cos(column * frequency),
                    math.sin(row * frequency),
                    math.cos(row * frequency),
                ]
                got = [encoding[channel + 2 * k, row, column].item() for channel in (0, 1, 4, 5)]
                assert got == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_negative_log_likelihood():
    data = normals(random(3, 5, 4, 4, seed=1))
    head = new(data, dims=(2, 3))
    perturb(head.flow)
    (stage,) = head.stages(data)
    with torch.no_grad():
        loss = stage.loss(data.features.features, None, generator=seeded(), training=True)["loss"].item()
        total = 0.0
        for image in data.features.features:
            flowed = head.flow(head.levels(image[None]))
            for latent in flowed.latents:
                total += 0.5 * sum(value * value for value in latent.flatten().tolist())
            total -= flowed.log_determinant.item()
    assert loss == pytest.approx(total / 3 / (2 * 16 + 3 * 4), rel=1e-5)


def test_the_map_adds_likelihoods_and_the_image_score_multiplies_them():
    data = normals(random(5, 5, 4, 4, seed=1))
    head = new(data, dims=(2, 3), top=0.25)
    perturb(head.flow)
    image = random(1, 5, 4, 4, seed=2)
    out = head(image)
    with torch.no_grad():
        logs = [-0.5 * (z[0] ** 2).mean(0).numpy() for z in head.flow(head.levels(image)).latents]

    def up(grid):  # 2 x 2 to 4 x 4: bilinear weights 0.25 and 0.75, repeated at the edge
        if len(grid) == 4:
            return grid
        weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
        return weights @ grid @ weights.T

    added = sum(up(np.exp(log - log.max())) for log in logs)
    np.testing.assert_allclose(out.scores[0].numpy(), added.max() - added, rtol=1e-4, atol=1e-5)
    product = sum(up(log) for log in logs)
    worst = np.sort((1 - np.exp(product - product.max())).flatten())[-4:]
    assert out.image_scores.item() == pytest.approx(worst.mean(), rel=1e-4)


def test_likelihoods_are_relative_to_the_most_likely_cell_of_the_image():
    shares = relative(torch.tensor([[[0.0, -1.0]], [[-50.0, -51.0]]]))
    torch.testing.assert_close(shares, torch.tensor([[[1.0, math.exp(-1)]]]).expand(2, 1, 2))


def test_unlikely_patches_score_higher_after_training():
    """Both channels of a normal patch are nearly equal; in the anomalous patch they differ."""
    along = random(20, 1, 8, 8, seed=5)
    normal = torch.cat([along, along], dim=1) + 0.1 * random(20, 2, 8, 8, seed=6)
    data = normals(normal)
    head = new(data, dims=(2,), blocks=4, training=quick_training(epochs=30))
    (stage,) = head.stages(data)
    history = train(stage, data, device="cpu")
    assert history.best_loss < history.holdout_losses[0] - 0.3
    off = normal[:5].clone()
    off[:, :, 3, 4] += torch.tensor([1.5, -1.5])
    scores = head(off).scores
    assert (scores.flatten(1).argmax(1) == 3 * 8 + 4).all()


def test_levels_that_cannot_be_coupled_are_an_error():
    data = normals(random(5, 5, 4, 4, seed=1))
    for dims in ((2, 2), (1, 4)):
        with pytest.raises(ConfigError, match="must add up to 5 channels, with 2 or more each"):
            new(data, dims=dims)


def test_the_initial_weights_depend_on_the_seed():
    features = random(4, 4, 4, 4, seed=1)
    one, same, other = (new(normals(features, seed=seed), dims=(2, 2)).state() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["flow.parallel.0.0.subnet.first.weight"], other["flow.parallel.0.0.subnet.first.weight"])
