import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from builders import (
    JOINT_DIM,
    TOKEN_DIM,
    InMemory,
    TinyPair,
    begun,
    fit,
    normals,
    quick_training,
    random,
    seeded,
)
from normweave.config import CNCConfig, GatingConfig, GuideConfig, PromptsConfig, SyntheticConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.heads import build
from normweave.heads.cnc.constraint import distillation, promotion
from normweave.training import train
from normweave.types import SyntheticAnomalies

DIMS, GRID, N = (4, 3, 5), (4, 4), 16
SHAPE = (sum(DIMS), *GRID)
COUNT, VARIANTS = 24, 2
MEAN = torch.linspace(-2, 2, SHAPE[0])
STD = torch.linspace(0.5, 3, SHAPE[0])
QUICK = quick_training(epochs=2, batch_images=6, learning_rate=1e-3)
QUICK_PROMPTS = {
    "context_words": 2,
    "normal_states": ("flawless surface", "perfect"),
    "abnormal_states": ("damaged surface", "a crack"),
    "training": quick_training(epochs=2, batch_images=6, learning_rate=5e-3),
}


def images(count, *, subclasses=2, seed=0):
    """Standardised features; subclasses differ in the means of their channels."""
    means = 2 * random(subclasses, SHAPE[0], 1, 1, seed=8)
    return means[torch.arange(count) % subclasses] + 0.4 * random(count, *SHAPE, seed=seed)


def add_anomalies(features, *, seed):
    anomalies = features.clone()
    anomalies[:, :, 1:3, 1:3] += 2 * random(len(features), SHAPE[0], 1, 1, seed=seed)
    return anomalies


def fit_data(*, pair=None, synthetic=True, held_out=8, count=COUNT, names=("a", "b")):
    clean = images(count, seed=1)
    anomalies = add_anomalies(clean.repeat(VARIANTS, 1, 1, 1), seed=2)
    shares = torch.zeros(len(anomalies), *GRID)
    shares[:, 1:3, 1:3] = 1
    return normals(
        clean,
        subclasses=np.arange(count) % 2,
        names=names,
        holdout=np.arange(count) < held_out,
        seed=3,
        mean=MEAN,
        std=STD,
        pair=pair,
        synthetic=SyntheticAnomalies(InMemory(anomalies), lambda rows: shares[torch.from_numpy(rows)])
        if synthetic
        else None,
    )


def new(*, moe=True, balance=0.01, guide="off", prompts=None, variants=2, **changed):
    """A small head; `prompts` are fields of its PromptsConfig."""
    config = CNCConfig(
        **{"width": 16, "heads": 2, "training": QUICK} | changed,
        moe=moe,
        gating=GatingConfig(experts=3, balance=balance) if moe else GatingConfig(),
        guide=GuideConfig() if guide == "off" else GuideConfig(tokens=guide, words=3),
        prompts=PromptsConfig(**QUICK_PROMPTS | (prompts or {})),
        synthetic=SyntheticConfig(variants=variants, share=0.5) if variants else SyntheticConfig(variants=0),
    )
    return build(config, shape=SHAPE, dims=DIMS)


def start(data, **changed):
    return begun(new(**changed), data)


def untrained(data, **changed):
    """A head with everything that is fitted in closed form; the weights are initial."""
    head = start(data, **changed)
    head.finish(data)
    return head


def stage_of(head, data, name):
    (stage,) = [stage for stage in head.stages(data) if stage.name == name]
    return stage


def levels_of(features):
    return torch.split(features.flatten(2).transpose(1, 2), DIMS, dim=2)


def cosine(one, other):
    one, other = one.tolist(), other.tolist()
    dot = sum(x * y for x, y in zip(one, other, strict=True))
    return dot / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))


