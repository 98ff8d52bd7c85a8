import math

import pytest
import torch

from builders import random
from normweave.heads.cnc.constraint import (
    JointSpace,
    distances,
    distillation,
    margin,
    promotion,
    prompt_loss,
    state_logits,
)
from normweave.types import JointMaps

DIMS = (2, 3, 4)
B, N, J, P, NORMAL, TAU = 2, 3, 5, 5, 2, 0.3


def levels(seed=0):
    return [random(B, N, D, seed=seed + level) for level, D in enumerate(DIMS)]


def space(*, layer_norm):
    joint = JointSpace(dims=DIMS)
    maps = JointMaps(
        weights=tuple(random(D, J, seed=20 + D) for D in DIMS),
        biases=tuple(random(J, seed=30 + D) for D in DIMS),
        layer_norm=layer_norm,
    )
    mean, std = random(sum(DIMS), seed=40), random(sum(DIMS), seed=41).exp()
    joint.fit(maps, mean=mean, std=std)
    return joint, maps, mean, std


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2], [1, 0]])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_joint_space_by_hand(layer_norm, chosen):
    """Raw scale, optional layer norm, W and b, length one."""
    joint, maps, mean, std = space(layer_norm=layer_norm)
    tokens = levels()

    got = joint(tokens, chosen)

    assert got.shape == (B, len(chosen), N, J)
    for index, level in enumerate(chosen):
        first = sum(DIMS[:level])
        for b in range(B):
            for n in range(N):
                raw = [
                    tokens[level][b, n, d].item() * std[first + d].item() + mean[first + d].item()
                    for d in range(DIMS[level])
                ]
                if layer_norm:
                    token_mean = sum(raw) / len(raw)
                    token_std = math.sqrt(sum((x - token_mean) ** 2 for x in raw) / len(raw) + 1e-5)
                    raw = [(x - token_mean) / token_std for x in raw]
                W, bias = maps.weights[level], maps.biases[level]
                j = [sum(raw[d] * W[d, k].item() for d in range(len(raw))) + bias[k].item() for k in range(J)]
                length = math.sqrt(sum(x * x for x in j))
                assert got[b, index, n].tolist() == pytest.approx([x / length for x in j], rel=1e-3, abs=1e-4)


def test_the_joint_space_has_no_parameters_but_passes_gradients():
    joint, *_ = space(layer_norm=True)
    tokens = [level.requires_grad_() for level in levels()]
    joint(tokens, [0, 1, 2])[..., 0].sum().backward()
    assert list(joint.parameters()) == []
    assert all(level.grad.abs().sum() > 0 for level in tokens)


def test_the_joint_space_copies_mean_and_std():
    joint, _, mean, std = space(layer_norm=False)
    before = joint(levels(), [0])
    mean.zero_()
    std.zero_()
    assert torch.equal(joint(levels(), [0]), before)


def similarity(seed=1):
    return torch.tanh(random(B, 2, N, P, seed=seed))  # (B, L, N, P)


def states_by_hand(cosines):
    """The softmax over all prompts, summed over those of each state."""
    exponentials = [math.exp(s / TAU) for s in cosines]
    total = sum(exponentials)
    return sum(exponentials[:NORMAL]) / total, sum(exponentials[NORMAL:]) / total


def flat(cosines):
    return cosines.reshape(-1, P).tolist()


def test_the_likelihood_of_a_state_is_the_sum_over_its_prompts():
    given = similarity()
    found = state_logits(given, normal=NORMAL, temperature=TAU).softmax(-1).reshape(-1, 2)
    for row, got in zip(flat(given), found.tolist(), strict=True):
        assert got == pytest.approx(states_by_hand(row), rel=1e-4)


def test_the_margin_is_the_log_odds_of_abnormal():
    given = similarity()
    found = margin(given, normal=NORMAL, temperature=TAU)
    assert found.shape == (B, 2, N)
    for row, got in zip(flat(given), found.flatten().tolist(), strict=True):
        normal, abnormal = states_by_hand(row)
        assert got == pytest.approx(math.log(abnormal / normal), rel=1e-4, abs=1e-5)


def test_the_margin_is_finite_at_the_papers_temperature():
    extremes = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]])
    assert margin(extremes, normal=NORMAL, temperature=0.001).item() == pytest.approx(
        -2000, abs=1
    )  # plus log 3/2, which is small against 2 / 0.001


def test_distances_are_1_minus_the_cosine_at_each_position_of_each_level():
    encoded, decoded = levels(), levels(seed=10)
    found = distances(encoded, decoded)
    assert found.shape == (B, 3, N)
    for level in range(3):
        for b in range(B):
            for n in range(N):
                E, D = encoded[level][b, n].tolist(), decoded[level][b, n].tolist()
                dot = sum(x * y for x, y in zip(E, D, strict=True))
                lengths = math.sqrt(sum(x * x for x in E) * sum(y * y for y in D))
                assert found[b, level, n].item() == pytest.approx(1 - dot / lengths, abs=1e-5)


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_prompt_loss_is_two_cross_entropies(synthetic):
    normal, abnormal = similarity(1), similarity(2)[:1]  # fewer anomalous cells than normal ones
    loss = prompt_loss(normal, abnormal if synthetic else None, normal=NORMAL, temperature=TAU)
    of_normal = [-math.log(states_by_hand(row)[0]) for row in flat(normal)]
    expected = sum(of_normal) / len(of_normal)
    if synthetic:
        of_abnormal = [-math.log(states_by_hand(row)[1]) for row in flat(abnormal)]
        expected += sum(of_abnormal) / len(of_abnormal)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_distillation_is_the_mean_difference_of_similarities():
    encoded, decoded = similarity(1), similarity(2)
    pairs = list(zip(encoded.flatten().tolist(), decoded.flatten().tolist(), strict=True))
    expected = sum(abs(d - e) for e, d in pairs) / len(pairs)
    assert distillation(encoded, decoded).item() == pytest.approx(expected, rel=1e-5)
    assert distillation(encoded, encoded).item() == 0


def test_the_gradient_of_distillation_moves_decoded_towards_encoded_patches():
    encoded, decoded = similarity(1), similarity(2).requires_grad_()
    distillation(encoded, decoded).backward()
    assert torch.equal(decoded.grad.sign(), (decoded - encoded).sign())


def test_promotion_is_the_cross_entropy_to_the_normal():
    decoded = similarity()
    expected = [-math.log(states_by_hand(row)[0]) for row in flat(decoded)]
    got = promotion(decoded, normal=NORMAL, temperature=TAU)
    assert got.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_gradient_of_promotion_moves_decoded_patches_towards_normal_prompts():
    decoded = similarity().requires_grad_()
    promotion(decoded, normal=NORMAL, temperature=TAU).backward()
    assert (decoded.grad[..., :NORMAL] < 0).all()
    assert (decoded.grad[..., NORMAL:] > 0).all()
