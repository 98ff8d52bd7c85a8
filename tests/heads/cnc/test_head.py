import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from builders import JOINT_DIM, TOKEN_DIM, InMemory, TinyPair, head_config
from normweave.config import CNCConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.heads import build
from normweave.heads.cnc.constraint import distillation, promotion
from normweave.training import train
from normweave.types import FitData, SyntheticAnomalies

DIMS, GRID, N = (4, 3, 5), (4, 4), 16
SHAPE = (sum(DIMS), *GRID)
COUNT, VARIANTS = 24, 2
MEAN = torch.linspace(-2, 2, SHAPE[0])
DEVIATION = torch.linspace(0.5, 3, SHAPE[0])
QUICK = {
    "width": 16,
    "heads": 2,
    "experts": 3,
    "context_words": 2,
    "normal_states": ("flawless surface", "perfect"),
    "abnormal_states": ("damaged surface", "a crack"),
    "guide_words": 3,
    "temperature": 0.07,
    "synthetic_share": 0.5,
    "prompt_epochs": 2,
    "epochs": 2,
    "batch_images": 6,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, *, kinds=2, seed=0):
    """Standardised features; kinds differ in the means of their channels."""
    means = 2 * torch.randn(kinds, SHAPE[0], 1, 1, generator=seeded(8))
    return means[torch.arange(count) % kinds] + 0.4 * torch.randn(count, *SHAPE, generator=seeded(seed))


def fit_data(*, pair=None, pseudo=True, held_out=8, count=COUNT, names=("a", "b")):
    clean = images(count, seed=1)
    broken = clean.repeat(VARIANTS, 1, 1, 1)
    broken[:, :, 1:3, 1:3] += 2 * torch.randn(len(broken), SHAPE[0], 1, 1, generator=seeded(2))
    shares = torch.zeros(len(broken), *GRID)
    shares[:, 1:3, 1:3] = 1
    return FitData(
        features=InMemory(clean),
        subclasses=np.arange(count) % 2,
        names=names,
        groups=np.arange(count),
        holdout=np.arange(count) < held_out,
        seed=3,
        mean=MEAN,
        std=DEVIATION,
        pair=pair,
        synthetic=SyntheticAnomalies(InMemory(broken), lambda rows: shares[torch.from_numpy(rows)])
        if pseudo
        else None,
    )


SECTIONS = {
    "experts": "gating.experts",
    "context_words": "prompts.context_words",
    "normal_states": "prompts.normal_states",
    "abnormal_states": "prompts.abnormal_states",
    "temperature": "prompts.temperature",
    "joint_levels": "prompts.joint_levels",
    "text": "prompts.text",
    "text_weight": "prompts.weight",
    "distillation": "prompts.distillation",
    "promotion": "prompts.promotion",
    "prompt_epochs": "prompts.training.epochs",
    "guide": "guide.tokens",
    "guide_words": "guide.words",
    "guide_residual": "guide.residual",
    "synthetic_share": "synthetic.share",
    "synthetic_variants": "synthetic.variants",
    "per_kind": "per_subclass",
    "epochs": "training.epochs",
    "batch_images": "training.batch_images",
    "learning_rate": "training.learning_rate",
}


def fresh(**changed):
    values = QUICK | changed
    if not values.get("moe", True):
        del values["experts"]
    if values.get("guide", "off") == "off":
        del values["guide_words"]
    if values.get("synthetic_variants") == 0:
        del values["synthetic_share"]
    config = head_config("cnc", **{SECTIONS.get(name, name): value for name, value in values.items()})
    return build(config, shape=SHAPE, dims=DIMS)


def begun(data, **changed):
    head = fresh(**changed)
    head.begin(data)
    return head


def untrained(data, **changed):
    """All that is in closed form; the weights are as drawn."""
    head = begun(data, **changed)
    head.finish(data)
    return head


def trained(data, **changed):
    head = begun(data, **changed)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return head


def lesson_of(head, data, name):
    (stage,) = [stage for stage in head.stages(data) if stage.name == name]
    return stage


def levels_of(features):
    return torch.split(features.flatten(2).transpose(1, 2), DIMS, dim=2)