def maps_by_hand(head, features, *, joint_levels=(0, 1, 2)):
    """1 - cos of each level and, last, the mean log odds of the abnormal prompts, (B, L + 1, N), cell by cell."""
    tokens, levels = features.flatten(2).transpose(1, 2), levels_of(features)
    decoded = head.decoder(tokens, head.guidance.tokens).levels
    joint = head.joint(levels, joint_levels)  # (B, levels, N, J)
    maps = torch.zeros(len(features), len(DIMS) + 1, N, dtype=torch.float64)
    for b in range(len(features)):
        for n in range(N):
            for level in range(len(DIMS)):
                maps[b, level, n] = 1 - cosine(levels[level][b, n], decoded[level][b, n])
            for level in range(len(joint_levels)):
                logits = [cosine(joint[b, level, n], prompt) / 0.07 for prompt in head.prompts.embeddings]
                normal, abnormal = (sum(math.exp(s) for s in part) for part in (logits[:2], logits[2:]))
                maps[b, -1, n] += math.log(abnormal / normal) / len(joint_levels)
    return maps


@pytest.fixture(scope="module")
def pair():
    return TinyPair(DIMS)


@pytest.fixture(scope="module")
def head(pair):
    """A complete fit: three levels, a pair with a text, a guide, and synthetic anomalies."""
    return fit(new(guide="text", dropout=0.1), fit_data(pair=pair))


