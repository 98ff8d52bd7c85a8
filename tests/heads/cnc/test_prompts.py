import math

import numpy as np
import pytest
import torch

from builders import (
    JOINT_DIM,
    TOKEN_DIM,
    WORD_DIM,
    InMemory,
    TinyText,
    normals,
    quick_training,
    random,
    seeded,
)
from normweave.config import PromptsConfig
from normweave.errors import MissingError
from normweave.features import minilm
from normweave.features.offline_pair import OfflineText, alignment
from normweave.heads.cnc.prompts import Guidance, Prompts, PromptStage
from normweave.heads.cnc.synthetic import SyntheticSampler
from normweave.training import train
from normweave.types import SyntheticAnomalies

NORMAL, ABNORMAL = ("flawless surface", "perfect"), ("damaged surface", "a deep crack", "a hole")
P = len(NORMAL) + len(ABNORMAL)
TAU = 0.1


def prompts(*, text=None, fixed=False, joint_dim=JOINT_DIM, seed=0, words=4):
    fresh = Prompts(PromptsConfig(context_words=words, normal_states=NORMAL, abnormal_states=ABNORMAL))
    fresh.start(text, joint_dim=joint_dim, random=fixed, generator=seeded(seed))
    return fresh


def guidance(*, text=None, seed=0):
    fresh = Guidance(words=3, state=NORMAL[0])
    return fresh, fresh.start(text, width=7, generator=seeded(seed))


@pytest.fixture(scope="module")
def text():
    return TinyText()


def test_with_a_text_every_prompt_is_the_context_and_a_state(text):
    net = prompts(text=text)
    outputs = net(text)
    assert net.learnt.shape == (4, WORD_DIM)
    assert outputs.shape == (P, JOINT_DIM)
    for row, state in enumerate((*NORMAL, *ABNORMAL)):  # the normal ones first
        torch.testing.assert_close(outputs[row], text.encode_prompts(net.learnt, [state])[0])
    assert net.normal == 2


def test_without_a_text_prompts_are_vectors_of_length_one():
    net = prompts()
    with torch.no_grad():
        net.learnt.mul_(torch.arange(1.0, P + 1)[:, None])
    assert net.learnt.shape == (P, JOINT_DIM)
    torch.testing.assert_close(net(None).norm(dim=1), torch.ones(P))


@pytest.mark.parametrize(("with_text", "fixed"), [(True, False), (False, False), (False, True)])
def test_prompts_are_learnable_unless_random(text, with_text, fixed):
    own = text if with_text else None
    net = prompts(text=own, fixed=fixed)
    assert net.learnt.requires_grad != fixed
    if not fixed:
        net(own)[:, 0].sum().backward()
        assert net.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in text.parameters())


def test_new_words_have_the_scale_of_those_of_the_encoder(text):
    drawn = prompts(text=text, words=2000).learnt
    assert drawn.std().item() == pytest.approx(text.embed_tokens("a photo of a").std().item(), rel=0.05)


def test_the_same_seed_draws_the_same(text):
    assert torch.equal(prompts(text=text).learnt, prompts(text=text).learnt)
    assert not torch.equal(prompts(seed=1).learnt, prompts().learnt)


@pytest.mark.parametrize("with_text", [True, False])
def test_stored_prompts_equal_the_computed_ones_and_need_no_text(text, with_text):
    own = text if with_text else None
    net = prompts(text=own)
    net.store(own)
    torch.testing.assert_close(net.embeddings, net(own).detach())
    assert not net.embeddings.requires_grad
    kept = net.embeddings.clone()
    with torch.no_grad():
        net.learnt.add_(1)
    assert torch.equal(net.embeddings, kept)


def test_without_a_joint_space_there_are_no_prompts():
    net = prompts(joint_dim=0)
    net.store(None)
    assert net.embeddings.shape == (P, 0)


def test_the_guides_tokens_are_outputs_of_the_encoder_for_the_normal_state(text):
    net, U = guidance(text=text)
    assert U == TOKEN_DIM
    assert net.learnt.shape == (3, WORD_DIM)
    tokens = net(text)
    torch.testing.assert_close(tokens, text.encode_context(net.learnt, NORMAL[0]))
    assert not torch.allclose(tokens, text.encode_context(net.learnt, NORMAL[1]))
    tokens.sum().backward()
    assert net.learnt.grad.abs().sum() > 0
    net.store(text)
    torch.testing.assert_close(net.tokens, tokens.detach())
    assert not net.tokens.requires_grad


def test_without_a_text_the_guides_tokens_are_free():
    net, U = guidance()
    assert U == 7
    assert net(None) is net.learnt
    assert net.learnt.shape == (3, 7)
    net.store(None)
    with torch.no_grad():
        net.learnt.add_(1)
    assert not torch.equal(net.tokens, net.learnt)


