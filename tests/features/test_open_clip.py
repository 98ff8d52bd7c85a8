"""CLIP towers against open_clip's own forward, on a small model of random weights that is read from a file."""

import json
import os
import shlex
import socket
import subprocess
import sys
import warnings
import zipfile

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file
from torch.nn import functional

from normweave import features
from normweave.config import OpenClipConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.features.open_clip import load as load_config

SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
VARIANTS = {
    "small": {},
    "small-bias": {"text_cfg": {"proj_bias": True}},  # its text projection is a linear layer
    "small-gelu": {"quick_gelu": False},
    "small-pooled": {"vision_cfg": {"attentional_pool": True}},
    "small-resnet": {"vision_cfg": {"layers": [1, 1, 1, 1]}},
    "small-biased": {"init_logit_bias": -10},
    "small-last": {"text_cfg": {"pool_type": "last"}},
    "small-both-ways": {"text_cfg": {"no_causal_mask": True}},
    "small-bert": {"text_cfg": {"hf_model_name": "bert-base-uncased"}},
    "small-word-pieces": {"text_cfg": {"hf_tokenizer_name": "bert-base-uncased"}},
}
HEIGHT, WIDTH, PATCH = 32, 32, 8


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """Every variant is one of open_clip's models while these tests run."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
        patch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS})
        for name, change in VARIANTS.items():
            config = {
                key: value | change.get(key, {}) if isinstance(value, dict) else change.get(key, value)
                for key, value in (change | SMALL).items()
            }
            (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        yield


@pytest.fixture(scope="module")
def states(models):
    """Random weights of two models; gains and offsets of the norms too, which start at one and zero."""
    random = torch.Generator().manual_seed(3)
    return {
        name: {
            key: tensor + 0.2 * torch.randn(tensor.shape, generator=random)
            for key, tensor in open_clip.CLIP(**open_clip.get_model_config(name)).state_dict().items()
        }
        for name in ("small", "small-bias")
    }


@pytest.fixture(scope="module")
def weights(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (3, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def reference(weights, name="small", **changes):
    """The model as open_clip itself loads it."""
    return open_clip.create_model(name, pretrained=os.fspath(weights / f"{name}.safetensors"), **changes).eval()


def normalised(pixels):
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (pixels / 255 - mean) / std


@torch.no_grad()
def output_of(module, work):
    """Return the output of `module` while `work` runs."""
    kept = []
    hook = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    work()
    hook.remove()
    return kept[0]


def build(path, *, name="small", layers=(2, 4), height=HEIGHT, width=WIDTH):
    config = OpenClipConfig(model=name, weights=str(path), layers=layers, batch_images=2)
    return features.build(config, height=height, width=width)


def load(name="small", *, weights="random", layers=(2, 4), height=HEIGHT, width=WIDTH):
    config = OpenClipConfig(model=name, weights=str(weights), layers=tuple(layers))
    return load_config(config, height=height, width=width)


def pair(path="random", *, name="small", layers=(2, 4)):
    config = OpenClipConfig(model=name, weights=str(path), layers=layers)
    return features.pair(config)


def as_grid(tokens, height=HEIGHT, width=WIDTH):
    """(B, 1 + P, D) to (B, D, h, w) without the class token."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))


# ── the vision side ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_those_of_open_clips_own_forward(weights, pixels):
    extractor = build(weights / "small.safetensors")
    own = reference(weights)

    got = extractor.extract(pixels)

    assert extractor.dims == (32, 32)
    assert extractor.shape == (64, 4, 4)
    for channels, block in ((got[:, :32], 1), (got[:, 32:], 3)):
        module = own.visual.transformer.resblocks[block]
        expected = as_grid(output_of(module, lambda: own.encode_image(normalised(pixels))))
        torch.testing.assert_close(channels, expected, rtol=1e-4, atol=1e-5)
    last = as_grid(output_of(own.visual.transformer, lambda: own.encode_image(normalised(pixels))))
    torch.testing.assert_close(got[:, 32:], last, rtol=1e-4, atol=1e-5)


