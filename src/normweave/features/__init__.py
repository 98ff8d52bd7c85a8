"""Prepared images to features of a network that is never trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from normweave.config import FeaturesConfig, OfflinePairConfig, OpenClipConfig, TimmConfig

if TYPE_CHECKING:
    from normweave.features.frozen import FrozenFeatures
    from normweave.types import Pair


def build(config: FeaturesConfig, *, height: int, width: int) -> FrozenFeatures:
    """The extractor that `config` describes, for prepared images of this size in pixels.

    Raises:
        ConfigError: no such backbone, or it cannot do what is asked of it.
        MissingError: its weights are not on this machine and cannot be fetched.
        DataError: its weights are damaged or belong to another backbone.
    """
    # Here, so that a setting can be read without waiting for torch.
    from normweave.features.frozen import FrozenFeatures
    from normweave.features.trunk import load

    match config:
        case TimmConfig():
            name, grid_stride, neighbourhood = config.backbone, config.grid_stride, config.neighbourhood
            trunk = load(name, weights=config.weights, strides=config.strides)
        case OfflinePairConfig():
            name, grid_stride, neighbourhood = (
                "tf_efficientnet_lite0",
                config.grid_stride,
                config.neighbourhood,
            )
            trunk = load(name, weights=config.weights, strides=config.strides)
        case OpenClipConfig():
            from normweave.features import clip

            name, neighbourhood = config.model, 1
            trunk = clip.trunk(name, weights=config.weights, layers=config.layers, height=height, width=width)
            grid_stride = trunk.model.patch
        case _:
            assert_never(config)
    return FrozenFeatures(
        trunk.model,
        name=name,
        indices=trunk.indices,
        mean=trunk.mean,
        std=trunk.std,
        height=height,
        width=width,
        grid_stride=grid_stride,
        neighbourhood=neighbourhood,
        batch_images=config.batch_images,
    )


def pair(config: FeaturesConfig) -> Pair | None:
    """The language side of a vision-language pair; None for features that have none.

    Raises:
        MissingError: its weights are not on this machine and cannot be fetched.
        DataError: its weights are damaged or belong to another model.
    """
    match config:
        case TimmConfig():
            return None
        case OfflinePairConfig():
            from normweave.features.offline_pair import OfflinePair

            return OfflinePair(strides=config.strides, random=config.weights == "random")
        case OpenClipConfig():
            from normweave.features import clip

            return clip.OpenClipPair(config.model, weights=config.weights, layers=config.layers)
        case _:
            assert_never(config)
