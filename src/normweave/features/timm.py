"""Any timm model with `forward_intermediates`, without the layers above the stages in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from normweave.config import OfflinePairConfig, TimmConfig
from normweave.errors import ConfigError, DataError, MissingError, unknown
from normweave.features import weights as weight_files
from normweave.features.frozen import Backbone, check_patches

HOWTO = "See docs/how-to/add-a-backbone.md."


def load(config: TimmConfig, *, height: int, width: int) -> Backbone:
    """Return the model that `config` describes. Its weights do not depend on the size of the images.

    Raises:
        ConfigError: the model, a stage or a block does not exist, the size is not a multiple of the patch of a plain
            vision transformer, or the weights have a format that can execute code.
        MissingError: the weights are not on this machine and cannot be downloaded.
        DataError: the weights are damaged or belong to another model.
    """
    backbone = load_model(config.backbone, config)
    if patch := patch_side(backbone.model, name=backbone.name):
        trained = backbone.model.pretrained_cfg["input_size"][1:]
        check_patches(backbone.name, patch=patch, height=height, width=width, trained=trained)
    return backbone


def pair(config: TimmConfig) -> None:
    """Return None: ImageNet models have no text side."""


def load_model(name: str, config: TimmConfig | OfflinePairConfig) -> Backbone:
    """Return timm's model `name` with the weights, stages and grid of `config`. Raises what `load` raises."""
    weights = config.weights
    chosen = config.blocks if isinstance(config, TimmConfig) else ()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise unknown("backbone", name, {*near, *weight_files.PACKAGES}, f"Choose any timm model. {HOWTO}")
    try:
        origin: Any = timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = timm.list_pretrained(f"{architecture}.*")
        raise unknown("tag of backbone", name, {architecture, *tags}, HOWTO) from None
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=False)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    indices = blocks(model, name=name, numbers=chosen) if chosen else stages(model, name=name, strides=config.strides)
    model.prune_intermediate_layers(indices, prune_norm=True)
    if weights != "random":
        if weights != "auto":
            state = _from_file(Path(weights))
        elif name in weight_files.PACKAGES:
            state = weight_files.read_packaged(name, shapes)
        else:
            state = _from_file(_from_hub(name, origin and origin.hf_hub_id))
        _load_state(model, state, name=name)
    return Backbone(
        model=model,
        name=name,
        indices=indices,
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
        grid_stride=config.grid_stride,
        neighbourhood=config.neighbourhood,
        average=bool(chosen),
    )


def stages(model: Any, *, name: str, strides: Sequence[int]) -> list[int]:
    """Return the indices of the intermediates with these strides, numbered as in timm, shallowest first.

    If several have one stride, the deepest is used: for a plain vision transformer its last block.

    Raises:
        ConfigError: the model has no intermediates, or none with one of the strides.
    """
    deepest = {stride: index for index, stride in enumerate(_strides(model, name=name))}
    absent = sorted(set(strides) - set(deepest))
    if absent:
        raise ConfigError(
            f"Backbone {name!r} has no stage of stride {', '.join(map(str, absent))}. It has {sorted(deepest)}: "
            f"choose from these, for example --set features.strides=[{max(deepest)}]."
        )
    return sorted(deepest[stride] for stride in set(strides))


def blocks(model: Any, *, name: str, numbers: Sequence[int]) -> list[int]:
    """Return the indices of these blocks, numbered from 1, of a plain vision transformer; shallowest first.

    Raises:
        ConfigError: the model is not a plain vision transformer, or does not have one of the blocks.
    """
    strides = _strides(model, name=name)
    if not patch_side(model, name=name):
        raise ConfigError(
            f"features.blocks needs a plain vision transformer, in which all blocks have one stride; {name!r} has the "
            f"strides {sorted(set(strides))}. Choose stages with features.strides, or a model such as "
            "vit_small_patch14_reg4_dinov2."
        )
    depth = len(strides)
    absent = [number for number in numbers if number > depth]
    if absent:
        raise ConfigError(
            f"Backbone {name!r} has no block {', '.join(map(str, absent))}. It has 1..{depth}: choose from these, for "
            f"example --set features.blocks=[{depth}]."
        )
    return sorted({number - 1 for number in numbers})


def patch_side(model: Any, *, name: str) -> int:
    """Return the side of the patches of a plain vision transformer in pixels, 0 for any other model.

    Raises:
        ConfigError: the model has no intermediates.
    """
    stride, *others = set(_strides(model, name=name))
    return int(stride) if hasattr(model, "patch_embed") and not others else 0


def _strides(model: Any, *, name: str) -> list[int]:
    """Return the stride of each intermediate to the input. Raises ConfigError if the model has no intermediates."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"Backbone {name!r} has no forward_intermediates, so no feature grid can be read from it. "
            f"Choose a timm model that has it. {HOWTO}"
        )
    # A list in most of timm's models, an object that contains the list in the others.
    infos = getattr(model.feature_info, "info", model.feature_info)
    return [info["reduction"] for info in infos]


def _load_state(model: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    cure = f"Give the state dict of timm's {name}, under timm's own names. {HOWTO}"
    used = model.state_dict()
    weight_files.check_state(state, used, name=name, cure=cure)
    model.load_state_dict({key: state[key] for key in used})


def _from_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, the only format that cannot execute code."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"features.weights must be 'auto', 'random' or a .safetensors file, got '{path}'. Other formats can "
            "execute code when they are read. Convert a state dict that you trust with: python -c "
            "\"import torch; from safetensors.torch import save_file; save_file(torch.load('weights.pth', "
            "weights_only=True), 'weights.safetensors')\""
        )
    if not path.is_file():
        raise MissingError(f"The weights file '{path}' does not exist. Check features.weights.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"'{path}' cannot be read as safetensors ({error}). Download or convert it again.") from error
    return tensors


def _from_hub(name: str, repository: str | None) -> Path:
    """Return the path of timm's own weights, from the hub's cache on this machine or downloaded."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cure = (
        f"Copy its model.safetensors here from a machine that has it (hub: {repository}) and name it with --set "
        f"features.weights=PATH, or choose a backbone that needs no download: {', '.join(weight_files.PACKAGES)}."
    )
    if not repository:
        raise MissingError(f"timm has no weights for backbone {name!r}. {cure}")
    try:
        return Path(hf_hub_download(repository, "model.safetensors", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        weight_files.check_connection(constants.ENDPOINT)
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, HfHubHTTPError) as error:
        raise MissingError(
            f"The weights of backbone {name!r} are not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {str(error)[:200]}). {cure}"
        ) from error
