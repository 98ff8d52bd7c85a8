import math

import numpy as np
import pytest
import torch

from builders import InMemory
from normweave.config import NetworkRoutingConfig, TrainingConfig
from normweave.heads.adapted_moe.router import Router, RouterStage, select_experts
from normweave.training import train
from normweave.types import FitData

D, C, K = 3, 4, 3


def router(*, stride=1, norm=True, alpha=0.5, centre_rate=0.5, subclasses=K, width=D, embedding=C, epochs=30):
    config = NetworkRoutingConfig(
        embedding=embedding,
        stride=stride,
        norm=norm,
        alpha=alpha,
        centre_rate=centre_rate,
        training=TrainingConfig(epochs=epochs, batch_images=4, learning_rate=1e-2),
    )
    fresh = Router(config, width=width)
    fresh.start(subclasses=subclasses, generator=torch.Generator().manual_seed(0))
    return fresh


def images(count, *, grid=(4, 5), seed=0):
    return torch.randn(count, D, *grid, generator=torch.Generator().manual_seed(seed))


def random_centres(seed=1):
    return torch.randn(K, C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_agrees_with_equation_1(stride, norm):
    """x = GAP(relu(W * X + b)), zeros beyond the edge, one position after the other; then x / |x|."""
    net = router(stride=stride, norm=norm)
    few = images(2)
    kernel, bias = net.kernel.detach().double().numpy(), net.bias.detach().double().numpy()

    embedded = net(few)

    for image, got in zip(few.double().numpy(), embedded, strict=True):
        padded = np.zeros((D, 6, 7))
        padded[:, 1:-1, 1:-1] = image
        places = []
        for row in range(0, 4, stride):
            for column in range(0, 5, stride):
                window = padded[:, row : row + 3, column : column + 3]
                places.append([max(0.0, (kernel[c] * window).sum() + bias[c]) for c in range(C)])
        x = np.array(places).mean(axis=0)
        if norm:
            x /= math.sqrt((x**2).sum())
        np.testing.assert_allclose(got.detach(), x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_agrees_with_equation_2(alpha):
    """alpha |x - c_y|^2 - (1 - alpha) log softmax_j(w_j . x)[y], averaged over the images."""
    net = router(alpha=alpha)
    net.centres = random_centres()
    embedded = torch.randn(5, C, generator=torch.Generator().manual_seed(2))
    own = torch.tensor([0, 2, 2, 1, 0])

    losses = net.losses(embedded, own)

    total = 0.0
    for x, y in zip(embedded.double().numpy(), own.tolist(), strict=True):
        centre = sum((x[c] - float(net.centres[y, c])) ** 2 for c in range(C))
        logits = [float(w.double() @ torch.from_numpy(x)) for w in net.classifier.detach()]
        softmax = math.exp(logits[y]) / sum(math.exp(logit) for logit in logits)
        total += alpha * centre - (1 - alpha) * math.log(softmax)
    assert losses["loss"].item() == pytest.approx(total / 5, rel=1e-5)


def test_centres_move_as_wen_et_al_say():
    """c_j -= rate * sum_{y = j} (c_j - x) / (1 + number with y = j); centres without an image stay."""
    net = router(centre_rate=0.7)
    net.centres = random_centres()
    before = net.centres.double().numpy().copy()
    embedded = torch.randn(3, C, generator=torch.Generator().manual_seed(2))

    net.move_centres(embedded, torch.tensor([0, 2, 0]))

    x = embedded.double().numpy()
    np.testing.assert_allclose(
        net.centres[0], before[0] - 0.7 * ((before[0] - x[0]) + (before[0] - x[2])) / 3, rtol=1e-5
    )
    np.testing.assert_allclose(net.centres[1], before[1])
    np.testing.assert_allclose(net.centres[2], before[2] - 0.7 * (before[2] - x[1]) / 2, rtol=1e-5)


def test_routes_by_the_cosine_to_the_centres():
    net = router(norm=False)
    net.centres = 3 * random_centres()
    few = images(2)

    similarity = net.similarity(few)

    for image in range(2):
        x = net(few)[image].detach().numpy()
        for k in range(K):
            c = net.centres[k].numpy()
            assert similarity[image, k].item() == pytest.approx((x @ c) / math.sqrt((x @ x) * (c @ c)), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_choice_is_a_softmax_of_which_the_best_are_kept_and_renormalised(top_k, temperature):
    similarity = torch.tensor([[0.2, 0.9, 0.5], [0.4, -0.3, 0.1]])

    choice = select_experts(similarity, temperature=temperature, top_k=top_k)

    for row, (weights, experts) in enumerate(zip(*choice, strict=True)):
        exponentials = [math.exp(value / temperature) for value in similarity[row].tolist()]
        softmax = [e / sum(exponentials) for e in exponentials]
        best = sorted(range(K), key=lambda k: -softmax[k])[:top_k]
        assert experts.tolist() == best
        kept = sum(softmax[k] for k in best)
        assert weights.tolist() == pytest.approx([softmax[k] / kept for k in best])
        assert weights.sum().item() == pytest.approx(1)


def stage(net):
    return RouterStage(net, assign=lambda features, given: given)


def one_loss(net, *, training):
    return stage(net).loss(images(6), torch.tensor([0, 1, 2, 0, 1, 2]), generator=torch.Generator(), training=training)


def test_gradient_reaches_convolution_and_classifier_but_not_the_centres():
    net = router(alpha=0.5)
    net.centres = random_centres()

    one_loss(net, training=True)["loss"].backward()

    assert {name for name, _ in net.named_parameters()} == {"kernel", "bias", "classifier"}
    for parameter in net.parameters():
        assert parameter.grad.abs().sum() > 0
    assert net.centres.grad is None
    assert not net.centres.requires_grad


def test_centres_move_in_training_only():
    net = router()
    net.centres = random_centres()
    before = net.centres.clone()

    one_loss(net, training=False)
    assert torch.equal(net.centres, before)

    one_loss(net, training=True)
    assert not torch.equal(net.centres, before)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_learns_to_route_subclasses_that_differ(alpha):
    """Subclasses that differ in where a channel is high, not in its mean: only a convolution separates them."""
    subclasses = np.arange(30) % K
    pattern = torch.zeros(K, D, 4, 5)
    pattern[0, :, ::2], pattern[1, :, :, ::2], pattern[2] = 2.0, 2.0, 1.0
    features = pattern[subclasses] + 0.3 * images(30)
    data = FitData(
        features=InMemory(features),
        subclasses=subclasses,
        names=("a", "b", "c"),
        groups=np.arange(30),
        holdout=np.arange(30) >= 24,
    )
    net = router(alpha=alpha, embedding=16, epochs=60)

    train(stage(net), data, device="cpu")

    assert (net.similarity(features[24:]).argmax(1).numpy() == subclasses[24:]).all()