COUNT, GRID, D = 10, (3, 3), 6
HELD_OUT = np.arange(COUNT) < 3
CELL = (1, 2)  # of the synthetic anomaly


def fit_data():
    return normals(0.3 * random(COUNT, D, *GRID, seed=1) + random(D, 1, 1, seed=2), holdout=HELD_OUT)


def synthetic(data, *, share=1.0):
    anomalies = data.features.features.clone()
    anomalies[:, :, CELL[0], CELL[1]] += 3 * random(D, seed=3)
    shares = torch.zeros(COUNT, *GRID)
    shares[:, CELL[0], CELL[1]] = share
    return SyntheticSampler(
        data,
        SyntheticAnomalies(InMemory(anomalies), lambda rows: shares[torch.from_numpy(rows)]),
        covered=0.1,
    )


def similarity(features, prompts):
    """Cosines (B, L, N, P) for two levels that are already in the joint space."""
    unit = torch.nn.functional.normalize(features.flatten(2).transpose(1, 2), dim=-1)  # (B, N, D)
    return torch.stack([unit, -unit[..., [1, 0, 2, 3, 4, 5]]], dim=1) @ prompts.T


def stage(net, *, text=None, source=None, epochs=8):
    return PromptStage(
        net,
        torch.nn.Identity(),  # `similarity` needs no joint space here
        PromptsConfig(temperature=TAU, training=quick_training(epochs=epochs, learning_rate=0.1)),
        text=text,
        similarity=similarity,
        synthetic=source,
    )


def loss(net, *, text=None, source=None, training=True):
    data = fit_data()
    features = data.features.read([4, 5, 6])
    return stage(net, text=text, source=source).loss(features, torch.zeros(3), generator=seeded(9), training=training)[
        "loss"
    ]


def cross_entropy(cosines, *, normal):
    exponentials = [math.exp(s / TAU) for s in cosines]
    state = exponentials[:2] if normal else exponentials[2:]
    return -math.log(sum(state) / sum(exponentials))


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_the_loss_uses_all_normal_cells_and_the_anomalous_ones(share):
    """Of synthetic anomalies only the anomalous cells count; without any, the normal images alone."""
    net, data = prompts(), fit_data()
    embeddings = net(None)
    source = None if share is None else synthetic(data, share=share)

    got = loss(net, source=source).item()

    normal = [
        cross_entropy(row, normal=True)
        for row in similarity(data.features.read([4, 5, 6]), embeddings).reshape(-1, P).tolist()
    ]
    expected = sum(normal) / len(normal)
    if share:
        batch = synthetic(data).draw(3, held_out=False, generator=seeded(9))
        cell = CELL[0] * GRID[1] + CELL[1]
        found = similarity(batch.features, embeddings)[:, :, cell].reshape(-1, P).tolist()
        expected += sum(cross_entropy(row, normal=False) for row in found) / len(found)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_training_and_validation_use_different_images(training):
    source = synthetic(fit_data())
    for _ in range(20):
        loss(prompts(), source=source, training=training)
    read = {row for rows in source.synthetic.features.reads for row in rows.tolist()}
    assert read <= set(np.flatnonzero(training != HELD_OUT).tolist())


@pytest.mark.parametrize("with_text", [True, False])
def test_prompts_learn_to_detect_synthetic_anomalies_and_the_encoder_is_unchanged(text, with_text):
    own = text if with_text else None
    data = fit_data()
    net = prompts(text=own)
    frozen = {name: tensor.clone() for name, tensor in text.state_dict().items()}

    history = train(stage(net, text=own, source=synthetic(data), epochs=12), data, device="cpu")

    assert history.holdout_losses[-1] < 0.97 * history.holdout_losses[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in text.state_dict().items())


@pytest.fixture(scope="module")
def real_text():
    try:
        model = minilm.load()
    except MissingError as missing:
        pytest.skip(str(missing))
    aligned = alignment()
    return OfflineText(model, mean=aligned.text_mean, projection=aligned.text_projection)


def test_with_a_real_encoder_only_the_words_are_learnt(real_text):
    net = prompts(text=real_text, joint_dim=real_text.joint_dim)
    guide = Guidance(words=3, state=NORMAL[0])
    assert guide.start(real_text, width=7, generator=seeded()) == real_text.output_dim
    outputs, tokens = net(real_text), guide(real_text)
    assert outputs.shape == (P, real_text.joint_dim)
    assert tokens.shape == (3, real_text.output_dim)
    (outputs[:, 0].sum() + tokens[:, 0].sum()).backward()
    assert net.learnt.grad.abs().sum() > 0
    assert guide.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in real_text.parameters())