@torch.no_grad()
@pytest.mark.parametrize("joint_levels", [(), (1,), (-1, 0)])
def test_the_score_by_hand(pair, joint_levels):
    """mean_l (1 - cos(E_l, D_l) - mu_l) / sd_l + beta (margin - mu) / sd, on the scale of the nearest subclass."""
    prompts = {"weight": 0.7, "joint_levels": joint_levels}
    head = untrained(fit_data(pair=pair), guide="text", border=0, prompts=prompts)
    features = images(3, seed=5)

    out = head(features)

    chosen = {(): (0, 1, 2), (1,): (1,), (-1, 0): (2, 0)}[joint_levels]
    maps = maps_by_hand(head, features, joint_levels=chosen)
    for b, subclass in enumerate((0, 1, 0)):
        mean, std = head.scale_mean[subclass, :, None], head.scale_std[subclass, :, None]
        standard = (maps[b] - mean) / std
        expected = standard[:3].mean(0) + 0.7 * standard[3]
        torch.testing.assert_close(out.scores[b].flatten(), expected.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(out.reconstruction[b].flatten(), maps[b, :3].mean(0).float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("per_subclass", [True, False])
@pytest.mark.parametrize("held_out", [8, 5, 0])
def test_the_scale_is_that_of_the_held_out_images_of_each_subclass(pair, held_out, per_subclass):
    """With fewer than three of them it is that of all subclasses; without any, that of all fit images."""
    data = fit_data(pair=pair, held_out=held_out)
    head = untrained(data, border=0, per_subclass=per_subclass)

    rows = np.flatnonzero(data.holdout) if held_out else np.arange(COUNT)
    maps = maps_by_hand(head, data.features.read(rows))
    for subclass in (0, 1):
        own = np.flatnonzero(rows % 2 == subclass)
        if len(own) < 3 or not per_subclass:
            own = np.arange(len(rows))
        found = maps[own].transpose(0, 1).flatten(1)  # (L + 1, images N)
        torch.testing.assert_close(head.scale_mean[subclass], found.mean(1).float(), rtol=1e-3, atol=1e-4)
        std = found.std(1, unbiased=False).float()
        torch.testing.assert_close(head.scale_std[subclass], std, rtol=1e-3, atol=1e-4)


def test_images_are_routed_to_their_subclass_and_an_unseen_one_is_far_from_both(head):
    features = images(6, seed=6)
    routing = head(features).routing
    assert head.subclass_names == ("a", "b")
    assert routing.subclass.tolist() == [0, 1, 0, 1, 0, 1]
    assert routing.weights.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 3
    unseen = images(3, subclasses=3, seed=6)[2:]
    assert head(unseen).routing.distance > 3 * routing.distance.max()


def test_border_cells_take_the_map_of_their_inner_neighbours(pair):
    data, features = fit_data(pair=pair), images(2, seed=5)
    out = untrained(data, border=1)(features)
    for found in (out.scores, out.reconstruction):
        assert torch.equal(found[:, 0], found[:, 1])
        assert torch.equal(found[:, :, -1], found[:, :, -2])


@pytest.mark.parametrize(
    ("setting", "pair_of", "prompt_type"),
    [
        ("auto", "text", "learned"),
        ("auto", "no text", "free"),
        ("auto", "no pair", "off"),
        ("learned", "text", "learned"),
        ("free", "text", "free"),
        ("free", "no text", "free"),
        ("random", "text", "random"),
        ("off", "text", "off"),
    ],
)
def test_the_type_of_the_prompts(setting, pair_of, prompt_type):
    data = fit_data(pair=None if pair_of == "no pair" else TinyPair(DIMS, text=pair_of == "text"))
    head = untrained(data, prompts={"text": setting})
    assert head.notes() == {"text": prompt_type}
    stages = [stage.name for stage in head.stages(data)]
    assert stages == (["prompts", "decoder"] if prompt_type in ("learned", "free") else ["decoder"])
    assert (
        head.prompts.learnt.shape
        == {
            "learned": (2, 8),
            "free": (4, JOINT_DIM),
            "random": (4, JOINT_DIM),
            "off": (4, 0),
        }[prompt_type]
    )
    out = head(images(2))
    if prompt_type == "off":
        assert head.prompts.embeddings.shape == (4, 0)
        plain = untrained(data, prompts={"text": setting, "weight": 0.0})(images(2))
        torch.testing.assert_close(out.scores, plain.scores)  # there is no text score
    else:
        torch.testing.assert_close(head.prompts.embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("given", [None, TinyPair(DIMS, text=False)], ids=["no pair", "no text"])
def test_learned_prompts_need_a_text_encoder(given):
    with pytest.raises(
        MissingError,
        match=r"head\.prompts\.text=learned needs a text encoder, and these features have none here\. "
        r"Install one with: pip install 'normweave\[clip\]', choose other features \(open_clip or offline_pair\), "
        r"or set head\.prompts\.text=auto\.",
    ):
        start(fit_data(pair=given), prompts={"text": "learned"})


@pytest.mark.parametrize(
    ("guide", "text", "width"),
    [("text", "auto", TOKEN_DIM), ("text", "free", TOKEN_DIM), ("free", "auto", 16), ("off", "auto", 1)],
)
def test_the_guide_attends_to_text_where_there_is_one(pair, guide, text, width):
    head = untrained(fit_data(pair=pair), guide=guide, prompts={"text": text})
    assert head.guidance.tokens.shape[1] == width
    assert (head.decoder.guide is None) == (guide == "off")


@pytest.mark.parametrize("given", [None, TinyPair(DIMS, text=False)], ids=["no pair", "no text"])
def test_a_guide_of_text_needs_a_text_encoder(given):
    with pytest.raises(
        MissingError,
        match=r"head\.guide\.tokens=text needs a text encoder.*or set head\.guide\.tokens=free\.",
    ):
        start(fit_data(pair=given), guide="text")


@pytest.mark.parametrize("text", ["free", "random"])
def test_prompts_without_text_need_a_joint_space(text):
    with pytest.raises(
        ConfigError,
        match=rf"head\.prompts\.text={text} needs features that share .* or set head\.prompts\.text=off\.",
    ):
        start(fit_data(pair=None), prompts={"text": text})


def test_the_pair_is_fitted_on_the_raw_features_of_all_fit_images():
    own = TinyPair(DIMS)
    data = fit_data(pair=own)
    start(data)
    raw = data.features.features * STD[:, None, None] + MEAN[:, None, None]
    torch.testing.assert_close(own.fitted_on, raw)


def test_features_without_mean_and_std_are_already_raw():
    own = TinyPair(DIMS)
    data = fit_data(pair=own)
    start(replace(data, mean=None, std=None))
    torch.testing.assert_close(own.fitted_on, data.features.features)


@pytest.mark.parametrize("training", [True, False])
def test_the_decoders_loss_by_hand(pair, training):
    """Synthetic anomalies are decoded as their clean image; the constraint applies to the decoded tokens."""
    data = fit_data(pair=pair)
    weights = {"balance": 0.3, "distillation": 0.5, "promotion": 0.7}
    prompts = {"distillation": 0.5, "promotion": 0.7}
    head = start(data, guide="text", dropout=0.2, balance=0.3, prompts=prompts)
    stage = stage_of(head, data, "decoder")
    features = images(6, seed=5)

    losses = stage.loss(features, torch.zeros(6), generator=seeded(4), training=training)

    generator = seeded(4)
    inputs, targets = features, features
    if training:
        batch = stage.synthetic.draw(3, held_out=False, generator=generator)
        inputs, targets = (torch.cat([features[3:], part]) for part in (batch.features, batch.clean))
        assert not torch.equal(inputs, targets)
    tokens = pair.text.encode_context(head.guidance.learnt, "flawless surface")
    decoded, uneven = head.decoder(inputs.flatten(2).transpose(1, 2), tokens, generator=generator if training else None)
    levels = levels_of(targets)
    distances = [
        1 - cosine(levels[level][b, n], decoded[level][b, n]) for level in range(3) for b in range(6) for n in range(N)
    ]
    embeddings = head.prompts(pair.text)
    encoded, reconstructed = (head.joint(tokens, [0, 1, 2]) @ embeddings.T for tokens in (levels, decoded))
    expected = {
        "reconstruction": sum(distances) / len(distances),
        "balance": uneven.item(),
        "distillation": distillation(encoded, reconstructed).item(),
        "promotion": promotion(reconstructed, normal=2, temperature=0.07).item(),
    }
    total = expected["reconstruction"] + sum(weight * expected[name] for name, weight in weights.items())
    got = {name: value.item() for name, value in losses.items()}
    assert got == pytest.approx(expected | {"loss": total}, rel=1e-3, abs=1e-4)


def test_without_text_losses_the_loss_is_the_reconstruction(pair):
    data = fit_data(pair=pair, synthetic=False)
    for prompts in ({"text": "off"}, {"distillation": 0.0, "promotion": 0.0}):
        stage = stage_of(start(data, moe=False, prompts=prompts), data, "decoder")
        losses = stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)
        assert losses.keys() == {"loss", "reconstruction", "balance"}
        assert losses["loss"] == losses["reconstruction"]


def test_held_out_images_are_evaluated_without_synthetic_anomalies_noise_and_dropout(pair):
    data = fit_data(pair=pair)
    stage = stage_of(start(data, dropout=0.5), data, "decoder")
    features = images(6, seed=5)

    def loss(seed, training):
        return stage.loss(features, torch.zeros(6), generator=seeded(seed), training=training)["loss"].item()

    assert loss(0, False) == loss(1, False)
    assert data.synthetic.features.reads == []
    assert loss(0, True) != loss(1, True)


def test_a_step_with_one_image_has_no_synthetic_anomaly(pair):
    data = fit_data(pair=pair)
    stage = stage_of(start(data), data, "decoder")
    loss = stage.loss(images(1), torch.zeros(1), generator=seeded(), training=True)["loss"]
    assert torch.isfinite(loss)


def test_the_decoder_stage_trains_decoder_and_guide_only(pair):
    """Some biases have no effect and no gradient: of keys (softmax) and of the guide's projection (centring)."""
    data = fit_data(pair=pair)
    head = start(data, guide="text", dropout=0.1)
    stage = stage_of(head, data, "decoder")
    stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)["loss"].backward()

    trained = {name for name, _ in stage.module.named_parameters()}
    assert len(trained) == len(list(head.decoder.parameters())) + 1  # and the guide's words
    for name, parameter in stage.module.named_parameters():
        if not name.endswith(("key.bias", "project.bias")):
            assert parameter.grad.abs().sum() > 1e-8, name
    assert head.prompts.learnt.grad is None
    assert not head.prompts.embeddings.requires_grad
    assert list(head.joint.parameters()) == []
    assert not any(buffer.requires_grad for buffer in head.joint.buffers())
    assert all(parameter.grad is None for parameter in pair.text.parameters())


def test_the_prompt_stage_trains_the_context_only(pair):
    data = fit_data(pair=pair)
    head = start(data)
    stage = stage_of(head, data, "prompts")
    stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)["loss"].backward()
    assert head.prompts.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in head.decoder.parameters())
    assert all(parameter.grad is None for parameter in pair.text.parameters())


