import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from normweave import settings
from normweave.config import TimmConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.features.timm import load as load_config
from normweave.features.timm import stages

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = "vit_tiny_patch16_224"


def load(name="resnet18", *, weights="random", strides=(4, 8), height=64):
    config = TimmConfig(backbone=name, weights=str(weights), strides=strides)
    return load_config(config, height=height, width=64)


def load_blocks(name, *blocks):
    return load_config(TimmConfig(backbone=name, weights="random", blocks=blocks), height=64, width=64)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def test_a_safetensors_file_with_timms_names_is_read(tmp_path, state):
    save_file(state, tmp_path / "own.safetensors")
    model = load(weights=tmp_path / "own.safetensors").model
    assert len(model.state_dict()) > 20
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_file_needs_only_what_is_used(tmp_path, state):
    used = {key: tensor for key, tensor in state.items() if not key.startswith(("layer3", "layer4", "fc"))}
    save_file(used, tmp_path / "own.safetensors")
    assert load(weights=tmp_path / "own.safetensors").indices == [1, 2]


def test_a_file_that_lacks_tensors_is_refused(tmp_path, state):
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "own.safetensors")
    with pytest.raises(
        DataError,
        match=r"lack 60 of the 60 tensors that resnet18 needs, first 'conv1.weight'. Give the state dict",
    ):
        load(weights=tmp_path / "own.safetensors")


def test_a_tensor_of_another_shape_is_refused(tmp_path, state):
    save_file(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "own.safetensors")
    with pytest.raises(
        DataError, match=r"'conv1.weight' of resnet18 must have shape \[64, 3, 7, 7\], got \[64, 1, 7, 7\]"
    ):
        load(weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, state, number):
    broken = state["layer1.0.conv1.weight"].clone()
    broken[3, 2, 1, 0] = number
    save_file(state | {"layer1.0.conv1.weight": broken}, tmp_path / "own.safetensors")
    with pytest.raises(DataError, match=r"'layer1.0.conv1.weight' of resnet18 contains NaN or infinity"):
        load(weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("name", ["own.pth", "own.pt", "own.bin", "own"])
def test_formats_that_can_execute_code_are_not_opened(tmp_path, name):
    with pytest.raises(ConfigError, match=r"a .safetensors file, got .* can execute code .* Convert .* save_file"):
        load(weights=tmp_path / name)


def test_a_damaged_or_absent_file_is_named(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        DataError, match=r"own.safetensors' cannot be read as safetensors .* Download or convert it again"
    ):
        load(weights=tmp_path / "own.safetensors")
    with pytest.raises(
        MissingError, match=r"The weights file .*gone.safetensors' does not exist. Check features.weights."
    ):
        load(weights=tmp_path / "gone.safetensors")


def test_the_message_for_an_unknown_backbone_is_short():
    with pytest.raises(ConfigError, match=r"Unknown backbone 'resnet81'. Did you mean 'resnet18'") as error:
        load("resnet81")
    assert "tf_efficientnet_lite0" in str(error.value)
    assert "docs/how-to/add-a-backbone.md" in str(error.value)
    assert len(str(error.value)) < 400


def test_a_hub_address_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown backbone 'hf-hub:timm/resnet18"):
        load("hf-hub:timm/resnet18.a1_in1k")


def test_an_unknown_tag_is_refused_with_the_known_tags():
    with pytest.raises(
        ConfigError, match=r"Unknown tag of backbone 'resnet18.a1_in2k'. Did you mean 'resnet18.a1_in1k'"
    ):
        load("resnet18.a1_in2k")


def test_an_unknown_stride_is_refused_with_the_known_strides():
    with pytest.raises(ConfigError, match=r"no stage of stride 4, 8. It has \[16\]: .* --set features.strides=\[16\]"):
        load("vit_tiny_patch16_224", strides=(4, 8))


def test_of_several_stages_of_one_stride_the_deepest_is_used():
    assert load("vit_tiny_patch16_224", strides=(16,)).indices == [11]


def test_the_order_of_the_strides_does_not_matter():
    assert load(strides=(16, 4, 8, 4)).indices == [1, 2, 3]


def test_a_network_without_intermediates_is_refused():
    with pytest.raises(ConfigError, match=r"'gernet' has no forward_intermediates, .* docs.how-to.add-a-backbone.md"):
        stages(torch.nn.Linear(1, 1), name="gernet", strides=(4,))


def test_blocks_are_counted_from_1_and_later_ones_are_removed():
    backbone = load_blocks(TINY, 4, 2, 4)
    assert backbone.indices == [1, 3]
    assert backbone.average
    assert len(backbone.model.blocks) == 4
    assert not load(TINY, strides=(16,)).average


@pytest.mark.parametrize("name", ["resnet18", "pit_ti_224"])
def test_blocks_of_a_model_with_several_strides_are_refused(name):
    message = rf"needs a plain vision transformer, .* '{name}' has the strides \[.*\]. Choose stages with"
    with pytest.raises(ConfigError, match=message):
        load_blocks(name, 2)


def test_a_block_that_does_not_exist_is_refused_with_those_that_do():
    message = r"has no block 13, 20. It has 1..12: .* --set features.blocks=\[12\]"
    with pytest.raises(ConfigError, match=message):
        load_blocks(TINY, 3, 13, 20)


def test_strides_beside_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"strides has no effect with blocks. Leave strides out"):
        TimmConfig(blocks=(3,), strides=(16,))


def test_a_size_that_is_not_a_multiple_of_the_patch_is_refused():
    """timm accepts it, and leaves out the rest at the right and at the bottom."""
    message = r"its patch of 16 pixels: prepare.height must be 64 or 80, got 70. It was trained on 224 x 224"
    with pytest.raises(ConfigError, match=message):
        load(TINY, strides=(16,), height=70)


@pytest.mark.parametrize(
    ("file", "indices", "grid"),
    [
        ("dinov2.yaml", list(range(2, 10)), (32, 32)),
        ("dinov3.yaml", list(range(2, 10)), (28, 28)),
        ("wide-resnet50.yaml", [2, 3], (32, 32)),
    ],
)
def test_the_recipes_fit_their_models(file, indices, grid):
    config = settings.read(CONFIGS / file)
    size = config.prepare
    backbone = load_config(replace(config.features, weights="random"), height=size.height, width=size.width)
    assert backbone.indices == indices
    assert (size.height // backbone.grid_stride, size.width // backbone.grid_stride) == grid
    assert f"# Weights: hf download {timm.get_pretrained_cfg(backbone.name).hf_hub_id} model.safetensors\n" in (
        CONFIGS / file
    ).read_text("utf-8")


def test_missing_weights_are_reported_within_seconds(tmp_path, monkeypatch):
    """A closed port simulates a machine without network."""
    from huggingface_hub import constants

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))
        with pytest.raises(MissingError) as error:
            load(weights="auto")
    assert "The weights of backbone 'resnet18' are not on this machine and cannot be downloaded" in str(error.value)
    assert "--set features.weights=PATH" in str(error.value)
    assert "needs no download: tf_efficientnet_lite0" in str(error.value)
    assert "timm/resnet18.a1_in1k" in str(error.value)