def cosine(one, other):
    one, other = one.tolist(), other.tolist()
    dot = sum(x * y for x, y in zip(one, other, strict=True))
    return dot / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))


def maps_by_hand(head, features, *, joint_levels=(0, 1, 2)):
    """1 - cos of each level and, last, the mean log odds of the abnormal prompts, (B, L + 1, N), place by place."""
    tokens, levels = features.flatten(2).transpose(1, 2), levels_of(features)
    decoded = head.decoder(tokens, head.guidance.tokens).levels
    joint = head.joint(levels, joint_levels)  # (B, levels, N, J)
    maps = torch.zeros(len(features), len(DIMS) + 1, N, dtype=torch.float64)
    for b in range(len(features)):
        for n in range(N):
            for level in range(len(DIMS)):
                maps[b, level, n] = 1 - cosine(levels[level][b, n], decoded[level][b, n])
            for level in range(len(joint_levels)):
                said = [cosine(joint[b, level, n], anchor) / 0.07 for anchor in head.prompts.anchors]
                normal, abnormal = (sum(math.exp(s) for s in part) for part in (said[:2], said[2:]))
                maps[b, -1, n] += math.log(abnormal / normal) / len(joint_levels)
    return maps


@pytest.fixture(scope="module")
def pair():
    return TinyPair(DIMS)


@pytest.fixture(scope="module")
def head(pair):
    """A whole fit: three levels, a pair with a text, a guide, and damage."""
    return trained(fit_data(pair=pair), guide="text", dropout=0.1)