def test_no_stage_trains_on_synthetic_anomalies_of_held_out_images(pair):
    data = fit_data(pair=pair)
    head = start(data)
    for stage in head.stages(data):
        for seed in range(10):
            stage.loss(images(6), torch.zeros(6), generator=seeded(seed), training=True)
    read = {row % COUNT for rows in data.synthetic.features.reads for row in rows.tolist()}
    assert read <= set(range(8, COUNT))
    assert len(read) > 8


@pytest.mark.parametrize(("share", "least"), [(0.75, 4), (0.5, 2), (1.0, 1), (0.25, 4)])
def test_a_worker_needs_images_with_and_without_an_anomaly(share, least):
    data = fit_data()
    config = CNCConfig(synthetic=SyntheticConfig(share=share), width=16, heads=2)
    head = begun(build(config, shape=SHAPE, dims=DIMS), data)
    assert stage_of(head, data, "decoder").worker_images == least


def test_synthetic_anomalies_are_optional():
    assert new(variants=3).synthetic_variants == 3
    data = fit_data(pair=TinyPair(DIMS), synthetic=False)
    for stage in start(data).stages(data):
        assert stage.synthetic is None
        assert stage.worker_images == 1
        assert torch.isfinite(stage.loss(images(2), torch.zeros(2), generator=seeded(), training=True)["loss"])