def test_layers_come_shallowest_first_and_once(weights, pixels):
    expected = build(weights / "small.safetensors", layers=(2, 4)).extract(pixels)
    assert torch.equal(build(weights / "small.safetensors", layers=(4, 2, 4)).extract(pixels), expected)
    assert len(pair(layers=(4, 2, 4)).joint_maps([]).weights) == 2


def test_unused_weights_are_not_kept(weights):
    model = load(weights=weights / "small.safetensors", layers=(2,)).model
    names = set(model.state_dict())
    assert len(model.tower.transformer.resblocks) == 2
    assert not [name for name in names if "ln_post" in name or "proj" in name.split(".") or "token" in name]
    assert not [name for name in pair().text.state_dict() if "visual" in name or "conv1" in name]


def test_a_file_needs_only_what_is_used(states, tmp_path):
    vision = {key: value for key, value in states["small"].items() if key.startswith("visual.")}
    shallow = {key: value for key, value in vision.items() if "resblocks.3" not in key and "post" not in key}
    save_file(shallow, tmp_path / "shallow.safetensors")
    assert load(weights=tmp_path / "shallow.safetensors", layers=(3,)).indices == [2]

    ends = ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias")
    text = {key: value for key, value in states["small"].items() if key in ends or key not in vision}
    save_file(text, tmp_path / "text.safetensors")
    assert pair(tmp_path / "text.safetensors").text.joint_dim == 24


