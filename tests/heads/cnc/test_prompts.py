import math

import numpy as np
import pytest
import torch

from builders import JOINT_DIM, TOKEN_DIM, WORD_DIM, InMemory, TinyText
from normweave.errors import MissingError
from normweave.features import minilm
from normweave.features.offline_pair import OfflineText, alignment
from normweave.heads.cnc.prompts import Guidance, Prompts, PromptStage
from normweave.heads.cnc.synthetic import Damaged
from normweave.training import train
from normweave.types import FitData, SyntheticAnomalies

NORMAL, ABNORMAL = ("flawless surface", "perfect"), ("damaged surface", "a deep crack", "a hole")
P = len(NORMAL) + len(ABNORMAL)
TAU = 0.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(*, text=None, random=False, joint_dim=JOINT_DIM, seed=0, words=4):
    fresh = Prompts(words=words, normal_states=NORMAL, abnormal_states=ABNORMAL)
    fresh.start(text, joint_dim=joint_dim, random=random, generator=seeded(seed))
    return fresh


def guidance(*, text=None, seed=0):
    fresh = Guidance(words=3, state=NORMAL[0])
    return fresh, fresh.start(text, width=7, generator=seeded(seed))


@pytest.fixture(scope="module")
def text():
    return TinyText()


def test_with_a_text_one_context_is_read_before_every_state(text):
    net = prompts(text=text)
    said = net(text)
    assert net.learnt.shape == (4, WORD_DIM)
    assert said.shape == (P, JOINT_DIM)
    for row, state in enumerate((*NORMAL, *ABNORMAL)):  # the normal ones first
        torch.testing.assert_close(said[row], text.encode_prompts(net.learnt, [state])[0])
    assert net.normal == 2


def test_without_a_text_they_are_vectors_of_length_one_in_any_direction():
    net = prompts()
    with torch.no_grad():
        net.learnt.mul_(torch.arange(1.0, P + 1)[:, None])
    assert net.learnt.shape == (P, JOINT_DIM)
    torch.testing.assert_close(net(None).norm(dim=1), torch.ones(P))


@pytest.mark.parametrize(("with_text", "random"), [(True, False), (False, False), (False, True)])
def test_only_what_was_drawn_at_random_to_stay_does_not_learn(text, with_text, random):
    own = text if with_text else None
    net = prompts(text=own, random=random)
    assert net.learnt.requires_grad != random
    if not random:
        net(own)[:, 0].sum().backward()
        assert net.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in text.parameters())


def test_new_words_are_as_large_as_those_of_the_encoder(text):
    drawn = prompts(text=text, words=2000).learnt
    assert drawn.std().item() == pytest.approx(text.embed_tokens("a photo of a").std().item(), rel=0.05)


def test_the_same_seed_draws_the_same(text):
    assert torch.equal(prompts(text=text).learnt, prompts(text=text).learnt)
    assert not torch.equal(prompts(seed=1).learnt, prompts().learnt)


@pytest.mark.parametrize("with_text", [True, False])
def test_settled_prompts_are_what_they_came_to_and_need_no_text(text, with_text):
    own = text if with_text else None
    net = prompts(text=own)
    net.settle(own)
    torch.testing.assert_close(net.anchors, net(own).detach())
    assert not net.anchors.requires_grad
    kept = net.anchors.clone()
    with torch.no_grad():
        net.learnt.add_(1)
    assert torch.equal(net.anchors, kept)


def test_without_a_joint_space_there_are_none():
    net = prompts(joint_dim=0)
    net.settle(None)
    assert net.anchors.shape == (P, 0)


def test_the_guides_tokens_are_what_the_encoder_says_before_the_normal_state(text):
    net, U = guidance(text=text)
    assert U == TOKEN_DIM
    assert net.learnt.shape == (3, WORD_DIM)
    tokens = net(text)
    torch.testing.assert_close(tokens, text.encode_context(net.learnt, NORMAL[0]))
    assert not torch.allclose(tokens, text.encode_context(net.learnt, NORMAL[1]))
    tokens.sum().backward()
    assert net.learnt.grad.abs().sum() > 0
    net.settle(text)
    torch.testing.assert_close(net.tokens, tokens.detach())
    assert not net.tokens.requires_grad


def test_without_a_text_the_guides_tokens_are_free():
    net, U = guidance()
    assert U == 7
    assert net(None) is net.learnt
    assert net.learnt.shape == (3, 7)
    net.settle(None)
    with torch.no_grad():
        net.learnt.add_(1)
    assert not torch.equal(net.tokens, net.learnt)