@torch.no_grad()
@pytest.mark.parametrize("joint_levels", [(), (1,), (-1, 0)])
def test_the_score_by_hand(pair, joint_levels):
    """mean_l (1 - cos(E_l, D_l) - mu_l) / sd_l + beta (margin - mu) / sd, on the scale of the nearest kind."""
    head = untrained(fit_data(pair=pair), guide="text", border=0, text_weight=0.7, joint_levels=joint_levels)
    few = images(3, seed=5)

    out = head(few)

    looked_at = {(): (0, 1, 2), (1,): (1,), (-1, 0): (2, 0)}[joint_levels]
    maps = maps_by_hand(head, few, joint_levels=looked_at)
    for b, kind in enumerate((0, 1, 0)):
        mean, deviation = head.scale_mean[kind, :, None], head.scale_deviation[kind, :, None]
        standard = (maps[b] - mean) / deviation
        expected = standard[:3].mean(0) + 0.7 * standard[3]
        torch.testing.assert_close(out.scores[b].flatten(), expected.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            out.reconstruction[b].flatten(), maps[b, :3].mean(0).float(), rtol=1e-3, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("per_kind", [True, False])
@pytest.mark.parametrize("held_out", [8, 5, 0])
def test_the_scale_is_that_of_the_held_out_normals_of_each_kind(pair, held_out, per_kind):
    """A kind with fewer than three of them has that of all together; without any, all images must do."""
    data = fit_data(pair=pair, held_out=held_out)
    head = untrained(data, border=0, per_kind=per_kind)

    rows = np.flatnonzero(data.holdout) if held_out else np.arange(COUNT)
    maps = maps_by_hand(head, data.features.read(rows))
    for kind in (0, 1):
        own = np.flatnonzero(rows % 2 == kind)
        if len(own) < 3 or not per_kind:
            own = np.arange(len(rows))
        found = maps[own].transpose(0, 1).flatten(1)  # (L + 1, images N)
        torch.testing.assert_close(head.scale_mean[kind], found.mean(1).float(), rtol=1e-3, atol=1e-4)
        deviation = found.std(1, unbiased=False).float()
        torch.testing.assert_close(head.scale_deviation[kind], deviation, rtol=1e-3, atol=1e-4)


def test_a_fit_names_the_kinds_and_a_stranger_lies_far_from_both(head):
    few = images(6, seed=6)
    routing = head(few).routing
    assert head.subclass_names == ("a", "b")
    assert routing.subclass.tolist() == [0, 1, 0, 1, 0, 1]
    assert routing.weights.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 3
    stranger = images(3, kinds=3, seed=6)[2:]
    assert head(stranger).routing.distance > 3 * routing.distance.max()


def test_the_border_takes_the_map_of_its_inner_neighbours(pair):
    data, few = fit_data(pair=pair), images(2, seed=5)
    out = untrained(data, border=1)(few)
    for found in (out.scores, out.reconstruction):
        assert torch.equal(found[:, 0], found[:, 1])
        assert torch.equal(found[:, :, -1], found[:, :, -2])


@pytest.mark.parametrize(
    ("asked", "of", "got"),
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
def test_prompts_are_what_was_asked_for(asked, of, got):
    data = fit_data(pair=None if of == "no pair" else TinyPair(DIMS, text=of == "text"))
    head = untrained(data, text=asked)
    assert head.notes() == {"text": got}
    stages = [stage.name for stage in head.stages(data)]
    assert stages == (["prompts", "decoder"] if got in ("learned", "free") else ["decoder"])
    assert (
        head.prompts.learnt.shape
        == {
            "learned": (2, 8),
            "free": (4, JOINT_DIM),
            "random": (4, JOINT_DIM),
            "off": (4, 0),
        }[got]
    )
    out = head(images(2))
    if got == "off":
        assert head.prompts.anchors.shape == (4, 0)
        plain = untrained(data, text=asked, text_weight=0.0)(images(2))
        torch.testing.assert_close(out.scores, plain.scores)  # there is no text score
    else:
        torch.testing.assert_close(head.prompts.anchors.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("given", [None, TinyPair(DIMS, text=False)], ids=["no pair", "no text"])
def test_learned_prompts_without_a_text_encoder_are_refused(given):
    with pytest.raises(
        MissingError,
        match=r"head\.prompts\.text=learned needs a text encoder, and these features have none here\. Install "
        r"one with: pip install 'normweave\[clip\]', choose features\.kind=open_clip or offline_pair, or set "
        r"head\.prompts\.text=auto\.",
    ):
        begun(fit_data(pair=given), text="learned")


@pytest.mark.parametrize(
    ("guide", "text", "width"),
    [("text", "auto", TOKEN_DIM), ("text", "free", TOKEN_DIM), ("free", "auto", 16), ("off", "auto", 1)],
)
def test_the_guide_attends_to_text_where_there_is_one(pair, guide, text, width):
    head = untrained(fit_data(pair=pair), guide=guide, text=text)
    assert head.guidance.tokens.shape[1] == width
    assert (head.decoder.guide is None) == (guide == "off")


@pytest.mark.parametrize("given", [None, TinyPair(DIMS, text=False)], ids=["no pair", "no text"])
def test_a_guide_of_text_without_a_text_encoder_is_refused(given):
    with pytest.raises(
        MissingError,
        match=r"head\.guide\.tokens=text needs a text encoder.*or set head\.guide\.tokens=free\.",
    ):
        begun(fit_data(pair=given), guide="text")


@pytest.mark.parametrize("text", ["free", "random"])
def test_vectors_without_a_space_to_put_them_into_are_refused(text):
    with pytest.raises(
        ConfigError,
        match=rf"head\.prompts\.text={text} puts vectors into a space .* or set head\.prompts\.text=off\.",
    ):
        begun(fit_data(pair=None), text=text)


def test_the_pair_is_shown_the_raw_features_of_all_fit_normals():
    own = TinyPair(DIMS)
    data = fit_data(pair=own)
    begun(data)
    raw = data.features.features * DEVIATION[:, None, None] + MEAN[:, None, None]
    torch.testing.assert_close(own.fitted_on, raw)


def test_features_without_a_scale_are_raw_already():
    own = TinyPair(DIMS)
    data = fit_data(pair=own)
    begun(FitData(**(vars(data) | {"mean": None, "deviation": None})))
    torch.testing.assert_close(own.fitted_on, data.features.features)


@pytest.mark.parametrize("training", [True, False])
def test_the_decoders_loss_by_hand(pair, training):
    """Damaged images are to be decoded as if they were not; the constraint looks at what was decoded."""
    data = fit_data(pair=pair)
    weighed = {"balance": 0.3, "distillation": 0.5, "promotion": 0.7}
    head = begun(data, guide="text", dropout=0.2, **weighed)
    stage = lesson_of(head, data, "decoder")
    few = images(6, seed=5)

    losses = stage.loss(few, torch.zeros(6), generator=seeded(4), training=training)

    generator = seeded(4)
    shown, clean = few, few
    if training:
        drawn = stage.damaged.draw(3, held_out=False, generator=generator)
        shown, clean = torch.cat([few[3:], drawn.features]), torch.cat([few[3:], drawn.clean])
        assert not torch.equal(shown, clean)
    tokens = pair.text.encode_context(head.guidance.learnt, "flawless surface")
    decoded, uneven = head.decoder(
        shown.flatten(2).transpose(1, 2), tokens, generator=generator if training else None
    )
    levels = levels_of(clean)
    rebuilt = [
        1 - cosine(levels[level][b, n], decoded[level][b, n])
        for level in range(3)
        for b in range(6)
        for n in range(N)
    ]
    anchors = head.prompts(pair.text)
    of_clean, of_decoded = (head.joint(given, [0, 1, 2]) @ anchors.T for given in (levels, decoded))
    expected = {
        "reconstruction": sum(rebuilt) / len(rebuilt),
        "balance": uneven.item(),
        "distillation": distillation(of_clean, of_decoded).item(),
        "promotion": promotion(of_decoded, normal=2, temperature=0.07).item(),
    }
    whole = expected["reconstruction"] + sum(weight * expected[name] for name, weight in weighed.items())
    got = {name: value.item() for name, value in losses.items()}
    assert got == pytest.approx(expected | {"loss": whole}, rel=1e-3, abs=1e-4)


def test_without_text_terms_reconstruction_is_all_there_is(pair):
    data = fit_data(pair=pair, pseudo=False)
    for changed in ({"text": "off"}, {"distillation": 0.0, "promotion": 0.0}):
        stage = lesson_of(begun(data, moe=False, **changed), data, "decoder")
        losses = stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)
        assert losses.keys() == {"loss", "reconstruction", "balance"}
        assert losses["loss"] == losses["reconstruction"]


def test_held_out_normals_are_judged_without_damage_noise_and_dropout(pair):
    data = fit_data(pair=pair)
    stage = lesson_of(begun(data, dropout=0.5), data, "decoder")
    few = images(6, seed=5)

    def loss(seed, training):
        return stage.loss(few, torch.zeros(6), generator=seeded(seed), training=training)["loss"].item()

    assert loss(0, False) == loss(1, False)
    assert data.synthetic.features.reads == []
    assert loss(0, True) != loss(1, True)


def test_a_step_with_one_image_has_none_damaged(pair):
    data = fit_data(pair=pair)
    stage = lesson_of(begun(data), data, "decoder")
    loss = stage.loss(images(1), torch.zeros(1), generator=seeded(), training=True)["loss"]
    assert torch.isfinite(loss)


def test_gradient_of_the_decoders_lesson_reaches_decoder_and_guide_and_nothing_frozen(pair):
    """Biases that drop out have none: of keys by the softmax, of the guide's projection by its centring."""
    data = fit_data(pair=pair)
    head = begun(data, guide="text", dropout=0.1)
    stage = lesson_of(head, data, "decoder")
    stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)["loss"].backward()

    taught = {name for name, _ in stage.module.named_parameters()}
    assert len(taught) == len(list(head.decoder.parameters())) + 1  # and the guide's words
    for name, parameter in stage.module.named_parameters():
        if not name.endswith(("key.bias", "project.bias")):
            assert parameter.grad.abs().sum() > 1e-8, name
    assert head.prompts.learnt.grad is None
    assert not head.prompts.anchors.requires_grad
    assert list(head.joint.parameters()) == []
    assert not any(buffer.requires_grad for buffer in head.joint.buffers())
    assert all(parameter.grad is None for parameter in pair.text.parameters())


def test_gradient_of_the_prompts_lesson_reaches_the_context_alone(pair):
    data = fit_data(pair=pair)
    head = begun(data)
    stage = lesson_of(head, data, "prompts")
    stage.loss(images(6), torch.zeros(6), generator=seeded(), training=True)["loss"].backward()
    assert head.prompts.learnt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in head.decoder.parameters())
    assert all(parameter.grad is None for parameter in pair.text.parameters())


