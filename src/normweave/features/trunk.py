"""A timm model with its weights, cut off above the stages in use."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from normweave.errors import ConfigError, DataError, MissingError, unknown
from normweave.features import carried

HOWTO = "See docs/how-to/add-a-backbone.md."


class Trunk(NamedTuple):
    """What an extractor needs of a model."""

    model: Any  # an nn.Module; Any, because timm's own methods are not in its type
    indices: list[int]  # intermediates in use, as timm counts them, shallowest first
    mean: Sequence[float]  # of the pixels that the weights were made for, R G B, white = 1
    std: Sequence[float]


def load(name: str, *, weights: str, strides: Sequence[int]) -> Trunk:
    """The model `name`, with the weights that `TimmConfig.weights` asks for.

    Raises:
        ConfigError: no such model, no such stages, or weights in a format that can execute code.
        MissingError: the weights are not on this machine and cannot be fetched.
        DataError: the weights are damaged or belong to another model.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise unknown("backbone", name, {*near, *carried.CARRIED}, f"Any timm model will do. {HOWTO}")
    try:
        origin: Any = timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = timm.list_pretrained(f"{architecture}.*")
        raise unknown("tag of backbone", name, {architecture, *tags}, HOWTO) from None
    with torch.random.fork_rng(
        devices=[]
    ):  # the caller's own random numbers go on as if nothing had been made
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=False)
    names = {key: tensor.shape for key, tensor in model.state_dict().items()}
    indices = stages(model, name=name, strides=strides)
    model.prune_intermediate_layers(indices, prune_norm=True)
    if weights != "random":
        if weights != "auto":
            state = _from_file(Path(weights))
        elif name in carried.CARRIED:
            state = carried.read(name, names)
        else:
            state = _from_file(_from_hub(name, origin and origin.hf_hub_id))
        _fill(model, state, name=name)
    return Trunk(model, indices, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


def stages(model: Any, *, name: str, strides: Sequence[int]) -> list[int]:
    """Which intermediates have these strides, as timm counts them, shallowest first.

    Of several of one stride the deepest is taken: of a plain vision transformer its last block.

    Raises:
        ConfigError: the model offers no intermediates, or none of a stride.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"Backbone {name!r} offers no forward_intermediates, so no feature grid can be read from it. "
            f"Choose a timm model that does. {HOWTO}"
        )
    # A list in most of timm's models, an object that holds the list in the others.
    infos = getattr(model.feature_info, "info", model.feature_info)
    deepest = {info["reduction"]: index for index, info in enumerate(infos)}
    absent = sorted(set(strides) - set(deepest))
    if absent:
        raise ConfigError(
            f"Backbone {name!r} has no stage of stride {', '.join(map(str, absent))}. It has {sorted(deepest)}: "
            f"choose from these, for example --set features.strides=[{max(deepest)}]."
        )
    return sorted(deepest[stride] for stride in set(strides))


def _fill(model: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    """Put the weights in. What a file holds beyond the stages in use is left aside.

    Raises:
        DataError: a tensor is absent, of another shape, or not finite.
    """
    wanted = model.state_dict()
    cure = f"Are these the weights of timm's {name}? They must be its state dict, under timm's own names. {HOWTO}"
    absent = [key for key in wanted if key not in state]
    if absent:
        raise DataError(
            f"The weights lack {len(absent)} of the {len(wanted)} tensors that {name} needs, first {absent[0]!r}. "
            f"{cure}"
        )
    for key, tensor in wanted.items():
        got = state[key]
        if got.shape != tensor.shape:
            raise DataError(
                f"Weight {key!r} of {name} must have shape {[*tensor.shape]}, got {[*got.shape]}. {cure}"
            )
        if not got.isfinite().all():
            raise DataError(
                f"Weight {key!r} of {name} holds NaN or infinity: the file is damaged. Fetch it again."
            )
    model.load_state_dict({key: state[key] for key in wanted})


def _from_file(path: Path) -> dict[str, Tensor]:
    """Read safetensors, which cannot execute code, and nothing else."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"features.weights must be 'auto', 'random' or a .safetensors file, got '{path}'. Other formats may "
            "execute code when they are read. Convert a state dict that you trust with: python -c "
            "\"import torch; from safetensors.torch import save_file; save_file(torch.load('weights.pth', "
            "weights_only=True), 'weights.safetensors')\""
        )
    if not path.is_file():
        raise MissingError(f"There is no weights file '{path}'. Check features.weights.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"'{path}' cannot be read as safetensors ({error}). Fetch or convert it again."
        ) from error
    return tensors


def _from_hub(name: str, repository: str | None) -> Path:
    """The safetensors file of timm's own weights: from the hub's cache on this machine, else downloaded."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cure = (
        f"Copy its model.safetensors here from a machine that has it (hub: {repository}) and name it with --set "
        f"features.weights=PATH, or choose a backbone that needs no download: {', '.join(carried.CARRIED)}."
    )
    if not repository:
        raise MissingError(f"timm knows no weights for backbone {name!r}. {cure}")
    try:
        return Path(hf_hub_download(repository, "model.safetensors", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # The hub's client tries again for half a minute; a machine without network is told sooner.
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, HfHubHTTPError) as error:
        raise MissingError(
            f"The weights of backbone {name!r} are not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {str(error)[:200]}). {cure}"
        ) from error