COUNT, GRID, D = 10, (3, 3), 6
HELD_OUT = np.arange(COUNT) < 3
SHOWN = (1, 2)  # the damaged cell


def fit_data():
    features = 0.3 * torch.randn(COUNT, D, *GRID, generator=seeded(1)) + torch.randn(
        D, 1, 1, generator=seeded(2)
    )
    return FitData(
        features=InMemory(features),
        subclasses=np.zeros(COUNT, dtype=np.int64),
        names=("a",),
        groups=np.arange(COUNT),
        holdout=HELD_OUT,
    )


def damaged(data, *, share=1.0):
    broken = data.features.features.clone()
    broken[:, :, SHOWN[0], SHOWN[1]] += 3 * torch.randn(D, generator=seeded(3))
    shares = torch.zeros(COUNT, *GRID)
    shares[:, SHOWN[0], SHOWN[1]] = share
    return Damaged(
        data, SyntheticAnomalies(InMemory(broken), lambda rows: shares[torch.from_numpy(rows)]), covered=0.1
    )


def similarity(features, said):
    """Two levels, whose joint space is their own: cosines (B, L, N, P)."""
    unit = torch.nn.functional.normalize(features.flatten(2).transpose(1, 2), dim=-1)  # (B, N, D)
    return torch.stack([unit, -unit[..., [1, 0, 2, 3, 4, 5]]], dim=1) @ said.T


def stage(net, *, text=None, source=None, epochs=8):
    return PromptStage(
        net,
        torch.nn.Identity(),  # similarity needs no way to the joint space here
        text=text,
        similarity=similarity,
        damaged=source,
        temperature=TAU,
        epochs=epochs,
        batch_images=4,
        learning_rate=0.1,
    )


def loss(net, *, text=None, source=None, training=True):
    data = fit_data()
    few = data.features.read([4, 5, 6])
    return stage(net, text=text, source=source).loss(
        few, torch.zeros(3), generator=seeded(9), training=training
    )["loss"]


def cross_entropy(cosines, *, normal):
    exponentials = [math.exp(s / TAU) for s in cosines]
    state = exponentials[:2] if normal else exponentials[2:]
    return -math.log(sum(state) / sum(exponentials))


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_the_lesson_looks_at_all_normal_places_and_at_the_damaged_ones(share):
    """Of damaged images only the places that show damage count; without any, normal images teach alone."""
    net, data = prompts(), fit_data()
    said = net(None)
    source = None if share is None else damaged(data, share=share)

    got = loss(net, source=source).item()

    normal = [
        cross_entropy(row, normal=True)
        for row in similarity(data.features.read([4, 5, 6]), said).reshape(-1, P).tolist()
    ]
    expected = sum(normal) / len(normal)
    if share:
        drawn = damaged(data).draw(3, held_out=False, generator=seeded(9))
        cell = SHOWN[0] * GRID[1] + SHOWN[1]
        found = similarity(drawn.features, said)[:, :, cell].reshape(-1, P).tolist()
        expected += sum(cross_entropy(row, normal=False) for row in found) / len(found)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_lesson_learns_from_some_images_and_is_judged_by_the_others(training):
    source = damaged(fit_data())
    for _ in range(20):
        loss(prompts(), source=source, training=training)
    asked = {row for rows in source.synthetic.features.reads for row in rows.tolist()}
    assert asked <= set(np.flatnonzero(training != HELD_OUT).tolist())


@pytest.mark.parametrize("with_text", [True, False])
def test_prompts_learn_to_tell_damaged_patches_and_nothing_else_changes(text, with_text):
    own = text if with_text else None
    data = fit_data()
    net = prompts(text=own)
    frozen = {name: tensor.clone() for name, tensor in text.state_dict().items()}

    history = train(stage(net, text=own, source=damaged(data), epochs=12), data, device="cpu")

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


def test_a_real_encoder_reads_the_prompts_and_only_their_words_learn(real_text):
    net = prompts(text=real_text, joint_dim=real_text.joint_dim)
    guide = Guidance(words=3, state=NORMAL[0])
    assert guide.start(real_text, width=7, generator=seeded()) == real_text.output_dim
    said, tokens = net(real_text), guide(real_text)
    assert said.shape == (P, real_text.joint_dim)
    assert tokens.shape == (3, real_text.output_dim)
    (said[:, 0].sum() + tokens[:, 0].sum()).backward()
    assert net.learnt.grad.abs().sum() > 0
    assert guide.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in real_text.parameters())
