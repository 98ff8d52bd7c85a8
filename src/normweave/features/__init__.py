"""Prepared images to features of a network that is never trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normweave.config import FeaturesConfig

if TYPE_CHECKING:
    from normweave.features.frozen import FrozenFeatures


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

    trunk = load(config.backbone, weights=config.weights, strides=config.strides)
    return FrozenFeatures(
        trunk.model,
        name=config.backbone,
        indices=trunk.indices,
        mean=trunk.mean,
        std=trunk.std,
        height=height,
        width=width,
        grid_stride=config.grid_stride,
        neighbourhood=config.neighbourhood,
        batch_images=config.batch_images,
    )