@torch.no_grad()
def test_scores_do_not_depend_on_the_batch_nor_on_train_mode(head):
    features = images(5, seed=6)
    together = head(features)
    head.train()
    for row in range(5):
        alone = head(features[row : row + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[row], rtol=1e-4, atol=1e-4)
    assert not head.training


def test_the_same_seed_gives_the_same_head(head, pair):
    again = fit(new(guide="text", dropout=0.1), fit_data(pair=pair)).state()
    assert again.keys() == head.state().keys()
    for name, tensor in head.state().items():
        assert torch.equal(tensor, again[name]), name


def test_normal_cells_are_decoded_better_than_anomalous_ones(pair):
    data = fit_data(pair=pair)
    head = fit(new(training=replace(QUICK, epochs=8, learning_rate=5e-3)), data)
    clean = images(6, seed=6)
    anomalies = add_anomalies(clean, seed=7)
    for found in ("reconstruction", "scores"):
        before, after = (getattr(head(features), found)[:, 1:3, 1:3] for features in (clean, anomalies))
        assert after.mean() > before.mean() + 2 * before.std(), found


def test_bf16_trains_close_to_32_bits(pair):
    data = fit_data(pair=pair)
    found = {}
    for precision in ("32", "bf16"):
        head = start(data, precision=precision, variants=0)
        found[precision] = train(stage_of(head, data, "decoder"), data, device="cpu").losses
        assert all(tensor.dtype == torch.float32 for tensor in head.decoder.state_dict().values())
    assert found["bf16"] == pytest.approx(found["32"], rel=0.02)
    assert found["bf16"] != found["32"]


@torch.no_grad()
@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize(("guide", "text"), [("text", "auto"), ("free", "free"), ("off", "random"), ("free", "off")])
def test_a_loaded_head_scores_as_the_fitted_one(guide, text, moe):
    data = fit_data(pair=TinyPair(DIMS, layer_norm=True))
    changed = {"guide": guide, "prompts": {"text": text}, "moe": moe, "bottleneck": 4 * moe}
    head = untrained(data, **changed)
    loaded = new(**changed)
    loaded.load_state(load(save(head.state())))
    features = images(4, seed=6)
    for one, other in zip(head(features), loaded(features), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_without_names_there_is_one_subclass():
    data = fit_data(names=())
    head = untrained(replace(data, subclasses=np.full(COUNT, -1)))
    assert head.subclass_names == ("all",)
    assert head(images(3)).routing.subclass.tolist() == [0, 0, 0]


def test_impossible_settings_and_data_are_errors():
    with pytest.raises(ConfigError, match=r"levels' widths \[4, 3\] must add up to 12 channels"):
        build(CNCConfig(), shape=SHAPE, dims=(4, 3))
    with pytest.raises(ConfigError, match=r"head\.prompts\.joint_levels must be in -3\.\.2, got \[3, -4\]"):
        new(prompts={"joint_levels": (0, 3, -4)})
    with pytest.raises(DataError, match="CNC has no normal image to learn from"):
        start(fit_data(count=0))
    assert build(CNCConfig(), shape=SHAPE).dims == [12]