@pytest.mark.parametrize(("height", "width"), [(48, 64), (16, 24), (32, 40)])
def test_position_embeddings_are_resized_as_open_clip_does_it(weights, height, width):
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    extractor = build(weights / "small.safetensors", height=height, width=width)
    own = reference(weights, force_image_size=(height, width))
    expected = output_of(own.visual.transformer, lambda: own.encode_image(normalised(pixels)))

    got = extractor.extract(pixels)

    assert got.shape == (1, 64, height // PATCH, width // PATCH)
    torch.testing.assert_close(got[:, 32:], as_grid(expected, height, width), rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_resized_to_as_many_patches_in_another_order(states, weights):
    """Grids of 4 x 4 and 2 x 8 patches both have sixteen patches; their number does not give the shape."""
    got = load(weights=weights / "small.safetensors", height=16, width=64).model.tower.positional_embedding
    old = states["small"]["visual.positional_embedding"]
    grid = old[1:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]  # (1, D, 4, 4)
    expected = functional.interpolate(grid, (2, 8), mode="bicubic", antialias=True)[0]  # (D, 2, 8)
    torch.testing.assert_close(got[0], old[0])
    torch.testing.assert_close(got[1:].unflatten(0, (2, 8)).permute(2, 0, 1), expected)


def test_at_its_own_size_nothing_is_resized(states, weights):
    tower = load(weights=weights / "small.safetensors").model.tower
    assert torch.equal(tower.positional_embedding, states["small"]["visual.positional_embedding"])


def test_an_extractor_is_restored_from_its_numbers_alone(weights):
    """As a bundle does it: built with random weights, then filled."""
    pixels = torch.randint(0, 256, (1, 3, 16, 64), dtype=torch.uint8)
    made = build(weights / "small.safetensors", height=16, width=64)
    restored = build("random", height=16, width=64)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored.extract(pixels), made.extract(pixels))


def test_sizes_that_patches_do_not_fill_name_the_nearest():
    with pytest.raises(ConfigError) as error:
        load(height=36, width=5)
    assert str(error.value) == (
        "small reads images of multiples of its patch of 8 pixels: prepare.height must be 32 or 40, got 36; "
        "prepare.width must be 8, got 5. It was trained on 32 x 32."
    )


@pytest.mark.parametrize("make", [load, lambda layers: pair(layers=layers)])
def test_an_unknown_layer_is_refused_with_the_known_layers(make):
    with pytest.raises(ConfigError, match=r"small has no layer 5, 24. It has 1..4: .* --set features.layers=\[4\]"):
        make(layers=(2, 5, 24))


# ── into the joint space ─────────────────────────────────────────────────────────────────────────────────────────────


def into_joint(tokens, maps, level):
    """The formula of types.JointMaps, literally."""
    assert maps.layer_norm
    mean = tokens.mean(-1, keepdim=True)
    std = (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    joint = (tokens - mean) / std @ maps.weights[level] + maps.biases[level]
    return joint / joint.norm(dim=-1, keepdim=True)


@torch.no_grad()
def test_joint_maps_are_the_last_norm_and_the_projection(weights, pixels):
    maps = pair(weights / "small.safetensors").joint_maps([])
    own = reference(weights)
    tokens = output_of(own.visual.transformer, lambda: own.encode_image(normalised(pixels)))
    expected = functional.normalize(own.visual.ln_post(tokens) @ own.visual.proj, dim=-1)
    for level in range(2):
        torch.testing.assert_close(into_joint(tokens, maps, level), expected)
    whole = own.encode_image(normalised(pixels), normalize=True)
    torch.testing.assert_close(into_joint(tokens[:, 0], maps, 1), whole)


def test_joint_maps_read_no_images():
    def unread():
        raise AssertionError("read")
        yield

    assert len(pair().joint_maps(unread()).biases) == 2


# ── the text side ────────────────────────────────────────────────────────────────────────────────────────────────────

STATES = ("damaged surface", "normal flawless surface without defects", "x")


@pytest.mark.parametrize("name", ["small", "small-bias"])
@pytest.mark.parametrize("context", ["", "a photo of a"])
@torch.no_grad()
def test_prompts_of_ordinary_words_are_encode_text(weights, name, context):
    text = pair(weights / f"{name}.safetensors", name=name).text
    own = reference(weights, name)
    tokens = open_clip.get_tokenizer(name)([f"{context} {state}" for state in STATES])

    got = text.encode_prompts(text.embed_tokens(context), STATES)

    assert got.shape == (3, text.joint_dim) == (3, 24)
    torch.testing.assert_close(got, own.encode_text(tokens, normalize=True), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prompt_does_not_depend_on_those_beside_it(weights):
    text = pair(weights / "small.safetensors").text
    context = torch.randn(4, text.embedding_dim, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([text.encode_prompts(context, [state]) for state in STATES])
    torch.testing.assert_close(text.encode_prompts(context, STATES), alone)


def test_tokens_are_rows_of_the_embedding(states, weights):
    text = pair(weights / "small.safetensors").text
    ids = open_clip.SimpleTokenizer().encode("a scratched bottle-neck")
    assert torch.equal(text.embed_tokens("a scratched bottle-neck"), states["small"]["token_embedding.weight"][ids])
    assert text.embed_tokens("").shape == (0, text.embedding_dim)


@torch.no_grad()
def test_encode_context_returns_the_outputs_at_the_positions_of_the_context(weights):
    text = pair(weights / "small.safetensors").text
    own = reference(weights)
    tokens = open_clip.get_tokenizer("small")(["damaged surface a photo of a"])

    got = text.encode_context(text.embed_tokens("a photo of a"), "damaged surface")

    assert got.shape == (4, text.output_dim)
    outputs = output_of(own.ln_final, lambda: own.encode_text(tokens))  # (1, 20, U)
    torch.testing.assert_close(got, outputs[0, 3:7], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_encode_context_depends_on_the_state(weights):
    text = pair(weights / "small.safetensors").text
    context = torch.randn(4, text.embedding_dim, generator=torch.Generator().manual_seed(0))
    one, other = (text.encode_context(context, state) for state in ("damaged", "flawless"))
    assert (one - other).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("encode", ["encode_prompts", "encode_context"])
def test_gradients_reach_the_context_and_nothing_frozen(weights, encode):
    text = pair(weights / "small.safetensors").text
    context = torch.randn(4, text.embedding_dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    state = STATES if encode == "encode_prompts" else STATES[0]

    out = getattr(text, encode)(context, state)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()

    assert (context.grad.abs().amax(1) > 1e-6).all()
    assert not any(parameter.requires_grad for parameter in text.parameters())
    assert all(parameter.grad is None for parameter in text.parameters())


def test_the_text_tower_stays_in_eval_mode():
    text = pair().text
    text.train()
    assert not any(module.training for module in text.modules())


def test_prompts_that_are_too_long_are_refused():
    text = pair().text
    assert text.encode_prompts(torch.zeros(17, text.embedding_dim), ["x"]).shape == (1, 24)
    with pytest.raises(
        ConfigError,
        match=r"A prompt of 21 tokens, start and end included, is longer than the 20 .* Use fewer",
    ):
        text.encode_prompts(torch.zeros(18, text.embedding_dim), ["x"])


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_dict_of_torch_is_as_good_and_half_precision_too(states, weights, tmp_path, pixels):
    torch.save(states["small"], tmp_path / "own.pt")
    torch.save({key: tensor.half() for key, tensor in states["small"].items()}, tmp_path / "half.bin")
    expected = build(weights / "small.safetensors").extract(pixels)
    assert torch.equal(build(tmp_path / "own.pt").extract(pixels), expected)
    half = build(tmp_path / "half.bin").extract(pixels)
    assert 0 < (half - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(
        pair(tmp_path / "own.pt").text.embed_tokens("crack"),
        pair(weights / "small.safetensors").text.embed_tokens("crack"),
    )


def test_random_weights_are_the_same_for_both_towers_and_each_time():
    state = load().model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in load().model.state_dict().items())
    assert torch.equal(pair().text.embed_tokens("crack"), pair().text.embed_tokens("crack"))
    torch.manual_seed(0)
    whole = open_clip.CLIP(**open_clip.get_model_config("small"))
    assert torch.equal(state["tower.conv1.weight"], whole.visual.conv1.weight)
    assert torch.equal(pair().weight, whole.visual.proj)


def test_weights_of_another_model_are_refused(states, weights, tmp_path):
    save_file({f"module.{key}": tensor for key, tensor in states["small"].items()}, tmp_path / "own.safetensors")
    with pytest.raises(
        DataError,
        match=r"lack 53 of the 53 tensors that small needs, first 'visual.class_embedding'. Give open_clip's",
    ):
        load(weights=tmp_path / "own.safetensors")
    part = {key: tensor for key, tensor in states["small-bias"].items() if key != "text_projection.bias"}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"lack 1 of the .* small-bias needs, first 'text_projection.bias'"):
        pair(tmp_path / "part.safetensors", name="small-bias")
    broken = states["small"] | {"visual.positional_embedding": torch.zeros(50, 32)}
    save_file(broken, tmp_path / "own.safetensors")
    with pytest.raises(
        DataError, match=r"'visual.positional_embedding' of small must have shape \[17, 32\], got \[50, 32\]"
    ):
        load(weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(states, tmp_path, number):
    for key, make in (("visual.conv1.weight", load), ("ln_final.weight", lambda weights: pair(weights))):
        broken = states["small"][key].clone()
        broken.view(-1)[3] = number
        save_file(states["small"] | {key: broken}, tmp_path / "own.safetensors")
        with pytest.raises(DataError, match=f"Weight '{key}' of small contains NaN or infinity"):
            make(weights=tmp_path / "own.safetensors")


def test_a_damaged_or_absent_file_is_named(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        DataError,
        match=r"own.safetensors' is neither safetensors \(.*\) nor a state dict .* Download or convert it",
    ):
        load(weights=tmp_path / "own.safetensors")
    with pytest.raises(MissingError, match=r"The weights file .*gone.pt' does not exist. Check --clip-weights"):
        load(weights=tmp_path / "gone.pt")


def test_files_that_could_execute_code_or_hold_more_are_refused(states, tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(
        DataError,
        match=r"module.pt' is damaged, or contains objects .* executing code. Save only the model's",
    ):
        load(weights=tmp_path / "module.pt")
    torch.save({"epoch": 3, "state_dict": states["small"]}, tmp_path / "epoch_3.pt")
    with pytest.raises(
        DataError, match=r"epoch_3.pt' contains more than a state dict. .* save only the entry 'state_dict'"
    ):
        load(weights=tmp_path / "epoch_3.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.png", b"")
    with pytest.raises(DataError, match=r"photos.zip' is damaged, or"):
        load(weights=tmp_path / "photos.zip")


@pytest.fixture(scope="module")
def archive(states, tmp_path_factory):
    """As OpenAI publishes CLIP: a TorchScript archive in half precision, three numbers beside the weights."""
    whole = torch.nn.Module()
    numbers = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    for name, tensor in (states["small"] | numbers).items():
        module, (*parents, last) = whole, name.split(".")
        for inner in parents:
            if not hasattr(module, inner):
                module.add_module(inner, torch.nn.Module())
            module = getattr(module, inner)
        module.register_buffer(last, tensor.half())
    path = tmp_path_factory.mktemp("openai") / "small.pt"
    with warnings.catch_warnings():
        # torch gives the format up; OpenAI's files remain
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        torch.jit.script(whole).save(os.fspath(path))
    return path


def test_openais_archive_is_refused_with_a_command_that_converts_it(archive, weights, pixels):
    with pytest.raises(DataError, match=r"small.pt' is a TorchScript archive, as OpenAI .* does not execute") as error:
        load(weights=archive)
    _, _, command = str(error.value).partition("if you trust it: ")
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    subprocess.run([sys.executable, *arguments[1:]], cwd=archive.parent, check=True, stderr=subprocess.DEVNULL)

    got = build(archive.with_suffix(".safetensors")).extract(pixels)

    expected = build(weights / "small.safetensors").extract(pixels)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    with pytest.raises(
        ConfigError,
        match=r"OpenAI's weights in .* were trained with QuickGELU, but small-gelu has GELU",
    ):
        load("small-gelu", weights=archive.with_suffix(".safetensors"))


# ── names, tags, the hub ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_message_for_an_unknown_model_is_short():
    with pytest.raises(
        ConfigError, match=r"Unknown open_clip model 'ViT-L-14-366'. Did you mean 'ViT-L-14-336'"
    ) as error:
        load("ViT-L-14-366")
    assert "ViT-L-14-336-quickgelu" in str(error.value)
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError, match=r"Unknown open_clip model 'hf-hub:timm/vit"):
        load("hf-hub:timm/vit_base_patch32_clip_224.openai")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "small-pooled", "small-resnet"])
def test_another_vision_tower_is_refused(name):
    with pytest.raises(
        ConfigError,
        match=f"vision tower of '{name}' is not open_clip's plain vision transformer.*such as ViT-L-14",
    ):
        load(name)


@pytest.mark.parametrize(
    "name",
    [
        "xlm-roberta-base-ViT-B-32",
        "ViT-L-14-CLIPA",
        "small-biased",
        "small-last",
        "small-both-ways",
        "small-bert",
        "small-word-pieces",
    ],
)
def test_another_text_tower_is_refused(name):
    with pytest.raises(ConfigError, match=f"text tower of '{name}' is not CLIP's causal transformer"):
        pair(name=name)


@pytest.fixture
def tag(monkeypatch):
    """Add the tag 'own' of the small models to those of open_clip."""
    origin = {"hf_hub": "acme/small/", "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1), "quick_gelu": True}
    for name in ("small", "small-gelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, {"own": origin})


def test_an_unknown_tag_is_refused_with_the_known_tags(tag):
    with pytest.raises(
        ConfigError,
        match=r"Unknown weights of small 'owm'. Did you mean 'own'\? Known: own, random. A path of a file",
    ):
        load(weights="owm")


def test_a_tag_of_another_activation_is_refused(tag):
    with pytest.raises(
        ConfigError,
        match=r"'own' were trained with QuickGELU, but small-gelu has GELU: .* Set features.model=small-gelu-quickgelu",
    ):
        load("small-gelu", weights="own")


def test_the_default_model_has_the_activation_of_its_default_weights():
    config = OpenClipConfig()
    assert open_clip.get_pretrained_cfg(config.model, config.weights)["quick_gelu"]
    assert open_clip.get_model_config(config.model)["quick_gelu"]
    with pytest.raises(ConfigError, match=r"Set features.model=ViT-L-14-336-quickgelu"):
        load("ViT-L-14-336", weights="openai", layers=(24,), height=336, width=336)


def test_a_tag_is_read_from_the_hubs_cache_with_its_own_mean(tag, weights, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--acme--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_model.safetensors").symlink_to(weights / "small.safetensors")
    (tmp_path / "models--acme--small" / "refs").mkdir()
    (tmp_path / "models--acme--small" / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))

    got = load(weights="own")

    expected = load(weights=weights / "small.safetensors")
    assert torch.equal(got.model.tower.conv1.weight, expected.model.tower.conv1.weight)
    assert (got.mean, got.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    assert expected.mean == open_clip.OPENAI_DATASET_MEAN


def test_missing_weights_are_reported_within_seconds(tag, tmp_path, monkeypatch):
    """A closed port simulates a machine without network."""
    from huggingface_hub import constants

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))
        with pytest.raises(MissingError) as error:
            load(weights="own")
    assert "The weights 'own' of small are not on this machine and cannot be downloaded" in str(error.value)
    assert "Copy open_clip_model.safetensors (or open_clip_pytorch_model.bin) here" in str(error.value)
    assert "(hub: acme/small) and name it with --clip-weights PATH" in str(error.value)


def test_without_open_clip_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "normweave.features.open_clip")
    monkeypatch.delattr(features, "open_clip")
    with pytest.raises(
        MissingError, match=r"need the package open_clip_torch. Install it: pip install 'normweave\[clip\]'"
    ):
        features.pair(OpenClipConfig())


# ── the real architecture ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@torch.no_grad()
def test_the_papers_architecture_is_read_from_a_file(tmp_path):
    name, height, width = "ViT-L-14-336-quickgelu", 336, 336
    path = tmp_path / "own.safetensors"
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)

    def by_open_clip():
        torch.manual_seed(0)
        own = open_clip.CLIP(**open_clip.get_model_config(name)).eval()
        save_file(own.state_dict(), path)
        words = open_clip.get_tokenizer(name)(["a photo of a damaged surface"])
        tokens = output_of(own.visual.transformer, lambda: own.encode_image(normalised(pixels)))
        return own.encode_text(words, normalize=True), tokens

    prompt, tokens = by_open_clip()
    config = OpenClipConfig(weights=os.fspath(path), batch_images=1)

    text = features.pair(config).text
    torch.testing.assert_close(
        text.encode_prompts(text.embed_tokens("a photo of a"), ["damaged surface"]),
        prompt,
        rtol=1e-4,
        atol=1e-5,
    )
    del text
    extractor = features.build(config, height=height, width=width)
    got = extractor.extract(pixels)

    assert extractor.shape == (4 * 1024, 24, 24)
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (24, 24))
    torch.testing.assert_close(got[:, -1024:], expected, rtol=1e-3, atol=1e-4)
