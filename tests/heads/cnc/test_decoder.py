import math

import pytest
import torch
import torch.nn.functional as F

from normweave.heads.cnc.decoder import Attention, Block, Decoder, NormalityGuide
from normweave.heads.cnc.gating import GatedExperts

DIMS = (2, 3, 4)
d, HEADS, N, U, M = 8, 2, 6, 5, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def shaken(module, seed=0):
    """With random numbers for all parameters, biases and gains too."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def decoder(*, dims=DIMS, dropout=0.0, bottleneck=0, experts=False, residual=None, blocks=1, start=None):
    net = Decoder(
        dims=dims,
        places=N,
        width=d,
        blocks=blocks,
        heads=HEADS,
        dropout=dropout,
        bottleneck=bottleneck,
        experts=GatedExperts(width=d, experts=3, top_k=2) if experts else None,
        guide=None if residual is None else NormalityGuide(width=d, tokens=U, heads=HEADS, residual=residual),
    )
    if start is None:
        return shaken(net)
    net.start(seeded(start))
    return net


def tokens(count=2, *, seed=1):
    return randn(count, N, sum(DIMS), seed=seed)


def entering_the_blocks(net, *args, **kwargs):
    """What the first block sees, without the position."""
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
    """Every image attends to its own memory, or all to one."""
    net = shaken(Attention(width=d, memory=U, heads=HEADS))
    queries, memory = randn(2, N, d), randn(1 if shared else 2, M, U, seed=1)
    got = net(queries, memory)
    for b in range(2):
        expected = attend_by_hand(net, queries[b], memory[0 if shared else b])
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-4)


def test_a_block_adds_attention_and_then_a_perceptron():
    net, few = shaken(Block(width=d, heads=HEADS)), randn(2, N, d)
    read = F.layer_norm(few, (d,), net.before_attention.weight, net.before_attention.bias)
    middle = few + torch.stack([attend_by_hand(net.attention, one, one) for one in read])
    widen, _, narrow = net.mlp
    hidden = widen(F.layer_norm(middle, (d,), net.before_mlp.weight, net.before_mlp.bias))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    torch.testing.assert_close(net(few), middle + narrow(hidden), rtol=1e-4, atol=1e-4)


def guide(*, residual=0.0):
    return shaken(NormalityGuide(width=d, tokens=U, heads=HEADS, residual=residual))


def test_the_guides_memory_is_centred_normed_projected_and_again():
    net, text = guide(), randn(M, U)

    mean = [sum(text[m, u].item() for m in range(M)) / M for u in range(U)]
    rows = []
    for m in range(M):
        centred = [text[m, u].item() - mean[u] for u in range(U)]
        middle = sum(centred) / U
        spread = math.sqrt(sum((x - middle) ** 2 for x in centred) / U + 1e-5)
        rows.append([(x - middle) / spread for x in centred])
    read = torch.tensor(rows) @ net.project.weight.T
    read = read - read.mean(0)
    expected = F.layer_norm(read, (d,), net.after.weight, net.after.bias)
    torch.testing.assert_close(net.memory(text)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_constant_vector_upon_all_text_tokens_changes_nothing():
    """The tokens of one prompt are nearly parallel: what they have in common is not told."""
    net, patches, text = guide(), randn(2, N, d), randn(M, U, seed=1)
    common = 3 * randn(U, seed=2)
    torch.testing.assert_close(net(patches, text + common), net(patches, text), rtol=1e-3, atol=1e-3)


def test_without_residual_a_patch_becomes_a_mixture_of_the_text():
    """Wo sum_m a_m v_m with a_m >= 0 that add up to 1, and nothing else of the patch."""
    net, patches, text = guide(), randn(2, N, d), randn(M, U, seed=1)
    read = F.layer_norm(patches, (d,), net.norm.weight, net.norm.bias)
    for b in range(2):
        expected = attend_by_hand(net.attention, read[b], net.memory(text)[0])
        torch.testing.assert_close(net(patches, text)[b], expected, rtol=1e-4, atol=1e-4)


def test_without_residual_one_text_token_says_the_same_of_every_patch():
    net, text = guide(), randn(1, U).expand(M, -1)  # all alike: there is one mixture only
    got = net(100 * randn(2, N, d), text)
    torch.testing.assert_close(got, got[:1, :1].expand_as(got), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [0.3, 1.0])
def test_the_residual_is_that_share_of_the_patch(residual):
    patches, text = randn(2, N, d), randn(M, U, seed=1)
    passed = guide(residual=residual)(patches, text) - guide()(patches, text)
    torch.testing.assert_close(passed, residual * patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_reconstructs_the_deepest_level_first(blocks):
    """z = sum_l W_l LN(E_l) + position; then, from the last level to the first, its blocks and W LN(z)."""
    net, few = decoder(blocks=blocks), tokens()

    levels = net(few, None).levels

    z = net.position.expand(2, -1, -1)
    first = 0
    for level, D in enumerate(DIMS):
        norm, project = net.read[level]
        part = few[..., first : first + D]
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


def test_deeper_levels_do_not_pass_the_blocks_of_finer_ones():
    net, few = decoder(), tokens()
    before = net(few, None).levels
    shaken(net.blocks[2], seed=7)  # the last to be passed
    after = net(few, None).levels
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_the_plain_decoder_has_nothing_but_reading_blocks_and_writing():
    net, few = decoder(), tokens()
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {
        "read",
        "position",
        "blocks",
        "write",
    }
    trained, tested = net(few, None, generator=seeded()), net(few, None)
    for one, other in zip(trained.levels, tested.levels, strict=True):
        assert torch.equal(one, other)  # nothing is drawn
    assert trained.balance == 0


def test_the_experts_come_before_the_bottleneck_and_the_guide_after_it():
    net, few, text = decoder(experts=True, bottleneck=2, residual=0.5), tokens(), randn(M, U)
    got = entering_the_blocks(net, few, text)
    levels = torch.split(few, DIMS, dim=2)
    z = sum(read(level) for read, level in zip(net.read, levels, strict=True))
    mixed, uneven = net.experts(z)
    squeeze, widen = net.narrow
    torch.testing.assert_close(got, net.guide(widen(squeeze(mixed)), text), rtol=1e-4, atol=1e-4)
    assert net(few, text).balance == uneven


def test_a_bottleneck_lets_that_many_numbers_through():
    wide, narrow = decoder(), decoder(bottleneck=2)
    ranks = []
    for net in (wide, narrow):
        z = entering_the_blocks(net, tokens(4), None).flatten(0, 1)
        ranks.append(torch.linalg.matrix_rank(z - z.mean(0), rtol=1e-4).item())
    assert ranks == [6, 2]  # 1 + 2 + 3: the layer norm of each level takes one away


def test_dropout_is_drawn_in_training_only_and_keeps_the_mean():
    net, few = decoder(dropout=0.25), tokens()
    clean = entering_the_blocks(net, few, None)
    dropped = entering_the_blocks(net, few, None, generator=seeded(3))
    kept = torch.rand(clean.shape, generator=seeded(3)) >= 0.25
    torch.testing.assert_close(dropped, torch.where(kept, clean / 0.75, 0), rtol=1e-4, atol=1e-5)
    plain = entering_the_blocks(decoder(), few, None)
    torch.testing.assert_close(clean, plain)


def test_dropout_leaves_out_as_many_as_it_says():
    net, few = decoder(dropout=0.25), tokens(400)
    dropped = entering_the_blocks(net, few, None, generator=seeded())
    assert (dropped.abs() < 1e-6).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("residual", [None, 0.5])
def test_an_image_does_not_depend_on_its_batch(residual):
    net, few, text = decoder(experts=True, bottleneck=4, residual=residual), tokens(4), randn(M, U)
    together = net(few, text).levels
    for row in range(4):
        for whole, alone in zip(together, net(few[row : row + 1], text).levels, strict=True):
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-4)


def test_new_weights_come_from_the_generator_alone():
    first, again, other = (
        decoder(experts=True, bottleneck=4, residual=0.5, start=seed) for seed in (0, 0, 1)
    )
    for (name, one), two, three in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        if not (one == one.flatten()[0]).all():  # what starts at 0 or 1 is not drawn
            assert not torch.equal(one, three), name
    linear = first.blocks[0][0].mlp[0]
    assert 0.8 * d**-0.5 < linear.weight.abs().max() <= d**-0.5


def test_gradient_reaches_every_part():
    """But biases that drop out: of keys by the softmax, of the guide's projection by the centring."""
    net = decoder(experts=True, bottleneck=4, residual=0.5, dropout=0.1)
    text = randn(M, U).requires_grad_()
    levels, uneven = net(tokens(), text, generator=seeded())
    (sum(level.square().mean() for level in levels) + uneven).backward()
    assert text.grad.abs().sum() > 0
    for name, parameter in net.named_parameters():
        if not name.endswith(("key.bias", "project.bias")):
            assert parameter.grad.abs().sum() > 1e-6, name
