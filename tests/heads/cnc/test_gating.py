import math

import pytest
import torch

from builders import random, seeded
from normweave.config import GatingConfig
from normweave.heads.cnc.gating import Gate, GatedExperts, balance

D, E = 4, 5


def gate(*, top_k=2, seed=0):
    fresh = Gate(GatingConfig(experts=E, top_k=top_k), width=D)
    with torch.no_grad():
        fresh.gate.normal_(generator=seeded(seed))
        fresh.noise.normal_(generator=seeded(seed + 1))
    return fresh


def experts(*, top_k=2, seed=0):
    """All weights random, biases too."""
    fresh = GatedExperts(GatingConfig(experts=E, top_k=top_k), width=D)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_(generator=generator)
    return fresh


def tokens(*shape, seed=2):
    return random(*shape, D, seed=seed)


def softplus(x):
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_agrees_with_equations_3_to_5(top_k, noisy):
    """H = t W_g + eps softplus(t W_noise); all but the k highest become -inf; then a softmax."""
    net, inputs = gate(top_k=top_k), tokens(6)
    eps = random(6, E, seed=3)

    weights, logits = net(inputs, generator=seeded(3) if noisy else None)

    Wg, Wn = net.gate.tolist(), net.noise.tolist()
    for row, t in enumerate(inputs.tolist()):
        H = []
        for e in range(E):
            clean = sum(t[d] * Wg[d][e] for d in range(D))
            spread = softplus(sum(t[d] * Wn[d][e] for d in range(D)))
            H.append(clean + eps[row, e].item() * spread if noisy else clean)
        kept = sorted(range(E), key=lambda e: -H[e])[:top_k]
        total = sum(math.exp(H[e]) for e in kept)
        assert logits[row].tolist() == pytest.approx(H, rel=1e-4, abs=1e-5)
        expected = [math.exp(H[e]) / total if e in kept else 0.0 for e in range(E)]
        assert weights[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_noise_is_normal_with_the_std_of_the_softplus():
    net, one = gate(), tokens(1)
    _, clean = net(one)

    _, noisy = net(one.expand(20_000, -1), generator=seeded())

    spread = [softplus(x) for x in (one @ net.noise)[0].tolist()]
    assert noisy.std(0).tolist() == pytest.approx(spread, rel=0.05)
    assert noisy.mean(0).tolist() == pytest.approx(clean[0].tolist(), abs=0.05)


def test_without_a_generator_there_is_no_noise():
    net, inputs = gate(), tokens(7)
    first = net(inputs)
    with torch.no_grad():
        net.noise.fill_(100.0)
    for one, other in zip(first, net(inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_weights_of_a_token_add_up_to_1_and_k_are_nonzero(top_k):
    weights, _ = gate(top_k=top_k)(tokens(50), generator=seeded())
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert (weights >= 0).all()
    assert ((weights > 0).sum(1) == top_k).all()


def test_logits_have_32_bits_under_autocast():
    net, inputs = gate(), tokens(9)
    exact = net(inputs, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(inputs, generator=seeded())
    for one, other in zip(exact, cast, strict=True):
        assert torch.equal(one, other)


def test_balance_agrees_with_equations_4_to_6():
    """E sum_e f_e p_e - 1: f_e counted, p_e averaged, token by token."""
    weights, logits = gate(top_k=2)(tokens(7))

    used, probability = [0] * E, [0.0] * E
    for row in range(7):
        exponentials = [math.exp(x) for x in logits[row].tolist()]
        for e in range(E):
            used[e] += weights[row, e].item() > 0
            probability[e] += exponentials[e] / sum(exponentials) / 7
    expected = E * sum(used[e] / (7 * 2) * probability[e] for e in range(E)) - 1
    assert balance(weights, logits).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_balance_is_0_for_equal_use_and_highest_for_a_single_expert():
    even = 20.0 * torch.eye(E).repeat(3, 1)
    assert balance(even.softmax(1) * (even > 0), even).item() == pytest.approx(0, abs=1e-6)
    one = torch.zeros(6, E)
    one[:, 2] = 40.0
    assert balance((one > 0).float(), one).item() == pytest.approx(E - 1)


def test_the_gradient_of_balance_lowers_the_logits_of_the_most_used_expert():
    net = Gate(GatingConfig(experts=E, top_k=1), width=D)
    inputs = torch.ones(8, D)
    with torch.no_grad():
        net.gate[:, 3] = 0.1
    balance(*net(inputs)).backward()
    assert (net.gate.grad[:, 3] > 0).all()  # a step goes down
    assert (net.gate.grad[:, [0, 1, 2, 4]] < 0).all()


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_results_and_gradients_equal_a_loop_over_tokens_and_experts(top_k):
    """With gradients, where tokens are routed, and without, where all experts process all tokens."""
    net, inputs = experts(top_k=top_k), tokens(2, 3)

    mixed, _ = net(inputs)
    with torch.no_grad():
        dense, _ = net(inputs)

    by_hand = torch.zeros(2, 3, D)
    gain, offset = net.norm.weight, net.norm.bias
    for b in range(2):
        for n in range(3):
            z = inputs[b, n]
            t = (z - z.mean()) / (z.var(unbiased=False) + net.norm.eps).sqrt() * gain + offset
            H = t @ net.gate.gate
            kept = H.argsort(descending=True)[:top_k]
            shares = [(H[e] - H[kept].logsumexp(0)).exp() for e in kept]
            expected = z.clone()
            for share, e in zip(shares, kept, strict=True):
                hidden = t @ net.weight_in[e] + net.bias_in[e, 0]
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
                expected = expected + share * (hidden @ net.weight_out[e] + net.bias_out[e, 0])
            by_hand[b, n] = expected
    torch.testing.assert_close(mixed, by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense, by_hand, rtol=1e-4, atol=1e-4)
    trained = [parameter for name, parameter in net.named_parameters() if name != "gate.noise"]
    for found, wanted in zip(*(torch.autograd.grad(z.square().sum(), trained) for z in (mixed, by_hand)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def test_a_token_does_not_depend_on_the_other_images():
    net, inputs = experts(), tokens(5, 4)
    together = net(inputs).tokens
    for row in range(5):
        torch.testing.assert_close(net(inputs[row : row + 1]).tokens[0], together[row], rtol=1e-4, atol=1e-5)


def test_gradient_reaches_gate_noise_and_experts_in_training():
    net = experts()
    mixed, uneven = net(tokens(4, 9), generator=seeded())
    (mixed.square().mean() + uneven).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_without_a_generator_the_noise_has_no_gradient():
    net = experts()
    net(tokens(4, 9)).tokens.sum().backward()
    assert net.gate.noise.grad is None


def test_new_weights_come_from_the_generator_and_experts_differ():
    def fresh(seed):
        net = experts(seed=9)
        net.start(seeded(seed))
        return net

    first, again, other = fresh(0), fresh(0), fresh(1)
    assert torch.equal(first.weight_in, again.weight_in)
    assert not torch.equal(first.weight_in, other.weight_in)
    assert not torch.equal(first.weight_in[0], first.weight_in[1])
    assert not first.gate.noise.any()  # as in the paper: equal noise for all experts
    assert first.gate.gate.std().item() == pytest.approx(0.02, rel=0.5)
