import os
import socket

import pytest
import timm
import torch
from safetensors.torch import save_file

from normweave.errors import ConfigError, DataError, MissingError
from normweave.features import trunk


def load(name="resnet18", *, weights="random", strides=(4, 8)):
    return trunk.load(name, weights=str(weights), strides=strides)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def test_a_safetensors_file_of_timms_names_is_taken(tmp_path, state):
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
        DataError, match=r"lack 60 of the 60 tensors that resnet18 needs, first 'conv1.weight'. Are these"
    ):
        load(weights=tmp_path / "own.safetensors")


def test_a_tensor_of_another_shape_is_refused(tmp_path, state):
    save_file(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "own.safetensors")
    with pytest.raises(
        DataError, match=r"'conv1.weight' of resnet18 must have shape \[64, 3, 7, 7\], got \[64, 1, 7, 7\]"
    ):
        load(weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, state, number):
    broken = state["layer1.0.conv1.weight"].clone()
    broken[3, 2, 1, 0] = number
    save_file(state | {"layer1.0.conv1.weight": broken}, tmp_path / "own.safetensors")
    with pytest.raises(DataError, match=r"'layer1.0.conv1.weight' of resnet18 holds NaN or infinity"):
        load(weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("name", ["own.pth", "own.pt", "own.bin", "own"])
def test_formats_that_may_execute_code_are_not_even_opened(tmp_path, name):
    with pytest.raises(
        ConfigError, match=r"a .safetensors file, got .* may execute code .* Convert .* save_file"
    ):
        load(weights=tmp_path / name)


def test_a_damaged_or_absent_file_is_named(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        DataError, match=r"own.safetensors' cannot be read as safetensors .* Fetch or convert it again"
    ):
        load(weights=tmp_path / "own.safetensors")
    with pytest.raises(
        MissingError, match=r"There is no weights file .*gone.safetensors'. Check features.weights."
    ):
        load(weights=tmp_path / "gone.safetensors")


def test_an_unknown_backbone_gets_a_short_answer():
    with pytest.raises(ConfigError, match=r"Unknown backbone 'resnet81'. Did you mean 'resnet18'") as error:
        load("resnet81")
    assert "tf_efficientnet_lite0" in str(error.value)
    assert "docs/how-to/add-a-backbone.md" in str(error.value)
    assert len(str(error.value)) < 400


def test_a_name_that_would_fetch_foreign_settings_is_unknown():
    with pytest.raises(ConfigError, match=r"Unknown backbone 'hf-hub:timm/resnet18"):
        load("hf-hub:timm/resnet18.a1_in1k")


def test_an_unknown_tag_names_the_known():
    with pytest.raises(
        ConfigError, match=r"Unknown tag of backbone 'resnet18.a1_in2k'. Did you mean 'resnet18.a1_in1k'"
    ):
        load("resnet18.a1_in2k")


def test_a_stride_that_the_network_does_not_have_names_those_it_has():
    with pytest.raises(
        ConfigError, match=r"no stage of stride 4, 8. It has \[16\]: .* --set features.strides=\[16\]"
    ):
        load("vit_tiny_patch16_224", strides=(4, 8))


def test_of_several_stages_of_one_stride_the_deepest_is_taken():
    assert load("vit_tiny_patch16_224", strides=(16,)).indices == [11]


def test_the_order_of_the_strides_does_not_matter():
    assert load(strides=(16, 4, 8, 4)).indices == [1, 2, 3]


def test_a_network_without_intermediates_says_so():
    with pytest.raises(
        ConfigError, match=r"'gernet' offers no forward_intermediates, .* docs.how-to.add-a-backbone.md"
    ):
        trunk.stages(torch.nn.Linear(1, 1), name="gernet", strides=(4,))


def test_weights_that_are_not_here_name_the_cure_in_seconds(tmp_path, monkeypatch):
    """A port on which nobody listens stands for a machine without network."""
    from huggingface_hub import constants

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))
        with pytest.raises(MissingError) as error:
            load(weights="auto")
    assert "The weights of backbone 'resnet18' are not on this machine and cannot be downloaded" in str(
        error.value
    )
    assert "--set features.weights=PATH" in str(error.value)
    assert "needs no download: tf_efficientnet_lite0" in str(error.value)
    assert "timm/resnet18.a1_in1k" in str(error.value)
