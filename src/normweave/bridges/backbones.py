"""Register our backbones in timm, so that anomalib's models find them by name with their weights.

Some of anomalib's models require pretrained weights, which timm would download. A name registered here loads the
weights of `features.backbone` and `features.weights`: from a package or from a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import timm
import torch

from normweave.config import TimmConfig
from normweave.features.timm import load_model


class RegisteredBackbone(NamedTuple):
    """A backbone registered in timm."""

    name: str
    """Its name in timm: `timm.create_model(name, pretrained=True)` downloads nothing."""
    layers: list[str]
    """Module names of the stages in use, shallowest first."""
    channels: list[int]
    """Channels of these stages."""
    indices: list[int]
    """Indices of these stages in timm."""
    mean: Sequence[float]
    std: Sequence[float]


def register(config: TimmConfig, *, strides: Sequence[int]) -> RegisteredBackbone:
    """Register a backbone with its weights in timm.

    Raises:
        ConfigError, MissingError, DataError: as `features.timm.load`.
    """
    with torch.random.fork_rng(devices=[]):
        loaded = load_model(config.backbone, replace(config, strides=tuple(strides)))
        model: Any = timm.create_model(config.backbone, pretrained=False)
    infos = getattr(model.feature_info, "info", model.feature_info)
    chosen = [infos[index] for index in loaded.indices]
    mark = hashlib.sha256(config.weights.encode()).hexdigest()[:8]
    name = f"normweave_{config.backbone.replace('.', '_')}_{mark}"
    if not timm.is_model(name):
        _add(name, config, deepest=max(info["reduction"] for info in infos))
    return RegisteredBackbone(
        name=name,
        layers=[info["module"] for info in chosen],
        channels=[info["num_chs"] for info in chosen],
        indices=loaded.indices,
        mean=loaded.mean,
        std=loaded.std,
    )


def _add(name: str, config: TimmConfig, *, deepest: int) -> None:
    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **arguments: Any,  # timm's own, such as features_only and out_indices
    ) -> Any:
        model = timm.create_model(config.backbone, pretrained=False, **arguments)
        if pretrained:
            state = load_model(config.backbone, replace(config, strides=(deepest,))).model.state_dict()
            # Layers after the last stage are missing and not needed.
            own = model.state_dict()
            model.load_state_dict(own | {key: state[key] for key in own if key in state})
        return model

    entrypoint.__name__ = name
    timm.models.register_model(entrypoint)