def test_lessons_never_learn_from_damage_of_held_out_images(pair):
    data = fit_data(pair=pair)
    head = begun(data)
    for stage in head.stages(data):
        for seed in range(10):
            stage.loss(images(6), torch.zeros(6), generator=seeded(seed), training=True)
    asked = {row % COUNT for rows in data.synthetic.features.reads for row in rows.tolist()}
    assert asked <= set(range(8, COUNT))
    assert len(asked) > 8


def test_asks_for_damage_and_does_without():
    head = fresh(synthetic_variants=3)
    assert head.synthetic_variants == 3
    data = fit_data(pair=TinyPair(DIMS), pseudo=False)
    for stage in begun(data).stages(data):
        assert stage.damaged is None
        assert torch.isfinite(
            stage.loss(images(2), torch.zeros(2), generator=seeded(), training=True)["loss"]
        )


@torch.no_grad()
def test_scores_do_not_depend_on_the_batch_nor_on_train_mode(head):
    few = images(5, seed=6)
    together = head(few)
    head.train()
    for row in range(5):
        alone = head(few[row : row + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            alone.reconstruction[0], together.reconstruction[row], rtol=1e-4, atol=1e-4
        )
    assert not head.training


def test_the_same_seed_gives_the_same_head(head, pair):
    again = trained(fit_data(pair=pair), guide="text", dropout=0.1).state()
    assert again.keys() == head.state().keys()
    for name, tensor in head.state().items():
        assert torch.equal(tensor, again[name]), name


def test_decodes_normal_places_better_than_damaged_ones(pair):
    data = fit_data(pair=pair)
    head = trained(data, epochs=8, learning_rate=5e-3)
    few = images(6, seed=6)
    broken = few.clone()
    broken[:, :, 1:3, 1:3] += 2 * torch.randn(6, SHAPE[0], 1, 1, generator=seeded(7))
    for found in ("reconstruction", "scores"):
        before, after = (getattr(head(given), found)[:, 1:3, 1:3] for given in (few, broken))
        assert after.mean() > before.mean() + 2 * before.std(), found


def test_bf16_trains_close_to_32_bits(pair):
    data = fit_data(pair=pair)
    found = {}
    for precision in ("32", "bf16"):
        head = begun(data, precision=precision, synthetic_variants=0)
        found[precision] = train(lesson_of(head, data, "decoder"), data, device="cpu").losses
        assert all(tensor.dtype == torch.float32 for tensor in head.decoder.state_dict().values())
    assert found["bf16"] == pytest.approx(found["32"], rel=0.02)
    assert found["bf16"] != found["32"]


@torch.no_grad()
@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize(
    ("guide", "text"), [("text", "auto"), ("free", "free"), ("off", "random"), ("free", "off")]
)
def test_what_is_saved_scores_as_what_was_fit(guide, text, moe):
    data = fit_data(pair=TinyPair(DIMS, layer_norm=True))
    changed = {"guide": guide, "text": text, "moe": moe, "bottleneck": 4 * moe}
    head = untrained(data, **changed)
    loaded = fresh(**changed)
    loaded.load_state(load(save(head.state())))
    few = images(4, seed=6)
    for one, other in zip(head(few), loaded(few), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_without_names_there_is_one_kind():
    data = fit_data(names=())
    head = untrained(FitData(**(vars(data) | {"subclasses": np.full(COUNT, -1)})))
    assert head.subclass_names == ("all",)
    assert head(images(3)).routing.subclass.tolist() == [0, 0, 0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"levels' widths \[4, 3\] must add up to 12 channels"):
        build(CNCConfig(), shape=SHAPE, dims=(4, 3))
    with pytest.raises(ConfigError, match=r"head\.joint_levels must lie in -3\.\.2, got \[3, -4\]"):
        fresh(joint_levels=(0, 3, -4))
    with pytest.raises(DataError, match="CNC has no normal image to learn from"):
        begun(fit_data(count=0))
    assert build(CNCConfig(), shape=SHAPE).dims == [12]
