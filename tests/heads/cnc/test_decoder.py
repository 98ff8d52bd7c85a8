import math

import pytest
import torch
import torch.nn.functional as F

from builders import random, seeded
from normweave.config import CNCConfig, GatingConfig, GuideConfig
from normweave.heads.cnc.decoder import Attention, Block, Decoder, NormalityGuide

DIMS = (2, 3, 4)
d, HEADS, N, U, M = 8, 2, 6, 5, 3


def randomised(module, seed=0):
    """Give random values to all parameters, also biases and gains."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def decoder(*, dims=DIMS, dropout=0.0, bottleneck=0, experts=False, residual=None, blocks=1, start=None):
    config = CNCConfig(
        width=d,
        blocks=blocks,
        heads=HEADS,
        dropout=dropout,
        bottleneck=bottleneck,
        moe=experts,
        gating=GatingConfig(experts=3) if experts else GatingConfig(),
        guide=GuideConfig() if residual is None else GuideConfig(tokens="free", residual=residual),
    )
    net = Decoder(config, dims=dims, cells=N)
    if start is None:
        return randomised(net)
    net.start(seeded(start))
    return net


def tokens(count=2, *, seed=1):
    return random(count, N, sum(DIMS), seed=seed)


def block_input(net, *args, **kwargs):
    """The input of the first block, without the position."""
    seen = []
    handle = net.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(*args, **kwargs)
    handle.remove()
    return (seen[0] - net.position).detach()


def attend_by_hand(net, queries, memory):
    """Head by head, query by query: softmax of q.k / sqrt(d / heads), then the mean of v with these weights."""
    q, k, v = net.query(queries), net.key(memory), net.value(memory)
    width = d // HEADS
    rows = []
    for n in range(len(q)):
        parts = []
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            logits = [(q[n, own] @ k[m, own]).item() / math.sqrt(width) for m in range(len(k))]
            weights = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
            parts.append(sum(w * v[m, own] for m, w in enumerate(weights)))
        rows.append(torch.cat(parts))
    return net.out(torch.stack(rows))


@pytest.mark.parametrize("shared", [True, False])
def test_attention_by_hand(shared):
    """Each image attends to its own memory, or all images to one."""
    net = randomised(Attention(width=d, memory=U, heads=HEADS))
    queries, memory = random(2, N, d), random(1 if shared else 2, M, U, seed=1)
    got = net(queries, memory)
    for b in range(2):
        expected = attend_by_hand(net, queries[b], memory[0 if shared else b])
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-4)


def test_a_block_adds_attention_and_then_a_perceptron():
    net, inputs = randomised(Block(width=d, heads=HEADS)), random(2, N, d)
    normed = F.layer_norm(inputs, (d,), net.before_attention.weight, net.before_attention.bias)
    middle = inputs + torch.stack([attend_by_hand(net.attention, one, one) for one in normed])
    widen, _, narrow = net.mlp
    hidden = widen(F.layer_norm(middle, (d,), net.before_mlp.weight, net.before_mlp.bias))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    torch.testing.assert_close(net(inputs), middle + narrow(hidden), rtol=1e-4, atol=1e-4)


def guide(*, residual=0.0):
    config = CNCConfig(width=d, heads=HEADS, guide=GuideConfig(tokens="free", residual=residual))
    return randomised(NormalityGuide(config, tokens=U))


def test_the_guides_memory_by_hand():
    net, text = guide(), random(M, U)

    mean = [sum(text[m, u].item() for m in range(M)) / M for u in range(U)]
    rows = []
    for m in range(M):
        centred = [text[m, u].item() - mean[u] for u in range(U)]
        middle = sum(centred) / U
        spread = math.sqrt(sum((x - middle) ** 2 for x in centred) / U + 1e-5)
        rows.append([(x - middle) / spread for x in centred])
    projected = torch.tensor(rows) @ net.project.weight.T
    projected = projected - projected.mean(0)
    expected = F.layer_norm(projected, (d,), net.after.weight, net.after.bias)
    torch.testing.assert_close(net.memory(text)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_constant_added_to_all_text_tokens_changes_nothing():
    """The tokens of one prompt are nearly parallel: their common part is removed."""
    net, patches, text = guide(), random(2, N, d), random(M, U, seed=1)
    common = 3 * random(U, seed=2)
    torch.testing.assert_close(net(patches, text + common), net(patches, text), rtol=1e-3, atol=1e-3)


def test_without_residual_a_patch_becomes_a_mixture_of_the_text():
    """Wo sum_m a_m v_m with a_m >= 0 that add up to 1, and no other term of the patch."""
    net, patches, text = guide(), random(2, N, d), random(M, U, seed=1)
    normed = F.layer_norm(patches, (d,), net.norm.weight, net.norm.bias)
    for b in range(2):
        expected = attend_by_hand(net.attention, normed[b], net.memory(text)[0])
        torch.testing.assert_close(net(patches, text)[b], expected, rtol=1e-4, atol=1e-4)


def test_without_residual_equal_text_tokens_give_equal_outputs():
    net, text = guide(), random(1, U).expand(M, -1)  # equal tokens: there is only one mixture
    got = net(100 * random(2, N, d), text)
    torch.testing.assert_close(got, got[:1, :1].expand_as(got), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [0.3, 1.0])
def test_the_residual_is_that_share_of_the_patch(residual):
    patches, text = random(2, N, d), random(M, U, seed=1)
    passed = guide(residual=residual)(patches, text) - guide()(patches, text)
    torch.testing.assert_close(passed, residual * patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_reconstructs_the_deepest_level_first(blocks):
    """z = sum_l W_l LN(E_l) + position; then, from the last level to the first, its blocks and W LN(z)."""
    net, inputs = decoder(blocks=blocks), tokens()

    levels = net(inputs, None).levels

    z = net.position.expand(2, -1, -1)
    first = 0
    for level, D in enumerate(DIMS):
        norm, project = net.read[level]
        part = inputs[..., first : first + D]
        z = z + project(F.layer_norm(part, (D,), norm.weight, norm.bias))
        first += D
    expected = {}
    for stage, level in enumerate((2, 1, 0)):
        for block in net.blocks[stage]:
            z = block(z)
        norm, project = net.write[level]
        expected[level] = project(F.layer_norm(z, (d,), norm.weight, norm.bias))
    assert [level.shape for level in levels] == [(2, N, D) for D in DIMS]
    for level in range(3):
        torch.testing.assert_close(levels[level], expected[level], rtol=1e-3, atol=1e-4)


def test_deeper_levels_do_not_depend_on_the_blocks_of_finer_ones():
    net, inputs = decoder(), tokens()
    before = net(inputs, None).levels
    randomised(net.blocks[2], seed=7)  # the last blocks, of the finest level
    after = net(inputs, None).levels
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_the_plain_decoder_has_no_other_parts():
    net, inputs = decoder(), tokens()
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {
        "read",
        "position",
        "blocks",
        "write",
    }
    trained, tested = net(inputs, None, generator=seeded()), net(inputs, None)
    for one, other in zip(trained.levels, tested.levels, strict=True):
        assert torch.equal(one, other)  # there are no random draws
    assert trained.balance == 0


def test_the_experts_come_before_the_bottleneck_and_the_guide_after_it():
    net, inputs, text = decoder(experts=True, bottleneck=2, residual=0.5), tokens(), random(M, d)
    got = block_input(net, inputs, text)
    levels = torch.split(inputs, DIMS, dim=2)
    z = sum(read(level) for read, level in zip(net.read, levels, strict=True))
    mixed, uneven = net.experts(z)
    squeeze, widen = net.narrow
    torch.testing.assert_close(got, net.guide(widen(squeeze(mixed)), text), rtol=1e-4, atol=1e-4)
    assert net(inputs, text).balance == uneven


def test_a_bottleneck_limits_the_rank():
    wide, narrow = decoder(), decoder(bottleneck=2)
    ranks = []
    for net in (wide, narrow):
        z = block_input(net, tokens(4), None).flatten(0, 1)
        ranks.append(torch.linalg.matrix_rank(z - z.mean(0), rtol=1e-4).item())
    assert ranks == [6, 2]  # 1 + 2 + 3: the layer norm of each level reduces the rank by one


def test_dropout_is_drawn_in_training_only_and_keeps_the_mean():
    net, inputs = decoder(dropout=0.25), tokens()
    clean = block_input(net, inputs, None)
    dropped = block_input(net, inputs, None, generator=seeded(3))
    kept = torch.rand(clean.shape, generator=seeded(3)) >= 0.25
    torch.testing.assert_close(dropped, torch.where(kept, clean / 0.75, 0), rtol=1e-4, atol=1e-5)
    plain = block_input(decoder(), inputs, None)
    torch.testing.assert_close(clean, plain)


def test_dropout_zeroes_the_configured_share():
    net, inputs = decoder(dropout=0.25), tokens(400)
    dropped = block_input(net, inputs, None, generator=seeded())
    assert (dropped.abs() < 1e-6).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("residual", [None, 0.5])
def test_an_image_does_not_depend_on_its_batch(residual):
    net, inputs, text = decoder(experts=True, bottleneck=4, residual=residual), tokens(4), random(M, d)
    together = net(inputs, text).levels
    for row in range(4):
        for batched, alone in zip(together, net(inputs[row : row + 1], text).levels, strict=True):
            torch.testing.assert_close(alone[0], batched[row], rtol=1e-4, atol=1e-4)


def test_new_weights_come_from_the_generator_alone():
    first, again, other = (decoder(experts=True, bottleneck=4, residual=0.5, start=seed) for seed in (0, 0, 1))
    for (name, one), two, three in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        if not (one == one.flatten()[0]).all():  # initial zeros and ones are not drawn
            assert not torch.equal(one, three), name
    linear = first.blocks[0][0].mlp[0]
    assert 0.8 * d**-0.5 < linear.weight.abs().max() <= d**-0.5


def test_gradient_reaches_every_part():
    """Except biases without effect: of keys, by the softmax, and of the guide's projection, by the centring."""
    net = decoder(experts=True, bottleneck=4, residual=0.5, dropout=0.1)
    text = random(M, d).requires_grad_()
    levels, uneven = net(tokens(), text, generator=seeded())
    (sum(level.square().mean() for level in levels) + uneven).backward()
    assert text.grad.abs().sum() > 0
    for name, parameter in net.named_parameters():
        if not name.endswith(("key.bias", "project.bias")):
            assert parameter.grad.abs().sum() > 1e-6, name
